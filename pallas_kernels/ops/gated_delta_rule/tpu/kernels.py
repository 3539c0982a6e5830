# SPDX-License-Identifier: Apache-2.0
"""TPU kernels of the gated delta rule: grid (batch, head block, chunks), the state, or its gradient, carried in VMEM.

q, k, v, y and log decays by channel keep the model's layout with channels merged, [B, T, H P]; gates are
[B, head blocks, rows, T], tokens in lanes, and are turned in VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32
from pallas_kernels.ops.gated_delta_rule.tpu.chunk import Blocks, advance
from pallas_kernels.ops.gated_delta_rule.tpu.products import CHUNK, unit_inverses
from pallas_kernels.varying import call_varying

VMEM_BYTES = 64 * 2**20  # that a kernel may take


def _tiles(ref, count: int) -> list:
    """The float32 [CHUNK, n] of each of `count` heads or groups."""
    size = ref.shape[2] // count
    return [ref[0, :, i * size : (i + 1) * size].astype(F32) for i in range(count)]


def _store(ref, tiles: list):
    size = ref.shape[2] // len(tiles)
    for i, tile in enumerate(tiles):
        ref[0, :, i * size : (i + 1) * size] = tile.astype(ref.dtype)


def _arrays(refs, blocks: Blocks) -> tuple:
    """(q, k, v, gates, steps) of a chunk as `advance` takes them."""
    q, k = (_tiles(refs[name], blocks.groups) for name in ("q", "k"))
    steps = _tiles(refs["steps"], blocks.heads) if blocks.by_channel else []
    return q, k, _tiles(refs["v"], blocks.heads), refs["gates"][0, 0].T, steps


def _begin(state, start, given: bool):
    """In a row's first step: what comes in, or zeros."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = start[0] if given else jnp.zeros_like(state)


def _end(state, out):
    """In a row's last step: what goes out."""

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out[0] = state[...]


def _forward_kernel(*args, names: tuple, blocks: Blocks):
    refs, heads = dict(zip(names, args, strict=True)), range(blocks.heads)
    state = refs["state"]
    _begin(state, refs.get("initial"), blocks.initial)

    def invert(belows):
        inverses = unit_inverses(belows, blocks.exact)
        if "inverses" in refs:
            for head in heads:
                refs["inverses"][0, 0, head] = inverses[head]
        return inverses

    if "states" in refs:
        refs["states"][0, 0] = state[...].astype(blocks.dtype)
    ys, leaving = advance(*_arrays(refs, blocks), [state[head] for head in heads], invert, blocks)
    _store(refs["y"], ys)
    for head in heads:
        state[head] = leaving[head]
    if blocks.final:
        _end(state, refs["last"])


def _backward_kernel(*args, names: tuple, blocks: Blocks):
    refs, heads = dict(zip(names, args, strict=True)), range(blocks.heads)
    dstate = refs["dstate"]
    _begin(dstate, refs.get("dlast"), blocks.final)
    inverses = [refs["inverses"][0, 0, head] for head in heads]
    entering = [refs["states"][0, 0, head].astype(F32) for head in heads]
    run = functools.partial(advance, invert=lambda _: inverses, blocks=blocks)
    _, pull = jax.vjp(run, *_arrays(refs, blocks), entering)
    dq, dk, dv, dgates, dsteps, dentering = pull((_tiles(refs["dy"], blocks.heads), [dstate[head] for head in heads]))
    for name, tiles in (("dq", dq), ("dk", dk), ("dv", dv), ("dsteps", dsteps)):
        if name in refs:
            _store(refs[name], tiles)
    refs["dgates"][0, 0] = dgates.T
    for head in heads:
        dstate[head] = dentering[head]
    if blocks.initial:
        _end(dstate, refs["dinitial"])


def _specs(blocks: Blocks, heads_a_group: int, chunk_of) -> dict:
    """Block specs by what an array is of; `chunk_of` maps a grid step to its chunk."""
    group = lambda h: h * blocks.heads // (heads_a_group * blocks.groups)
    by_tokens = lambda width, block: pl.BlockSpec((1, CHUNK, width), lambda b, h, c: (b, chunk_of(c), block(h)))
    matrices = lambda *shape: pl.BlockSpec((1, 1, blocks.heads, *shape), lambda b, h, c: (b, chunk_of(c), h, 0, 0))
    return {
        "group": by_tokens(blocks.groups * blocks.key, group),
        "own group": by_tokens(blocks.groups * blocks.key, lambda h: h),
        "head": by_tokens(blocks.heads * blocks.width, lambda h: h),
        "head keys": by_tokens(blocks.heads * blocks.key, lambda h: h),
        "gates": pl.BlockSpec((1, 1, blocks.gate_rows, CHUNK), lambda b, h, c: (b, h, 0, chunk_of(c))),
        "state": pl.BlockSpec((1, blocks.heads, blocks.key, blocks.width), lambda b, h, c: (b, h, 0, 0)),
        "states": matrices(blocks.key, blocks.width),
        "inverses": matrices(CHUNK, CHUNK),
    }


KINDS = {"q": "group", "k": "group", "v": "head", "y": "head", "dy": "head", "dv": "head", "gates": "gates",
         "dgates": "gates", "steps": "head keys", "dsteps": "head keys",
         "dq": "own group", "dk": "own group", "initial": "state", "last": "state", "dlast": "state",
         "dinitial": "state", "states": "states", "inverses": "inverses"}  # fmt: skip


def _call(kernel, name, inputs, outputs, scratch, blocks: Blocks, backward: bool, interpret) -> dict:
    """{output: array} of a kernel on {input: array}; outputs: {name: shape}."""
    n_batch, n_tokens = inputs["q"].shape[:2]
    n_blocks, chunks = inputs["gates"].shape[1], n_tokens // CHUNK
    n_groups = inputs["q"].shape[2] // blocks.key
    chunk_of = (lambda c: chunks - 1 - c) if backward else (lambda c: c)
    specs = _specs(blocks, n_blocks * blocks.heads // n_groups, chunk_of)
    call = pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs, scratch), blocks=blocks),
        grid=(n_batch, n_blocks, chunks),
        in_specs=[specs[KINDS[key]] for key in inputs],
        out_specs=[specs[KINDS[key]] for key in outputs],
        out_shape=list(outputs.values()),
        scratch_shapes=[pltpu.VMEM((blocks.heads, blocks.key, blocks.width), F32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
    )
    return dict(zip(outputs, call_varying(call, *inputs.values()), strict=True))


def _name(part: str, blocks: Blocks) -> str:
    return f"gated_delta_rule_channel_{part}" if blocks.by_channel else f"gated_delta_rule_{part}"


def forward(inputs: dict, blocks: Blocks, *, keep: bool, interpret) -> dict:
    """y [B, T, H P]; by request last (float32 [B, H, N, P]) and, `keep`, what the backward needs of each chunk:
    states [B, chunks, H, N, P] before it and inverses [B, chunks, H, 128, 128].

    inputs: q, k [B, T, G N], v [B, T, H P], gates float32 [B, blocks, gate_rows, T], steps float32 [B, T, H N] where
    decays are of channels, initial if there is one.
    """
    n_batch, n_tokens = inputs["v"].shape[:2]
    n_heads, by_chunk = inputs["gates"].shape[1] * blocks.heads, (n_batch, n_tokens // CHUNK)
    state = (n_heads, blocks.key, blocks.width)
    outputs = {"y": jax.ShapeDtypeStruct(inputs["v"].shape, blocks.dtype)}
    if blocks.final:
        outputs["last"] = jax.ShapeDtypeStruct((n_batch, *state), F32)
    if keep:
        outputs["states"] = jax.ShapeDtypeStruct((*by_chunk, *state), blocks.dtype)
        outputs["inverses"] = jax.ShapeDtypeStruct((*by_chunk, n_heads, CHUNK, CHUNK), F32)
    return _call(_forward_kernel, _name("forward", blocks), inputs, outputs, "state", blocks, False, interpret)


def backward(inputs: dict, blocks: Blocks, *, interpret) -> dict:
    """Gradients by name of the inputs of `forward`; inputs: those but initial, its states and inverses, dy and dlast.

    dq and dk are [B, T, head blocks, ...]: a group that several blocks of heads share has a part in each.
    """
    shape_of = lambda array, dtype=None: jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)
    n_blocks, n_groups = inputs["gates"].shape[1], inputs["q"].shape[2] // blocks.key
    parts = n_blocks * blocks.groups // n_groups
    shared = jax.ShapeDtypeStruct(
        (*inputs["q"].shape[:2], parts * inputs["q"].shape[2]), blocks.dtype if parts == 1 else F32
    )
    outputs = {"dq": shared, "dk": shared, "dv": shape_of(inputs["v"]), "dgates": shape_of(inputs["gates"])}
    outputs |= {"dsteps": shape_of(inputs["steps"])} if blocks.by_channel else {}
    if blocks.initial:
        n_batch, n_heads = inputs["q"].shape[0], n_blocks * blocks.heads
        outputs["dinitial"] = jax.ShapeDtypeStruct((n_batch, n_heads, blocks.key, blocks.width), F32)
    return _call(_backward_kernel, _name("backward", blocks), inputs, outputs, "dstate", blocks, True, interpret)
