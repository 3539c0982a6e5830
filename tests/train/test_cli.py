# SPDX-License-Identifier: Apache-2.0
"""What the command line says: help, and one line for what the user has to change."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from hybridlm.cli import main, train_main
from hybridlm.cli.ending import explained
from hybridlm.cli.start import without_late_writes
from hybridlm.cli.table import COMMANDS
from hybridlm.cli.train import _find_devices
from hybridlm.config.find import config_names
from hybridlm.errors import AgainError, ConfigError, Exit, RunError
from hybridlm.train.progress import Display, clock, short

ROOT = Path(__file__).resolve().parents[2]


def check_fails(capsys, words, *said, code=2, command=train_main):
    assert command(words) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    for text in said:
        assert text in error


def test_config_is_missing(capsys):
    check_fails(capsys, [], "--config is missing", "hybrid_tiny")
    check_fails(capsys, ["--config"], "--config wants a name", "hybrid_1b")


def test_unknown_names_and_keys(capsys, mini):
    check_fails(capsys, ["--config", "hybrid_tny"], "hybrid_tny", "did you mean hybrid_tiny")
    check_fails(capsys, ["--config", "nowhere/file.py"], "nowhere/file.py")
    check_fails(capsys, ["--config", "hybrid_tiny", "--model.d_modle=4"], "--model.d_modle", "d_model")
    check_fails(capsys, ["--config=hybrid_tiny", "--optim.lr=fast"], "--optim.lr", "fast")


def test_impossible_combinations(capsys, mini):
    mini = str(mini)
    check_fails(
        capsys,
        ["--config", mini, "--mesh.data=1", "--mesh.fsdp=3"],
        "mesh (fsdp 3) needs 3 devices",
    )
    check_fails(
        capsys,
        ["--config", mini, "--data.batch_size=4"],
        "data.batch_size (4) not divisible by mesh.data * mesh.fsdp (8)",
    )
    check_fails(
        capsys, ["--config", mini, "--optim.accumulate=3"], "data.batch_size (8) not divisible by optim.accumulate (3)"
    )
    check_fails(
        capsys, ["--config", mini, "--model.blocks.*.n_heads=3", "--model.blocks.*.n_kv_heads=2"], "n_heads (3)"
    )
    check_fails(capsys, ["--config", mini, "--data.path=nothing/*.txt"], "nothing/*.txt")
    for first, last in ((5, 2), (-3, -1), (0, 4)):
        words = ["--config", mini, "--run.profile_steps", str(first), str(last)]
        check_fails(capsys, words, f"run.profile_steps ({first} {last}) must be a first step of at least 1")
    check_fails(capsys, ["--config", mini, "--run.watchdog=-1"], "run.watchdog (-1.0) must be 0 (never) or seconds")
    check_fails(capsys, ["--config", mini, "--run.heartbeat=0.5"], "run.heartbeat (0.5) must be between 1 and 3600")
    check_fails(capsys, ["--config", mini, "--run.dir=/dev/null/x"], "run.dir (/dev/null/x) cannot be written")


def test_generate_errors(capsys, tmp_path):
    def check(words, *said):
        check_fails(capsys, ["generate", *words], *said, command=main)

    check([], "--run")
    check(["--run", str(tmp_path)], "holds no run")
    check(["--run", str(tmp_path), "--temprature", "1"], "--temprature", "did you mean --temperature?")
    check(["--top_k", "1"], "unknown option --top_k: did you mean --top-k?")
    check(["--run", str(tmp_path), "--config", "hybrid_tny"], "no config named 'hybrid_tny'")
    check(["--run", str(tmp_path), "--config", str(tmp_path / "none.py")], "no config file")
    check(["--run", str(tmp_path), "--prompt", "--", "--x"], "--prompt", "see hybridlm generate --help")
    check(["--run", str(tmp_path), "--top-p", "2"], "--top-p (2) must be between 0 and 1")
    check(["--run", str(tmp_path), "--max-new-tokens", "0"], "--max-new-tokens (0) must be at least 1")


def test_help(capsys):
    assert train_main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "hybrid_125m" in said and "--optim.lr" in said and "--run.steps" in said
    assert train_main(["--config", "mamba2_1b", "--help"]) == 0
    assert "128256" in capsys.readouterr().out.replace("_", "")
    assert main(["--help"]) == 0 and "hybridlm generate" in capsys.readouterr().out
    assert main(["generate", "--help"]) == 0 and "--top-k" in capsys.readouterr().out
    assert main(["fly"]) == 2 and main([]) == 2


@pytest.mark.parametrize(
    "words, shown",
    [
        (["--model.blocks.E=MoE"], ["--model.blocks.E.n_experts", "--model.blocks.E (now MoE)"]),
        (["--model.blocks.M=Mamba1"], ["--model.blocks.M.dt_rank"]),
        (["--optim.rule", "AdamW"], ["--optim.rule.betas", "--optim.rule (now AdamW)"]),
        (["--optim.schedule=Cosine"], ["--optim.schedule (now Cosine)"]),
        (["--optim.objective=Masked", "--optim.objective.masked=0.3"], ["--optim.objective.masked", "0.3"]),
        (["--model.blocks.*.rope.scaling=YaRN"], ["--model.blocks.*.rope.scaling.factor"]),
    ],
)
def test_help_shows_what_is_chosen_on_its_line(capsys, words, shown):
    """Fields of a choice stand in the help with it and not without; so do values of this line."""
    assert train_main(["--config", "hybrid_tiny", "--help"]) == 0
    without = capsys.readouterr().out
    assert train_main(["--config", "hybrid_tiny", *words, "--help"]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in shown) and "would not start" not in said
    assert not all(key in without for key in shown)


def test_help_of_an_unfinished_line(capsys):
    """What is wrong is told behind the help of what can be read."""
    words = ["--config", "hybrid_tiny", "--model.blocks.E=MoE", "--model.blocks.E.n_expert=4", "--help"]
    assert train_main(words) == 0
    said = capsys.readouterr().out
    assert "--model.blocks.E.n_experts" in said
    assert said.splitlines()[-1].startswith("as it stands, this line would not start: unknown key --model.blocks.E.n_e")
    check_fails(capsys, ["--config", "hybrid_tny", "--help"], "no config named 'hybrid_tny'")


def test_names_of_configs_stand_in_columns_by_family(capsys):
    assert train_main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ") and len(line.split()) > 1}
    assert rows["mamba2"] == ["130m", "370m", "780m", "1.3b", "2.7b"] and "hybrid_tiny" in rows["continue_from_hf"]
    assert "tiny-mag" in rows["titans"] and "v5p:8x8x16" in rows["hybrid_8b"] and max(map(len, lines)) <= 100
    listed = {f"{name}:{size}" for name, sizes in rows.items() for size in sizes}
    assert {name for name in config_names() if ":" in name} <= listed


def test_a_name_that_is_not_there_is_told_its_nearest(capsys):
    check_fails(capsys, ["--config", "memba2:1.3b"], "did you mean mamba2:1.3b")
    assert train_main(["--config", "qqq"]) == 2
    assert len(capsys.readouterr().err) < 120


@pytest.mark.parametrize(
    "text, told",
    [
        ("x = 1\n", "has no function config()"),
        ("config = 3\n", "has no function config()"),
        ("def config():\n    return 3\n", "config() returned int"),
        ("import sys\nsys.exit('bye')\n", "SystemExit: bye"),
        ("def config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_config_file_of_ones_own_that_gives_none_is_one_line(capsys, tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    check_fails(capsys, ["--config", str(tmp_path / "mine.py")], "mine.py: ", told)


def test_every_command_has_a_help_with_all_its_options(capsys):
    for command in COMMANDS:
        assert main([command.name, "--help"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"usage: hybridlm {command.name}") and said.count("\n") > 5, command.name
        assert main([command.name, "--hlep"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_list_of_commands(capsys):
    assert main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: hybridlm train --config NAME") and "a published checkpoint" in "".join(lines)
    assert {line.removeprefix("usage:").split()[1] for line in lines} == {c.name for c in COMMANDS} | {
        "COMMAND",
        "--version",
    }
    check_fails(capsys, ["convert", "from-hf", "a"], "RUN; see hybridlm convert from-hf --help", command=main)
    check_fails(capsys, ["convert", "sideways"], "sideways", command=main)


def test_a_start_that_computes_nothing_waits_for_nothing_slow():
    """Help and mistakes come before the model's and the trainer's imports."""
    slow = "('hybridlm.model.model', 'hybridlm.train.loop', 'orbax', 'grain', 'tokenizers', 'transformers')"
    starts = {("--help",): "main", ("generate", "--help"): "main", ("--config", "hybrid_tny"): "train_main"}
    for words, start in starts.items():
        code = f"import sys; from hybridlm.cli import {start}; {start}({list(words)}); "
        code += f"print([name for name in {slow} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]", (words, done.stderr)


@pytest.mark.parametrize("words", [["train.py"], ["-m", "hybridlm", "train"]])
def test_as_a_process(words):
    done = subprocess.run(
        [sys.executable, *words, "--config", "hybrid_tny"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_error_lines_are_always_printable(tmp_path):
    """Whatever a word holds, and whether or not anybody reads; the exit code says the same."""
    words = [sys.executable, "train.py", "--config", b"hybrid_tiny", b"--data.path=\xff\x1b.txt"]
    for env in ({}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}):
        done = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
        assert b"udcff" in done.stderr
    for closed in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        command = f"exec {sys.executable} train.py --config nothing {closed}"
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_exit_codes():
    assert (Exit.COMPLETE, Exit.FAILED, Exit.CHANGE, Exit.AGAIN) == (0, 1, 2, 75)
    errors = {
        ConfigError("a\nb"): (2, "a b"),
        RunError("a\nb"): (1, "a b"),
        AgainError("a"): (75, "a"),
        FileNotFoundError(2, "No such file", "x"): (1, "x: No such file"),
        KeyboardInterrupt(): (130, "interrupted"),
        ValueError("a"): (1, None),
    }
    assert {error: explained(error) for error in errors} == errors


def test_times_and_numbers():
    assert [clock(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert [short(n) for n in (0.5, 999, 1234, 45_600_000, 7.89e9, 2e12)] == [
        "0.5",
        "999",
        "1.23k",
        "45.6M",
        "7.89B",
        "2T",
    ]


def test_lines_off_a_terminal(capsys):
    display = Display(20)
    display.start(0)
    values = {"loss": 1.5, "tokens_per_second": 12_345.0, "mfu": 0.314, "skipped": 2, "seconds_left": 90}
    display.update(10, values, log=True)
    display.update(11, values, log=False)
    display.stop()
    assert capsys.readouterr().out == "step 10/20  loss 1.5000  12.3k tokens/s  MFU 31.4%  skipped 2  1:30 left\n"


def test_arrays_of_a_checkpoint_that_cannot_be_written_say_nothing_each():
    """The save says it once; anything else that threads say is said."""
    said = []
    hook = without_late_writes(said.append)
    for error in (RuntimeError("Event loop is closed"), RuntimeError("Event loop is slow"), ValueError("cut")):
        hook(types.SimpleNamespace(exc_value=error))
    assert [str(unraisable.exc_value) for unraisable in said] == ["Event loop is slow", "cut"]


def test_devices_that_cannot_be_opened_are_told_by_whoever_needs_them(monkeypatch):
    """They are opened in a thread of a start, which says nothing."""
    asked = []

    def devices():
        asked.append(True)
        raise RuntimeError("no device")

    monkeypatch.setattr(jax, "devices", devices)
    assert _find_devices() is None and asked == [True]
