# SPDX-License-Identifier: Apache-2.0
"""Held-out sets while a run trains: each on the evaluation cadence, with a record by name."""

import math

import pytest

from hybridlm.cli import train_main
from hybridlm.train.plot import sets_of
from hybridlm.train.run_folder import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


def validations(folder):
    return {r["step"]: r for r in read_metrics(folder / "run" / "metrics.jsonl") if r["kind"] == "val"}


def test_each_set_has_its_loss_and_all_have_one(mini, capsys):
    """The sets may change on resume. Their sum over tokens is the loss that there was before sets had names."""
    words = ["--config", str(mini), "--run.eval_every=2", "--run.eval_batches=0", "--run.sample_tokens=0"]
    folder = mini.parent
    (folder / "long.txt").write_text((folder / "val-1.txt").read_text() * 3)
    assert train_main([*words, "--run.steps=2"]) == 0
    capsys.readouterr()
    two = [*words, "--data.val_path", f"first={folder}/val-0.txt", f"{folder}/long.txt"]
    assert train_main([*two, "--run.steps=4", "--run.tensorboard=True"]) == 0
    said = capsys.readouterr().out
    records = validations(folder)
    assert set(records[2]) == {"kind", "step", "loss", "bits_per_byte"} and set(records) == {2, 4}
    record = records[4]
    names = ("first", "long")
    assert set(record) == {*records[2], *(f"{key}/{name}" for key in ("loss", "bits_per_byte") for name in names)}
    n_bytes = [len((folder / file).read_text()) for file in ("val-0.txt", "long.txt")]
    losses, bits = ([record[f"{key}/{name}"] for name in names] for key in ("loss", "bits_per_byte"))
    assert losses[0] != losses[1]
    for loss, bit, size in zip(losses, bits, n_bytes, strict=True):  # a file is a document of size + 1 targets
        assert bit == pytest.approx(loss * (size + 1) / size / math.log(2))
    pairs = [size + 1 for size in n_bytes]
    total = sum(loss * n for loss, n in zip(losses, pairs, strict=True))
    assert record["loss"] == pytest.approx(total / sum(pairs))
    assert record["bits_per_byte"] == pytest.approx(total / sum(n_bytes) / math.log(2))
    told = ", ".join(f"{name} {bit:.3f}" for name, bit in zip(names, bits, strict=True))
    assert f"step 4: validation {record['bits_per_byte']:.3f} bits per byte ({told}), loss {record['loss']:.4f}" in said
    assert sets_of(list(records.values())) == list(names)
    board = b"".join(file.read_bytes() for file in (folder / "run").rglob("events.*"))
    assert b"val/loss/first" in board and b"val/bits_per_byte/long" in board
