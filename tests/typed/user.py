# SPDX-License-Identifier: Apache-2.0
"""A program of a user, checked by `make types`: what it is told of types, and that wrong calls are reported.

A line with `type: ignore` has to be an error: mypy reports those that are none.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hybridlm
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.layers import MLP, AttentionMixer, FeedForward, Mamba2, Mamba2Mixer, MoE, MoEFeedForward
from pallas_kernels import attention, ssd


def ops(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, x_in_numpy: np.ndarray[Any, Any]) -> None:
    """Results hang on what is asked for; lists are no arrays."""
    assert_type(ssd(x, dt, A, B, B), jax.Array)
    assert_type(ssd(x_in_numpy, dt, A, B, B, return_final_state=True), tuple[jax.Array, jax.Array])
    assert_type(attention(x, x, x, window=8), jax.Array)
    ssd([[1.0]], dt, A, B, B)  # type: ignore[call-overload]
    ssd(x, dt, A, B, B, chunks=8)  # type: ignore[call-overload]
    attention(x, x, x, window=8.5)  # type: ignore[arg-type]


def layers(x: jax.Array, ids: jax.Array) -> None:
    """Mixers take their own block and give an array, those with statistics that, too."""
    mixer = Mamba2Mixer(Mamba2(d_state=16, activation="silu"), 64, rngs=nnx.Rngs(0), dtype=jnp.float32)
    assert_type(mixer(x, segment_ids=ids), jax.Array)
    assert_type(MoEFeedForward(MoE(), 64, rngs=nnx.Rngs(0))(x)[0], jax.Array)
    FeedForward(MLP(), 64)  # type: ignore[call-arg]
    AttentionMixer(Mamba2(), 64, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    Mamba2(d_stat=16)  # type: ignore[call-arg]
    Mamba2(activation="sulu")  # type: ignore[arg-type]
    mixer([[1.0]])  # type: ignore[arg-type]


def models(folder: str, tokens: jax.Array) -> None:
    """What `hybridlm` exports."""
    config = hybridlm.load_config("hybrid_tiny", {"model.d_model": 64})
    model = hybridlm.HybridLM(config.model, rngs=nnx.Rngs(0))
    assert_type(model(tokens), jax.Array)
    assert_type(hybridlm.generate(model, tokens, max_new_tokens=8), jax.Array)
    hybridlm.generate(model, tokens, cache_types=hybridlm.CacheTypes(keys="int8", states="bfloat16"))
    hybridlm.CacheTypes(keys="int4")  # type: ignore[arg-type]
    run = hybridlm.load_run(folder, mesh=hybridlm.make_mesh(hybridlm.MeshConfig(fsdp=2)))
    assert_type(run.model, hybridlm.HybridLM)
    assert_type(run.tokenizer, Tokenizer)
    assert_type(run.step, int)
    hybridlm.load_run(folder, "newest")  # type: ignore[arg-type]
    hybridlm.HybridLM(config, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    hybridlm.generate(model, "text", max_new_tokens=8)  # type: ignore[arg-type]
    hybridlm.no_such_name  # type: ignore[attr-defined]  # noqa: B018
