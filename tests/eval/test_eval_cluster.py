# SPDX-License-Identifier: Apache-2.0
"""`hybridlm eval` in two processes, through the real command: what one process finds, and refusals of one line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def together(folder: Path, *words: str) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of two processes on one machine, each with caches of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, "-m", "hybridlm", "eval", *words, f"--cluster.coordinator={address}"]
    processes = [
        subprocess.Popen(
            [*command, "--cluster.processes=2", f"--cluster.index={i}", f"--data.cache_dir={folder}/cache{i}"],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for i in range(2)
    ]  # fmt: skip
    own = lambda said: "".join(line for line in said.splitlines(True) if not line.startswith("[Gloo]"))
    try:
        said = [process.communicate(timeout=300) for process in processes]
        return [(process.returncode, own(out), error) for process, (out, error) in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_equal_one(trained, command, tmp_path):
    """A run's own sets, and others; the first process alone says what was found."""
    run = ("--run", str(trained / "run"), "--json")
    for words in (("--mesh.fsdp=2",), (f"--data.val_path=long={trained}/long.jsonl", "--data.packing=best_fit")):
        code, said, error = command(*run, *words)
        assert code == 0, error
        first, second = together(tmp_path, *run, *words)
        assert (first[0], second[0]) == (0, 0), (first, second)
        assert not second[1].strip()
        expected, found = json.loads(said), json.loads(first[1])
        assert found["sets"].keys() == expected["sets"].keys()
        for name, of_set in expected["sets"].items():
            for key in ("documents", "bytes", "tokens"):
                assert found["sets"][name][key] == of_set[key]
            assert found["sets"][name]["loss"] == pytest.approx(of_set["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, told",
    [
        (("--data.val_path=nowhere.txt",), "data.val_path ('nowhere.txt'): no file matches"),
        pytest.param(
            ("--tasks", "arc_easy"), "tasks are of one process, and this is one of 2: start it in one",
            marks=pytest.mark.harness,
        ),
    ],
    ids=["no_text", "tasks"],
)  # fmt: skip
def test_what_cannot_be_ends_both_in_one_line(trained, tmp_path, words, told):
    for code, said, error in together(tmp_path, "--run", str(trained / "run"), *words):
        lines = [line for line in error.splitlines() if line.startswith("error")]
        assert code == 2 and len(lines) == 1 and told in lines[0] and not said, error
