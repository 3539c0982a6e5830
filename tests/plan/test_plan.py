# SPDX-License-Identifier: Apache-2.0
"""`hybridlm plan` on eight CPU devices: what is counted against what is compiled, and what is printed and written."""

import json
import math
import re
from dataclasses import replace

import jax
import pytest

from hybridlm.cli import main
from hybridlm.config import MLP, Attention, Config, DataConfig, LoraConfig, Mamba2, MeshConfig, ModelConfig, RunConfig
from hybridlm.config.find import load_config
from hybridlm.errors import ConfigError
from hybridlm.model.flops import train_flops
from hybridlm.model.init import abstract
from hybridlm.plan import budget
from hybridlm.plan.counted import count
from hybridlm.plan.page import as_html
from hybridlm.plan.plan import Plan
from hybridlm.plan.search import Result
from hybridlm.plan.sections import compared, sections
from hybridlm.plan.slices import read_devices
from tests import budgets

TINY = Config(
    name="tiny",
    model=ModelConfig(
        vocab_size=512, d_model=64, pattern="M-*-",
        blocks={
            "M": Mamba2(d_state=16, d_head=32), "*": Attention(n_heads=4, n_kv_heads=4, d_head=16),
            "-": MLP(d_ff=256),
        },
        remat="none", compute_dtype="float32",
    ),
    data=DataConfig(seq_len=128, batch_size=8),
    mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    run=RunConfig(sample_tokens=0),
)  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    made = Plan("tiny", TINY, read_devices("cpu:8"), tokens=1e9)
    assert list(made.run("compiled")) == ["counted", "lowered", "compiled"]
    return made


def test_counted_bytes_are_those_of_the_compiled_step(plan):
    """Arguments are the state, the batch (four int32 a token, rows over fsdp) and the lengths of the schedule."""
    batch = 4 * 4 * TINY.data.batch_size * TINY.data.seq_len // 4
    beside = plan.compiled.memory.arguments - sum(plan.counted.state.values()) - batch
    assert 0 <= beside <= 64
    assert plan.compiled.memory.aliased >= sum(plan.counted.state.values()) - 64


def test_a_run_with_adapters_holds_its_base(plan):
    """The base is the whole model, and so is the number of parameters; optimizer and gradients are the adapters'."""
    low = count(replace(TINY, lora=LoraConfig(rank=1, blocks=("*",), matrices=("w_q",))), plan.devices)
    assert low.parameters == plan.counted.parameters and low.state["base"] == plan.counted.state["parameters"]
    one = 4 * (64 / 4 + 4 * 16 / 2)  # A over fsdp, B over tensor
    assert low.state["parameters"] == one and 2 * one <= low.state["optimizer"] < 2 * one + 64
    assert low.gradients == one and plan.counted.gradients > 100 * one
    assert low.least == sum(low.state.values()) + low.gradients + low.inputs


@pytest.mark.slow
def test_counted_bytes_of_adapters_are_those_of_the_compiled_step():
    made = Plan("tiny", replace(TINY, lora=LoraConfig(rank=2)), read_devices("cpu:8"))
    assert list(made.run("compiled")) == ["counted", "lowered", "compiled"]
    batch = 4 * 4 * TINY.data.batch_size * TINY.data.seq_len // 4
    assert 0 <= made.compiled.memory.arguments - sum(made.counted.state.values()) - batch <= 64


def test_flops_are_the_models(plan):
    """Traced and compiled FLOPs are the model's, but for what is stated: scores of pairs that no token sees (attention
    by XLA computes all), tables (the chunked loss makes its logits twice, an embedding's gradient may be a product),
    the scan's chunks, and the convolution, which is no product."""
    tokens = TINY.data.batch_size * TINY.data.seq_len
    model, found = TINY.model, plan.lowered.flops.by_class
    assert plan.counted.model_flops == train_flops(model, TINY.data.seq_len) * tokens / 8
    products = {"MLP": 3 * 2 * 2 * 3 * 64 * 256}  # forward and backward, two sublayers of three products
    d_inner, n_heads = 128, 4
    both = 2 * 2 * 16  # B and C of the one group, which both `tensor` shards make for themselves
    mamba = 64 * (2 * d_inner + both + n_heads) + d_inner * 64
    products["projections"] = 3 * 2 * (mamba + 4 * 64 * 64)
    for name, a_token in products.items():
        assert found[name] == pytest.approx(a_token * tokens / 8, rel=0.03), name
        assert plan.compiled.work.by_class[name].flops == pytest.approx(found[name], rel=0.25), name
    assert 0.9 < plan.lowered.flops.all / plan.counted.model_flops < 1.6


def test_what_lives_is_what_the_compiler_says(plan):
    """Read from the program's order, within a quarter of arguments, results and temporaries as assigned."""
    assert plan.compiled.live.bytes == pytest.approx(plan.compiled.memory.peak, rel=0.25)
    assert sum(plan.compiled.live.by_kind.values()) == plan.compiled.live.bytes
    assert plan.compiled.live.by_kind["kept activations"] > plan.counted.inputs


def test_the_rest_of_a_plan(plan):
    counted = plan.counted
    assert counted.parameters == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(TINY.model).shapes))
    assert (counted.compiled, counted.depth, counted.rows_of_host, counted.tokens) == (4, 4, (8, 8), 1024)
    assert any(line.startswith("ssd: auto uses xla on cpu") for line in plan.lowered.choices)
    assert {"all-gather", "all-reduce"} & set(plan.compiled.exchanges)
    assert plan.bounds is None and plan.cost is None and plan.fits is None  # of CPUs no peaks are known
    told = json.loads(plan.as_json())
    assert told["counted"]["state"] == counted.state and told["compiled"]["memory"]["peak"] > 0
    page = as_html(plan)
    assert page.startswith("<!doctype html>") and page.count("<svg") == 1
    assert not re.search(r"(src|href)=.https?:|@import|<script", page)  # nothing is fetched
    for stage in ("counted", "lowered", "compiled"):
        assert all(len(row) <= 8 for section in sections(plan, stage) for row in section.rows)


def test_a_program_that_does_not_fit(plan):
    """What a compiler that gives up says, and what was compiled instead, are tables."""
    made = Plan(
        "tiny", TINY, plan.devices, counted=plan.counted, refused="it needs 20 GiB of 16", needed_bytes=20 * 2**30
    )
    assert made.fits is False and made.needed == 20 * 2**30 and made.bounds is None
    assert sections(made, "compiled")[0].rows == [("DOES NOT FIT", "it needs 20 GiB of 16")]
    assert "it needs 20 GiB" in as_html(made) and json.loads(made.as_json())["fits"] is False
    tried = [Result("", False, why="too large"), Result("--model.remat=full", True, 2**30, (0.5, 2.0))]
    assert compared(tried, "Changes").rows == [
        ("as it is", "too large", "", ""),
        ("--model.remat=full", "fits", "1.00 GiB", "500.0 ms to 2.00 s"),
    ]


def test_a_budget(plan, tmp_path):
    """Figures of the plan, put beside those of other runs; what was compiled stays where a plan is only traced."""
    path = tmp_path / "budgets.json"
    path.write_text('{"other": {"traced": {"state bytes": 1}, "compiled": {}}}')
    budget.write(path, "tiny", budget.of_plan(plan))
    kept = budget.read(path)
    assert set(kept) == {"other", "tiny"}
    assert kept["tiny"]["traced"]["state bytes"] == sum(plan.counted.state.values())
    assert kept["tiny"]["traced"]["sublayers compiled"] == 4
    assert kept["tiny"]["traced"]["FLOPs"] == round(plan.lowered.flops.all)
    assert kept["tiny"]["compiled"]["peak bytes"] == plan.compiled.memory.peak
    budget.write(path, "tiny", {"traced": {"state bytes": 2}, "compiled": {}})
    assert budget.read(path)["tiny"] == {"traced": {"state bytes": 2}, "compiled": kept["tiny"]["compiled"]}
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds no budgets"):
        budget.read(path)


def test_a_slice_without_its_compiler():
    """Everything of the first stage, of meshes that lie on a torus, with nothing of a TPU installed or asked."""
    found = count(replace(TINY, data=DataConfig(seq_len=128, batch_size=64)), read_devices("v5e:2x4"))
    assert (found.devices, found.hosts, found.mesh) == (8, 2, {"fsdp": 4, "tensor": 2})
    assert found.memory == 16 * 2**30 and found.least < found.memory
    assert found.rows_of_host[1] * found.hosts >= found.rows
    with pytest.raises(ConfigError, match="needs 8 devices, 4 are there"):
        count(TINY, read_devices("v5p:2x2x1"))


@pytest.mark.parametrize("name", ["hybrid_8b:v5p:8x8x16", "hybrid_1b:2xv5e:16x16", "hybrid_125m:v5e:2x4"])
def test_state_of_pod_settings(name):
    """12 bytes a parameter over its shards (some are split by `fsdp` alone), and what the committed budgets say, which
    were made with libtpu's devices."""
    found = count(load_config(name), read_devices(name.partition(":")[2]))
    assert sum(found.state.values()) == budgets.read()[name]["traced"]["state bytes"]
    shards = found.mesh.get("fsdp", 1) * found.mesh.get("tensor", 1)
    whole = found.whole * (1 - 1 / shards)
    assert sum(found.state.values()) == pytest.approx(12 * found.parameters / shards + whole, rel=0.03)


def test_the_command(tmp_path, capsys):
    page, told = tmp_path / "plan.html", tmp_path / "plan.json"
    words = ["plan", "--config", "hybrid_8b:v5p:8x8x16", "--stage", "counted", "--json", str(told), "--html", str(page)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "8,100,852,736" in out and "fsdp 128 x tensor 8" in out and "12 of 768" in out
    assert json.loads(told.read_text())["fits"] is True and "<h1>" in page.read_text()
    assert main(["plan", "--config", "hybrid_8b", "--topology", "v5p:8x8x16", "--mesh.fsdp=128", "--mesh.tensor=8",
                 "--mesh.data=1", "--stage=counted"]) == 0  # fmt: skip
    assert "fsdp 128 x tensor 8" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "line"), {
    ("--config", "hybrid_8b"): "--topology is missing",
    ("--config", "hybrid_tiny", "--topology", "v5e:3x3"): "slices of v5e are 2x2, 2x4",
    ("--config", "hybrid_tiny", "--topology", "cpu:1", "--tokens", "many"): r"--tokens \('many'\) must be",
    ("--config", "hybrid_tiny", "--topology", "cpu:1", "--search", "x.jsonl"): "no peaks are known of cpu:1",
    ("--config", "hybrid_tiny", "--topology", "cpu:1", "--json", "x", "--html", "x"): "are one file: name two",
    ("--config", "hybrid_tiny", "--topology", "cpu:1", "--price", "-1"): "must be a positive number",
    ("--config", "hybrid_tiny", "--topology", "cpu:1", "--tokens", "1T", "--price", "inf"): "must be a positive number",
    ("--config", "hybrid_tiny", "--topology", "cpu:1", "--price", "2"): "give its --tokens",
    ("--config", "hybrid_tiny", "--topology", "v5e:2x4", "--search", "/no/such/x"): r"^error: --search \(/no/such",
    ("--config", "hybrid_tiny", "--topology", "v5e:2x4", "--search", "/"): r"^error: --search \(/\): Is a directory",
    ("--config", "hybrid_tiny", "--topology", "cpu:1", "--json", "/no/such/x"): r"^error: --json \(/no/such/x",
    ("--config", "hybrid_tiny", "--topology", "v5e:2x4", "--mesh.tensor=3"): "8 devices not divisible by 3",
}.items())  # fmt: skip
def test_what_cannot_be_is_one_line(words, line, capsys):
    assert main(["plan", *words, "--stage", "counted"]) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(line, err) and "\n" not in err


@pytest.mark.libtpu
@pytest.mark.slow
def test_on_a_slice():
    """The whole plan for a TPU slice: memory as the compiler says, an interval, kernels counted."""
    blocks = {"M": Mamba2(d_state=128, d_head=64), "*": Attention(n_heads=8, n_kv_heads=8, d_head=64),
              "-": MLP(d_ff=1024)}  # fmt: skip
    model = ModelConfig(vocab_size=1024, d_model=512, pattern="M-*-" * 2, blocks=blocks, remat="full")
    config = Config(model=model, data=DataConfig(seq_len=1024, batch_size=8), mesh=MeshConfig(data=1, fsdp=8),
                    run=RunConfig(sample_tokens=0))  # fmt: skip
    made = Plan("narrow", config, read_devices("v5e:2x4"), tokens=1e12, price=1.2)
    assert list(made.run("compiled")) == ["counted", "lowered", "compiled"]
    assert made.compiled.kernels == made.lowered.kernels and not made.compiled.work.unknown
    assert 0 < made.bounds.lower <= made.bounds.upper and made.fits
    assert made.compiled.work.all.flops == pytest.approx(made.lowered.flops.all, rel=0.05)
    assert as_html(made).count("<svg") == 2
