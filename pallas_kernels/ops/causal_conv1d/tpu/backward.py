# SPDX-License-Identifier: Apache-2.0
"""TPU kernel of the causal convolution's gradients: one pass that reads x and dy and writes dx.

Grid (rows, blocks of channels, blocks of tokens from the last to the first). With K = W - 1,

    s_t = bias + sum_k w[K - k] x_{t-k}      ds_t = dy_t act'(s_t)      dx_t = sum_k w[K - k] ds_{t+k}

x and ds stand in VMEM in float32, one tile of 128 channels behind the other, so that a shift by k tokens is a load
from another row and costs nothing else. The K tokens before a block are read with it, the K values of ds behind it are
carried. Sums over tokens stay in VMEM until a row is done. Strips of tokens inside one document take no masks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES, SUBLANES, column
from pallas_kernels.varying import call_varying

VMEM_BYTES = 64 * 2**20  # that the kernel may take
EDGE = 8  # tokens kept beside a block, at least W - 1
HALO = 16  # tokens read before a block: a whole tile of bfloat16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Static description of the kernel."""

    taps: int
    tokens: int  # of a block
    strip: int  # tokens that are worked on at once
    channels: int  # of a block
    bias: bool
    silu: bool
    masked: bool  # `seen` is given
    initial: bool
    interpret: bool | object = False

    @property
    def before(self) -> int:
        return self.taps - 1


def _slope(sums, blocks):
    """Derivative of the activation, times two for silu, of whose argument `sums` is the half then."""
    bend = jnp.tanh(sums)
    return (1.0 + bend) * (1.0 + sums * (1.0 - bend))


def _fold(array):
    """Sum of a strip over tokens, down to one tile."""
    return functools.reduce(jnp.add, [array[row : row + SUBLANES] for row in range(0, array.shape[0], SUBLANES)])


def _strip_sums(blocks, refs, tile, lanes, weights, first, sums, masked):
    """Keeps ds of one strip and adds to the sums over tokens, [8, 128] by tap and of ds itself."""
    rows = pl.ds(first, blocks.strip)
    x = refs["x"][0, rows, lanes].astype(F32)
    dy = refs["dy"][0, rows, lanes].astype(F32)
    seen = refs["seen_rows"][rows] if masked else None
    if masked:
        x = jnp.where(seen > 0, x, 0.0)
    refs["inputs"][tile, pl.ds(EDGE + first, blocks.strip)] = x
    window = [x]  # newest first
    for k in range(1, blocks.taps):
        older = refs["inputs"][tile, pl.ds(EDGE + first - k, blocks.strip)]
        window.append(jnp.where(seen > k, older, 0.0) if masked else older)
    ds = dy
    if blocks.silu:
        total = weights[blocks.taps] if blocks.bias else None
        for k, older in enumerate(window):
            term = older * weights[blocks.before - k]
            total = term if total is None else total + term
        ds = dy * _slope(total, blocks)
    if masked:
        ds = jnp.where(seen > 0, ds, 0.0)
    refs["slopes"][tile, pl.ds(EDGE + first, blocks.strip)] = ds
    found = [total + _fold(ds * older) for total, older in zip(sums, reversed(window), strict=False)]
    return (*found, sums[-1] + _fold(ds)) if blocks.bias else tuple(found)


def _gradient(blocks, refs, tile, weights, first, size, masked):
    """dx of `size` tokens from `first` on, which may be -EDGE."""
    total = None
    for k in range(blocks.taps):
        later = pl.ds(EDGE + first + k, size)
        term = refs["slopes"][tile, later] * weights[blocks.before - k]
        if masked and k > 0:
            term = jnp.where(refs["seen_rows"][pl.ds(first + k, size)] > k, term, 0.0)
        total = term if total is None else total + term
    return total


def _either(blocks, refs, number, body, carried=None):
    """body(masked, carried) for a strip, without masks where it needs none."""
    if not blocks.masked:
        return body(False, carried)
    whole = refs["whole"][number] > 0
    return lax.cond(whole, functools.partial(body, False), functools.partial(body, True), carried)


def _tile_step(blocks, refs, tile, carry):
    """All of one tile of 128 channels but the gradient of the initial state."""
    lanes = pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)
    n_weights = blocks.taps + blocks.bias
    weights = [refs["w"][j : j + 1, lanes] for j in range(n_weights)]
    sums = tuple(refs["sums"][j, :, lanes] for j in range(n_weights))
    strips = range(0, blocks.tokens, blocks.strip)
    for number, first in enumerate(strips):

        def add(masked, sums, first=first):
            return _strip_sums(blocks, refs, tile, lanes, weights, first, sums, masked)

        sums = _either(blocks, refs, number, add, sums)
    for j, total in enumerate(sums):
        refs["sums"][j, :, lanes] = total
    for number, first in enumerate(strips):

        def write(masked, carried, first=first):
            dx = _gradient(blocks, refs, tile, weights, first, blocks.strip, masked)
            refs["dx"][0, pl.ds(first, blocks.strip), lanes] = dx.astype(refs["dx"].dtype)
            return carried

        _either(blocks, refs, number, write, 0)
    return carry


def _prepare_seen(blocks, refs, is_last):
    """`seen` with a token a row, and which strips, with what their gradients reach, need no mask."""
    n_tokens, rows = blocks.tokens, refs["seen_rows"]

    @pl.when(is_last)
    def _():
        rows[n_tokens:] = jnp.zeros((EDGE, LANES), jnp.int32)

    @pl.when(~is_last)
    def _():
        rows[n_tokens:] = rows[:EDGE]

    rows[:n_tokens] = column(refs["seen"][0].astype(F32)).astype(jnp.int32)
    for number, first in enumerate(range(0, n_tokens, blocks.strip)):
        least = jnp.min(rows[first : first + blocks.strip + EDGE])
        refs["whole"][number] = (least >= blocks.taps).astype(jnp.int32)


def _kernel(blocks, names, *refs):
    refs = dict(zip(names, refs, strict=True))
    step, n_steps = pl.program_id(2), pl.num_programs(2)
    is_last, is_first = step == 0, step == n_steps - 1  # of the row's tokens
    n_tiles, n_tokens = blocks.channels // LANES, blocks.tokens
    edge = (n_tiles, EDGE, LANES)

    @pl.when(is_last)
    def _():
        refs["slopes"][:, EDGE + n_tokens :] = jnp.zeros(edge, F32)
        refs["sums"][...] = jnp.zeros_like(refs["sums"])

    @pl.when(~is_last)
    def _():
        refs["slopes"][:, EDGE + n_tokens :] = refs["slopes"][:, EDGE : 2 * EDGE]

    def set_before(values, rows):
        for tile in range(n_tiles):
            lanes = slice(tile * LANES, (tile + 1) * LANES)
            refs["inputs"][tile, :EDGE] = values[0, rows, lanes].astype(F32)

    @pl.when(is_first)
    def _():
        if blocks.initial:
            set_before(refs["state"], slice(0, EDGE))
        else:
            refs["inputs"][:, :EDGE] = jnp.zeros(edge, F32)

    @pl.when(~is_first)
    def _():
        set_before(refs["x_before"], slice(HALO - EDGE, HALO))

    if blocks.masked:
        _prepare_seen(blocks, refs, is_last)
    lax.fori_loop(0, n_tiles, functools.partial(_tile_step, blocks, refs), 0)

    @pl.when(is_first)
    def _():
        refs["dw"][0] = jnp.sum(refs["sums"][...], axis=1)
        if blocks.initial:
            _write_state_gradient(blocks, refs)


def _write_state_gradient(blocks, refs):
    """dx of the tokens before the first; only of the last W - 1 of them it means something."""
    refs["slopes"][:, :EDGE] = jnp.zeros((blocks.channels // LANES, EDGE, LANES), F32)
    for tile in range(blocks.channels // LANES):
        lanes = slice(tile * LANES, (tile + 1) * LANES)
        weights = [refs["w"][j : j + 1, lanes] for j in range(blocks.taps)]
        total = jnp.zeros((EDGE, LANES), F32)
        for k in range(1, blocks.taps):
            term = refs["slopes"][tile, k : EDGE + k] * weights[blocks.before - k]
            if blocks.masked:
                reaches = refs["seen_rows"][:EDGE] > k  # of tokens 0 to 7, those before them reach nothing
                reaches = jnp.concatenate([jnp.zeros((EDGE, LANES), jnp.int32), reaches.astype(jnp.int32)])
                term = jnp.where(reaches[k : EDGE + k] > 0, term, 0.0)
            total += term
        refs["dstate"][0, :, lanes] = total


@functools.partial(jax.jit, static_argnames=("blocks",), inline=True)  # traced once for all layers
def backward(blocks: Blocks, x, dy, w, seen, state):
    """(dx; sums over tokens float32 [B, W (+ 1 with bias), D'], of taps and of the bias; dstate [B, 8, D] or None).

    x, dy [B, T, D], T not below a block's; w float32 [W (+ 1), D'], halved with silu, D' >= D filling blocks; seen
    int32 [B, 1, T'], T' >= T filling blocks, or None; state float32 [B, 8, D] or None. With silu the sums are twice
    too large.
    """
    n_batch, n_tokens, width = x.shape
    n_weights, n_channels = blocks.taps + blocks.bias, blocks.channels
    n_blocks = -(-n_tokens // blocks.tokens)
    halos = blocks.tokens // HALO
    at = lambda step: n_blocks - 1 - step
    whole = pl.BlockSpec((1, blocks.tokens, n_channels), lambda b, c, i: (b, at(i), c))
    halo = pl.BlockSpec((1, HALO, n_channels), lambda b, c, i: (b, jnp.maximum(at(i) * halos - 1, 0), c))
    edge = pl.BlockSpec((1, EDGE, n_channels), lambda b, c, i: (b, 0, c))
    given = {
        "x": (x, whole),
        "x_before": (x, halo),
        "dy": (dy, whole),
        "w": (w, pl.BlockSpec((n_weights, n_channels), lambda b, c, i: (0, c))),
        "seen": (seen, pl.BlockSpec((1, 1, blocks.tokens), lambda b, c, i: (b, 0, at(i)))),
        "state": (state, edge),
    }
    given = {name: pair for name, pair in given.items() if pair[0] is not None}
    sums = pl.BlockSpec((1, n_weights, n_channels), lambda b, c, i: (b, 0, c))
    made = {
        "dx": (jax.ShapeDtypeStruct(x.shape, x.dtype), whole),
        "dw": (jax.ShapeDtypeStruct((n_batch, n_weights, w.shape[1]), F32), sums),
    }
    if blocks.initial:
        made["dstate"] = (jax.ShapeDtypeStruct((n_batch, EDGE, width), F32), edge)
    n_tiles = n_channels // LANES
    scratch = {
        "inputs": pltpu.VMEM((n_tiles, EDGE + blocks.tokens, LANES), F32),
        "slopes": pltpu.VMEM((n_tiles, 2 * EDGE + blocks.tokens, LANES), F32),
        "sums": pltpu.VMEM((n_weights, SUBLANES, n_channels), F32),
    }
    if blocks.masked:
        scratch["seen_rows"] = pltpu.VMEM((blocks.tokens + EDGE, LANES), jnp.int32)
        scratch["whole"] = pltpu.SMEM((blocks.tokens // blocks.strip,), jnp.int32)
    kernel = pl.pallas_call(
        functools.partial(_kernel, blocks, (*given, *made, *scratch)),
        grid=(n_batch, w.shape[1] // n_channels, n_blocks),
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in made.values()],
        out_shape=[shape for shape, _ in made.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=blocks.interpret,
        name="causal_conv1d_backward",
    )
    arrays = [array for array, _ in given.values()]
    out = call_varying(kernel, *arrays)
    return (*out, *[None] * (3 - len(out)))
