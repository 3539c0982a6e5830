# SPDX-License-Identifier: Apache-2.0
"""A model's forward and what probes read of it: one program for all tasks of a shape, on one device and on many.

Axis letters: B rows, T tokens of a row, C places that are read at once, D model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridlm.model.model import HybridLM
from hybridlm.probes.packed import Packed
from hybridlm.probes.scoring import Counts, Score
from hybridlm.sharding import batch_sharding
from hybridlm.train.loss import token_losses
from hybridlm.train.metrics import Mean, Metrics
from hybridlm.train.xla import options
from pallas_kernels.platform import platform_of

Args = Sequence[Any]
"""What gives the parameters: themselves, or adapters and the base that these belong to."""
Stop = Callable[[], bool]
HITS, REST = "hits", "rest"


def _itself(params):
    return params


class Forward:
    """Programs that are compiled when they are first called, for a mesh that is set; results are on every process."""

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh, whole: Callable = _itself):
        """whole: (*args) -> the model's parameters."""
        self._rows = batch_sharding(mesh)

        def model(args: Args) -> HybridLM:
            return nnx.merge(graphdef, whole(*args))

        def hidden(args: Args, cells: Mapping[str, jax.Array]) -> jax.Array:
            return model(args).hidden(cells["tokens"], cells["segment_ids"], cells["positions"])

        def likeliest(args: Args, x_BTD: jax.Array, at_BC: jax.Array) -> jax.Array:
            x_BCD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1)
            return model(args).logits(x_BCD).argmax(axis=-1)

        def losses(args: Args, x_BTD: jax.Array, targets_BT: jax.Array, hits_BT: jax.Array) -> Metrics:
            of = model(args)
            nats_BT = token_losses(
                x_BTD, of.unembedding(), targets_BT, multiplier=of.logit_scale, softcap=of.config.logit_softcap
            )
            chosen = {HITS: hits_BT > 0, REST: (hits_BT == 0) & (targets_BT >= 0)}
            count = lambda where_BT: jnp.sum(where_BT, dtype=jnp.float32)
            return {
                name: Mean(jnp.sum(jnp.where(where_BT, nats_BT, 0.0)), count(where_BT))
                for name, where_BT in chosen.items()
            }

        often: dict[str, Any] = {"compiler_options": options(platform_of(mesh.devices.flat[0]))}
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._hidden = jax.jit(hidden, **often)
        self._likeliest = jax.jit(likeliest, out_shardings=everywhere, **often)
        self._losses = jax.jit(losses, out_shardings=everywhere, **often)

    def score(self, args: Args, packed: Packed, stop: Stop = lambda: False) -> Score | None:
        """What a model is right in; None where `stop()`, asked before each batch, came true."""
        likeliest_EN = np.zeros(packed.at_EN.shape, np.int32)
        for cells, asked in packed.batches():
            if stop():
                return None
            x_BTD = self._hidden(args, {name: self.put(value) for name, value in cells.items()})
            for one in asked:
                read_BC = np.asarray(self._likeliest(args, x_BTD, self.put(one.at_BC)))
                likeliest_EN[one.example_n, one.answer_n] = read_BC[one.row_n, one.column_n]
        counts = Counts(packed.examples.tokens_BT.shape[1])
        counts.add(packed.examples, packed.at_EN, packed.real_EN, likeliest_EN)
        return counts.score()

    def losses(self, args: Args, batch: Mapping[str, jax.Array]) -> Metrics:
        """Of a batch on the devices, with `hits` (int32: 1, 0) beside its fields: the loss in these and in the rest."""
        names = ("tokens", "segment_ids", "positions")
        x_BTD = self._hidden(args, {name: batch[name] for name in names})
        return self._losses(args, x_BTD, batch["targets"], batch[HITS])

    def put(self, whole: np.ndarray) -> jax.Array:
        """An array [B, ...] that every process has, rows shared among the devices."""
        return jax.make_array_from_callback(whole.shape, self._rows, lambda index: whole[index])
