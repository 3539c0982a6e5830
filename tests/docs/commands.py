# SPDX-License-Identifier: Apache-2.0
"""Shell commands of the docs, taken as far as their programs understand them, and no further."""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hybridlm.__main__ import main
from hybridlm.config.find import load_config
from tests.docs.pages import ROOT, project


class Parsed(Exception):
    """A command's words are understood; it would run now."""


def check_shell(code: str) -> None:
    """Checks every command of a block; AssertionError or ConfigError names what is wrong."""
    parsed = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, timeout=60, check=False)
    assert parsed.returncode == 0, parsed.stderr
    for line in code.replace("\\\n", " ").splitlines():
        line = re.sub(r"\s\d?>&?\s*[^\s']+", "", line)  # where the output goes
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and not set(word) <= set("&|;"):
                words.append(word)
            elif words:
                check_command([word for word in words if word not in WORDS_OF_SHELL])
                words = []


def check_command(words: list[str]) -> None:
    """Checks one command, variables before it aside."""
    while words and re.match(r"[A-Za-z_]+=", words[0]):
        words = words[1:]
    if not words or words[0] in SHELL:
        return
    program = Path(words[0]).name
    assert program in PROGRAMS, f"{' '.join(words)}: tests/docs/commands.py knows no program {program!r}"
    PROGRAMS[program](words[1:])


def check_train(words: list[str]) -> None:
    """`--config NAME` and overrides give a config; or `--help` prints."""
    if "--help" in words:
        assert main(["train", *words]) == 0
        return
    at = next((i for i, word in enumerate(words) if word.split("=")[0] == "--config"), None)
    assert at is not None, f"{' '.join(words)}: --config is missing"
    _, equals, name = words[at].partition("=")
    load_config(name if equals else words[at + 1], words[:at] + words[at + (1 if equals else 2) :])


def check_hybridlm(words: list[str]) -> None:
    """A subcommand whose parser takes the words."""
    if words[0] == "train":
        check_train(words[1:])
    else:
        stops_after_parsing(main, words)


def stops_after_parsing(program, words: list[str]) -> None:
    """Runs program(words) until argparse has understood them, or has printed its help."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        try:
            code = program(words)
        except Parsed:
            return
        except SystemExit as done:
            code = done.code
    assert code == 0 and "--help" in words, f"{' '.join(words)} is not understood, see stderr"


def check_python(words: list[str]) -> None:
    """`train.py`, a module with a command line, pytest on files that are there, or another script that is there."""
    if words[0] == "train.py":
        check_train(words[1:])
    elif words[:2] == ["-m", "hybridlm"]:
        check_hybridlm(words[2:])
    elif words[:2] == ["-m", "pytest"]:
        paths = [word.split("::")[0] for word in words[2:] if word.split("::")[0].endswith((".py", "/"))]
        assert all((ROOT / path).exists() for path in paths), f"no such tests: {' '.join(paths)}"
    elif words[0] == "-m":
        stops_after_parsing(importlib.import_module(words[1]).main, words[2:])
    else:
        assert (ROOT / words[0]).is_file(), f"no script {words[0]}"


def check_make(words: list[str]) -> None:
    """Targets and variables of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} \??=" if equals else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE) or name == "ARGS", f"the Makefile has no {name}"


def check_pip(words: list[str]) -> None:
    """`pip install` of the project with extras that it has, or of packages that one of them names."""
    assert words[0] == "install", f"pip {words[0]} is not checked"
    extras = project()["optional-dependencies"]
    known = {re.split(r"[\[<>=]", wanted)[0] for wanteds in extras.values() for wanted in wanteds}
    for word in words[1:]:
        name, _, asked = word.rstrip("]").partition("[")
        if name in (".", "hybridlm"):
            wrong = set(filter(None, asked.split(","))) - set(extras)
            assert not wrong, f"no extra {', '.join(sorted(wrong))}: there are {', '.join(extras)}"
        elif not name.startswith("-"):
            assert name in known, f"no extra of the project names {name}"


def check_cd(words: list[str]) -> None:
    """Into the checkout or a folder of it."""
    assert words == ["hybridlm"] or (ROOT / words[0]).is_dir(), f"no folder {words[0]}"


def check_git(words: list[str]) -> None:
    """A clone, of wherever the reader has it from."""
    assert words[0] == "clone", f"git {words[0]} is not checked"


def check_flags(words: list[str]) -> None:
    """A program that is not here: its subcommand and flags are among those that its reference lists (see FLAGS)."""
    plain = [word for word in words if not word.startswith("-")]
    command = next((c for c in sorted(FLAGS, key=len, reverse=True) if plain[: len(c.split())] == c.split()), None)
    assert command is not None, f"{' '.join(words)}: no command that tests/docs/commands.py knows"
    for word in words:
        name, _, value = word.partition("=")
        if not word.startswith("-"):
            continue
        assert name in FLAGS[command].split(), f"{command} has no flag {name}"
        if name == "--command":
            check_shell(value)


def check_srun(words: list[str]) -> None:
    """Flags of srun, then a command of ours."""
    at = next(i for i, word in enumerate(words) if not word.startswith("-"))
    check_flags(["srun", *words[:at]])
    check_command(words[at:])


def check_nohup(words: list[str]) -> None:
    """The command behind it."""
    check_command(words)


FLAGS = {
    "gcloud compute tpus queued-resources create": "--node-id --node-count --node-prefix --zone --project "
    "--accelerator-type --runtime-version --service-account --spot --reserved --network --subnetwork "
    "--valid-until-duration",
    "gcloud compute tpus queued-resources describe": "--zone --project --format",
    "gcloud compute tpus queued-resources delete": "--zone --project --force --quiet --async",
    "gcloud compute tpus tpu-vm ssh": "--zone --project --worker --command --internal-ip --ssh-key-file",
    "gcloud container clusters get-credentials": "--location --project",
    "kubectl apply": "-f --server-side",
    "kubectl get": "-o --watch",
    "kubectl delete": "",
    "kubectl logs": "--follow --selector --container --tail",
    "srun": "--kill-on-bad-exit --ntasks-per-node --nodes --ntasks",
    "sbatch": "",
    "squeue": "--me",
    "scancel": "--signal",
    "scontrol requeue": "",
    "tail": "-f",
    "pkill": "-TERM -f",
}
"""Command of a program of others -> its flags that pages use, as the program's reference has them."""
WORDS_OF_SHELL = ("do", "done", "then", "fi", "else")
SHELL = ("for", "if", "wait", "exit", "export", "[")

PROGRAMS = {
    **{name: lambda words, name=name: check_flags([name, *words]) for name in {c.split()[0] for c in FLAGS}},
    "srun": check_srun,
    "nohup": check_nohup,
    "python": check_python,
    "hybridlm": check_hybridlm,
    "make": check_make,
    "pip": check_pip,
    "cd": check_cd,
    "git": check_git,
}
