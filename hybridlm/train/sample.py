# SPDX-License-Identifier: Apache-2.0
"""Text from trained parameters: of a run that has them in memory, or of a run's folder."""

from pathlib import Path

import jax
import jax.numpy as jnp

from hybridlm.config import Config
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import require
from hybridlm.model.generation import generate
from hybridlm.model.model import HybridLM
from hybridlm.train import loading
from hybridlm.train.loading import load_model

__all__ = ["load_model", "load_run", "sample_text"]


def sample_text(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> str:
    """The prompt and what the model writes after it, up to the end of the document. ConfigError without a token."""
    tokens = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    require(len(tokens) > 0, "prompt ('') has no token and the tokenizer no start token: give --prompt")
    new = generate(
        model, jnp.asarray(tokens)[None], max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, eos_id=tokenizer.eos_id, key=key,
    )  # fmt: skip
    ids = jax.device_get(new)[0].tolist()
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return prompt + tokenizer.decode(ids)


def load_run(
    path: Path, step: int | None = None, like: Config | None = None, tokenizer: str | None = None
) -> tuple[HybridLM, Tokenizer, int]:
    """(model, tokenizer, step) of a run's newest checkpoint, or of one step; arguments and errors as of
    `hybridlm.load_run`."""
    run = loading.load_run(path, step, like=like, tokenizer=tokenizer)
    return run.model, run.tokenizer, run.step
