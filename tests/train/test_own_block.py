# SPDX-License-Identifier: Apache-2.0
"""A block that is defined in a user's config file: its run resumes, and generates once the file is named."""

import pytest

from hybridlm.cli import main
from hybridlm.train.run_folder import read_metrics

BLOCK = """
from dataclasses import dataclass, replace
from hybridlm.config import MLP

@dataclass(frozen=True)
class Wide:
    times: int = 2
    FREE, KEPT, STATISTICS, MIXES_TOKENS = frozenset(), MLP.KEPT, {}, False
    def _mlp(self, d_model): return MLP(d_ff=self.times * d_model)
    def check(self, d_model): self._mlp(d_model).check(d_model)
    def build(self, d_model, make): return self._mlp(d_model).build(d_model, make)
    def split(self, d_model): return self._mlp(d_model).split(d_model)
    def flops(self, d_model, seq_len): return self._mlp(d_model).flops(d_model, seq_len)
    def resolved(self, d_model): return self

def config():
    plain = plain_config()
    return replace(plain, model=replace(plain.model, pattern="-W", blocks={**plain.model.blocks, "W": Wide()}))
"""


@pytest.fixture
def own(mini, one_device):
    """The file of a small run whose model has a block of its own."""
    mini.write_text(mini.read_text().replace("def config()", "def plain_config()") + BLOCK)
    return mini


def test_a_run_with_a_block_of_its_own(own, capsys):
    run = own.parent / "run"
    words = ["train", "--config", str(own), "--run.log_every=1", "--run.eval_every=-1", "--run.sample_tokens=0"]
    assert main([*words, "--run.steps=3"]) == 0
    assert main([*words, "--run.steps=5"]) == 0
    assert "going on from the checkpoint of step 3" in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert main([*words, "--run.steps=6", "--model.blocks.W.times=3"]) == 2
    assert "model.blocks.W.times (2 there, 3 now)" in capsys.readouterr().err

    generate = ["generate", "--run", str(run), "--prompt", "ab", "--max-new-tokens", "3"]
    assert main(generate) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'Wide'" in error and "give the config file that defines it" in error
    assert main([*generate, "--config", str(own)]) == 0
    assert capsys.readouterr().out.startswith("ab")

    publish = ["convert", "to-hf", str(run), str(own.parent / "out")]
    assert main(publish) == 2
    assert "give the config file that defines it" in capsys.readouterr().err
    assert main([*publish, "--config", str(own)]) == 2  # it is known then, and of no published family
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "give the config file" not in error and not (own.parent / "out").exists()
