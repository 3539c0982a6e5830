# SPDX-License-Identifier: Apache-2.0
"""`hybridlm generate` and `hybridlm chat` as typed: prompts, files, standard input, a terminal, a closed pipe."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.hf import to_hf
from hybridlm.layers.cache import CacheTypes
from hybridlm.model import decoding
from hybridlm.train.sample import load_run
from tests.hf.hf_support import golden

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "tests" / "fixtures" / "runs" / "hybrid" / "run")
GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


def said(capsys, *words, stdin=None, code=0, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    assert main(list(words)) == code
    return capsys.readouterr()


def texts(out):
    return [json.loads(line) for line in out.splitlines()]


def test_prompts_from_everywhere(capsys, tmp_path, monkeypatch):
    """Each as if it were alone."""
    (tmp_path / "whole.txt").write_text("ab\ncd\n")
    (tmp_path / "lines.txt").write_bytes(b"one\r\n\ntwo")
    words = ["--run", RUN, *GREEDY, "--json", "--quiet"]
    mixed = said(
        capsys, "generate", *words, "--prompt", "x", "y", "--prompt=-z", "--prompt-file", str(tmp_path / "whole.txt"),
        "--prompt-lines", str(tmp_path / "lines.txt"), "-", stdin=b"\n three\n", monkeypatch=monkeypatch,
    )  # fmt: skip
    found = texts(mixed.out)
    assert [line["prompt"] for line in found] == ["x", "y", "-z", "ab\ncd", "one", "two", " three"]
    assert "written" not in mixed.err
    alone = said(capsys, "generate", "--run", RUN, *GREEDY, "--prompt", "one")
    assert alone.out == "one" + found[4]["text"] + "\n" and "tokens/s" in alone.err
    stop = found[4]["text"][2]
    stopped = texts(said(capsys, "generate", *words, "--prompt", "one", "--stop", "no such", stop).out)[0]
    assert stopped["reason"] == "stop" and stopped["text"] == found[4]["text"].split(stop)[0]


@pytest.mark.slow
def test_caches_stored_smaller(capsys, monkeypatch):
    """The options reach the cache, of texts and of conversations."""
    made, original = [], decoding._empty

    def note(*args):
        made.append(args[-1])
        return original(*args)

    monkeypatch.setattr(decoding, "_empty", note)
    words = ["--run", RUN, *GREEDY, "--cache.keys=int8", "--cache.states", "bfloat16"]
    assert said(capsys, "generate", *words, "--prompt", "one").out.startswith("one")
    said(capsys, "chat", *words, stdin=b"ab\n", monkeypatch=monkeypatch)
    assert made == [CacheTypes("int8", "bfloat16")] * 2


@pytest.mark.slow
def test_on_a_mesh(capsys, monkeypatch, tmp_path):
    """All devices write what one does, a run's model and a published one, several rows and one."""
    to_hf(load_run(Path(RUN))[0], tmp_path / "hf", family="hybridlm")
    for model in (["--run", RUN], ["--hf", str(tmp_path / "hf"), "--data.tokenizer=byte"]):
        words = ["generate", *model, *GREEDY, "--json", "--quiet", "--prompt", "x", "the second"]
        alone = texts(said(capsys, *words).out)
        for mesh in (["--mesh.tensor=2"], ["--mesh.fsdp", "4"]):
            assert texts(said(capsys, *words, *mesh).out) == alone
    talk = lambda *mesh: said(
        capsys, "chat", "--run", RUN, *GREEDY, *mesh, stdin=b"hello\n", monkeypatch=monkeypatch
    ).out  # fmt: skip
    assert talk("--mesh.fsdp=-1", "--mesh.data=1") == talk()


def test_several_processes_and_wrong_meshes_are_one_line(capsys, monkeypatch):
    words = ["generate", "--run", RUN, "--prompt=a"]
    assert said(capsys, *words, "--mesh.fsdp=3", code=2).err.startswith("error: mesh (data -1 x fsdp 3): 8 devices")
    assert "mesh.wings" in said(capsys, *words, "--mesh.wings=3", code=2).err
    for name, value in (("COORDINATOR_ADDRESS", "localhost:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    for command in (words, ["chat", "--run", RUN]):
        error = said(capsys, *command, code=2).err
        assert f"hybridlm {command[0]} is of one process, and this is one of several" in error
        assert error.count("\n") == 1


def test_a_published_folder(capsys, tmp_path):
    model = golden("mamba2")[0]
    to_hf(model, tmp_path / "published", family="mamba2")
    words = ["generate", "--hf", str(tmp_path / "published"), "--prompt", "AB", "--data.tokenizer", "byte", *GREEDY]
    if model.config.vocab_size < 258:
        assert main(words) == 2 and "beyond the model's vocab_size" in capsys.readouterr().err
    else:
        assert main(words) == 0 and capsys.readouterr().out.startswith("AB")


def test_a_terminal_is_sent_no_escape_sequence(monkeypatch):
    read, write = pty.openpty()
    with os.fdopen(write, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["generate", "--run", RUN, *GREEDY, "--prompt", "a\x1b[31mb\u009b"]) == 0
    shown = os.read(read, 10_000)
    os.close(read)
    assert shown.startswith(b"a^[[31mb\\x9b") and b"\x1b" not in shown


def test_chat_from_a_pipe(capsys, monkeypatch):
    talk = b"ab\n/unknown\n/reset\n\nab\n/quit\nab\n"
    done = said(capsys, "chat", "--run", RUN, *GREEDY, "--stats", stdin=talk, monkeypatch=monkeypatch)
    model_texts = done.out.removesuffix("\n")
    half = len(model_texts) // 2
    assert model_texts[:half] == model_texts[half + 1 :] and "> " not in done.out
    assert done.err.count("tokens read") == 2 and "/unknown is no command: /reset forgets" in done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give --run DIR of a run, or --hf FOLDER"),
        (["--run", RUN, "--hf", "x"], "give one of them"),
        (["--hf", "x", "--step", "3"], "--step belongs to a run, but --hf (x) is none"),
        (["--hf", "/nowhere/x"], "/nowhere/x"),
        (["--run", RUN, "--stop", ""], "--stop ('') must not be empty"),
        (["--run", RUN, "--cache.keys", "int4"], "argument --cache.keys: invalid choice: 'int4'"),
        (["--run", RUN, "--top-k", "0"], "--top-k (0) must be at least 1"),
        (["--run", RUN, "--prefill-chunk", "0"], "--prefill-chunk (0) must be at least 1"),
        (["--run", RUN, "--max-new-tokens", "2147483647"], "max_new_tokens (2147483647) must be at most 2147483646"),
    ],
)
def test_errors_are_one_line(capsys, words, told, command="generate"):
    for command in ("generate", "chat") if "2147483647" not in words else ("generate",):
        assert main([command, *words]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and told in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt-file", "/nowhere/x"], "--prompt-file (/nowhere/x): No such file"),
        (["--prompt-file", "bad"], "--prompt-file (bad) is no UTF-8 text: byte 1 is"),
        (["--prompt-lines", "empty"], "--prompt-lines: there is no line that is not empty"),
        (["--prompt-lines", "-", "--prompt-file", "-"], "standard input (-) can be read once"),
        (["--batch", "0"], "--batch (0) must be at least 1"),
    ],
)
def test_prompts_that_cannot_be_read(capsys, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    Path("bad").write_bytes(b"a\xff")
    Path("empty").write_text("\n\n")
    assert main(["generate", "--run", RUN, *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_pipe_that_is_closed_early_is_quiet(command):
    """As `hybridlm generate ... | head -c 3`: nothing but the warning of an old checkpoint is said."""
    words = [sys.executable, "-m", "hybridlm", command, "--run", RUN, "--max-new-tokens", "2000"]
    with subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            process.stdin.write(b"hello\n" if command == "chat" else b"")
            process.stdin.close()
            assert process.stdout.read(3)
            process.stdout.close()
            lines = process.stderr.read().decode().splitlines()
            assert process.wait(timeout=120) == 1
        finally:
            process.kill()
    assert [line for line in lines if "checksums" not in line] == []


def test_the_run_is_only_read(capsys):
    before = sorted((str(path), path.stat().st_mtime_ns) for path in Path(RUN).rglob("*"))
    assert load_run(Path(RUN))[2] == 6
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in Path(RUN).rglob("*"))
