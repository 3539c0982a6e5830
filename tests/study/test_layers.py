# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study layers`: sublayers that are set, what they are worth, patterns of them, and distillation."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.cli import main
from hybridlm.config import (
    MLP,
    Attention,
    Config,
    DataConfig,
    Mamba2,
    ModelConfig,
    Muon,
    OptimConfig,
    Parallel,
    RunConfig,
    Wsd,
)
from hybridlm.errors import ConfigError
from hybridlm.layers.parallel import Branch
from hybridlm.model.config import QuantizeConfig
from hybridlm.model.model import HybridLM
from hybridlm.probes import MQAR
from hybridlm.study import answers, on_task
from hybridlm.study.distill import divergence, make_distillation
from hybridlm.study.layers import Findings, Worth, attention_at, carried, dial, proposed, study_layers
from hybridlm.study.on_task import Trial
from tests.library.runs import write_run

ATTENTION = Attention(n_heads=2, d_head=8, gate="elementwise", qk_norm=True)
MODEL = ModelConfig(
    vocab_size=264, d_model=16, pattern="*-*-M*", compute_dtype="float32", norm_after="*",
    blocks={"*": ATTENTION, "-": MLP(d_ff=16), "M": Mamba2(d_state=4, d_head=8, expand=1)},
)  # fmt: skip
"""Of whose pattern the first four sublayers are stored as two repeats of one unit."""
TOKENS = np.random.default_rng(0).integers(0, 264, (2, 12))


def params_of(model: HybridLM) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.fixture(scope="module")
def model() -> HybridLM:
    """Larger numbers than those that a model begins with, so that every sublayer is felt."""
    drawn = nnx.jit(lambda: HybridLM(MODEL, rngs=nnx.Rngs(0)))()
    graphdef, params = nnx.split(drawn, nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, params))


def test_attention_that_can_be_set():
    assert attention_at(MODEL) == (0, 2, 5)
    some = replace(MODEL, pattern="*wM", blocks=MODEL.blocks | {"w": replace(ATTENTION, window=3)})
    assert attention_at(some) == (0,)
    both = {"P": Parallel(branches={"a": Branch(ATTENTION)})}
    for pattern, blocks in (("M-", {}), ("P-", both), ("w", {"w": replace(ATTENTION, window=3)})):
        with pytest.raises(ConfigError, match="has no attention over all tokens that could have a window"):
            attention_at(replace(MODEL, pattern=pattern, blocks=MODEL.blocks | blocks, norm_after=""))
    ahead = replace(ATTENTION, direction="bidirectional")
    with pytest.raises(ConfigError, match="has no attention over all tokens"):
        attention_at(replace(MODEL, pattern="*", blocks={"*": ahead}))


@pytest.mark.slow
def test_a_setting_is_the_model_of_its_pattern(model):
    """One program with its dials gives what the model with that pattern of its own gives, with the parameters of the
    sublayers that it keeps; nothing turned, it is the model."""
    turned = dial(model, window=3)
    logits = nnx.jit(lambda m: m(TOKENS))
    whole = logits(model)
    np.testing.assert_array_equal(logits(turned.set({})), whole)
    for settings, pattern in (
        ({0: "window", 5: "none"}, "w-*-M"),
        ({2: "window", 0: "none"}, "-w-M*"),
    ):
        config, kept = proposed(MODEL, settings, window=3)
        assert config.pattern == pattern and config.blocks["w"] == replace(ATTENTION, window=3)
        assert set(config.norm_after) == {"*", "w"} & set(pattern) and kept[0] == (0 if pattern[0] == "w" else 1)
        params = carried(params_of(model), MODEL.pattern, pattern, kept)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda c=config: HybridLM(c, rngs=nnx.Rngs(0))))
        found = logits(turned.set(settings))
        np.testing.assert_allclose(found, logits(nnx.merge(graphdef, params)), rtol=2e-5, atol=2e-5)
        assert np.abs(found - whole).max() > 1e-2


def test_patterns_that_cannot_be(model):
    with pytest.raises(ConfigError, match=r"window \(0\) must be at least 1"):
        dial(model, 0)
    only = replace(MODEL, pattern="**", blocks={"*": ATTENTION})
    with pytest.raises(ConfigError, match="nothing of the model would be left"):
        proposed(only, {0: "none", 1: "none"}, 3)
    with pytest.raises(ConfigError, match=r"keep \(0\) must be above 0"):
        study_layers(model, lambda m: 0.0, 3, keep=0)


def test_what_is_proposed(model):
    """Of a score that is known: sublayer 0 is worth nothing, 2 its window, 5 all that it is; but without 0 and 5 none
    is anything."""
    asked = []

    def score(turned: HybridLM) -> float:
        words = {}
        for depth, (group, position, repeat) in {0: (0, 0, 0), 2: (0, 0, 1), 5: (1, 1, 0)}.items():
            branches = params_of(turned)["groups"][group][position]["mixer"]["branches"]
            on = {name: bool(np.asarray(branch["w_o"][repeat]).any()) for name, branch in branches.items()}
            assert sum(on.values()) <= 1
            words[depth] = next((name for name in on if on[name]), "none")
        asked.append(words)
        if words[0] == words[5] == "none":
            return 0.1
        return {"full": 0.5, "window": 0.2, "none": 0.1}[words[5]] + {"full": 0.4, "window": 0.39, "none": 0.2}[
            words[2]
        ]

    found = study_layers(model, score, window=3, keep=0.95)
    assert (found.full, found.all_windowed, found.none) == (0.9, 0.2 + 0.39, 0.1)
    worths = {worth.index: (worth.without, worth.windowed, worth.alone) for worth in found.worths}
    wanted = {0: (0.9, 0.9, 0.59), 2: (0.7, 0.89, 0.6), 5: (0.5, 0.6, 0.89)}
    assert worths == {index: pytest.approx(numbers) for index, numbers in wanted.items()}
    assert found.settings == {0: "none", 2: "window"} and found.proposed == 0.89
    assert asked[0] == {0: "full", 2: "full", 5: "full"}
    assert study_layers(model, score, window=3, keep=0.05).settings == {0: "none", 2: "none", 5: "none"}
    assert study_layers(model, score, window=3, keep=1).settings == {0: "none"}


def test_divergence_is_that_of_the_logits(model):
    """As NumPy adds it up in float64, whatever the size of its parts; the teacher gets no gradient."""
    x, y = 8 * np.random.default_rng(1).normal(size=(2, 2, 7, 16)).astype(np.float32)
    at = np.random.default_rng(2).random((2, 7)) < 0.6
    w = np.asarray(model.unembedding(), np.float64)

    def log_softmax(hidden):
        logits = hidden.astype(np.float64) @ w.T
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    p, q = log_softmax(x), log_softmax(y)
    wanted = ((np.exp(p) * (p - q)).sum(-1) * at).sum()
    for n_logits in (3 * 2 * 264, 10**9):
        of = jax.jit(jax.value_and_grad(lambda x, y, n=n_logits: divergence(model, model, x, y, at, n), argnums=(0, 1)))
        found, (dx, dy) = of(x, y)
        assert found == pytest.approx(wanted, rel=1e-5) and not np.asarray(dx).any()
        slope = (np.exp(q) - np.exp(p)) @ w * at[..., None]
        np.testing.assert_allclose(dy, slope, rtol=1e-4, atol=1e-5)


def test_what_a_distillation_does_not_do(model):
    config = Config(model=replace(MODEL, vocab_size=300), optim=OptimConfig(accumulate=2))
    mesh = on_task.one_device()
    with pytest.raises(ConfigError, match=r"model.vocab_size \(300\) must be the teacher's \(264\)"):
        make_distillation(config, mesh, model)
    with pytest.raises(ConfigError, match=r"optim.accumulate \(2\) must be 1"):
        make_distillation(replace(config, model=MODEL), mesh, model)
    rounded = Config(model=MODEL, quantize=QuantizeConfig(weights="int8"))
    with pytest.raises(ConfigError, match=r"quantize.weights \(int8\) must be none"):
        make_distillation(rounded, mesh, model)


OF_TASK = ["--task", "mqar", "--mqar.pairs=2", "--mqar.vocab_size=16", "--length", "16"]


@pytest.mark.parametrize(
    "change, words, told",
    [
        ({}, ["--optim.accumulate=2"], "optim.accumulate (2) must be 1 in a distillation"),
        ({}, ["--data.batch_size=3"], "data.batch_size (3) not divisible by"),
        ({"model": replace(MODEL, prefix_tokens=2)}, [], "model.prefix_tokens (2): rows of a task have no room"),
        ({"data": DataConfig(path=("gone.txt",))}, ["--text", "--data.seq_len=16"], "gone.txt"),
        ({"quantize": QuantizeConfig("int8")}, [], "reached"),
    ],
)
def test_what_cannot_be_distilled_is_said_before_anything_is_scored(change, words, told, tmp_path, capsys, monkeypatch):
    """A run whose matrices training rounds can be: its student is trained as it is."""

    def studied(*_):
        raise ConfigError("reached")

    monkeypatch.setattr("hybridlm.cli.study_layers._studied", studied)
    config = replace(Config(name="run", model=MODEL, data=DataConfig(seq_len=16, batch_size=8)), **change)
    write_run(tmp_path / "run", config)
    asked = ["study", "layers", "--run", str(tmp_path / "run"), *OF_TASK]
    assert main([*asked, "--data.batch_size=8", "--distill", str(tmp_path / "less"), *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not (tmp_path / "less").exists(), said


def test_numbers_are_shown_where_nothing_can_be_spared(tmp_path, capsys, monkeypatch):
    found = Findings(2, 0.5, 0.1, 0.1, (Worth(0, 0.1, 0.1, 0.5),), {}, 0.5)
    monkeypatch.setattr("hybridlm.cli.study_layers._studied", lambda *_: (found, MODEL, [*range(6)]))
    write_run(tmp_path / "run", Config(name="run", model=MODEL, data=DataConfig(seq_len=16, batch_size=8)))
    words = ["study", "layers", "--run", str(tmp_path / "run"), *OF_TASK]
    words += ["--distill", str(tmp_path / "less"), "--data.batch_size=8"]
    for more in ([], ["--json"]):
        assert main([*words, *more]) == 2
        said = capsys.readouterr()
        assert "no attention can be spared" in said.err and "0.5" in said.out
    assert json.loads(said.out)["accuracy"] == 0.5


TASK = MQAR(pairs=3, vocab_size=16)
WORDS = ["--task", "mqar", "--mqar.pairs=3", "--mqar.vocab_size=16", "--length", "16", "--rows", "64", "--batches", "4"]
LEARNER = Config(
    name="whole",
    model=replace(
        MODEL, pattern="M*-*-", d_model=32, norm_after="", init_std=32**-0.5,
        blocks={
            "*": Attention(n_heads=2, d_head=16, qk_norm=True), "-": MLP(d_ff=64),
            "M": Mamba2(d_state=2, d_head=16, expand=1),
        },
    ),
    data=DataConfig(seq_len=16, batch_size=64),
    optim=OptimConfig(lr=5e-3, rule=Muon(lr=0.05), schedule=Wsd(), warmup_steps=20),
    run=RunConfig(steps=240, log_every=40),
)  # fmt: skip
STAGES = [Trial(MQAR(pairs=2, vocab_size=16), 8), Trial(TASK, 16)]


@pytest.mark.slow
def test_a_model_with_less_attention_from_a_trained_one(tmp_path, capsys):
    """A model learns the task; the study finds what it can spare; distilled into that pattern it recalls as much as
    before, is a run, and its cache is smaller."""
    trained = on_task.train_on(LEARNER, STAGES)
    on_task.keep(tmp_path / "whole", LEARNER, trained)
    assert answers.scored(trained.model, [Trial(TASK, 16)], 64, 4)[0]["accuracy"] > 0.9
    words = ["study", "layers", "--run", str(tmp_path / "whole"), *WORDS, "--window", "2", "--keep", "0.6"]
    words += ["--distill", str(tmp_path / "less"), "--run.steps=200", "--data.batch_size=64", "--optim.lr=1e-3"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    proposal, distilled = found["proposal"], found["distilled"]
    assert found["accuracy"] > 0.9 and proposal["pattern"].count("*") < 2
    assert proposal["cache_bytes"] < found["cache_bytes"]
    assert proposal["accuracy"] >= 0.6 * found["accuracy"]
    assert distilled["accuracy"] >= 0.95 * found["accuracy"] and distilled["accuracy"] >= proposal["accuracy"]
    of_less = ["probe", "--run", str(tmp_path / "less"), "--tasks", "mqar", *WORDS[2:4], "--lengths", "16", "--json"]
    assert main(of_less) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["mqar"]["scores"][0]["accuracy"] > 0.85
    assert main(words) == 2 and "is not empty: choose another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_text_is_distilled_on_its_text(tmp_path, capsys):
    """Of all devices; loss falls to where the student says what the whole model says."""
    for name in "train", "val":
        (tmp_path / f"{name}.txt").write_text("abc abd abe " * 400)
    here = {name: (str(tmp_path / f"{name}.txt"),) for name in ("train", "val")}
    data = DataConfig(path=here["train"], val_path=here["val"], seq_len=16, batch_size=8, cache_dir=str(tmp_path))
    write_run(tmp_path / "run", Config(name="run", model=MODEL, data=data))
    words = ["study", "layers", "--run", str(tmp_path / "run"), "--task", "induction_heads", "--length", "16"]
    words += ["--window", "2", "--keep", "0.01", "--text", "--distill", str(tmp_path / "less"), "--run.steps=30"]
    words += ["--data.seq_len=16", "--data.batch_size=8", "--run.log_every=10", "--optim.lr=1e-3"]
    assert main(words) == 0
    said = capsys.readouterr().out
    losses = [float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if line.startswith("step ")]
    assert len(losses) == 3 and losses[-1] < losses[0] and "distilled into" in said
