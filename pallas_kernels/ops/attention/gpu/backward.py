# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the attention backward: dk and dv in registers, dq added up in global memory.

A thread block owns 128 keys of one key head, 64 a compute warpgroup, and walks the query blocks of all query heads of
that key head. Scores are kept transposed ([keys, queries]), so that the products for dv and dk take their left
operand from registers (Shah et al. 2024, arXiv:2407.08608, appendix B):

    P^T  = exp2(c K Q^T - lse)              dv += P^T dO
    dS^T = P^T * (V dO^T - delta)           dk += dS^T Q            dq += dS K

dS goes through shared memory, where both warpgroups read it: each computes a 64 x 64 tile of dq, which the copy engine
adds to float32 in global memory. That of one query block is computed with the next block, so that one warpgroup may do
the softmax while the other keeps the matrix units busy. dq leaves here without the factor `scale`.

Heads of 256 do not fit that way. There a thread block owns 64 keys, both warpgroups compute the same scores, and each
half of the columns of dk, dv and dq.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    COL,
    F32,
    F32_TRANSFORMS,
    LANE_PARAMS,
    LOG2E,
    ROW,
    TILE,
    accumulate,
    cols_of,
    drain,
    sums_of,
    zeros,
)
from pallas_kernels.ops.attention.gpu.common import capped, visible
from pallas_kernels.varying import unchecked_varying

REGISTERS = (240, 24)  # of a thread of the compute warpgroups and of the producer


@dataclasses.dataclass(frozen=True)
class Backward:
    """Static description of one backward kernel."""

    batch: int
    heads: int
    kv_heads: int
    width: int  # 64, 128 or 256
    keys: int
    scale: float
    softcap: float | None
    ids: bool = False  # documents: bounds and keys hold ids
    positions: bool = False  # keys hold positions
    masks_batch: bool = False  # ranges, bounds and keys differ between rows of the batch
    first_masked: bool = True  # query blocks before those without masks can exist
    last_masked: bool = True  # and behind them
    v_head: int = 0  # v is the heads from here on of an array whose gradient has dk before dv; 0: each has its own
    dtype: jnp.dtype = jnp.bfloat16
    stages: int = 2

    replace = dataclasses.replace

    @property
    def split(self) -> bool:
        """The warpgroups split the columns of the gradients, not the keys."""
        return self.width > 128

    @property
    def block_k(self) -> int:
        return TILE if self.split else 2 * TILE

    @property
    def columns(self) -> int:
        """Columns of dk and dv of a warpgroup."""
        return self.width // 2 if self.split else self.width

    @property
    def do_stages(self) -> int:
        return 1 if self.split else self.stages

    @property
    def block_q(self) -> int:
        return 128 if self.width == 64 else 64

    @property
    def blocks(self) -> int:
        return -(-self.keys // self.block_k)

    @property
    def key_rows(self) -> int:
        return self.ids + self.positions

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def _unknown_zero():
    """0 that the compiler cannot see through: what is addressed with it is not kept in registers around a loop."""
    return lax.optimization_barrier(jnp.int32(0))


def _weights(cfg, raw, base, smem, slot, keys, masked: bool):
    """(P transposed, tanh of the softcap or None)."""
    factor, tanh = cfg.scale * LOG2E, None
    if cfg.softcap is not None or factor < 0:
        raw, tanh = capped(raw, cfg.scale, cfg.softcap)
        factor = 1.0
    if masked:
        bounds = [plgpu.load(smem["bounds"].at[slot, i], layout=COL) for i in range(2 + cfg.ids)]
        raw = jnp.where(visible(cfg, base, bounds, keys, 0, raw.shape), raw, -jnp.inf)
    lse = plgpu.load(smem["lse"].at[slot], layout=COL)
    return jnp.exp2(raw * factor - cols_of(lse, TILE)), tanh


def _score_gradients(cfg, base, smem, bars, wg, slots, keys, masked):
    """(P, dS) transposed, in the dtype of the operands."""
    _, q_full, do_full = bars[:3]
    slot, do_slot = slots
    own = _unknown_zero() + (0 if cfg.split else wg)
    plgpu.barrier_wait(q_full.at[slot])

    def products(raw_acc, dp_acc):
        plgpu.wgmma(raw_acc, smem["k"].at[own], smem["q"].at[slot].T)
        plgpu.barrier_wait(do_full.at[do_slot])
        plgpu.wgmma(dp_acc, smem["v"].at[own], smem["do"].at[do_slot].T)
        raw = lax.optimization_barrier(sums_of(raw_acc, 1))
        weights, tanh = _weights(cfg, raw, base, smem, slot, keys, masked)
        weights = lax.optimization_barrier(weights)
        ds = dp_acc[...] - cols_of(plgpu.load(smem["delta"].at[do_slot], layout=COL), TILE)
        ds *= weights
        if cfg.softcap is not None:
            ds *= 1.0 - tanh * tanh
        return weights.astype(cfg.dtype), ds.astype(cfg.dtype)

    return accumulate(products, cfg.block_q, cfg.block_q)


def _add_dq(cfg, refs, smem, wg, dq, place, column):
    """Starts adding a 64 x 64 tile of dq in global memory, once the tile before has left.

    place: batch, head, query block and whether there is anything to add.
    """
    batch, head, block, some = place
    first = block * cfg.block_q
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem["dq"][wg] = dq
    plgpu.commit_smem()
    if cfg.width == 64:
        target = refs["dq"].at[batch, pl.ds(first + wg * TILE, TILE), head]
    else:
        target = refs["dq"].at[batch, pl.ds(first, TILE), head, pl.ds(column, TILE)]

    @pl.when(some)
    def _():
        plgpu.copy_smem_to_gmem(smem["dq"].at[wg], target, reduction_op="add")


def _store_ds(cfg, smem, wg, turn, ds):
    for part in range(cfg.block_q // TILE):
        smem["ds"][turn, part, wg] = ds[:, part * TILE : (part + 1) * TILE]
    plgpu.commit_smem()


def _multiply_dq(cfg, smem, wg, acc, turn):
    """acc += the warpgroup's tile of dS K."""
    zero = _unknown_zero()
    for half in range(2):
        if cfg.width == 64:
            left, right = smem["ds"].at[turn, wg, half], smem["k"].at[half + zero]
        else:
            left, right = smem["ds"].at[turn, 0, half], smem["k"].at[half + zero, :, pl.ds(wg * TILE, TILE)]
        plgpu.wgmma(acc, left.T, right)


def _sums(cfg, refs, smem, wg, meet, slots, turn, before, carry, weights, ds):
    """dk and dv with this query block added; starts adding to dq what the block before (a place) gives."""
    plgpu.barrier_wait(meet)  # both have stored dS of the block before and read that of the one before it

    def products(dq_acc, dv_acc, dk_acc):
        dk_acc[...], dv_acc[...] = carry
        _multiply_dq(cfg, smem, wg, dq_acc, 1 - turn)
        plgpu.wgmma(dv_acc, weights, smem["do"].at[slots[1]])
        plgpu.wgmma(dk_acc, ds, smem["q"].at[slots[0]])
        _store_ds(cfg, smem, wg, turn, ds)
        dq = lax.optimization_barrier(sums_of(dq_acc, 2))
        _add_dq(cfg, refs, smem, wg, dq, before, wg * TILE)
        return dk_acc[...], dv_acc[...]

    carry = accumulate(products, TILE, cfg.columns, cfg.columns)
    plgpu.barrier_arrive(meet)
    return carry


def _last_dq(cfg, refs, smem, wg, meet, steps, place):
    """Adds what the last query block gives to dq."""
    plgpu.barrier_wait(meet)

    def product(acc):
        _multiply_dq(cfg, smem, wg, acc, lax.rem(steps - 1, 2))
        return acc[...]

    @pl.when(steps > 0)
    def _():
        dq = accumulate(product, TILE)
        _add_dq(cfg, refs, smem, wg, dq, (*place, True), wg * TILE)


def _split_sums(cfg, refs, smem, wg, slots, place, carry, weights, ds):
    """The same where the warpgroups split columns: each has dS of its own, and dq of this block is added at once."""
    columns = pl.ds(wg * cfg.columns, cfg.columns)
    q_ref, do_ref = smem["q"].at[slots[0], :, columns], smem["do"].at[slots[1], :, columns]
    _store_ds(cfg, smem, wg, 0, ds)
    zero = _unknown_zero()

    def multiply_dq(acc, column):
        plgpu.wgmma(acc, smem["ds"].at[zero, 0, wg].T, smem["k"].at[zero, :, pl.ds(column, TILE)])

    first_column = wg * cfg.columns

    def products(dv_acc, dq_acc, dk_acc):
        dk_acc[...], dv_acc[...] = carry
        plgpu.wgmma(dv_acc, weights, do_ref)
        plgpu.wgmma(dk_acc, ds, q_ref)
        multiply_dq(dq_acc, first_column)
        dq = lax.optimization_barrier(sums_of(dq_acc))
        _add_dq(cfg, refs, smem, wg, dq, place, first_column)
        return dk_acc[...], dv_acc[...]

    carry = accumulate(products, cfg.columns, TILE, cfg.columns)
    for column in range(TILE, cfg.columns, TILE):

        def rest(acc, column=first_column + column):
            multiply_dq(acc, column)
            return acc[...]

        dq = accumulate(rest, TILE)
        _add_dq(cfg, refs, smem, wg, dq, place, first_column + column)
    return carry


def _compute(cfg, idx, refs, smem, bars, wg):
    batch, block, kv_head, (lo, a, b, hi) = idx
    kv_bar, _, _, q_empty, do_empty, meet = bars
    own = 0 if cfg.split else wg
    base = block * cfg.block_k + own * TILE
    mask_row = batch if cfg.masks_batch else 0
    keys = [
        plgpu.load(refs["keys"].at[mask_row, i, pl.ds(base, TILE)], layout=ROW, optimized=False)
        for i in range(cfg.key_rows)
    ]
    plgpu.barrier_wait(kv_bar)
    if not cfg.split:
        plgpu.barrier_arrive(meet)

    def step(i, carry, head, before, masked):
        sums, place = carry
        count = before + i - lo
        slots = lax.rem(count, cfg.stages), lax.rem(count, cfg.do_stages)
        weights, ds = _score_gradients(cfg, base, smem, bars, wg, slots, keys, masked)
        if cfg.split:
            sums = _split_sums(cfg, refs, smem, wg, slots, (batch, head, i, True), sums, weights, ds)
        else:
            place = (batch, *place, count > 0)
            sums = _sums(cfg, refs, smem, wg, meet, slots, lax.rem(count, 2), place, sums, weights, ds)
        plgpu.barrier_arrive(q_empty.at[slots[0]])
        plgpu.barrier_arrive(do_empty.at[slots[1]])
        return sums, (head, i)

    def one_head(r, carry):
        here = functools.partial(step, head=kv_head * cfg.group + r, before=r * (hi - lo))
        if cfg.first_masked:
            carry = lax.fori_loop(lo, a, functools.partial(here, masked=True), carry)
        carry = lax.fori_loop(a, b, functools.partial(here, masked=False), carry)
        if cfg.last_masked:
            carry = lax.fori_loop(b, hi, functools.partial(here, masked=True), carry)
        return carry

    zero = zeros(cfg.columns)
    first_place = (kv_head * cfg.group, jnp.int32(0))
    (dk, dv), place = lax.fori_loop(0, cfg.group, one_head, ((zero, zero), first_place))
    if not cfg.split:
        _last_dq(cfg, refs, smem, wg, meet, (hi - lo) * cfg.group, (batch, *place))
    plgpu.barrier_arrive(meet)  # the other warpgroup reads these keys until here
    plgpu.barrier_wait(meet)
    columns = pl.ds(wg * cfg.columns, cfg.columns) if cfg.split else slice(None)
    smem["k"][own, :, columns] = (dk * cfg.scale).astype(cfg.dtype)
    smem["v"][own, :, columns] = dv.astype(cfg.dtype)
    plgpu.commit_smem()
    heads = {"k": kv_head, "v": kv_head + cfg.v_head}
    if cfg.split:  # each warpgroup copies what both have written
        plgpu.barrier_arrive(meet)
        plgpu.barrier_wait(meet)

    def store(name):
        plgpu.copy_smem_to_gmem(smem[name].at[own], refs["d" + name].at[batch, pl.ds(base, TILE), heads[name]])

    for number, name in enumerate("kv"):
        if cfg.split:
            pl.when(wg == number)(functools.partial(store, name))
        else:
            store(name)
    plgpu.wait_smem_to_gmem(0)


def _produce(cfg, idx, refs, smem, bars):
    batch, block, kv_head, (lo, _, _, hi) = idx
    kv_bar, q_full, do_full, q_empty, do_empty, _ = bars
    for half in range(cfg.block_k // TILE):
        rows = pl.ds(block * cfg.block_k + half * TILE, TILE)
        for name, head in (("k", kv_head), ("v", kv_head + cfg.v_head)):
            plgpu.copy_gmem_to_smem(refs[name].at[batch, rows, head], smem[name].at[half], kv_bar)
    mask_row = batch if cfg.masks_batch else 0
    per_head = hi - lo
    steps = per_head * cfg.group

    def step(count, _):
        head = kv_head * cfg.group + lax.div(count, per_head)
        rows = pl.ds((lo + lax.rem(count, per_head)) * cfg.block_q, cfg.block_q)

        def free(empty, stages):
            @pl.when(count >= stages)
            def _():
                plgpu.barrier_wait(empty.at[lax.rem(count, stages)])

            return lax.rem(count, stages)

        slot = free(q_empty, cfg.stages)
        full = q_full.at[slot]
        plgpu.copy_gmem_to_smem(refs["q"].at[batch, rows, head], smem["q"].at[slot], full)
        plgpu.copy_gmem_to_smem(refs["lse"].at[batch, head, rows], smem["lse"].at[slot], full)
        plgpu.copy_gmem_to_smem(refs["bounds"].at[mask_row, :, rows], smem["bounds"].at[slot], full)
        slot = free(do_empty, cfg.do_stages)
        full = do_full.at[slot]
        plgpu.copy_gmem_to_smem(refs["do"].at[batch, rows, head], smem["do"].at[slot], full)
        plgpu.copy_gmem_to_smem(refs["delta"].at[batch, head, rows], smem["delta"].at[slot], full)
        return None

    lax.fori_loop(0, steps, step, None)
    drain(steps, cfg.stages, (q_empty,))
    drain(steps, cfg.do_stages, (do_empty,))


def _body(cfg, *flat):
    names = ["q", "k", "v", "do", "lse", "delta", "bounds", "ranges"] + ["keys"] * (cfg.key_rows > 0)
    refs = dict(zip([*names, "dq", "dv", "dk"], flat))
    refs.setdefault("dk", refs["dv"])
    wg = lax.axis_index("wg")
    index = lax.axis_index("block")
    per_block = cfg.batch * cfg.kv_heads
    block = lax.div(index, per_block)  # under a causal mask the first key blocks have the most queries
    rest = lax.rem(index, per_block)
    batch, kv_head = lax.div(rest, cfg.kv_heads), lax.rem(rest, cfg.kv_heads)
    mask_row = batch if cfg.masks_batch else 0
    # + 0: what is read counts as varying over a shard_map's axes, what is computed here as the same, also in loops.
    idx = (batch, block, kv_head, tuple(refs["ranges"][mask_row, block, i] + 0 for i in range(4)))

    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    s, do_s, halves = cfg.stages, cfg.do_stages, cfg.block_k // TILE
    scratch = {
        "k": tile((halves, TILE, cfg.width)),
        "v": tile((halves, TILE, cfg.width)),
        "q": tile((s, cfg.block_q, cfg.width)),
        "do": tile((do_s, cfg.block_q, cfg.width)),
        "ds": tile((halves, cfg.block_q // TILE, 2, TILE, TILE)),  # two in turn, unless each warpgroup has its own
        "dq": plgpu.SMEM((2, TILE, TILE), F32, transforms=F32_TRANSFORMS),
        "lse": plgpu.SMEM((s, cfg.block_q), F32),
        "delta": plgpu.SMEM((do_s, cfg.block_q), F32),
        "bounds": plgpu.SMEM((s, 2 + cfg.ids, cfg.block_q), jnp.int32),
    }

    def scoped(smem, *bars):
        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            _compute(cfg, idx, refs, smem, bars, wg)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            _produce(cfg, idx, refs, smem, bars)

    pl.run_scoped(
        scoped,
        scratch,
        plgpu.Barrier(num_arrivals=2 * halves),
        plgpu.Barrier(num_arrivals=3, num_barriers=s),
        plgpu.Barrier(num_arrivals=2, num_barriers=do_s),
        plgpu.Barrier(num_arrivals=2, num_barriers=s),
        plgpu.Barrier(num_arrivals=2, num_barriers=do_s),
        plgpu.Barrier(num_arrivals=2),
        collective_axes="wg",
    )


def backward(cfg, q, k, v, do, lse, delta, bounds, ranges, keys):
    """Run the backward kernel: (dq / scale in float32, dk, dv), shaped like q, k and v; dk None where dv has it.

    do: the gradient of the ungated output; lse, delta ``[B, H, T or more]``: the forward's log-sum-exp (units of log2)
    and the row sums of do * ungated out; bounds ``[B or 1, 2 or 3, T or more]``; ranges ``[B or 1, blocks, 4]``: the
    query blocks lo..hi that see the key block, a..b without masks; keys as in the forward.
    """
    mesh = plgpu.Mesh(
        grid=(cfg.blocks * cfg.batch * cfg.kv_heads,), grid_names=("block",), num_threads=3, thread_name="wg"
    )
    # Zeros that hang on this call: XLA would make one array for all calls of a shape, and copy it for each to add to.
    zero, delta = lax.optimization_barrier((jnp.zeros((), F32), delta))
    args = [q, k, v, do, lse, delta, bounds, ranges] + [keys] * (cfg.key_rows > 0)
    with unchecked_varying():
        dq = jax.new_ref(jnp.full(q.shape, zero))
        dv, *dk = pl.kernel(
            functools.partial(_body, cfg),
            out_type=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ([v] if cfg.v_head else [v, k])],
            mesh=mesh,
            # Every store to shared memory follows a wait of the whole warpgroup for its last readers: no barriers are
            # needed beside those of commits and waits.
            compiler_params=LANE_PARAMS,
            name="attention_backward",
        )(*args, dq)
        return jax.freeze(dq), dk[0] if dk else None, dv
