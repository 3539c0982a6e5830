# SPDX-License-Identifier: Apache-2.0
"""A small hybrid learns real text, the embedded corpus, through the real command."""

import numpy as np
import pytest

from hybridlm.cli import train_main
from hybridlm.train.run_folder import read_metrics


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_loss_falls_on_the_embedded_corpus(tmp_path, capsys, one_device, name):
    words = [
        "--config=hybrid_tiny", "--model.d_model=64", "--model.pattern=M*-", "--data.seq_len=64",
        "--data.batch_size=8", "--run.steps=80", "--optim.warmup_steps=5", f"--optim.name={name}", "--optim.lr=1e-2",
        "--run.eval_batches=4", "--run.sample_tokens=0", "--run.tensorboard=False", f"--run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert train_main(words) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[0] > 3 and np.all(np.diff(losses[:4]) < 0) and losses[-1] < 0.6 * losses[0]
    assert [r["bits_per_byte"] for r in records if r["kind"] == "val"][-1] < 4.0
    assert "byte bigram: 3." in capsys.readouterr().out
