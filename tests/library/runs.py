# SPDX-License-Identifier: Apache-2.0
"""A run's folder with a checkpoint in it, without a run: the parameters as they are drawn."""

from pathlib import Path

from flax import nnx

from hybridlm import HybridLM
from hybridlm.config import Config
from hybridlm.config.tree import to_dict
from hybridlm.data import load_tokenizer
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.tokenizer_copy import IDENTITY


def write_run(folder: Path, config: Config, steps: tuple[int, ...] = (1,)) -> None:
    """The folder; the parameters of step n are those that the seed n gives."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=len(steps))
    tokenizer = load_tokenizer(config.data.tokenizer, bos=None, eos=None)
    for step in steps:
        params = nnx.to_pure_dict(nnx.state(HybridLM(config.model, rngs=nnx.Rngs(step)), nnx.Param))
        checkpoints.save(step, {"params": params}, to_dict(config), {IDENTITY: tokenizer.fingerprint})
    checkpoints.close()
