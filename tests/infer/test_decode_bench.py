# SPDX-License-Identifier: Apache-2.0
"""`hybridlm bench`: what it counts against counts by hand, how it takes turns, what it does where memory ends, and that
tokens are written without the host."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.cli import main
from hybridlm.config import ConfigError
from hybridlm.config.find import load_config
from hybridlm.infer import bench, bench_models, bench_peers, bench_tables
from hybridlm.infer.bench import Key, Plan, Row, measure
from hybridlm.infer.bench_claims import CLAIMS, beside, ratios
from hybridlm.infer.bench_models import Ours, filled
from hybridlm.infer.bound import HYBRID, RECURRENT, TRANSFORMER, Moved, kind_of, moved, weights_held, weights_read
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.layers.quantized import dot
from hybridlm.model import decoding
from hybridlm.model.config import QuantizeConfig
from hybridlm.model.decoding import Sampling
from hybridlm.model.init import abstract
from hybridlm.study.bench_page import as_html
from pallas_kernels import platform
from tests.study.test_pages import check_self_contained

GIB = 2**30
COPY_RATE = bench.copy_rate
TINY = ("--model.d_model=32", "--model.pattern=M*-", "--model.blocks.M.d_head=8", "--model.blocks.M.d_state=8",
        "--model.blocks.*.n_heads=4", "--model.blocks.*.d_head=8", "--model.blocks.-.d_ff=64")  # fmt: skip


# What is counted


def test_bytes_are_those_counted_by_hand():
    """hybrid_1b: 21 Mamba-2 of 64 heads of 64 with state 128, 3 attentions of 8 heads of 64 for keys, 24 MLPs."""
    model, D, V, context = load_config("hybrid_1b").model, 2048, 50_304, 131_072
    mamba = D * 2 * 4096 + D * 2 * 128 + D * 64 + 4096 * D
    attention = D * (32 + 8 + 8 + 32) * 64 + 32 * 64 * D
    matrices = 2 * (21 * mamba + 3 * attention + 24 * 3 * D * 4096 + V * D)
    found = moved(model, 1, context)
    assert matrices < found.weights < 1.002 * matrices, "norms, convolutions and recurrences are small, and float32"
    assert found.weights == weights_held(model), "the embedding is the output too"
    windows = 3 * (4096 + 256) * 2
    assert found.states == 2 * 21 * (64 * 64 * 128 * 4 + windows)
    assert (found.kept, found.added) == (3 * 2 * 512 * 2 * context, 3 * 2 * 512 * 2)
    many = moved(model, 64, context)
    assert many == Moved(found.weights, 64 * found.states, 64 * found.kept, 64 * found.added)
    assert many.all == sum(many)


def test_bytes_of_caches_stored_smaller():
    """int8 keys with a float32 scale for each head and token; bfloat16 states."""
    model = load_config("hybrid_1b").model
    full, small = (moved(model, 1, 4096, types) for types in (AS_COMPUTED, CacheTypes("int8", "bfloat16")))
    assert small.added == 3 * 2 * (512 + 8 * 4) and small.kept == 4096 * small.added
    assert full.states - small.states == 2 * 21 * 64 * 64 * 128 * 2
    ring = replace(model, blocks=model.blocks | {"*": replace(model.blocks["*"], window=256)})
    assert moved(ring, 1, 4096, CacheTypes("int8")) == moved(ring, 1, 256, CacheTypes("int8"))
    assert moved(ring, 1, 4096, CacheTypes("int8")).added == small.added


def test_an_embedding_of_its_own_is_looked_up():
    model = load_config("mamba2_1b").model
    embedding = model.vocab_size * model.d_model * 2
    for batch in (1, 64):
        assert weights_held(model) - weights_read(model, batch) == embedding - batch * model.d_model * 2


def test_experts_that_nobody_chooses_are_not_read():
    model = load_config("jamba:52b").model
    symbol = next(s for s, block in model.blocks.items() if hasattr(block, "n_experts"))
    block = model.blocks[symbol]
    n, k, depths = block.n_experts, block.router.top_k, model.pattern.count(symbol)
    experts = depths * n * 3 * model.d_model * block.d_ff * 2
    embedding = (model.vocab_size - 1) * model.d_model * 2  # of many rows all of it is looked up
    all_of_it = weights_read(model, 100_000)
    assert all_of_it - weights_read(model, 1) == pytest.approx((1 - k / n) * experts + embedding, rel=1e-6)


def test_shared_weights_are_read_at_each_depth():
    """Zamba: nothing on a chip holds them from one depth to the next."""
    model = load_config("zamba:7b").model
    symbol = next(s for s, block in model.blocks.items() if hasattr(block, "build_shared"))
    shared = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(nnx.to_pure_dict(decoding.shapes_at_work(model))["shared"])
    )
    uses = model.pattern.count(symbol)
    assert uses > 1
    assert weights_read(model, 1) - weights_held(model) == pytest.approx((uses - 1) * shared, rel=0.05)


@pytest.mark.parametrize(
    "name, kind", [("hybrid_1b", HYBRID), ("mamba2_1b", RECURRENT), ("transformer_1b", TRANSFORMER)]
)
def test_kinds(name, kind):
    assert kind_of(load_config(name).model) == kind


# How turns are taken


@dataclass
class Fake:
    """A model whose turns take what is said, and that says what is done with it."""

    name: str
    seconds: float = 1.0
    heavy: int = GIB
    row: int = GIB
    kind: str = HYBRID
    filled: str = "nothing"
    compute: str = "bfloat16"
    fits: int = 10**9
    log: list = field(default_factory=list)
    length: float = 0.0

    def weights(self):
        return self.heavy

    def cache(self, batch, context):
        return batch * self.row * context // 1024, {"recurrent states": "float32"}

    def beside(self, batch):
        return 0

    def moved(self, batch, context):
        return Moved(self.heavy, 0, batch * self.row, 0)

    def flops(self, context):
        return float(context) ** 2

    @contextmanager
    def opened(self):
        self.log.append(("open", self.name))
        yield self
        self.log.append(("close", self.name))

    def decode(self, batch, context, n_new, warm):
        self.log.append(("warm" if warm else "turn", self.name))
        if batch > self.fits:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        self.length += 1
        return self.seconds * (1 + 0.1 * self.length)

    def prefill(self, batch, context, warm):
        return self.seconds * self.flops(context) / self.flops(1024)


@pytest.fixture(autouse=True)
def known_rate(monkeypatch):
    monkeypatch.setattr(bench, "copy_rate", lambda limit=None: 2.0 * GIB)


def plan(phase="decode", contexts=(1024,), batches=(1,), **more):
    return Plan(phase, contexts, batches, **({"n_new": 64, "rounds": 3, "memory": 64 * GIB} | more))


def test_models_take_turns():
    log = []
    a, b = Fake("a", log=log), Fake("b", seconds=3.0, log=log)
    rows = list(measure([a, b], plan()))
    turns = [name for what, name in log if what == "turn"]
    assert turns == ["a", "b"] * 3 and [n for w, n in log if w == "warm"] == ["a", "b"]
    assert [w for w, _ in log].count("open") == 2, "both lie on the device together"
    assert [row.key for row in rows] == [Key("a", "decode", 1024, 1), Key("b", "decode", 1024, 1)]
    first = rows[0]  # turns of 1.2, 1.3 and 1.4 s, the warm one was the first
    assert first.seconds == pytest.approx(1.3 / 64) and first.tokens_per_second == pytest.approx(64 / 1.3)
    assert (first.low, first.high) == (pytest.approx(64 / 1.4), pytest.approx(64 / 1.2))
    assert first.bound == pytest.approx(1.0) and first.share == pytest.approx(64 / 1.3)


def test_what_does_not_fit_together_is_opened_for_its_turn():
    log = []
    list(measure([Fake("a", heavy=40 * GIB, log=log), Fake("b", heavy=40 * GIB, log=log)], plan(rounds=1)))
    assert [what for what, _ in log] == ["open", "warm", "close"] * 2 + ["open", "turn", "close"] * 2


def test_what_does_not_fit_is_a_row():
    """Counted beforehand, or found by the device; others go on."""
    rows = list(measure([Fake("large", row=80 * GIB), Fake("a", fits=0), Fake("b")], plan()))
    assert rows[0].why == "does not fit: needs 81.0 GiB, 64.0 are there" and rows[0].tokens_per_second is None
    assert rows[1].why == "does not fit: memory ran out" and rows[1].share is None
    assert rows[2].tokens_per_second and not rows[2].why


def test_other_errors_are_errors():
    class Broken(Fake):
        def decode(self, batch, context, n_new, warm):
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        list(measure([Broken("a")], plan()))


def test_filling():
    """59.8 GiB of 60.8 are left; what does not fit after all is made smaller by eighths."""
    asked = plan(batches=(0,))
    (row,) = measure([Fake("a")], asked)
    assert (row.batch, row.fills, row.key.batch) == (56, True, 0)
    (row,) = measure([Fake("a", fits=50)], asked)
    assert row.batch == 49 and row.cache == 49 * GIB and row.moved["kept"] == 49 * GIB and row.share
    (row,) = measure([Fake("a", heavy=60 * GIB, row=2 * GIB)], asked)
    assert row.why.startswith("does not fit: needs 62.0 GiB")


def test_rows_that_are_known_are_not_measured_again():
    a, b = Fake("a"), Fake("b")
    known = list(measure([a], plan()))
    rows = list(measure([a, b], plan(contexts=(1024, 2048)), known))
    assert [row.key[0::2] for row in rows] == [("b", 1024), ("a", 2048), ("b", 2048)]


def test_reading_for_too_long_is_left_out():
    """By the FLOPs of what was read before."""
    rows = list(measure([Fake("a", seconds=2.0, row=1)], plan("prefill", (4096, 1024, 65_536), most_seconds=100)))
    assert [row.context for row in rows] == [1024, 4096, 65_536]
    assert rows[1].seconds == pytest.approx(32) and rows[1].tokens_per_second == pytest.approx(4095 / 32)
    assert rows[1].tflops == pytest.approx(4096**2 / 32 / 1e12) and rows[1].share is None
    assert rows[2].why == "not measured: would take about 8,192 s"


@pytest.mark.parametrize(
    "change, text",
    [
        ({"phase": "train"}, r"phase \('train'\) not one of decode, prefill"),
        ({"contexts": (1,)}, r"context \(1\) must be between 2 and"),
        ({"contexts": (64,)}, r"tokens \(64\) must be less than context \(64\)"),
        ({"batches": (-1,)}, r"batch \(-1\) must be between 0 and"),
        ({"rounds": 0}, r"rounds \(0\) must be between 1 and"),
    ],
)
def test_plans_that_cannot_be(change, text):
    with pytest.raises(ConfigError, match=text):
        plan(**change)


# What is published


def row(config, kind, context, batch, speed, **more):
    return Row(config, kind, "decode", context, batch, tokens_per_second=speed, seconds=1.0, low=1.0, high=2.0, **more)


def test_claims_beside_what_was_measured():
    rows = [
        row("h", HYBRID, 131_072, 1, 300.0), row("t", TRANSFORMER, 131_072, 1, 100.0),
        row("h", HYBRID, 131_072, 80, 5000.0, fills=True), row("t", TRANSFORMER, 131_072, 10, 500.0, fills=True),
        row("h", HYBRID, 1024, 1, 90.0), row("t", TRANSFORMER, 1024, 1, 100.0), row("m", RECURRENT, 2048, 1, 9e9),
    ]  # fmt: skip
    found = dict(zip((claim.factor for claim in CLAIMS), (said for *_, said in beside(rows)), strict=True))
    assert [ratio.times for ratio in ratios(rows, HYBRID, TRANSFORMER)] == [10, 3, 0.9]
    assert found[15] == found[8] == "10.00 times: h over t, context 131,072, 80 and 10 rows, as many as fit"
    assert found[3] == "not measured: needs a hybrid and a transformer at 65,536 tokens"
    assert found[5] == "not measured: needs a recurrent and a transformer", "no context that both have"


# Files


def test_the_file_goes_on(tmp_path):
    here = bench_tables.about(["--model.d_model=8"])
    rows = [row("h", HYBRID, 1024, 1, 90.0, types={"recurrent states": "float32"}, moved={"weights": 5})]
    bench_tables.write(tmp_path / "bench.json", here, rows)
    assert bench_tables.read(tmp_path / "bench.json", here) == rows
    assert bench_tables.read(tmp_path / "none.json", here) == []
    for change, text in (({"device": "another"}, "its device was cpu, here another"), ({"overrides": []}, "overrides")):
        with pytest.raises(ConfigError, match=text):
            bench_tables.read(tmp_path / "bench.json", here | change)
    for content in ("no JSON", "[]", '{"about": {}, "rows": [{}]}', '{"about": {"versions": 5}, "rows": []}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match="no file of `hybridlm bench`: name another"):
            bench_tables.read(tmp_path / "bad.json", here)


def test_pages_and_tables_say_all_of_it():
    evil = "<script>$x$</script>"
    rows = [
        row(evil, HYBRID, 1024, 1, 1234.5, share=0.625, moved={"weights": GIB}, types={"recurrent states": "float32"},
            weights=GIB, cache=GIB, copy_rate=3e12, filled="noise", compute="bfloat16"),
        Row("b", TRANSFORMER, "decode", 1024, 1, why="does not fit: needs 81.0 GiB, 64.0 are there"),
        Row("b", TRANSFORMER, "prefill", 2048, 4, tokens_per_second=10.0, low=9.0, high=11.0, seconds=2.0, tflops=1.5),
    ]  # fmt: skip
    tables = bench_tables.tables(rows, ["mamba2-jax is not timed"])
    assert all(len(line) == len(table.head) for table in tables for line in table.rows)
    text = check_self_contained(as_html("Title", [bench_tables.as_dict(one) for one in rows], tables))
    for words in ("1,234", "62.5%", "seconds to the first token, batch 4", "does not fit: needs 81.0 GiB", "float32",
                  "3,000.0 GB/s", "noise", "1.50",
                  "Blakeman", "mamba2-jax is not timed", evil):  # fmt: skip
        assert words in text, words


# The model at work


@pytest.fixture(scope="module")
def writer():
    with Ours("hybrid_tiny", load_config("hybrid_tiny", TINY).model).opened() as opened:
        return opened.writer


def test_a_filled_cache_is_that_of_rows_that_were_read(writer):
    """Lengths and shapes; values are noise, of which no two are alike in a row of them."""
    state = filled(writer, 2, 48, 8)
    assert state.length == 40 and np.array_equal(state.cache.length_B, [40, 40])
    assert jax.tree.map(jax.numpy.shape, state.cache) == jax.tree.map(jax.numpy.shape, writer.start(2, 48).cache)
    for leaf in jax.tree.leaves(state.cache.groups):
        values = np.asarray(leaf, np.float32)
        assert np.abs(values).max() <= 0.5 and 0.2 < values.std() < 0.4
        assert not np.array_equal(values[:, 0], values[:, 1])
    out_BN, state = writer.write(state, 8, Sampling())
    assert out_BN.shape == (2, 8) and state.length == 48 and np.array_equal(state.cache.length_B, [48, 48])


def test_a_cache_is_filled_where_it_lies(writer):
    """One that fills the device must not be there twice."""
    state = writer.start(2, 48)
    arrays = state.cache, state.x_BD
    n_bytes = sum(a.nbytes for a in jax.tree.leaves(arrays))
    memory = bench_models._noise.lower(arrays).compile().memory_analysis()
    assert memory.alias_size_in_bytes == n_bytes


def test_matrices_in_eight_bits():
    """What is counted is what lies on the device, and tokens are written with it."""
    pytest.importorskip("qwix")
    model = load_config("hybrid_tiny", TINY).model
    small, whole = Ours("x", model, rounding=QuantizeConfig(weights="int8", stored=True)), Ours("x", model)
    with small.opened() as opened:
        held = sum(a.nbytes for a in jax.tree.leaves(opened.writer.prepared[1]))
        assert small.weights() == held < whole.weights()
        assert opened.decode(1, 16, 4, warm=False) > 0
    assert small.moved(1, 16).weights < whole.moved(1, 16).weights
    assert small.moved(1, 16).states == whole.moved(1, 16).states
    assert "int8" in small.compute and "int8" not in whole.compute


def test_tokens_are_written_without_the_host(writer, monkeypatch):
    """One program writes up to 64 of them: a loop on the device, in which nothing calls, sends or receives."""
    state = writer.start(1, 80)
    how = np.int32(0), np.int32(64), 0.0, None, np.array([-1], np.int32), True, None
    text = (
        decoding.writing(platform.platform())
        .lower(
            state.cache,
            writer._graphdef,
            writer._params,
            state.x_BD,
            state.done_B,
            state.last_B,
            jax.random.key(0),
            *how,
        )
        .as_text()
    )
    assert "stablehlo.while" in text
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in text
    calls = []

    def written(cache, graphdef, params, x_BD, done_B, last_B, key, first, n_new, *rest):
        calls.append(int(n_new))
        return np.zeros((1, decoding.BLOCK), np.int32), cache, x_BD, done_B, last_B

    monkeypatch.setattr(decoding, "writing", lambda kind: written)
    writer.write(state, 70, Sampling())
    assert calls == [64, 6]


def test_options_of_the_program_that_writes():
    """XLA knows them, which refuses others."""
    assert decoding.writing("gpu") is decoding.writing("gpu") is not decoding.writing("cpu")
    assert jax.jit(lambda x: x + 1, compiler_options=decoding.OPTIONS["gpu"])(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_option": 1})(1)


def test_on_a_gpu_loops_are_written_out():
    """So that no matrix is copied out of a stack; where the config says nothing."""
    given = (*TINY, "--model.pattern=M-M-")
    for words, spots in ((given, 4), ((*given, "--model.unroll=1"), 2)):
        model = abstract(load_config("hybrid_tiny", words).model).model()
        graphdef, shapes = nnx.split(model)
        for unroll, expected in ((decoding.UNROLL["gpu"], spots), (None, 2)):
            _, state = jax.eval_shape(lambda p, n=unroll, g=graphdef: decoding._prepared(g, p, n), shapes)
            assert len(nnx.to_pure_dict(state)["groups"]) == expected


def test_products_of_one_row_on_a_gpu():
    """Eight rows meet the matrix, of which seven are zeros; whole numbers of few bits make the sums exact."""
    rng = np.random.default_rng(0)
    x_BTHP, w_HPD = (jnp.asarray(rng.integers(-4, 5, shape), jnp.bfloat16) for shape in ((1, 1, 4, 8), (4, 8, 16)))

    def text_and_result(x):
        run = jax.jit(lambda x, w: dot(x, w, 2))
        return run.lower(x, w_HPD).as_text(), run(x, w_HPD)

    with platform.assume_platform("gpu"):
        text, y_BTD = text_and_result(x_BTHP)
        many, _ = text_and_result(jnp.concatenate([x_BTHP] * 2, 1))
    assert y_BTD.shape == (1, 1, 16) and np.array_equal(y_BTD, jnp.tensordot(x_BTHP, w_HPD, 2))
    assert "tensor<8x4x8xbf16>" in text and "tensor<8x4x8xbf16>" not in many
    assert "tensor<8x4x8xbf16>" not in text_and_result(x_BTHP)[0]


@pytest.mark.slow
def test_tokens_do_not_hang_on_how_loops_are_written():
    given = (*TINY, "--model.pattern=M*-M*-")
    prompts_BT, lengths_B = np.arange(34, dtype=np.int32).reshape(2, 17), np.array([17, 9], np.int32)
    found = []
    for words in (given, (*given, "--model.unroll=64")):
        with Ours("hybrid_tiny", load_config("hybrid_tiny", words).model).opened() as opened:
            state = opened.writer.read(opened.writer.start(2, 64), prompts_BT, lengths_B)
            found.append(np.asarray(opened.writer.write(state, 24, Sampling())[0]))
    assert np.array_equal(*found)


# The command


MISTAKES = {
    "decode --config hybrid_tiny --context 8": r"--tokens \(64\) must be less than context \(8\)",
    "decode --config hybrid_tiny hybrid_tiny --context 128": r"--config \(hybrid_tiny hybrid_tiny\) has one of them",
    "decode --config hybrid_tiny --context 128 --batch 0": r"--batch \(0\) must be at least 1",
    "decode --config caduceus:ps-1k --context 128": "--config .caduceus:ps-1k.: it cannot be decoded token by token",
    "decode --config hybrid_tiny --context 128 --peers": "peers: no config here is of Mamba-2 alone",
    "decode --config hybrid_tiny --context 128 --memory 0": r"--memory \(0.0\) must be positive",
    "decode --config hybrid_tiny --context 128 --json none/b.json": r"--json \(none/b.json\): there is no folder none",
    "decode --config hybrid_tiny --context 128 --json docs": r"--json \(docs\) is a folder: name a file in it",
    "decode --config hybrid_tiny --context 128 --json b --html b": r"--json and --html \(b\) are one file: name two",
    "decode --config hybrid_tiny --context 128 --html b.svg --figure ./b.svg": r"--html and --figure .* are one file",
    "decode --config hybrid_tiny --context 128 --quantize.weights=int8": "--quantize.weights is no option of bench",
    "decode --config hybrid_tiny --context 128 --mesh.tensor=2": "--mesh.tensor is no option of bench: .* model.KEY",
    "decode --config hybrid_tiny --context 128 --figure a.gif": r"--figure \(a.gif\) must end in .png or .svg",
    "train --config hybrid_tiny --context 128": "invalid choice: 'train'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(words, capsys):
    assert main(["bench", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(MISTAKES[words], said), said


def test_the_command(capsys, tmp_path):
    """Twice: the second time nothing is measured."""
    files = [w for kind in ("json", "html") for w in (f"--{kind}", str(tmp_path / f"bench.{kind}"))]
    files += ["--figure", str(tmp_path / "bench.svg")]
    words = ["bench", "decode", "--config", "hybrid_tiny", "--context", "48", "--batch", "2", "--tokens", "8",
             "--rounds", "2", *TINY]  # fmt: skip
    assert main([*words, *files]) == 0
    shown = capsys.readouterr()
    (found,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert found["tokens_per_second"] > 0 and found["low"] <= found["tokens_per_second"] <= found["high"]
    assert found["share"] == pytest.approx(found["bound"] / found["seconds"])
    assert found["types"]["recurrent states"] == "float32" and found["rounds"] == 2
    assert "hybrid_tiny" in shown.out and "context 48" in shown.err
    assert "hybrid_tiny" in check_self_contained((tmp_path / "bench.html").read_text())
    assert "share of the bound, batch 2" in (tmp_path / "bench.svg").read_text()
    assert main([*words, *files]) == 0
    assert "known" in capsys.readouterr().err
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == [found]


@pytest.mark.slow
def test_several_side_by_side(capsys, tmp_path, monkeypatch):
    """Reading and writing, filling a memory of 10 MiB, whose rate is measured."""
    monkeypatch.setattr(bench, "copy_rate", COPY_RATE)
    file = tmp_path / "bench.json"
    for phase in ("decode", "prefill"):
        words = ["bench", phase, "--config", "hybrid_tiny", "--context", "64", "512", "--tokens", "8", "--batch", "2",
                 "--fill", "--memory", "0.01", "--rounds", "2", "--json", str(file), *TINY]  # fmt: skip
        assert main(words) == 0
    rows = [Row(**one) for one in json.loads(file.read_text())["rows"]]
    assert len(rows) == 8 and all(one.tokens_per_second for one in rows)
    for one in rows:
        assert one.weights + one.cache <= 0.01 * GIB and (one.copy_rate or 0) > 1e8
        assert not one.fills or one.batch > 2
    assert "Writing" in capsys.readouterr().out


# Others


def test_peers_that_are_missing_are_told(monkeypatch):
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None)
    found, missing = bench_peers.peers([Ours("mamba2_1b", load_config("mamba2_1b").model)])
    assert found == [] and missing == [
        "transformers is not timed: torch, transformers not installed (pip install 'hybridlm[peers]')",
        "mamba2-jax is not timed: mamba2-jax not installed (pip install 'hybridlm[peers]')",
    ]


def small_mamba2():
    model = load_config("mamba2_1b").model
    block = replace(model.blocks["M"], d_head=8, d_state=8)
    return replace(model, d_model=32, vocab_size=256, pattern="MM", blocks={"M": block}, compute_dtype="float32")


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_beside_ours():
    """Rows of both; the loop that is timed writes what its own `generate` does."""
    ours = Ours("mamba2", small_mamba2())
    found, _ = bench_peers.peers([ours])
    peer = next(one for one in found if one.name == "transformers")
    rows = list(measure([ours, peer], plan(contexts=(256,), n_new=8, rounds=1)))
    rows += measure([ours, peer], plan("prefill", contexts=(256,), rounds=1))
    assert [one.config for one in rows] == ["mamba2", "transformers"] * 2 and all(one.share for one in rows[:2])
    theirs = bench_peers.Transformers(ours.model)
    torch = theirs.torch
    ids_BT = torch.randint(256, (1, 16))
    with torch.inference_mode():
        token_B1, kept = theirs._next(theirs.model(ids_BT, use_cache=True, logits_to_keep=1))
        out = [token_B1]
        for i in range(7):
            token_B1, kept = theirs._step(token_B1, kept, 16 + i)
            out.append(token_B1)
    whole = theirs.model.generate(ids_BT, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(torch.cat(out, 1), whole[:, 16:])


@pytest.mark.slow
@pytest.mark.mamba2_jax
def test_mamba2_jax_beside_ours():
    ours = Ours("mamba2", small_mamba2())
    found, _ = bench_peers.peers([ours])
    peer = next(one for one in found if one.name == "mamba2-jax")
    with jax.numpy_rank_promotion("allow"):
        rows = list(measure([ours, peer], plan(contexts=(256,), n_new=8, rounds=1)))
    assert [one.config for one in rows] == ["mamba2", "mamba2-jax"] and all(one.share for one in rows)
