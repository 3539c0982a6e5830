# SPDX-License-Identifier: Apache-2.0
"""Values of configs are refused by the config classes themselves: types, numbers, choices, texts."""

import ast
import math
from pathlib import Path

import pytest

import hybridlm
from hybridlm.config import (
    MLP,
    AdamW,
    Attention,
    ClusterConfig,
    Config,
    Cosine,
    DataConfig,
    InitConfig,
    Mamba2,
    MeshConfig,
    ModelConfig,
    MoE,
    OptimConfig,
    Parallel,
    Rope,
    RunConfig,
)  # fmt: skip
from hybridlm.config.tree import children, walk
from hybridlm.errors import ConfigError
from hybridlm.fields import REAL, WHOLE, field_types, type_name

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ModelConfig(d_model=32.0), "model.d_model (32.0) must be a whole number"),
        (lambda: ModelConfig(vocab_size=10**12), f"model.vocab_size (1000000000000) must be at most {WHOLE}"),
        (lambda: ModelConfig(norm_eps=math.inf), "model.norm_eps (inf) must be finite"),
        (lambda: ModelConfig(logit_multiplier=0), "model.logit_multiplier (0) must not be 0"),
        (lambda: ModelConfig(compute_dtype="float16"), "model.compute_dtype ('float16') must be one of"),
        (lambda: ModelConfig(blocks={"M": Mamba2}), "model.blocks.M (<class"),
        (lambda: ModelConfig(blocks=None), "model.blocks (None) must be"),
        (lambda: ModelConfig(pattern="M" * 10_001), "model.pattern has 10001 symbols"),
        (lambda: Config(model=None), "model (None) must be ModelConfig"),
        (lambda: Config(name=3), "name (3) must be a text"),
        (lambda: RunConfig(steps=10**20), f"run.steps (100000000000000000000) must be at most {WHOLE}"),
        (lambda: RunConfig(steps=10**5000), "run.steps (a number of 16610 bits) must be at most"),
        (lambda: RunConfig(steps=True), "run.steps (True) must be a whole number"),
        (lambda: RunConfig(seed=2**63), "run.seed (9223372036854775808) must be at most 9223372036854775807"),
        (lambda: RunConfig(dir="a\0b"), "run.dir ('a\\x00b') must not hold a NUL character"),
        (lambda: RunConfig(profile_steps=(5, 2)), "run.profile_steps (5 2)"),
        (lambda: OptimConfig(lr=math.inf), "optim.lr (inf) must be finite"),
        (lambda: OptimConfig(lr=math.nan), "optim.lr (nan) is not a number to compute with"),
        (lambda: OptimConfig(lr=1e39), "optim.lr (1e+39) must be at most 3.4e+38"),
        (lambda: OptimConfig(warmup_steps=10**20), "optim.warmup_steps (100000000000000000000) must be at most"),
        (lambda: OptimConfig(name="sgd"), "optim.name ('sgd') must be one of adamw, muon"),
        (lambda: OptimConfig(schedule="x"), "optim.schedule ('x') must be one of Cosine, LinearDecay, Wsd, Constant"),
        (lambda: AdamW(eps=math.inf), "eps (inf) must be finite"),
        (lambda: AdamW(betas=(0.9,)), "betas ((0.9,)) must be 2 values, each a number"),
        (lambda: Cosine(final_lr_ratio="x"), "final_lr_ratio ('x') must be a number"),
        (lambda: DataConfig(path="x.txt"), "data.path ('x.txt') must be any number of a text"),
        (lambda: DataConfig(packing="x"), "data.packing ('x') must be one of split, best_fit"),
        (lambda: DataConfig(workers=500), "data.workers (500) must be 0..64 processes of each host"),
        (lambda: DataConfig(workers=10**20), "data.workers (100000000000000000000) must be 0..64"),
        (lambda: DataConfig(seq_len=None), "data.seq_len (None) must be a whole number"),
        (lambda: MeshConfig(data="all"), "mesh.data ('all') must be a whole number"),
        (lambda: InitConfig(hf=3), "init.hf (3) must be a text or None"),
        (lambda: ClusterConfig(processes=10**20), "cluster.processes (100000000000000000000) must be at most"),
        (lambda: Mamba2(expand=math.inf), "expand (inf) must be finite"),
        (lambda: Mamba2(d_state="x"), "d_state ('x') must be a whole number"),
        (lambda: Mamba2(dt_limit=(0.0, math.nan)), "dt_limit (nan) is not a number"),
        (lambda: Mamba2(dt_limit=3), "dt_limit (3) must be 2 values, each a number"),
        (lambda: Attention(gate="both"), "gate ('both') must be one of elementwise, head or None"),
        (lambda: Attention(rope="x"), "rope ('x') must be Rope or None"),
        (lambda: Rope(theta=None), "theta (None) must be a number"),
        (lambda: MLP(d_ff=2**40), "d_ff (1099511627776) must be at most"),
        (lambda: MoE(router=None), "router (None) must be Router"),
        (lambda: Parallel({"a": 3}), "branches.a (3) must be Branch"),
    ],
)  # fmt: skip
def test_each_class_refuses_in_one_line(make, said):
    with pytest.raises(ConfigError) as error:
        make()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_at_the_limit_is_taken():
    assert RunConfig(seed=2**63 - 1).seed == 2**63 - 1
    assert OptimConfig(lr=REAL).lr == REAL
    assert Mamba2(dt_limit=(0, math.inf)).dt_limit == (0, math.inf)
    assert DataConfig(path=["a.txt"]).path == ["a.txt"]
    assert ModelConfig(unroll=WHOLE).unroll == WHOLE


def test_no_field_takes_what_is_no_value_of_it():
    """Of every field of every class of a config: an object of no type at all, and of the wrong one."""
    tried = 0
    for path, node in [("", Config()), *walk(Config())]:
        for name in children(node) if not isinstance(node, dict) else ():
            hint = field_types(type(node))[name]
            for value in (object(), 1j, "x" if type_name(hint) in ("a whole number", "a number") else b"x"):
                with pytest.raises(ConfigError, match=r"\S") as error:
                    type(node)(**{**_made_with(node), name: value})
                assert name in str(error.value) and "\n" not in str(error.value), (path, name)
                tried += 1
    assert tried > 200


def _made_with(node) -> dict:
    """What a node is made of again."""
    return {name: value for name, value in children(node).items() if name != "numbers"}


def test_every_class_with_checks_of_its_own_checks_its_fields_first():
    folder = Path(hybridlm.__file__).parent
    found = 0
    for wing in ("layers", "model", "optim", "data", "config"):
        for file in (folder / wing).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                    calls = [c.func.id for c in ast.walk(node) if isinstance(c, ast.Call) and hasattr(c.func, "id")]
                    assert "check_fields" in calls, f"{file}:{node.lineno}: call check_fields(self) first"
                    found += 1
    assert found > 20
