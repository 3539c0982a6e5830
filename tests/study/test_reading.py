# SPDX-License-Identifier: Apache-2.0
"""What is read of folders of runs: each step once, the state, and no folder that can stop a survey."""

import fcntl
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.cli import main
from hybridlm.config.overrides import override
from hybridlm.errors import ConfigError
from hybridlm.study.reading import Broken, Run, each_once, find_runs, read_run
from hybridlm.study.state import state_of
from hybridlm.train.holder import holder
from tests.study.folders import END, TINY, WHOLE, start, train, val, write_run


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=6))
def test_each_step_once(starts):
    """Starts that go on from any earlier step, as of a folder whose records were not cut: what counts of a step is what
    the last start that took it wrote, and nothing behind where a later one began."""
    records, truth, reached = [], {}, 0
    for number, (wanted, n_steps) in enumerate(starts):
        begin = min(wanted, reached)
        records.append(start(begin))
        truth = {step: by for step, by in truth.items() if step <= begin}
        for step in range(begin + 1, begin + n_steps + 1):
            records += [train(step, by=number), val(step, 1.0)]
            truth[step] = number
        reached = begin + n_steps
    kept = each_once(records)
    assert [(r["step"], r["by"]) for r in kept if r["kind"] == "train"] == sorted(truth.items())
    assert [r["step"] for r in kept if r["kind"] == "val"] == sorted(truth)


def test_steps_that_come_again_without_a_start():
    records = [train(2, by=0), train(4, by=0), val(4, 3.0), train(4, by=1), val(4, 2.0), train(6, by=1)]
    assert [(r["step"], r.get("by", r["loss"])) for r in each_once(records)] == [(2, 0), (4, 1), (4, 2.0), (6, 1)]
    back = [*records[:3], {"kind": "rollback", "step": 2}, train(6, by=2)]
    assert [(r["kind"], r["step"]) for r in each_once(back)] == [("train", 2), ("rollback", 2), ("train", 6)]


@pytest.mark.parametrize(
    "records, checkpoints, word, why",
    [
        (WHOLE, [20], "complete", ""),
        (WHOLE, [], "complete", "no checkpoint"),
        (WHOLE[:-1], [20], "stopped", "at step 20"),  # before it was closed
        ([start(), train(2), {"kind": "stop", "step": 3, "signal": 2}], [3], "stopped", "at step 3, the newest check"),
        ([start(), train(2), {"kind": "failed", "step": 2, "why": "disk\nfull"}], [], "failed", "disk full"),
        ([start(), {"kind": "gave_up", "step": 2, "why": "diverged"}], [2], "failed", "diverged"),
        (
            [start(), train(2), train(4)],
            [2],
            "failed",
            "without a word after step 4, the newest checkpoint is of step 2",
        ),
        ([start(), train(2), train(4)], [4], "stopped", "at step 4"),
        ([start(), {"kind": "failed", "step": 0, "why": "x"}, start(), train(2)], [2], "stopped", "at step 2"),
        ([], [], "stopped", "before a step"),
        ([], [20], "complete", ""),  # made of another run, as quantised ones
        ([], [10], "stopped", "at step 10"),
        ([*WHOLE, start(20), train(22)], [20], "failed", "after step 22"),  # trained on, and lost
    ],
)
def test_states(records, checkpoints, word, why):
    asked = 40 if records and records[-1]["step"] == 22 else 20
    state = state_of(asked, records, checkpoints, None)
    assert state.word == word and why in state.why and "\n" not in state.why
    assert state_of(asked, records, checkpoints, "process 1 on h") == ("running", "process 1 on h")


@pytest.mark.parametrize("name", ["", "lock"])
def test_a_run_is_running_as_long_as_its_lock_is_held(tmp_path, name):
    """By another process, which holds the folder or the file in it; asking takes nothing away."""
    run = write_run(tmp_path / "run", [start(), train(2)], [2])
    (run / "lock").write_text("process 7 on there")
    code = "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(run / name)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            assert read_run(run).state == ("running", "process 7 on there")
            assert read_run(run, ours=True).state.word == "stopped"
        finally:
            other.stdin.close()
            other.wait(20)
    assert holder(run) is None and read_run(run).state.word == "stopped"
    with open(run / "lock", "a") as lock:  # it is free, whoever asked
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def motley(tmp_path):
    """A folder of sound runs, broken ones and what is none."""
    runs = tmp_path / "runs"
    write_run(runs / "a")
    write_run(
        runs / "group" / "b", [start(), train(2), {"kind": "stop", "step": 3}], [3], override(TINY, ["optim.lr=0.5"])
    )
    odd = [{"kind": "train", "step": 4, "loss": "low", "tokens": None, "mfu": [1]}, {"kind": "train", "step": -1}, 3]
    write_run(runs / "odd", [*odd, {"kind": "val", "step": 4, "loss": None}], [])
    for name, text in {"list": "[]", "cut": '{"model": {', "none": "", "deep": "[" * 100_000}.items():
        (runs / name / "checkpoints").mkdir(parents=True)
        (runs / name / "config.json").write_text(text)
    (runs / "noise").mkdir()
    (runs / "noise" / "config.json").write_bytes(b"\xff\x00")
    (runs / "noise" / "metrics.jsonl").write_bytes(bytes(range(256)))
    (runs / "published").mkdir()
    (runs / "published" / "config.json").write_text('{"model_type": "bamba"}')
    (runs / "empty").mkdir()
    (runs / ".hidden" / "checkpoints").mkdir(parents=True)
    (runs / "file.txt").write_text("x")
    (runs / "around").symlink_to(runs)
    (runs / "folder.jsonl" / "metrics.jsonl").mkdir(parents=True)
    return runs


def test_a_survey_survives_any_folder(motley, capsys):
    found = {each.path.relative_to(motley).as_posix(): each for each in find_runs(motley)}
    assert {name for name, each in found.items() if isinstance(each, Run)} == {"a", "group/b", "odd"}
    words = {name: each.word for name, each in found.items() if isinstance(each, Broken)}
    assert words == {
        **dict.fromkeys(("list", "cut", "none", "deep", "noise", "folder.jsonl"), "broken"),
        **dict.fromkeys(("published", "empty"), "no run"),
    }
    assert main(["runs", str(motley)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == "" and len([line for line in lines if ": broken: " in line or ": no run: " in line]) == 8
    a = next(line for line in lines if line.startswith("a "))
    assert a.split()[1:9] == ["complete", "20/20", "1.28k", "0.2500", "0.3000", "0.150", "32", "25.0%"]
    assert "optim.lr=0.0003" in a and "optim.lr=0.5" in next(line for line in lines if line.startswith("b "))
    assert "d_model" not in said.out


def test_as_json(motley, capsys):
    assert main(["runs", str(motley), "--json"]) == 0
    rows = {row["run"].removeprefix(f"{motley}/"): row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 11
    assert rows["a"] | {"run": ""} == {
        "run": "", "state": "complete", "why": "", "steps": 20, "asked": 20, "tokens": 1280, "loss": 0.25,
        "val_loss": 0.3, "bits_per_byte": 0.15, "tokens_per_second": 32.0, "mfu": 0.25, "differs": {"optim.lr": 0.0003},
    }  # fmt: skip
    assert rows["odd"]["loss"] is None and rows["odd"]["steps"] == 4 and rows["odd"]["differs"] == {"optim.lr": 0.0003}


def test_one_run_and_none(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a")
    assert main(["runs", str(tmp_path / "runs" / "a")]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and "differs" not in said
    (tmp_path / "nothing").mkdir()
    assert main(["runs", str(tmp_path / "nothing")]) == 0 and "no runs" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not there" in capsys.readouterr().err
    for command in ("runs", "compare"):
        assert main([command, str(tmp_path / "runs" / "a" / "config.json")]) == 2
        assert "config.json is a file: give the folder of runs" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path / "nothing")


def test_a_run_with_blocks_of_its_own_is_read_without_them(tmp_path):
    """Its config stays JSON, so it can be compared; with its config file it is a config."""
    run = write_run(tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    symbol = stored["model"]["pattern"][0]
    stored["model"]["blocks"][symbol]["type"] = "MyOwn"
    (run / "config.json").write_text(json.dumps(stored))
    (run / "checkpoints" / "20").rmdir()
    found = read_run(run)
    assert found.parsed is None and found.config["model"]["blocks"][symbol]["type"] == "MyOwn"
    assert found.asked == 20 and found.state.word == "complete" and END in found.records
