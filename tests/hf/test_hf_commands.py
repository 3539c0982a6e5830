# SPDX-License-Identifier: Apache-2.0
"""`hybridlm convert` and training on from a published checkpoint, as typed."""

import json
import shlex
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hybridlm.cli import main
from hybridlm.config.find import load_config
from hybridlm.data.as_files import files_of
from hybridlm.data.tokenizer import ByteTokenizer
from hybridlm.train.checkpoint import finished_steps
from hybridlm.train.loading import load_run
from hybridlm.train.run_folder import read_metrics, stored_config
from tests.hf.hf_support import FOLDER
from tests.train.conftest import mini, one_device, write_texts  # noqa: F401 (fixtures)

LLAMA = FOLDER / "llama"


@pytest.fixture
def bytes_checkpoint(tmp_path):
    """A golden checkpoint whose vocabulary is wide enough for bytes."""
    from safetensors.numpy import save_file

    folder = tmp_path / "published"
    folder.mkdir()
    tensors = load_file(LLAMA / "model.safetensors")
    draw = np.random.default_rng(0).normal(size=(264, 32)).astype(np.float32)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = 0.1 * draw
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 264, "eos_token_id": 77}))
    (folder / "generation_config.json").write_text("{}")
    return folder


def test_there_and_back(bytes_checkpoint, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["convert", "from-hf", str(bytes_checkpoint), str(run)]) == 0
    assert "generate --run" in capsys.readouterr().out
    assert main(["generate", "--run", str(run), "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert main(["convert", "to-hf", str(run), str(out)]) == 0
    published, written = (load_file(folder / "model.safetensors") for folder in (bytes_checkpoint, out))
    assert sorted(published) == sorted(written)
    for name, value in published.items():
        np.testing.assert_array_equal(value, written[name], err_msg=name)
    assert (out / "generation_config.json").is_file()
    assert main(["convert", "from-hf", str(bytes_checkpoint), str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["copy_small_files", "keep_tokenizer", "Checkpoints.save"])
def test_a_conversion_that_was_stopped_begins_again(at, bytes_checkpoint, tmp_path, capsys, monkeypatch):
    """Wherever it stopped, of another source, too; what is not of such a call is never touched."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(bytes_checkpoint, other)
    for name, text in files_of(ByteTokenizer()).items():
        (other / name).write_text(text)
    (other / "generation_config.json").unlink()
    convert = lambda source: main(["convert", "from-hf", str(source), str(run), "--data.tokenizer=byte"])

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"hybridlm.train.published.{at}", stop)
        assert convert(other) == 130
    assert (run / "converting").is_file() and main(["generate", "--run", str(run)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert convert(bytes_checkpoint) == 0
    assert not (run / "converting").exists() and not (run / "published" / "tokenizer.json").exists()
    assert (run / "published" / "generation_config.json").is_file()
    assert load_run(run).step == 0
    (run / "converting").touch()  # of a call that was killed right behind its checkpoint
    assert convert(bytes_checkpoint) == 2 and "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_conversion_that_is_killed_begins_again(bytes_checkpoint, tmp_path):
    """SIGKILL at ten moments of its way."""
    words = [sys.executable, "-m", "hybridlm", "convert", "from-hf", str(bytes_checkpoint)]
    began = time.monotonic()
    subprocess.run([*words, str(tmp_path / "whole")], check=True, timeout=120)
    seconds = time.monotonic() - began
    for i in range(10):
        run = tmp_path / f"run{i}"
        process = subprocess.Popen([*words, str(run)])
        until = time.monotonic() + 0.9 * seconds
        while time.monotonic() < until and not run.exists():
            time.sleep(0.002)
        time.sleep(0.02 * i * i)
        process.kill()
        process.wait()
        code = main(["convert", "from-hf", str(bytes_checkpoint), str(run)])
        assert code == 0 or (code == 2 and finished_steps(run / "checkpoints") == [0])
        assert main(["generate", "--run", str(run), "--data.tokenizer=byte", "--max-new-tokens=2"]) == 0


def test_a_run_of_no_published_family(mini, one_device, capsys):  # noqa: F811
    """Out with its tokenizer and a card of what the run says; in again, and on with the line that is printed then."""
    folder = mini.parent
    run, out, again = folder / "run", folder / "out", folder / "again run"
    words = ["--run.steps=2", "--run.eval_every=1", "--run.sample_tokens=0"]
    words += ["--data.val_path", f"a={folder}/val-0.txt", f"{folder}/val-1.txt"]
    assert main(["train", "--config", str(mini), *words]) == 0
    assert main(["convert", "to-hf", str(run), str(out)]) == 0
    config, card = json.loads((out / "config.json").read_text()), (out / "README.md").read_text()
    assert (config["model_type"], config["bos_token_id"], config["eos_token_id"]) == ("hybridlm", 256, 257)
    assert (out / "tokenizer.json").is_file() and (out / "modeling_hybridlm.py").is_file()
    assert card.count("trust_remote_code=True)") == 2  # transformers asks for it of the tokenizer, too
    for line in (r"/train-\*.txt |", "| steps | 2 |", "| tokens | 512 |", "| validation loss | ", "bits per byte"):
        assert line in card, line
    assert str(folder) not in card and "--config mini.py" in card and "a=val-0.txt val-1.txt" in card and "jax " in card
    capsys.readouterr()
    for words, told in (
        (["generate", "--run", str(out)], "out holds a published checkpoint, not a run: --hf and --init.hf take it"),
        (["generate", "--hf", str(run)], "run holds a run, not a published checkpoint: --run and --init.run take it"),
    ):
        assert main([*words, "--prompt", "a"]) == 2
        assert told in capsys.readouterr().err

    assert main(["convert", "from-hf", str(out), str(again)]) == 0
    printed = capsys.readouterr().out.splitlines()
    line = next(shlex.split(line.partition(": ")[2]) for line in printed if line.startswith("or train on"))
    words = line[line.index("train") :]
    assert f"--init.hf={out}" in words and f"--data.tokenizer={again}/published" in words
    words[words.index("--data.path=texts/*.jsonl")] = f"--data.path={folder}/train-*.txt"
    small = ["--data.seq_len=32", "--data.batch_size=8", "--optim.accumulate=1", f"--data.cache_dir={folder}/cache"]
    assert main([*words, *small, "--run.steps=2", "--run.sample_tokens=0", "--run.tensorboard=False"]) == 0
    assert (folder / "again run_continued" / "checkpoints" / "2").is_dir()
    assert main(["convert", "to-hf", f"{again}_continued", str(folder / "last")]) == 0
    assert "| started from | out |" in (folder / "last" / "README.md").read_text()


def test_training_on(bytes_checkpoint, tmp_path, capsys):
    """The first loss is the published model's, later ones are lower; the run is resumed, and written as a checkpoint
    even when the published folder is gone."""
    texts = tmp_path / "texts"
    texts.mkdir()
    write_texts(texts)
    words = [
        "train", "--config", "configs/continue_from_hf.py", f"--init.hf={bytes_checkpoint}", "--data.seq_len=32",
        f"--data.path={texts}/train-*.txt", f"--data.val_path={texts}/val-*.txt", f"--data.cache_dir={tmp_path}/cache",
        f"--run.dir={tmp_path}/run", "--data.batch_size=8", "--optim.accumulate=1", "--optim.lr=1e-2",
        "--optim.warmup_steps=1", "--run.log_every=1", "--run.eval_every=-1", "--run.sample_tokens=0",
        "--run.tensorboard=False", "--model.compute_dtype=float32",
    ]  # fmt: skip
    assert main([*words, "--run.steps=10"]) == 0
    assert "parameters of" in capsys.readouterr().out
    assert main([*words, "--run.steps=12"]) == 0
    assert "going on from the checkpoint of step 10" in capsys.readouterr().out
    losses = [
        record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    config = stored_config(tmp_path / "run")
    assert config.model.remat == "mixer"
    bytes_checkpoint.rename(tmp_path / "elsewhere")
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == ("llama", 77)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("elsewhere", "out"))
    assert jax.tree.map(np.shape, before) == jax.tree.map(np.shape, after)
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def test_the_folder_has_to_be_given(capsys):
    assert main(["train", "--config", "continue_from_hf"]) == 2
    assert "give --init.hf=FOLDER" in capsys.readouterr().err
    assert main(["train", "--config", "continue_from_hf", "--init.hf=nowhere"]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_the_model_can_still_be_overridden():
    config = load_config("continue_from_hf", [f"--init.hf={LLAMA}", "--model.remat=full"])
    assert (config.model.remat, config.model.pattern, config.model.compute_dtype) == ("full", "*-*-", "bfloat16")
