# SPDX-License-Identifier: Apache-2.0
"""Folders of runs as training leaves them, written without training."""

import json
from dataclasses import replace
from pathlib import Path

from hybridlm.config import Config
from hybridlm.config.overrides import override
from hybridlm.config.stored import save_config

TINY = override(
    Config(name="tiny"),
    ["--model.vocab_size=264", "--model.d_model=32", "--model.compute_dtype=float32", "--data.seq_len=16",
     "--data.batch_size=4", "--run.steps=20"],
)  # fmt: skip
PER_STEP = 64
"""Tokens."""


def train(step: int, **values) -> dict:
    """A record of an interval."""
    loss = values.pop("loss", 5.0 / step)
    return {
        "kind": "train", "step": step, "loss": loss, "bits_per_byte": loss and loss / 2, "tokens": step * PER_STEP,
        "tokens_per_second": 32.0, "mfu": 0.25, "lr": 1e-3, "grad_norm": 1.0,
    } | values  # fmt: skip


def val(step: int, loss: float) -> dict:
    """A record of an evaluation."""
    return {"kind": "val", "step": step, "loss": loss, "bits_per_byte": loss / 2}


def start(step: int = 0, **values) -> dict:
    """The record of a start."""
    return {"kind": "start", "step": step, "host": "h", "devices": "1 x cpu", "command": "python train.py"} | values


END = {"kind": "end", "step": 20, "seconds": 12.0}
WHOLE = [start(), *(train(step) for step in range(2, 21, 2)), val(10, 0.6), val(20, 0.3), END]
"""Of a run of 20 steps from its start to its end."""


def write_run(folder: Path, records=WHOLE, steps=(20,), config: Config = TINY, sample: bytes | None = None) -> Path:
    """A run's folder with these records and checkpoints of these steps; the folder."""
    folder.mkdir(parents=True)
    save_config(replace(config, run=replace(config.run, dir=str(folder))), folder / "config.json")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    if sample is not None:
        (folder / "sample.txt").write_bytes(sample)
    return folder
