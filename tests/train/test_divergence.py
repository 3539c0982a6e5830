# SPDX-License-Identifier: Apache-2.0
"""Runs that diverge: they go back, leave out what spoiled them, and are then as if told from the start, to the bit."""

import json
import re
import shlex

import chex
import jax
import pytest

from hybridlm.cli import train_main
from hybridlm.config.find import load_config
from hybridlm.data.loader import Loader
from hybridlm.train import loop, recovery
from hybridlm.train import step as step_module
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.plot import plot_loss
from hybridlm.train.rollback import Rollback
from tests.faults.poison import marks, poisoned, told

pytestmark = pytest.mark.usefixtures("one_device")
WORDS = ["--run.eval_every=-1", "--run.sample_tokens=0", "--run.log_every=1", "--run.save_every=3", "--run.keep=1"]
WORDS += ["--run.steps=13", "--optim.max_skipped=3"]
BAD = (7, 8, 9)
"""Batches that spoil a step, of steps 8 to 10; the checkpoint of step 6 is the last good one, that of 9 is not."""


def train(config, *words):
    return train_main(["--config", str(config), *WORDS, *words])


def of_kind(run, *kinds):
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] in kinds]


def steps_of(run):
    """What the records of steps say but for the clock."""
    clock = ("tokens_per_second", "seconds_left", "data_wait", "mfu")
    return [{k: v for k, v in record.items() if k not in clock} for record in of_kind(run, "train", "spike")]


@pytest.fixture
def saved(monkeypatch):
    """(state, data) that runs save, by folder and step."""
    seen = {}
    save = loop.Checkpoints.save

    def saving(self, step, state, config, record):
        seen[self.folder.parent.name, step] = jax.device_get(state), record["data"]
        save(self, step, state, config, record)

    monkeypatch.setattr(loop.Checkpoints, "save", saving)
    return seen


@pytest.fixture
def bad(mini, monkeypatch):
    """The run of `mini` has the batches BAD."""
    objective = poisoned(step_module.make_objective, marks(load_config(str(mini), []), BAD))
    monkeypatch.setattr(step_module, "make_objective", objective)


@pytest.fixture
def as_told(mini, bad, saved, monkeypatch):
    """Folder of a run that leaves out the batches of steps 7 to 10 from the start."""
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__next__", told(Loader.__next__, 6, 4))
        assert train(mini, f"--run.dir={mini.parent}/told") == 0
    return mini.parent / "told"


def check_equal(run, as_told, saved):
    assert steps_of(run) == steps_of(as_told) and [record["step"] for record in steps_of(run)] == list(range(1, 14))
    chex.assert_trees_all_equal(saved[run.name, 13], saved["told", 13])


def test_it_goes_back_and_leaves_out_what_spoiled_it(mini, as_told, saved, capsys, monkeypatch):
    run = mini.parent / "run"
    assert train(mini) == 0
    said = capsys.readouterr().out
    assert all(
        f"step {step}: gradient not finite: skipped ({i} in a row)" in said for i, step in enumerate((8, 9, 10), 1)
    )
    assert "10: loss, gradient or update not finite 3 times in a row (optim.max_skipped), none applied: back to" in said
    assert "the checkpoint of step 6, without the next 4 batches (1 of 3 times)" in said
    assert "; times gone back: 1, batches left out: 4" in said
    check_equal(run, as_told, saved)
    (back,), (window,), (end,) = (of_kind(run, kind) for kind in ("rollback", "window", "end"))
    assert (back["step"], back["failed_at"], back["in_row"], back["superseded"]) == (6, 10, 1, [9])
    assert "not finite 3 times" in back["why"] and (window["step"], window["batches"]) == (6, 4)
    assert (end["rollbacks"], end["batches_left_out"], end["skipped_steps"]) == (1, 4, 0)
    superseded = [json.loads(line) for line in (run / "superseded" / "metrics.jsonl").read_text().splitlines()]
    skipped = [(r["step"], r["what"], r["in_row"]) for r in superseded if r["kind"] == "skipped"]
    assert skipped == [(8, "gradient", 1), (9, "gradient", 2), (10, "gradient", 3)]
    assert [path.name[:2] for path in (run / "superseded").iterdir() if path.is_dir()] == ["9-"]
    entries = saved["run", 13][1]["entries"]
    assert [(entry["step"], entry["skipped"]) for entry in entries] == [(0, 0), (6, 4)]
    assert (run / "loss.png").stat().st_size > 0


MOMENTS = {
    "before anything": (recovery.Recovery, "_candidates"),
    "before it is written down": (Rollback, "write"),
    "before later checkpoints are moved": (Checkpoints, "supersede"),
    "before records are dropped": (MetricsLog, "rewind"),
    "before the next step": (recovery.Validation, "forget"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_goes_back(mini, as_told, saved, monkeypatch, moment):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS[moment], killed)
        assert train(mini) == 130
    assert train(mini) == 0
    check_equal(mini.parent / "run", as_told, saved)


@pytest.mark.slow
def test_it_gives_up_and_what_it_advises_goes_on(mini, saved, capsys, monkeypatch):
    """Every batch from the third on is bad: back to the checkpoint of step 2 once, then to that of step 1."""
    run, words = mini.parent / "run", ["--run.save_every=1", "--run.keep=2", "--run.max_rollbacks=2", "--run.steps=9"]
    words += ["--optim.max_skipped=2"]
    with monkeypatch.context() as patch:
        bad = marks(load_config(str(mini), []), range(2, 20))
        patch.setattr(step_module, "make_objective", poisoned(step_module.make_objective, bad))
        assert train(mini, *words) == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert (
            "step 3: loss, gradient or update not finite 2 times in a row (optim.max_skipped), none applied; after "
            in captured.err
        )
        assert (
            "2 times back (run.max_rollbacks 2): the run stands at the checkpoint of step 1; a lower rate "
            in captured.err
        )
        assert "back to the checkpoint of step 2, without the next 2 batches (1 of 2 times)" in captured.out
        assert "back to the checkpoint of step 1, without the next 5 batches (2 of 2 times)" in captured.out
    assert finished_steps(run / "checkpoints") == [1]
    (event,) = of_kind(run, "gave_up")
    assert (event["step"], event["failed_at"], event["in_row"]) == (1, 3, 2)
    typed = shlex.split(re.search(r"a lower rate may help: (.*)$", captured.err)[1])
    typed = typed[typed.index("--config") :]
    assert typed[-1] == "--optim.lr=0.001" and "--optim.max_skipped=2" in typed
    assert train_main(typed) == 0
    said = capsys.readouterr().out
    assert "going on from the checkpoint of step 1" in said and "without the next 7 batches" in said
    assert "optim.lr 0.01 -> 0.001" in said and "done: 9 steps" in said
    assert [r["step"] for r in of_kind(run, "train")] == list(range(1, 10))
    entries = saved["run", 9][1]["entries"]
    assert [(entry["step"], entry["skipped"]) for entry in entries] == [(0, 0), (1, 7)]


@pytest.mark.parametrize("save_every", [pytest.param(-1, marks=pytest.mark.slow), 1])
def test_nothing_to_go_back_to(mini, capsys, save_every):
    """All steps from the first on: none is saved, or all that are saved are of a run that diverged."""
    run = mini.parent / "run"
    words = ["--optim.warmup_steps=0", f"--run.save_every={save_every}"]
    assert train(mini, *words, "--optim.lr=1e38") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out.count("update not finite: skipped") == 3
    assert "step 3: loss, gradient or update not finite 3 times in a row" in captured.err
    found = "no good checkpoint to go back to" + (" (run.save_every -1)" if save_every < 0 else "")
    assert f"none applied; {found}: the run begins again; a lower rate may help: " in captured.err
    assert finished_steps(run / "checkpoints") == []
    typed = shlex.split(captured.err.rpartition(": ")[2])
    assert typed[-1] == "--optim.lr=1e+37"
    assert train_main([*typed[typed.index("--config") :], "--optim.lr=1e-3", "--run.steps=2"]) == 0
    assert [record["step"] for record in of_kind(run, "train")] == [1, 2]


@pytest.mark.slow
def test_spikes(mini, saved, capsys, monkeypatch):
    """A loss far above those before it three times in a row, of steps 8 to 10; a threshold that is off sees nothing."""
    run, far = mini.parent / "run", poisoned(step_module.make_objective, marks(load_config(str(mini), []), BAD), 1e3)

    def make_far(config, graphdef):
        objective = far(config, graphdef)

        def run(params, batch, weight=1.0):
            total, metrics = objective(params, batch, weight)
            loss = metrics["loss"]
            return total, metrics | {"loss": type(loss)(total, loss.weight)}

        return run

    monkeypatch.setattr(step_module, "make_objective", make_far)
    spikes = ["--run.spike_threshold=20", "--run.spike_window=5", "--run.spike_steps=3"]
    assert train(mini, *spikes) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"step (8|9|10): loss [\d.]+ above [\d.]+ \((1|2|3) in a row\)", said)) == 3
    assert "20 median deviations over the median of the last 5, 3 times in a row (run.spike_steps): back to" in said
    assert "the checkpoint of step 6, without the next 4 batches (1 of 3 times)" in said
    assert len(saved["run", 13][1]["entries"]) == 2 and len(of_kind(run, "rollback")) == 1
    assert max(record["loss"] for record in of_kind(run, "train")) < 10
    assert train(mini, f"--run.dir={mini.parent}/off") == 0
    assert "back to" not in capsys.readouterr().out and of_kind(mini.parent / "off", "spike", "rollback") == []


def test_the_figure_marks_them(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **_: drawn.append(x))
    records = [{"kind": "train", "step": i, "bits_per_byte": 1.0 + i} for i in range(5)]
    records += [{"kind": kind, "step": 2} for kind in ("rollback", "window", "skipped", "spike", "rollback")]
    plot_loss(records, None, "a run", tmp_path / "loss.png")
    assert drawn == [2] and (tmp_path / "loss.png").stat().st_size > 0


def test_what_is_told_of_records():
    assert recovery.told([]) == ({"rollbacks": 0, "batches_left_out": 0, "skipped_steps": 0, "spikes": 0}, "")
    events = [("rollback", 9, {"in_row": 2}), ("window", 9, {"batches": 3}), ("rollback", 9, {"in_row": 3})]
    events += [("window", 9, {"batches": 8}), ("rollback", 30, {"in_row": 1}), ("window", 30, {"batches": 4})]
    events += [("skipped", 40, {}), ("window", 41, {"batches": "x"}), ("rollback", 41, {}), ("train", 42, {})]
    counts, words = recovery.told([{"kind": kind, "step": step, **values} for kind, step, values in events])
    assert counts == {"rollbacks": 4, "batches_left_out": 12, "skipped_steps": 1, "spikes": 0}
    assert words == "times gone back: 4, batches left out: 12, steps skipped: 1"


@pytest.mark.slow
def test_a_user_who_goes_back_begins_there_anew(mini, bad, saved, capsys):
    """What was left out comes again; what the run went back to is forgotten, wherever it stops."""
    run = mini.parent / "run"
    assert train(mini, "--run.keep=9") == 0 and (run / "rollback.json").exists()
    capsys.readouterr()
    assert train(mini, "--run.keep=9", "--run.from_step=3", "--run.steps=6") == 0
    assert not (run / "rollback.json").exists()
    assert train(mini, "--run.keep=9", "--run.from_step=3", "--run.steps=7") == 0  # goes on from 6
    assert "without the next" not in capsys.readouterr().out
    assert saved["run", 7][1]["entries"] == saved["run", 3][1]["entries"] and len(saved["run", 3][1]["entries"]) == 1


def test_what_a_run_went_back_to_vouches_for_itself(tmp_path, caplog):
    file, rollback = tmp_path / "rollback.json", Rollback(6, 4, False, None)
    assert Rollback.read(file) is None and not caplog.records
    rollback.write(file)
    assert Rollback.read(file) == rollback
    whole = file.read_bytes()
    changed = [whole[:i] + b"#" + whole[i + 1 :] for i in range(len(whole))]
    for content in [b"", b"{}", b"[]\n", b"\xff\n0", *changed]:
        file.write_bytes(content)
        assert Rollback.read(file) is None and "is damaged: what it says is not heeded" in caplog.text
        caplog.clear()
