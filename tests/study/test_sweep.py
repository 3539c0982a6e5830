# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the product and its names, processes side by side, what a second start does, signals, the page."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.cli import compare, main, side_by_side, sweep
from hybridlm.cli.side_by_side import Job, run_jobs, slots
from hybridlm.config.find import load_config
from hybridlm.errors import ConfigError
from hybridlm.probes.in_training import check as check_probes
from hybridlm.study.reading import Run, find_runs
from hybridlm.study.sweep import Member, check_members, members, read_alternatives
from tests.study.folders import TINY, WHOLE, start, train, write_run

ROOT = Path(__file__).resolve().parents[2]


def test_the_product():
    words = ["optim.lr=1e-3", "optim.lr=3e-4", "model.pattern=M-", "--model.pattern=M*-", "model.norm=layer"]
    alternatives = read_alternatives(words)
    assert alternatives == {"optim.lr": ["1e-3", "3e-4"], "model.pattern": ["M-", "M*-"], "model.norm": ["layer"]}
    found = members(TINY, alternatives, Path("runs/s"), ["--run.steps=3"])
    pairs = list(itertools.product(*alternatives.values()))
    for member, values in zip(found, pairs, strict=True):
        given = [f"--{key}={value}" for key, value in zip(alternatives, values)]
        assert member.words == ["--run.steps=3", *given, f"--run.dir=runs/s/{member.name}"]
    assert [member.name for member in found[::2]] == [f"lr={lr},pattern=M-,norm=layer" for lr in ("1e-3", "3e-4")]
    assert len({member.name for member in found}) == 4 and "*" not in "".join(member.name for member in found)
    more = members(TINY, alternatives | {"optim.lr": ["1e-3", "3e-4", "1"]}, Path("runs/s"), [])
    assert {member.name for member in found} < {member.name for member in more}  # added to, it finds its runs
    same_end = members(TINY, {"optim.rule.eps": ["1"], "model.norm_eps": ["1"], "x.eps": ["2"]}, Path("s"), [])
    assert same_end[0].name == "optim.rule.eps=1,norm_eps=1,x.eps=2"
    several = members(TINY, {"run.profile_steps": ["2 3"], "run.sample_prompt": ["a b"]}, Path("s"), [])[0].words
    assert several[:3] == ["--run.profile_steps", "2", "3"] and "--run.sample_prompt=a b" in several


@given(st.lists(st.text(max_size=150), min_size=1, max_size=6, unique=True))
def test_names_of_folders_are_plain_and_nobody_elses(values):
    found = members(TINY, {"run.sample_prompt": values}, Path("s"), [])
    names = [member.name for member in found]
    assert len({name.lower() for name in names}) >= len({value.lower() for value in values})
    assert all(name.isascii() and len(name) < 140 and not set(name) & set("/\\*?[]\n ~") for name in names)


@pytest.mark.parametrize(
    "words, told",
    [
        (["optim.lr"], "--sweep (optim.lr) must be SECTION.KEY=VALUE"),
        (["lr=3"], "must be SECTION.KEY=VALUE"),
        (["optim.lr=1", "optim.lr=1"], "there twice"),
        (["run.dir=x"], "each run has a folder of its own"),
        (
            [f"optim.lr={i}" for i in range(40)] + [f"run.seed={i}" for i in range(40)],
            "1600 combinations: at most 1000",
        ),
    ],
)
def test_wrong_alternatives(words, told):
    with pytest.raises(ConfigError) as error:
        members(TINY, read_alternatives(words), Path("s"), [])
    assert told in str(error.value)


def test_wrong_words_are_one_line(capsys, tmp_path):
    base = ["sweep", "--config", "hybrid_tiny"]
    for words, told in (
        (["sweep"], "--config"),
        ([*base], "--sweep"),
        ([*base, "--sweep", "optim.lr=1", "--paralel", "2"], "did you mean --parallel?"),
        ([*base, "--sweep", "optim.lr=1", "--run.dir=x"], "give --dir of the sweep"),
        ([*base, "--sweep", "optim.lr=1", "--parallel", "0"], "--parallel (0) must be between 1 and 64"),
        ([*base, "--sweep", "optim.lr=1", "--optim.lrr=3"], "did you mean --optim.lr?"),
        (["sweep", "--config", "hybrid_tny", "--sweep", "optim.lr=1"], "did you mean hybrid_tiny"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1, said


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(side_by_side.glob, "glob", lambda pattern: [])
    assert slots(1, {}) == [{}] and slots(3, {}) == [{}] * 3
    four = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert slots(1, four) == [{}] and slots(2, four | {"JAX_PLATFORMS": "cpu"}) == [{}, {}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(3, four)] == ["4", "5", "6"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(2, four)] == ["4,5", "6,7"]
    with pytest.raises(ConfigError, match=r"--parallel \(5\): there are 4 GPUs"):
        slots(5, four)
    here = {"/dev/nvidia*": ["/dev/nvidia10", "/dev/nvidia2", "/dev/nvidiactl", "/dev/nvidia-uvm"]}
    monkeypatch.setattr(side_by_side.glob, "glob", lambda pattern: here.get(pattern, []))
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(2, {})] == ["2", "10"]
    monkeypatch.setattr(side_by_side.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    with pytest.raises(ConfigError, match="takes all TPUs"):
        slots(2, {})


def sleeper(tmp_path, name, code=0, seconds=0.12):
    """A job that notes when it began and ended, and ends with a code."""
    text = (
        f"import sys, time; a = time.time(); time.sleep({seconds}); print('said by {name}'); "
        f"open({str(tmp_path / name)!r}, 'w').write(f'{{a}} {{time.time()}}'); sys.exit({code})"
    )
    return Job(name, [sys.executable, "-S", "-c", text], tmp_path / f"{name}.log")


@pytest.mark.parametrize("places", [1, 2])
def test_jobs_side_by_side(tmp_path, places):
    """As many at once as there are places, in order; one that fails does not stop the others unless asked."""
    jobs = [sleeper(tmp_path, name, code=3 * (name == "b")) for name in "abcd"]
    began, codes = [], {}
    tell = lambda job, code: codes.update({job.name: code}) is None
    assert run_jobs(jobs, [{}] * places, lambda job: began.append(job.name), tell) is None
    assert began == list("abcd") and codes == {"a": 0, "b": 3, "c": 0, "d": 0}
    times = [tuple(map(float, (tmp_path / name).read_text().split())) for name in "abcd"]
    at_once = max(sum(begin <= at < end for begin, end in times) for at, _ in times)
    assert at_once == places
    assert (tmp_path / "a.log").read_text() == "said by a\n"
    began.clear()
    run_jobs(jobs, [{}], lambda job: began.append(job.name), lambda job, code: code == 0)
    assert began == ["a", "b"] and (tmp_path / "a.log").read_text() == "said by a\n" * 2


def test_a_signal_goes_on_to_the_jobs(tmp_path):
    """Each of those that run gets it and may take its time; no further one is begun."""
    text = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.3); pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop); print('ready', flush=True); time.sleep(60)\n"
    )
    words = lambda name: [sys.executable, "-S", "-c", text, str(tmp_path / name)]
    jobs = [Job(name, words(name), tmp_path / f"{name}.log") for name in "abc"]
    code = (
        "import sys, json, pathlib; from hybridlm.cli.side_by_side import Job, run_jobs\n"
        "jobs = [Job(n, w, pathlib.Path(p)) for n, w, p in json.load(sys.stdin)]\n"
        "codes = []\n"
        "tell = lambda job, code: codes.append((job.name, code)) is None\n"
        "print('signal', run_jobs(jobs, [{}, {}], lambda job: None, tell), codes)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        json.dump([(job.name, job.words, str(job.log)) for job in jobs], process.stdin)
        process.stdin.close()
        until = time.monotonic() + 30
        while not all((tmp_path / f"{n}.log").exists() and (tmp_path / f"{n}.log").read_text() for n in "ab"):
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(30) == 0
    assert said.startswith("signal 2 ") and "('a', 130)" in said and "('b', 130)" in said and "'c'" not in said
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "saved"


def test_jobs_end_with_a_process_that_is_killed(tmp_path):
    """SIGKILL leaves it no word to say: they notice, and save and end as upon SIGTERM."""
    text = (
        "import pathlib, signal, sys, time; from hybridlm.cli.side_by_side import end_with_parent\n"
        "def stop(number, _):\n    pathlib.Path(sys.argv[1]).write_text(f'saved upon {number}'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop); end_with_parent(); print('ready', flush=True); time.sleep(60)\n"
    )
    code = (
        "import sys, pathlib; from hybridlm.cli.side_by_side import Job, run_jobs; log, done, text = sys.argv[1:]\n"
        "job = Job('a', [sys.executable, '-c', text, done], pathlib.Path(log))\n"
        "run_jobs([job], [{}], lambda job: None, lambda job, code: True)"
    )
    log, done = tmp_path / "log", tmp_path / "done"
    with subprocess.Popen([sys.executable, "-c", code, log, done, text], cwd=ROOT) as process:
        _await(lambda: log.exists() and log.read_text())
        assert log.read_text() == "ready\n"
        process.kill()
    _await(lambda: done.exists() and done.read_text())
    assert done.read_text() == "saved upon 15"


def _await(there, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_members_are_checked_before_the_first_starts(mini):
    """The first that cannot be trained is named; folders with other runs are refused, with the same one go on."""
    folder, name = mini.parent / "s", str(mini)

    def check(*words):
        found = members(load_config(name), read_alternatives(words), folder, [])
        return check_members(name, found, also=check_probes)

    assert check("optim.lr=0.1", "optim.lr=0.2") == ["new", "new"] and not folder.exists()
    for words, told in {
        ("optim.lr=0.1", "optim.lr=fast"): "lr=fast: --optim.lr: 'fast' is not a number",
        ("data.batch_size=8", "data.batch_size=12"): "batch_size=12: data.batch_size (12) not divisible by",
        ("data.path=nowhere/*.txt",): "data.path",
        ("data.tokenizer=",): "data.tokenizer",
        ("probe.tasks=parity", "probe.tasks=mqr"): "tasks=mqr: probe.tasks (mqr): no task of that name",
        ("optim.rule=AdamW", "optim.rule=Muon", "optim.rule.momentum=0.9"): "rule=AdamW,momentum=0.9: unknown key",
    }.items():
        with pytest.raises(ConfigError) as error:
            check(*words)
        assert told in str(error.value), error.value
    config = load_config(name)
    one, two = ({"records": WHOLE, "steps": [20]}, {"records": [start(), train(2)], "steps": [2]})
    for value, left in (("0.1", one), ("0.2", two)):
        write_run(folder / f"lr={value}", config=load_config(name, [f"optim.lr={value}"]), **left)
    assert check("optim.lr=0.1", "optim.lr=0.2", "optim.lr=0.3") == ["complete", "stopped", "new"]
    more = [Member("m", str(folder / "lr=0.1"), ["--run.steps=30", f"--run.dir={folder}/lr=0.1"])]
    assert check_members(name, more) == ["stopped"]
    write_run(folder / "seed=7", config=config)
    with pytest.raises(ConfigError, match=r"seed=7: .* holds a run with another config: run.seed \(0 there, 7 now\)"):
        check("run.seed=7")


def test_text_is_looked_for_as_a_run_opens_it(mini):
    """Held-out sets by their names, sources of a mixture one by one: text beside tokens."""
    here, name = mini.parent, str(mini)
    (here / "tokens.bin").touch()
    words = ["--data.weights", "1", "2", "--data.path", f"{here}/train-*.txt", f"{here}/tokens.bin", "--data.val_path"]
    check = lambda *sets: check_members(
        name, members(load_config(name), {"optim.lr": ["0.1"]}, here / "s", [*words, *sets])
    )
    assert check(f"own={here}/val-0.txt", f"{here}/val-1.txt") == ["new"]
    with pytest.raises(ConfigError, match=r"^lr=0.1: data.val_path \('[^']*/nowhere.txt'\)"):
        check(f"own={here}/val-0.txt", f"other={here}/nowhere.txt")


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """`hybridlm sweep` with runs that are written, not trained: optim.lr=1 fails, the rest are complete at once."""
    script = tmp_path / "member.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nimport json\n"
        "words = dict(word.removeprefix('--').split('=', 1) for word in sys.argv[1:])\n"
        "if words['optim.lr'] == '1': sys.exit(1)\n"
        "run = Path(words['run.dir']); (run / 'checkpoints' / '20').mkdir(parents=True, exist_ok=True)\n"
        "config = json.loads(Path(sys.argv[0]).with_name('config.json').read_text())\n"
        "config['optim']['lr'] = float(words['optim.lr']); (run / 'config.json').write_text(json.dumps(config))\n"
        f"records = {WHOLE!r}\n"
        "(run / 'metrics.jsonl').open('a').write(''.join(json.dumps(r) + '\\n' for r in records))\n"
    )
    write_run(tmp_path / "like")
    (tmp_path / "like" / "config.json").rename(tmp_path / "config.json")
    monkeypatch.setattr(sweep, "_command", lambda config, words: [sys.executable, str(script), *words])
    monkeypatch.setattr(sweep, "_checked", lambda config, found, place: check_members(config, found))
    folder, config = tmp_path / "sweep", tmp_path / "tiny.py"
    config.write_text("from tests.study.folders import TINY\n\ndef config():\n    return TINY\n")
    words = ["sweep", "--config", str(config), "--dir", str(folder), "--data.batch_size=8"]
    return folder, words


def test_a_sweep_from_start_to_page(made_up, capfd, monkeypatch):
    """A failing member does not stop the others, and is the exit code; a second start does what is left."""
    folder, words = made_up
    alternatives = ["--sweep", "optim.lr=0.5", "optim.lr=1", "optim.lr=0.25"]
    assert main([*words, *alternatives, "--dry-run"]) == 0
    assert "3 new" in capfd.readouterr().out and not folder.exists()
    assert main([*words, *alternatives, "--parallel", "2"]) == 1
    said = capfd.readouterr().out
    assert "3 runs in" in said and "lr=1: ended with exit code 1" in said and said.count(": complete") == 2
    runs = {each.path.name: each for each in find_runs(folder) if isinstance(each, Run)}
    assert set(runs) == {"lr=0.5", "lr=0.25"} and (folder / "lr=0.5.log").exists()
    page = (folder / "compare.html").read_text()
    assert "lr=0.5" in page and "lr=0.25" in page and (folder / "compare.png").exists()
    monkeypatch.setattr(compare, "write", lambda *given: None)  # drawn once is enough
    written = (folder / "lr=0.5" / "metrics.jsonl").stat().st_mtime_ns
    assert main([*words, *alternatives]) == 1
    said = capfd.readouterr().out
    assert "2 complete, 1 new" in said and "[3/3] lr=1" in said and "[2/3]" not in said
    assert (folder / "lr=0.5" / "metrics.jsonl").stat().st_mtime_ns == written
    assert main([*words, "--sweep", "optim.lr=0.5", "optim.lr=0.25"]) == 0
    assert main([*words, "--sweep", "optim.lr=1", "optim.lr=0.125", "--stop-on-failure"]) == 1
    assert "lr=0.125" not in capfd.readouterr().out.partition("[2/2]")[2] and not (folder / "lr=0.125").exists()


@pytest.mark.slow
def test_ctrl_c_saves_the_member_and_a_second_start_ends_it(mini):
    """The whole command, as a process: the signal to it alone, its exit code, and what goes on from there."""
    words = [
        sys.executable, "-m", "hybridlm", "sweep", "--config", str(mini), "--dir", str(mini.parent / "s"),
        "--sweep", "optim.lr=0.01", "optim.lr=0.02", "--run.steps=3000", "--run.eval_every=-1", "--run.log_every=5",
        "--run.sample_tokens=0", "--run.save_every=0",
    ]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    first = mini.parent / "s" / "lr=0.01"
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 300
        while not (first / "metrics.jsonl").exists() or b'"train"' not in (first / "metrics.jsonl").read_bytes():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "stopped and saved at step" in said and "compared: " in said
    (run,) = [each for each in find_runs(mini.parent / "s") if isinstance(each, Run)]
    assert run.path == first and run.state.word == "stopped" and run.checkpoints
    short = [word for word in words if not word.startswith("--run.steps")] + [f"--run.steps={run.steps + 2}"]
    done = subprocess.run(short, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "1 stopped, 1 new" in done.stdout and "going on from the checkpoint" in done.stdout
    states = {each.path.name: each.state.word for each in find_runs(mini.parent / "s") if isinstance(each, Run)}
    assert states == {"lr=0.01": "complete", "lr=0.02": "complete"}
