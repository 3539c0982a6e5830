# SPDX-License-Identifier: Apache-2.0
"""A mixer that the project does not know: by its contract alone it trains, resumes, shards, counts and decodes.

The block and its mixer are what a file of `hybridlm/layers` would hold; see `hybridlm/layers/block.py` for what each
part promises.
"""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import hybridlm
from hybridlm import sharding
from hybridlm.config import Branch, Config, ConfigError, DataConfig, MeshConfig, ModelConfig, OptimConfig, Parallel
from hybridlm.errors import require
from hybridlm.layers import cache as caches
from hybridlm.layers import params
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, free_fields, on_arrays
from hybridlm.model.flops import forward_flops
from hybridlm.model.init import check_model
from hybridlm.model.statistics import inspected
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.step import make_program
from pallas_kernels.segments import document_numbers
from tests.model import properties
from tests.model.model_support import log_likelihoods, small


@dataclass(frozen=True)
class Average:
    """Gated exponential moving average: h_t = a h_(t-1) + (1 - a) x_t for each channel, then silu(z_t) h_t."""

    width: int = 32
    """Channels F."""

    FREE = frozenset()
    KEPT: ClassVar = {"average": Kept("moving average", kernels=True)}
    STATISTICS: ClassVar = {"decay": Statistic("average_decay")}
    MIXES_TOKENS = True

    def __post_init__(self):
        require(self.width > 0, f"width ({self.width}) must be positive")

    def check(self, d_model: int) -> None:
        """Any width fits."""

    def build(self, d_model: int, make: Make) -> "AverageMixer":
        return make.mixer(AverageMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        return [("width", self.width, "d_ff")]

    def flops(self, d_model: int, seq_len: int) -> float:
        return 2.0 * 3 * d_model * self.width

    def resolved(self, d_model: int) -> "Average":
        return self


class AverageMixer(nnx.Module):
    """Two projections, the average of one, the gate of the other, a projection back."""

    cache_grows = False
    __call__ = on_arrays

    def __init__(self, config: Average, d_model: int, *, rngs, init_std=0.02, out_std=None, dtype="bfloat16"):
        self.config, self.dtype = config, dtype
        D, F = d_model, config.width
        out_std = init_std if out_std is None else out_std
        self.w_in = params.matrix(rngs, (D, 2, F), ("d_model", None, "d_ff"), init_std, fused_axes=(1,))
        self.decay = params.ones((F,), ("d_ff",), "recurrence")
        self.w_out = params.matrix(rngs, (F, D), ("d_ff", "d_model"), out_std)

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        y_BTD, _ = self._run(x_BTD, tokens.segment_ids, None)
        return Output(y_BTD, {"decay": jax.nn.sigmoid(self.decay[...]).mean()})

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        a_F = jax.nn.sigmoid(self.decay[...])
        return {"decay_min": a_F.min(), "decay_mean": a_F.mean(), "decay_max": a_F.max()}

    def init_cache(self, batch: int, max_len: int) -> dict[str, jax.Array]:
        return {"h": jnp.zeros((batch, self.config.width), jnp.float32)}

    def extend(self, x_BTD, cache, length_B, real_BT=None, layer=None, *, gaps=True):
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        y_BTD, h_BF = self._run(x_BTD, ids, caches.read(cache["h"], layer))
        return y_BTD, caches.write_all(cache, layer, {"h": h_BF})

    def _run(self, x_BTD, segment_ids, h_BF) -> tuple[jax.Array, jax.Array]:
        """All tokens at once, from the average h (None: from nothing); and the average behind the last one."""
        x_BTcF = params.project(x_BTD.astype(self.dtype), self.w_in)
        x_BTF, z_BTF = x_BTcF[:, :, 0].astype(jnp.float32), x_BTcF[:, :, 1]
        a_F = jax.nn.sigmoid(self.decay[...])
        a_BTF = jnp.broadcast_to(a_F, x_BTF.shape)
        b_BTF = (1 - a_BTF) * x_BTF
        if segment_ids is not None:  # a document's first token forgets, padding neither forgets nor adds
            number_BT = document_numbers(segment_ids)
            starts_BT = jnp.pad(number_BT[:, 1:] != number_BT[:, :-1], ((0, 0), (1, 0)))
            real_BT = segment_ids != 0
            a_BTF = jnp.where(starts_BT[..., None], 0.0, jnp.where(real_BT[..., None], a_BTF, 1.0))
            b_BTF = jnp.where(real_BT[..., None], b_BTF, 0.0)
        decay_BTF, h_BTF = jax.lax.associative_scan(
            lambda p, q: (p[0] * q[0], p[1] * q[0] + q[1]), (a_BTF, b_BTF), axis=1
        )
        h_BTF = h_BTF if h_BF is None else h_BTF + decay_BTF * h_BF[:, None]
        h_BTF = checkpoint_name(sharding.constrain(h_BTF, "batch", "tokens", "d_ff"), "average")
        y_BTF = h_BTF.astype(self.dtype) * jax.nn.silu(z_BTF)
        return params.leave(y_BTF, self.w_out), h_BTF[:, -1]


BLOCK = Average(12)
MODEL = small("AX" * 2, {"A": BLOCK, "X": Parallel({"average": Branch(Average(8), out_multiplier=0.5)})})
EVERYTHING_BEFORE = np.tril(np.ones((11, 11), bool))


def test_properties():
    properties.check_config(BLOCK)
    properties.check_split(BLOCK)
    properties.check_padding(BLOCK)
    properties.check_cache_alone(BLOCK)
    properties.check_packed(MODEL)
    properties.check_cache(MODEL)
    properties.check_causal(MODEL, EVERYTHING_BEFORE)
    properties.check_remat(BLOCK, "average")


def test_it_shards():
    properties.check_devices(BLOCK, MeshConfig(1, fsdp=2, tensor=2, context=2))
    mesh = sharding.make_mesh(MeshConfig(1, tensor=8))
    with pytest.raises(ConfigError, match=r"^model.blocks.A.width \(12\) not divisible by mesh.tensor \(8\)$"):
        check_model(replace(MODEL, vocab_size=32), mesh)


def test_it_counts():
    assert BLOCK.flops(properties.D, 8) == properties.flops_by_hand(BLOCK, 0.0)
    assert forward_flops(MODEL, 8) == 2 * 2.0 * 3 * 16 * (12 + 8) + 2 * 16 * MODEL.vocab_size
    assert free_fields(MODEL.blocks["X"]) == set()


def test_it_is_inspected():
    run = lambda model: inspected(MODEL, model.hidden_with_stats(np.array([[1, 2, 3]]), inspect=True)[1])
    model = properties.build(MODEL)
    found = jax.jit(run)(model)
    lowest = 1 / (1 + np.exp(-model.groups[0][0].mixer.decay[...].min()))  # of all depths
    np.testing.assert_allclose(found["A.Average"]["decay_min"], lowest, rtol=1e-6)
    assert found["X.Parallel"].keys() == {"average.decay_min", "average.decay_mean", "average.decay_max"}


def test_it_generates():
    model, prompt = properties.build(MODEL), np.array([[1, 2, 3]])
    new = hybridlm.generate(model, prompt, max_new_tokens=4)
    longer = np.concatenate([prompt, new], axis=1)
    np.testing.assert_array_equal(np.argmax(model(longer[:, :-1]), axis=-1)[:, 2:], new)


def test_it_trains_and_resumes(tmp_path):
    """Four steps are two, a checkpoint, and two; the loss falls and the block's statistic is in the metrics."""
    config = Config(
        model=ModelConfig(32, 16, "A", {"A": BLOCK}, compute_dtype="float32", remat="kernels"),
        data=DataConfig(seq_len=12, batch_size=4),
        optim=OptimConfig(lr=0.03, warmup_steps=1, schedule="constant"),
    )
    mesh = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
    tokens_BT = np.tile(np.arange(13, dtype=np.int32), (4, 1))
    ones_BT, place_BT = np.ones((4, 12), np.int32), tokens_BT[:, :-1]
    batch = {"tokens": place_BT, "targets": tokens_BT[:, 1:], "segment_ids": ones_BT, "positions": place_BT}

    def train(program, state, steps):
        for _ in range(steps):
            state, metrics = program.train_step(state, batch)
        return state, metrics

    @functools.partial(jax.jit, static_argnums=0)
    def mean_loss(graphdef, params):
        return -log_likelihoods(nnx.merge(graphdef, params), batch["tokens"], batch["targets"]).mean()

    loss = lambda program, state: mean_loss(program.graphdef, state["params"])

    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        before = loss(program, program.init())
        whole, metrics = train(program, program.init(), 4)
        half, _ = train(program, program.init(), 2)
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
        checkpoints.save(2, half, {}, {})
        checkpoints.wait()
        _, state, _ = checkpoints.restore_latest(program.state_like)
        checkpoints.close()
        parts, _ = train(program, state, 2)
        assert loss(program, whole) < before
    assert "average_decay" in metrics
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
