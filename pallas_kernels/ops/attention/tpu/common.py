# SPDX-License-Identifier: Apache-2.0
"""What the forward and the backward TPU kernel of attention share: settings, masks, block specs, the call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import LOG2E
from pallas_kernels.ops.attention import block_pairs
from pallas_kernels.varying import call_varying

VMEM_BYTES = 96 * 2**20  # that a kernel may take
HIDDEN = -3e38  # score of what is not visible: exp2(HIDDEN - LOWEST) is 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static description of a call, after padding to whole blocks."""

    heads: int
    kv_heads: int
    width: int  # of q and k
    v_width: int
    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    ids: bool  # documents or padding are masked
    positions: bool  # causal or window masks
    gate: str  # "", "head" or "channel"
    sinks: bool
    packed: int  # query heads of a key head in the rows of a query block
    blocks: tuple[int, int]
    natural: bool  # arrays are [B, T, H P], else [B, H, T, P]
    interpret: bool | object = False

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a tile of scores."""
        return self.blocks[0] // block_pairs.TILES, self.blocks[1] // block_pairs.TILES


def log2_scores(product, s: Settings):
    """(scores in units of log 2, derivative of the softcap or None) from q . k."""
    if s.softcap is None:
        return product * (s.scale * LOG2E), None
    squashed = jnp.tanh(product * (s.scale / s.softcap))
    return squashed * (s.softcap * LOG2E), 1.0 - squashed * squashed


def block_spec(rows: int, width: int, where, s: Settings, heads: int = 1) -> pl.BlockSpec:
    """Rows of `heads` heads; where(*grid indices, words) -> (batch, block of heads, block of rows)."""
    if s.natural:

        def index(*args):
            batch, head, row = where(*args)
            return batch, row, head

        return pl.BlockSpec((1, rows, heads * width), index)

    def head_major(*args):
        return (*where(*args), 0)

    return pl.BlockSpec((1, heads, rows, width), head_major)


def head_ref(ref, head: int, width: int, s: Settings):
    """The [rows, width] part of one head of a block of `block_spec`."""
    return ref.at[0, :, pl.ds(head * width, width)] if s.natural else ref.at[0, head]


def word_at(words, batch, n):
    """Word n of a row; one list may serve all rows."""
    return words[batch if words.shape[0] > 1 else 0, n]


def mask_specs(arrays: dict, s: Settings) -> dict:
    """Specs of the ids and positions among the arrays, int32 [B or 1, 1, tokens]; grid (batch, _, pairs, ...)."""

    def spec(array, size, block_of):
        def index(b, _, n, *rest):
            return (b if array.shape[0] > 1 else 0), 0, block_of(word_at(rest[-1], b, n))

        return pl.BlockSpec((1, 1, size), index)

    sides = {"q": (s.blocks[0], block_pairs.query_block), "k": (s.blocks[1], block_pairs.key_block)}
    return {
        f"{side}_{what}": spec(arrays[f"{side}_{what}"], *sides[side])
        for side in sides
        for what in ("ids", "positions")
        if f"{side}_{what}" in arrays
    }


def array_shape(n_batch: int, n_tokens: int, heads: int, width: int, dtype, s: Settings):
    shape = (n_batch, n_tokens, heads * width) if s.natural else (n_batch, heads, n_tokens, width)
    return jax.ShapeDtypeStruct(shape, dtype)


def call_kernel(kernel, name: str, grid, words, inputs: dict, outputs: dict, scratch: dict, s: Settings) -> dict:
    """Runs kernel(words, *refs, names=..., s=...) over grid (batch, heads, ..., pairs); {output name: array}.

    inputs: {name: (array, spec)}; outputs: {name: (shape, spec)}; scratch: {name: memory}. words [rows, n].
    """
    arrays = [array for array, _ in inputs.values()]
    call = pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs, *scratch), s=s),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=s.interpret,
        name=name,
    )
    return dict(zip(outputs, call_varying(call, words, *arrays)))
