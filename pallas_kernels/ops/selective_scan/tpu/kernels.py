# SPDX-License-Identifier: Apache-2.0
"""TPU kernels of the selective scan: grid (row, chunk of tokens, block of channels), all on the vector unit.

Channels lie in lanes, states in sublanes, tokens follow each other. The states of all channels stay in VMEM from chunk
to chunk, so that blocks of channels can be the innermost axis: B and C of a chunk are spread over lanes once for all
of them, and the gradients of B and C are summed over all of them before they leave.

The backward pass computes a chunk's states again from the one that entered it, which the forward keeps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES, NT, dot
from pallas_kernels.varying import call_varying

CHUNK = 128  # tokens
GROUP = 16  # tokens whose arrays are read and written at once: whole registers in bfloat16 too
VMEM_BYTES = 64 * 2**20  # that a kernel may take


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes and options of a call, whose arrays are whole chunks, blocks of channels and registers of states."""

    lanes: int  # channels of a block
    blocks: int  # of channels
    per_group: int  # blocks that share B and C
    states: int
    dtype: str  # of x and y
    skip: bool
    segments: bool
    initial: bool
    final: bool


def _spread(refs, blocks: Blocks):
    """B and C of a chunk, tokens in lanes, as [token, state, 128 equal lanes]; in a group's first step."""

    @pl.when(lax.rem(pl.program_id(2), blocks.per_group) == 0)
    def _():
        def step(i, _):
            for name in ("B", "C"):
                maps = pltpu.roll(refs[name][0, 0], CHUNK - i * GROUP, 1)
                for r in range(GROUP):
                    spread = jnp.broadcast_to(maps[:, r : r + 1], (blocks.states, LANES))
                    refs[name + "s"][i * GROUP + r] = spread

        lax.fori_loop(0, CHUNK // GROUP, step, None)


def _wide(array, blocks: Blocks):
    """[n, 128] as [n, lanes], repeated."""
    return jnp.tile(array, (1, blocks.lanes // LANES))


def _narrow(array, blocks: Blocks):
    """[n, lanes] as [n, 128], summed."""
    return sum(array[:, i : i + LANES] for i in range(0, blocks.lanes, LANES))


def _group(refs, blocks: Blocks, i, names) -> dict:
    """Float32 [GROUP, lanes] of some tokens by name, zero in padding, and what is added to their decays."""
    rows = pl.ds(i * GROUP, GROUP)
    arrays = {name: refs[name][0, rows, :].astype(F32) for name in names}
    if blocks.segments:
        marks = _wide(refs["marks"][0, rows, :], blocks)
        arrays = {name: jnp.where(marks <= 0.0, array, 0.0) for name, array in arrays.items()}
        arrays["marks"] = marks
    return arrays


def _decay(arrays, rates, r):
    """Of token r of a group, [states, lanes]."""
    exponent = arrays["dt"][r : r + 1] * rates
    if "marks" in arrays:
        exponent += jnp.minimum(arrays["marks"][r : r + 1], 0.0)
    return jnp.exp(exponent)


def _begin(state, start, given: bool):
    """In a row's first step of each block of channels: what comes in, or zeros."""
    block = pl.program_id(2)

    @pl.when(pl.program_id(1) == 0)
    def _():
        state[block] = start[0] if given else jnp.zeros(state.shape[1:], F32)


def _end(*pairs):
    """In a row's last step of each block of channels: what goes out."""
    block = pl.program_id(2)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        for state, out in pairs:
            out[0] = state[block]


def _forward_kernel(*args, names: tuple, blocks: Blocks):
    refs = dict(zip(names, args, strict=True))
    state, block = refs["state"], pl.program_id(2)
    _begin(state, refs.get("initial"), blocks.initial)
    _spread(refs, blocks)
    rates = refs["A"][...]
    if "states" in refs:
        refs["states"][0, 0] = state[block]

    def step(i, h):
        arrays, ys = _group(refs, blocks, i, ("x", "dt")), []
        inputs = arrays["dt"] * arrays["x"]
        for r in range(GROUP):
            b, c = (_wide(refs[name][i * GROUP + r], blocks) for name in ("Bs", "Cs"))
            h = _decay(arrays, rates, r) * h + inputs[r : r + 1] * b
            ys.append(jnp.sum(h * c, axis=0, keepdims=True))
        y = jnp.concatenate(ys, axis=0)
        if blocks.skip:
            y += refs["D"][...] * arrays["x"]
        refs["y"][0, pl.ds(i * GROUP, GROUP), :] = y.astype(blocks.dtype)
        return h

    state[block] = lax.fori_loop(0, CHUNK // GROUP, step, state[block])
    if blocks.final:
        _end((state, refs["last"]))


def _states(refs, blocks: Blocks, rates):
    """Leaves the state before each token of the chunk in VMEM."""

    def step(i, h):
        arrays = _group(refs, blocks, i, ("x", "dt"))
        inputs = arrays["dt"] * arrays["x"]
        for r in range(GROUP):
            refs["before"][i * GROUP + r] = h
            b = _wide(refs["Bs"][i * GROUP + r], blocks)
            h = _decay(arrays, rates, r) * h + inputs[r : r + 1] * b
        return h

    lax.fori_loop(0, CHUNK // GROUP, step, refs["states"][0, 0])


def _token(refs, blocks: Blocks, arrays, rates, t, r, g):
    """(gradient of the state before a token, that of its log decay, the rows that x and dt get of it)."""
    row = lambda name: arrays[name][r : r + 1]
    b, c = (_wide(refs[name][t], blocks) for name in ("Bs", "Cs"))
    inputs, decay, before = row("dt") * row("x"), _decay(arrays, rates, r), refs["before"][t]
    kept = decay * before
    g = row("dy") * c + g
    refs["dCs"][t] += _narrow(row("dy") * (kept + inputs * b), blocks)
    refs["dBs"][t] += _narrow(g * inputs, blocks)
    of_decay = g * kept
    rows = jnp.sum(g * b, axis=0, keepdims=True), jnp.sum(of_decay * rates, axis=0, keepdims=True)
    return g * decay, of_decay, rows


def _backward_kernel(*args, names: tuple, blocks: Blocks):
    refs = dict(zip(names, args, strict=True))
    g_all, block, rates = refs["dstate"], pl.program_id(2), refs["A"][...]
    _begin(g_all, refs.get("dlast"), blocks.final)
    _begin(refs["dA_sum"], None, False)
    if blocks.skip:
        _begin(refs["dD_sum"], None, False)
    _spread(refs, blocks)

    @pl.when(lax.rem(block, blocks.per_group) == 0)
    def _():
        for name in ("dBs", "dCs"):
            refs[name][...] = jnp.zeros_like(refs[name])

    _states(refs, blocks, rates)

    def step(j, carry):
        (g, dA, dskip), i = carry, CHUNK // GROUP - 1 - j
        arrays, found = _group(refs, blocks, i, ("x", "dt", "dy")), [None] * GROUP
        for r in reversed(range(GROUP)):
            g, of_decay, found[r] = _token(refs, blocks, arrays, rates, i * GROUP + r, r, g)
            dA += of_decay * arrays["dt"][r : r + 1]
        of_inputs, of_decays = (jnp.concatenate(rows, axis=0) for rows in zip(*found, strict=True))
        if blocks.segments:
            of_decays = jnp.where(arrays["marks"] <= 0.0, of_decays, 0.0)
        dx = arrays["dt"] * of_inputs
        if blocks.skip:
            dx += refs["D"][...] * arrays["dy"]
            dskip += arrays["x"] * arrays["dy"]
        rows = pl.ds(i * GROUP, GROUP)
        refs["dx"][0, rows, :] = dx.astype(blocks.dtype)
        refs["ddt"][0, rows, :] = arrays["x"] * of_inputs + of_decays
        return g, dA, dskip

    dskip = refs["dD_sum"][block] if blocks.skip else jnp.zeros((GROUP, blocks.lanes), F32)
    start = (g_all[block], refs["dA_sum"][block], dskip)
    g_all[block], refs["dA_sum"][block], dskip = lax.fori_loop(0, CHUNK // GROUP, step, start)
    ends = [(refs["dA_sum"], refs["dA"])]
    if blocks.skip:
        refs["dD_sum"][block] = dskip
        ends.append((refs["dD_sum"], refs["dD"]))
    _end(*ends, *([(g_all, refs["dinitial"])] if blocks.initial else []))

    @pl.when(lax.rem(block, blocks.per_group) == blocks.per_group - 1)
    def _():
        ones = jnp.ones((8, LANES), F32)
        for name in ("dB", "dC"):
            sums = refs[name + "s"][...].reshape(CHUNK * blocks.states, LANES)
            refs[name][0, 0] = dot(ones, sums, NT)[:1]


def _specs(blocks: Blocks, chunk_of) -> dict:
    """Block specs by what an array is of; `chunk_of` maps a grid step to its chunk."""
    group = lambda d: d // blocks.per_group
    by_token = lambda lanes, block: pl.BlockSpec((1, CHUNK, lanes), lambda b, c, d: (b, chunk_of(c), block(d)))
    row = lambda n: pl.BlockSpec((1, n, blocks.lanes), lambda b, c, d: (b, 0, d))
    return {
        "tokens": by_token(blocks.lanes, lambda d: d),
        "marks": by_token(LANES, lambda d: 0),
        "maps": pl.BlockSpec((1, 1, blocks.states, CHUNK), lambda b, c, d: (b, group(d), 0, chunk_of(c))),
        "dmaps": pl.BlockSpec((1, 1, 1, CHUNK * blocks.states), lambda b, c, d: (b, group(d), 0, chunk_of(c))),
        "rates": pl.BlockSpec((blocks.states, blocks.lanes), lambda b, c, d: (0, d)),
        "skip": pl.BlockSpec((1, blocks.lanes), lambda b, c, d: (0, d)),
        "state": row(blocks.states),
        "rows": row(GROUP),
        "states": pl.BlockSpec((1, 1, blocks.states, blocks.lanes), lambda b, c, d: (b, chunk_of(c), 0, d)),
    }


KINDS = {"x": "tokens", "dt": "tokens", "dy": "tokens", "y": "tokens", "dx": "tokens", "ddt": "tokens",
         "marks": "marks", "B": "maps", "C": "maps", "dB": "dmaps", "dC": "dmaps", "A": "rates", "D": "skip",
         "initial": "state", "last": "state", "dlast": "state", "dinitial": "state", "dA": "state", "dD": "rows",
         "states": "states"}  # fmt: skip


def _call(kernel, name, inputs, outputs, scratch, blocks: Blocks, backward: bool, interpret) -> dict:
    """{output: array} of a kernel on {input: array}; outputs: {name: shape}, scratch: {name: shape}."""
    n_batch, n_tokens, _ = inputs["x"].shape
    chunks = n_tokens // CHUNK
    specs = _specs(blocks, (lambda c: chunks - 1 - c) if backward else (lambda c: c))
    call = pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs, *scratch), blocks=blocks),
        grid=(n_batch, chunks, blocks.blocks),
        in_specs=[specs[KINDS[key]] for key in inputs],
        out_specs=[specs[KINDS[key]] for key in outputs],
        out_shape=list(outputs.values()),
        scratch_shapes=[pltpu.VMEM(shape, F32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
    )
    return dict(zip(outputs, call_varying(call, *inputs.values()), strict=True))


def forward(inputs: dict, blocks: Blocks, *, keep: bool, interpret) -> dict:
    """y [B, T, D]; by request last [B, N, D] and, `keep`, the states that enter the chunks [B, chunks, N, D].

    inputs: x [B, T, D]; float32 dt [B, T, D], A [N, D], B and C [B, G, N, T] and, where there are, D [1, D], marks
    [B, T, 128], initial [B, N, D].
    """
    n_batch, n_tokens, n_channels = inputs["x"].shape
    state = (blocks.states, n_channels)
    outputs = {"y": jax.ShapeDtypeStruct(inputs["x"].shape, blocks.dtype)}
    if blocks.final:
        outputs["last"] = jax.ShapeDtypeStruct((n_batch, *state), F32)
    if keep:
        outputs["states"] = jax.ShapeDtypeStruct((n_batch, n_tokens // CHUNK, *state), F32)
    spread = (CHUNK, blocks.states, LANES)
    scratch = {"state": (blocks.blocks, blocks.states, blocks.lanes), "Bs": spread, "Cs": spread}
    return _call(_forward_kernel, "selective_scan_forward", inputs, outputs, scratch, blocks, False, interpret)


def backward(inputs: dict, blocks: Blocks, *, interpret) -> dict:
    """Gradients by name of the inputs of `forward`; inputs: those but initial, its states, dy and dlast.

    dA is [B, N, D], dD [B, GROUP, D], dB and dC are [B, G, 1, T N].
    """
    n_batch, n_tokens, n_channels = inputs["x"].shape
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, F32)
    maps = f32(n_batch, blocks.blocks // blocks.per_group, 1, n_tokens * blocks.states)
    state = f32(n_batch, blocks.states, n_channels)
    outputs = {"dx": jax.ShapeDtypeStruct(inputs["x"].shape, blocks.dtype), "ddt": f32(*inputs["dt"].shape)}
    outputs |= {"dB": maps, "dC": maps, "dA": state}
    by_block = (blocks.blocks, blocks.states, blocks.lanes)
    scratch = {"dstate": by_block, "dA_sum": by_block, "before": (CHUNK, blocks.states, blocks.lanes)}
    scratch |= dict.fromkeys(("Bs", "Cs", "dBs", "dCs"), (CHUNK, blocks.states, LANES))
    if blocks.skip:
        outputs["dD"] = f32(n_batch, GROUP, n_channels)
        scratch["dD_sum"] = (blocks.blocks, GROUP, blocks.lanes)
    if blocks.initial:
        outputs["dinitial"] = state
    return _call(_backward_kernel, "selective_scan_backward", inputs, outputs, scratch, blocks, True, interpret)
