# SPDX-License-Identifier: Apache-2.0
"""Text from trained parameters: of a run that has them in memory, or of a run's folder."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import storage
from hybridlm.config import Config, DataConfig
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import require
from hybridlm.model.generation import generate
from hybridlm.model.init import abstract
from hybridlm.model.model import HybridLM
from hybridlm.train.base import read_params
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.run_folder import stored_config
from hybridlm.train.tokenizer_copy import IDENTITY, check_tokenizer, kept_tokenizer


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
    """(model, tokenizer, step) of a run's newest checkpoint, or of one step. ConfigError where there is none.

    like: a config whose own classes the run may have used; see from_dict. tokenizer: as data.tokenizer; None: that of
    the run.
    """
    model, config, record, found = load_model(path, step, like)
    if tokenizer is None:
        return model, kept_tokenizer(config.data, path, record.get(IDENTITY)), found
    return model, check_tokenizer(DataConfig(tokenizer=tokenizer), record.get(IDENTITY), path), found


def load_model(path: Path, step: int | None = None, like: Config | None = None) -> tuple[HybridLM, Config, dict, int]:
    """(model, config, loop record, step); as load_run, but for the tokenizer."""
    storage.check(path, "the run's folder")
    config = stored_config(path, like)
    steps = finished_steps(path / "checkpoints")
    require(bool(steps), f"{path} has no checkpoint yet")
    require(step is None or step in steps, f"step ({step}) has no checkpoint in {path}: there are {steps}")
    graphdef, shapes, _ = abstract(config.model)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    checkpoints = Checkpoints(path / "checkpoints", keep=1, read_only=True)
    try:
        found, params, record = read_params(checkpoints, path, config, wanted, steps if step is None else [step])
    finally:
        checkpoints.close()
    return nnx.merge(graphdef, params), config, record, found
