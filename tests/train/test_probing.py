# SPDX-License-Identifier: Apache-2.0
"""Runs that are probed while they train: the run that is not, the scores that a checkpoint has, any mesh, any stop."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from hybridlm.cli import main, train_main
from hybridlm.config import MeshConfig, MoE, Router
from hybridlm.config.overrides import override
from hybridlm.config.probe import split_task
from hybridlm.config.resume import refused
from hybridlm.data import load_tokenizer
from hybridlm.errors import ConfigError
from hybridlm.probes import Needle, StateTracking, StringCopying, score
from hybridlm.probes.in_training import check, open_probe
from hybridlm.sharding import make_mesh
from hybridlm.train import loop
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.probing import Probing
from hybridlm.train.probing import check as check_probes
from hybridlm.train.sample import load_model
from hybridlm.train.step import make_program
from tests.train.conftest import small_config
from tests.train.test_run import records, states, stop_at
from tests.train.test_sinks import numbers, scalars

__all__ = ["states", "stop_at"]

NEEDLE = "needle:over=tokens,tokens=30,digits=2,depths=(0,100)"
WORDS = ["--probe.tasks", "copying", NEEDLE, "repeated_bigrams:frequent=300", "--probe.every=2", "--probe.examples=11"]
NAMES = [f"{task}/12" for task in ("copying", NEEDLE)]
PARTS = [f"repeated_bigrams:frequent=300/{part}" for part in ("hits", "rest", "share")]


@pytest.fixture
def train(mini, one_device):
    """`train` of four steps with words, in a folder of the test; its folder."""

    def run(name: str, *words: str, code: int = 0):
        common = ["--run.steps=4", "--run.log_every=1", "--run.eval_every=4", "--run.sample_tokens=0", "--run.keep=9"]
        common += ["--run.save_every=2", "--run.eval_batches=0", f"--run.dir={mini.parent / name}"]
        assert train_main(["--config", str(mini), *common, *words]) == code
        return mini.parent / name

    return run


def probes_of(folder):
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "probe"]


def state_of(folder, step: int):
    return load_model(folder, step, None)[0]


def test_a_run_records_what_its_checkpoint_scores(train, capsys):
    """Tasks as `score` scores them; the loss of repeated pairs and of the rest together is that of the evaluation."""
    run = train("run", *WORDS, "--probe.lengths=12", "--probe.every=3")
    said = capsys.readouterr().out
    found = probes_of(run)
    assert [record["step"] for record in found] == [3, 4]
    (val,) = (record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "val")
    for record in found:
        assert set(record) == {"kind", "step", *NAMES, *PARTS, "chance", "by", "seconds"}  # attention has no bound
    last, expected = found[1], score(state_of(run, 4), StringCopying(), 12, rows=11, batches=1)
    assert last["copying/12"] == expected.accuracy and last["chance"]["copying/12"] == 1 / 26
    by = {facet: {str(v): list(n) for v, n in of.items()} for facet, of in expected.by.items()}
    assert last["by"]["copying/12"] == by and set(last["by"][NAMES[1]]["depth"]) == {"0", "100"}
    hits, rest, share = (last[name] for name in PARTS)
    assert 0 < share < 1 and share * hits + (1 - share) * rest == pytest.approx(val["loss"], rel=1e-5)
    assert hits != rest and "step 3: probes: copying/12 " in said and "(chance 0.0385)" in said


@pytest.mark.slow
def test_a_probed_run_is_the_run_that_is_not(train):
    """To the bit; what is recorded stands in all that shows a run."""
    plain = train("plain")
    run = train("run", *WORDS, "--probe.lengths", "12", "24", "--run.tensorboard=True", "--run.report=True")
    assert records(run) == records(plain) and len(records(run)) == 5
    for step in (2, 4):
        old, new = (jax.tree.leaves(jax.device_get(state_of(folder, step))) for folder in (plain, run))
        chex.assert_trees_all_equal(old, new)
    assert not probes_of(plain) and [record["step"] for record in probes_of(run)] == [2, 4]
    needle = Needle(over="tokens", tokens=30, digits=2, depths=(0, 100))
    for record in probes_of(run):
        for length in (12, 24):
            expected = score(state_of(run, record["step"]), needle, length, rows=11, batches=1)
            assert record[f"{NEEDLE}/{length}"] == expected.accuracy
    assert scalars(run / "tensorboard").keys() >= {("probe/copying/12", 2), ("probe/seconds", 4)}
    assert len(scalars(run / "tensorboard")) == len(numbers(run / "metrics.jsonl"))
    page = (run / "report.html").read_text()
    assert "<h2>Probes</h2>" in page and "tokens of an example" in page and "copying: accuracy" in page


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_probes(train, stop_at, states):
    """Stopped at a step with a probe, which is made up for where the run goes on; tasks may change then."""
    whole = train("whole", *WORDS, "--probe.lengths=12")
    stop_at(2)
    parts = train("parts", *WORDS, "--probe.lengths=12", code=130)
    assert not probes_of(parts)
    stop_at(None)
    train("parts", *WORDS, "--probe.lengths=12")
    clean = lambda folder: [{k: v for k, v in record.items() if k != "seconds"} for record in probes_of(folder)]
    assert clean(parts) == clean(whole) and len(clean(whole)) == 2
    assert records(parts) == records(whole)
    train("parts", "--run.steps=6", "--probe.tasks=copying", "--probe.every=0", "--probe.examples=5")
    assert [record["step"] for record in probes_of(parts)] == [2, 4, 6] and "copying/32" in probes_of(parts)[-1]


@pytest.mark.slow
def test_adapters_and_several_sets(train, mini, capsys):
    """With adapters the whole model is probed; each held-out set has its losses: as `hybridlm probe` has them."""
    folder = mini.parent
    sets = ["--data.val_path", f"a={folder}/val-0.txt", f"b={folder}/val-1.txt"]
    train("base")
    words = [*WORDS, f"--init.run={folder}/base", "--lora.rank=2", "--optim.lr=1", *sets]
    run = train("run", *words, "--probe.lengths=24")
    record = probes_of(run)[-1]
    capsys.readouterr()
    tasks = ["copying", NEEDLE, "repeated_bigrams:frequent=300"]
    asked = ["--lengths", "24", "--rows=11", "--batches=1", "--mesh.data=1", "--json", "--run", str(run)]
    one = pytest.MonkeyPatch()
    from hybridlm.eval import subject

    one.setattr(subject, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    page = folder / "out.html"
    try:
        assert main(["probe", *asked, "--page", str(page), "--tasks", *tasks]) == 0
    finally:
        one.undo()
    found = json.loads(capsys.readouterr().out)["tasks"]
    for word in tasks[:2]:
        assert found[word]["scores"][0]["accuracy"] == record[f"{word}/24"]
    for name in ("a", "b"):
        for part in ("hits", "rest"):
            expected = found[tasks[2]]["sets"][name][part]["loss"]
            assert record[f"{tasks[2]}/{name}/{part}"] == pytest.approx(expected, rel=1e-5)
    text = page.read_text()
    assert "depth, percent" in text and "loss there" in text and "repeated_bigrams" in text


@pytest.mark.slow
@pytest.mark.parametrize("more", [("weights=fp8",), ("weights=int8", "activations=int8")])
def test_a_run_that_rounds_is_probed_as_it_is_evaluated(train, more):
    """The loss of all tokens is that of the evaluation, which is of the rounded model."""
    words = ["--probe.tasks=repeated_bigrams:frequent=300", "--optim.lr=0.1", "--run.steps=2", "--run.eval_every=2"]
    run = train("run", *words, *(f"--quantize.{word}" for word in more))
    (val,) = (record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "val")
    hits, rest, share = (probes_of(run)[0][name] for name in PARTS)
    assert share * hits + (1 - share) * rest == pytest.approx(val["loss"], rel=1e-5)


# Any mesh -----------------------------------------------------------------------------------------------------------


def probed_on(config, sizes, held_out=None, corpus=None):
    """What the first parameters of a config are probed to be, on a mesh."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        corpus = corpus or SimpleNamespace(tokenizer=load_tokenizer("dna"))
        probe = open_probe(config, mesh, program, corpus, held_out or {})
        return probe(program.init()["params"], lambda: False)


def with_experts(config):
    experts = MoE(n_experts=4, d_ff=16, router=Router(top_k=2, score="softmax"), balance_weight=0.0)
    return replace(config, model=replace(config.model, blocks={**config.model.blocks, "-": experts}))


TASKS = ["--probe.tasks", "copying", "needle:over=tokens,tokens=30,digits=2", "parity", "--probe.lengths", "16", "13"]
MESHES = {
    "data": (8,), "fsdp and tensor": (1, 4, 2), "context": (1, 1, 1, 4), "all": (1, 2, 2, 2),
    "slices": (2, 2, 1, 1, 1, 2), "experts": (1, 2, 1, 1, 4),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_any_mesh_says_the_same(name):
    config = small_config(*TASKS, "--probe.examples=21", "--data.batch_size=16", "--optim.accumulate=2")
    config = with_experts(config) if name == "experts" else config
    one, many = probed_on(config, (1,)), probed_on(config, MESHES[name])
    assert one == many and all(0 <= one[f"copying/{length}"] <= 1 for length in (16, 13))
    assert sum(n for of in one["by"].values() for facet in of.values() for n, _ in facet.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 1, 2)])
def test_longer_examples_and_prefix_tokens(sizes):
    """Examples longer than rows have rows of their own; a model with prefix tokens has room for them in each."""
    for words, length in ((["--probe.lengths", "37"], 37), (["--model.prefix_tokens=3"], 13)):
        config = small_config("--probe.tasks", "copying", "parity", "--probe.examples=9", *words)
        found = probed_on(config, sizes)
        mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
        with jax.set_mesh(mesh):
            program = make_program(config, mesh)
            model = program.model(program.init()["params"])
            for name, task in (("copying", StringCopying()), ("parity", StateTracking("Z2"))):
                assert found[f"{name}/{length}"] == score(model, task, length, rows=9, batches=1).accuracy


@pytest.mark.slow
def test_state_of_a_fixed_size_has_a_bound():
    """Beside what a model with a fixed state scores stands what such a state allows."""
    config = small_config("--probe.tasks", "copying", "--model.pattern=M-", "--probe.examples=3", "--probe.lengths=13")
    found = probed_on(config, (1,))
    assert found["fixed_state"] == {"copying/13": 1.0} and found["chance"] == {"copying/13": 1 / 26}


# When ---------------------------------------------------------------------------------------------------------------


class Said:
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_when_a_run_is_probed(tmp_path):
    """By its own cadence or that of evaluations; a probe that was due and cut short is missing."""
    said, log = Said(), MetricsLog(tmp_path / "metrics.jsonl", 0)
    answers = iter([{"mqar/8": 0.25, "chance": {"mqar/8": 0.125}}, None])
    config = small_config("--probe.tasks=mqar", "--probe.every=3", "--run.steps=9", "--run.eval_every=5")
    probing = Probing(config, lambda params, stop: next(answers), log, said, lambda: False)
    assert [step for step in range(12) if probing.due(step)] == [3, 6]
    assert probing.missed(3) and probing.read(3, {}) and not probing.missed(3)
    assert not probing.read(6, {}) and probing.missed(6) and not probing.missed(5)
    assert said.lines[0].startswith("step 3: probes: mqar/8 0.250 (chance 0.125), 0.0 s") and len(said.lines) == 1
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["mqar/8"] == 0.25 and math.isfinite(record["seconds"]) and record["kind"] == "probe"
    with_evaluations = Probing(override(config, ["--probe.every=None"]), lambda *_: {}, log, said, lambda: False)
    at_the_end = Probing(override(config, ["--probe.every=0"]), lambda *_: {}, log, said, lambda: False)
    assert [step for step in range(12) if with_evaluations.due(step)] == [5]
    assert not any(at_the_end.due(step) for step in range(12))
    never = Probing(config, None, log, said, lambda: False)
    assert never.read(9, {}) and not any(never.due(step) for step in range(12))
    log.close()


def test_probes_may_change_on_resume():
    old = small_config()
    assert not refused(old, override(old, [*TASKS, "--probe.every=7", "--probe.seed=3"]))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("mqar", ("mqar", {})),
        ("mqar:pairs=4,power=0.5", ("mqar", {"pairs": 4, "power": 0.5})),
        ("needle:over=tokens,depths=(0, 50)", ("needle", {"over": "tokens", "depths": (0, 50)})),
        ("s5:group='A5'", ("s5", {"group": "A5"})),
    ],
)
def test_words_of_tasks(word, expected):
    assert split_task(word, "x") == expected


WRONG = [
    (["--probe.tasks=mqr"], "probe.tasks (mqr): no task of that name: there are mqar, selective_copying"),
    (["--probe.tasks=mqar:pair=3"], "unknown field --mqar.pair: mqar has no pair: did you mean pairs?"),
    (["--probe.tasks=mqar:pairs=many"], "mqar.pairs ('many') must be a whole number"),
    (["--probe.tasks=mqar:pairs"], "probe.tasks (mqar:pairs) must be NAME or NAME:FIELD=VALUE,FIELD=VALUE"),
    (["--probe.tasks=mqar:"], "probe.tasks (mqar:) must be NAME or"),
    (["--probe.tasks=:a=1"], "probe.tasks (:a=1) must be NAME or"),
    (["--probe.tasks=mqar:pairs=4)(a=1"], "must be NAME or NAME:FIELD=VALUE,FIELD=VALUE"),
    (["--probe.tasks=mqar:**{}"], "must be NAME or NAME:FIELD=VALUE,FIELD=VALUE"),
    (["--probe.tasks=mqar:pairs=f(4)"], "must be NAME or NAME:FIELD=VALUE,FIELD=VALUE"),
    (["--probe.tasks", "mqar", "mqar"], "probe.tasks (mqar mqar): one is there twice"),
    (["--probe.tasks=mqar"], "probe.tasks (mqar): MQAR needs a vocabulary of 8192 tokens, the model has 64"),
    (["--probe.tasks=copying", "--probe.lengths=2"], "probe.tasks (copying): length (2) must be at least 3"),
    (["--probe.lengths", "8", "0"], "probe.lengths (0) must be at least 1"),
    (["--probe.lengths", "8", "8"], "probe.lengths (8, 8): one is there twice"),
    (["--probe.examples=0"], "probe.examples (0) must be at least 1"),
    (["--probe.every=-1"], "probe.every (-1) must be a number of steps, 0 (at the end) or None"),
    (["--probe.tasks=parity", "--run.eval_every=-1"], "run.eval_every (-1) has none: set probe.every"),
    (["--probe.tasks=repeated_bigrams", "--run.eval_every=-1", "--probe.every=3"], "run.eval_every (-1) leaves closed"),
    (["--probe.tasks=parity", "--optim.objective=Masked", "--optim.objective.tokens", "7", "12"],
     "probe.tasks (parity) ask for the next token, which the model is not for: optim.objective Masked"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "told"), WRONG)
def test_what_cannot_be_probed_is_one_line(words, told):
    with pytest.raises(ConfigError) as error:
        check(small_config(*words))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_text_that_does_not_fit_is_told_before_a_step():
    """What hangs on the tokenizer; and a program that knows no probes does not train as if there were none."""
    config = small_config("--probe.tasks=needle")
    with pytest.raises(ConfigError, match=r"^probe.tasks \(needle\): Needle is text, .* dna does not tell apart"):
        probed_on(config, (1,))
    with pytest.raises(ConfigError, match=r"^probe.tasks \(needle\): length \(16\) must be at least 152 for needles"):
        probed_on(config, (1,), corpus=SimpleNamespace(tokenizer=load_tokenizer("byte")))
    with pytest.raises(ConfigError, match=r"^probe.tasks \(repeated_bigrams\): there is no held-out set"):
        probed_on(small_config("--probe.tasks=repeated_bigrams"), (1,))
    with pytest.raises(ConfigError, match=r"^probe.tasks \(needle\): this program trains without probes"):
        loop.train(config)
    check_probes(small_config(), None)
