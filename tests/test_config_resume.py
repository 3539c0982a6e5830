# SPDX-License-Identifier: Apache-2.0
"""What may change on resume, and configs with blocks that their file defines."""

import dataclasses
import json

import pytest

from hybridlm import ConfigError, load_config
from hybridlm.config import Branch, Config, Mamba2, ModelConfig, MoE, OptimConfig, Parallel, RunConfig, Shared
from hybridlm.config.help import help_text
from hybridlm.config.overrides import override
from hybridlm.config.resume import FREE, NUMBERS, changes, may_change, refused
from hybridlm.config.stored import from_dict, save_config
from hybridlm.config.tree import to_dict, walk
from hybridlm.train.run_folder import stored_config

pytestmark = pytest.mark.quick

FILE = """
from dataclasses import dataclass
from hybridlm.config import Branch, Config, ModelConfig, Parallel

@dataclass(frozen=True)
class Toy:
    width: int = 4
    chunk: int = 8
    FREE = frozenset({"chunk"})
    KEPT = {}
    STATISTICS = {}
    def check(self, d_model): pass
    def resolved(self, d_model): return self

def config():
    return Config(model=ModelConfig(pattern="TP", blocks={"T": Toy(), "P": Parallel({"a": Branch(Toy(5))})}))
"""


def changed(config: Config, *words: str) -> list[str]:
    return list(refused(config, override(config, words)))


def test_what_computes_the_same_may_change():
    words = [
        "--name=other", "--init.hf=None", "--mesh.fsdp=2", "--mesh.data=1", "--model.remat=full", "--data.workers=1",
        "--data.prefetch=9", "--data.cache_dir=x", "--optim.accumulate=2", "--optim.max_skipped=3", "--run.steps=7",
        "--run.profile_steps", "1", "2", "--run.keep=9", "--run.dir=there", "--model.blocks.M.chunk=32",
        "--cluster.coordinator=host:1", "--cluster.processes=4", "--cluster.index=3", "--cluster.off=True",
    ]  # fmt: skip
    assert changed(load_config("hybrid_tiny"), *words) == []


def test_how_it_learns_and_what_it_reads_may_change():
    words = [
        "--optim.lr=1", "--optim.schedule=linear", "--optim.warmup_steps=3", "--optim.weight_decay=0",
        "--optim.z_loss=1", "--optim.clip_norm=None", "--optim.rule.betas", "0.8", "0.9",
        "--data.path=a.txt", "--data.val_path=b.txt", "--data.seq_len=128", "--data.batch_size=32",
        "--run.eval_every=7", "--run.from_step=3", "--run.keep_best=2",
    ]  # fmt: skip
    config = load_config("hybrid_tiny")
    assert changed(config, *words) == []
    assert {"optim.lr", "optim.rule.betas", "data.batch_size"} <= changes(config, override(config, words)).keys()


def test_what_the_parameters_hang_on_may_not():
    words = ["--run.seed=1", "--optim.rule=AdamW", "--model.blocks.M.d_state=8", "--data.tokenizer=t.json"]
    names = ["model.blocks.M.d_state", "data.tokenizer", "optim.rule", "run.seed"]
    assert changed(load_config("hybrid_tiny"), *words) == names
    assert changed(load_config("hybrid_tiny"), "--model.d_model=64")[0] == "model.d_model"


def test_every_free_name_is_there():
    names = {name for group in FREE.values() for name in group}
    assert names <= {path for path, _ in walk(Config())} and set(NUMBERS) <= {path for path, _ in walk(Config())}
    free = may_change(Config())
    assert [f.name for f in dataclasses.fields(RunConfig) if not free(f"run.{f.name}")] == ["seed"]
    assert [f.name for f in dataclasses.fields(OptimConfig) if not free(f"optim.{f.name}")] == ["rule", "objective"]


def nested(chunk: int, n_heads: int | None = None, moe: bool = False, accumulate: int = 1) -> Config:
    mixer = Mamba2(chunk=chunk, n_heads=n_heads)
    branches = {"a": Branch(mixer)} | ({"b": Branch(MoE())} if moe else {})
    model = ModelConfig(pattern="PS", blocks={"P": Parallel(branches), "S": Shared(mixer=mixer)})
    return Config(model=model, optim=OptimConfig(accumulate=accumulate))


def test_blocks_inside_blocks():
    assert refused(nested(64), nested(128)) == {}
    assert list(refused(nested(64), nested(64, n_heads=12))) == [
        "model.blocks.P.branches.a.mixer.n_heads",
        "model.blocks.S.mixer.n_heads",
    ]


def test_two_ways_to_say_the_same_are_the_same():
    assert refused(nested(64), nested(128, n_heads=24)) == {}  # 2 * 768 / 64


def test_microbatches_may_change_where_a_loss_is_taken_of_each_and_that_is_recorded():
    old, new = nested(64, moe=True), nested(64, moe=True, accumulate=2)
    assert refused(old, new) == {} and changes(old, new) == {"optim.accumulate": (1, 2)}


WRONG = [
    [], None, 5, "x", {"model": []}, {"model": None}, {"model": "x"}, {"model": {"d_model": "64"}},
    {"model": {"d_model": None}}, {"model": {"d_model": 64.5}}, {"model": {"d_model": True}}, {"model": {"blocks": []}},
    {"model": {"blocks": {"M": None}}}, {"model": {"blocks": {"M": "Mamba2"}}},
    {"model": {"blocks": {"M": {"type": []}}}},
    {"model": {"blocks": {"M": {"type": "None"}}}}, {"optim": {"lr": "fast"}}, {"optim": {"lr": None}},
    {"optim": {"rule": 3}}, {"optim": {"rule": {"betas": [0.9]}}}, {"optim": {"name": []}}, {"data": {"path": 3}},
    {"data": {"path": [["a"]]}}, {"run": {"steps": [1]}}, {"run": {"seed": 1.5}}, {"name": 3}, {"mesh": "fsdp"},
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=json.dumps)
def test_a_stored_config_of_wrong_types_is_one_line(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        stored_config(tmp_path)


def test_what_a_config_holds_is_read_back_whatever_it_is():
    for name in ("hybrid_tiny", "jamba:52b", "zamba2:1.2b", "nemotron_h:8b"):
        config = load_config(name)
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_block_of_ones_own(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text(FILE)
    config = load_config(str(file), ["--model.blocks.T.width=6", "--model.blocks.P.branches.a.mixer.width=7"])
    assert "model.blocks.T.width " in help_text(config, "train.py")
    values = json.loads(json.dumps(to_dict(config)))
    again = load_config(str(file))  # another class of the same name, as in another process
    stored = from_dict(values, like=again)
    assert [type(b) for b in stored.model.blocks.values()] == [type(b) for b in again.model.blocks.values()]
    assert list(refused(stored, again)) == ["model.blocks.T.width", "model.blocks.P.branches.a.mixer.width"]
    assert (
        refused(again, override(again, {"model.blocks.T.chunk": 2, "model.blocks.P.branches.a.mixer.chunk": 1})) == {}
    )
    save_config(config, tmp_path / "config.json")
    assert stored_config(tmp_path, like=again) == stored
    with pytest.raises(ConfigError, match=r"has a 'Toy', which is none of Mamba1.*: give the config file .*--config"):
        stored_config(tmp_path)
