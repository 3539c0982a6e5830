# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of the grouped product: rows times their group's matrix, and the matrices' gradients.

A thread block works on one tile of the result after the other: 128 rows of it, 64 a compute warpgroup, and up to 256
columns, in registers. A producer warpgroup streams blocks of 64 of the summed axis through shared memory by TMA, those
of the next tile while this one is stored.

Rows times matrices: tiles begin at multiples of 128 rows, wherever groups begin. A tile visits each group that has rows
in it and sums over all of them; of a group that has only some of the rows, the others are zeroed in shared memory. So
every tile is stored whole, and rows in no group, which are visited by none, are zeros. Tiles with the most visits come
first.

Gradients of matrices: a tile is 128 inputs by up to 256 outputs of one group, summed over the group's rows in blocks of
64 that begin at the last multiple of 8 up to it, as the copy engine counts in tiles of 8 rows; what is another group's
in the first and the last block is zeroed in both operands. The largest groups come first; those without rows are zeros.
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
    LANE_PARAMS,
    TILE,
    accumulate,
    clear_rows,
    drain,
    loop_with,
    named_body,
    tile_index,
)
from pallas_kernels.varying import call_varying

ROWS = 2 * TILE  # of a tile: those of two compute warpgroups
COPIED = 8  # rows of a tile of shared memory: of arrays in global memory rows are a multiple, as is where copies begin
REGISTERS = (240, 24)  # of a thread of the compute warpgroups and of the producer
SLOTS = 2  # of a warpgroup's results in shared memory


@dataclasses.dataclass(frozen=True)
class Product:
    """Static description of one kernel. Of rows times matrices: x ``[rows, inputs]``, w ``[groups, inputs, outputs]``
    or, transposed, ``[groups, outputs, inputs]``. Of their gradient: x ``[rows, inputs]``, dy ``[rows, outputs]``."""

    rows: int
    inputs: int
    outputs: int
    groups: int
    multiprocessors: int
    transposed: bool = False
    dtype: jnp.dtype = jnp.bfloat16
    stages: int = 4

    @property
    def columns(self) -> int:
        """Of a tile."""
        return next(n for n in (256, 128, 64) if self.outputs % n == 0)

    @property
    def n_columns(self) -> int:
        """Tiles beside each other."""
        return self.outputs // self.columns

    @property
    def n_rows(self) -> int:
        """Tiles of rows, the last of which may reach beyond them."""
        return -(-self.rows // ROWS)

    @property
    def tiles(self) -> int:
        return self.n_rows * self.n_columns

    @property
    def weight_tiles(self) -> int:
        return self.groups * (self.inputs // ROWS) * self.n_columns


def _programs(cfg, tiles: int) -> int:
    return min(cfg.multiprocessors, tiles)


def _each_tile(cfg, tiles: int, work) -> jax.Array:
    """`work(index, steps before it) -> steps with its own` for each tile of this thread block: all its steps."""
    programs, program = _programs(cfg, tiles), lax.axis_index("program")
    count = lax.div(tiles - program + programs - 1, programs)
    return lax.fori_loop(0, count, lambda number, done: work(number * programs + program, done), jnp.int32(0))


def _free(cfg, at, empty):
    """The slot of step `at`, once its last readers are done."""
    slot = lax.rem(at, cfg.stages)

    @pl.when(at >= cfg.stages)
    def _():
        plgpu.barrier_wait(empty.at[slot])

    return slot


def _multiply(cfg, acc, left, right, at, first, empty):
    """acc += left @ right of step `at`; lets go of the slot of the step before, unless this is the tile's first."""
    plgpu.wgmma(acc, left, right)
    plgpu.wgmma_wait(1)

    @pl.when(at > first)
    def _():
        plgpu.barrier_arrive(empty.at[lax.rem(at - 1, cfg.stages)])


def _finish(cfg, acc, end, first, empty):
    """The sums, once the last step's product is done and its slot free."""
    plgpu.wgmma_wait(0)

    @pl.when(end > first)
    def _():
        plgpu.barrier_arrive(empty.at[lax.rem(end - 1, cfg.stages)])

    return acc[...]


def _store(cfg, value, out_s, wg, target):
    """Starts storing a warpgroup's ``[64, columns]``; target(column) is where 64 columns go."""
    for number, column in enumerate(range(0, cfg.columns, TILE)):
        slot = number % SLOTS
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)  # what the slot held before has left it
        out_s[wg, slot] = value[:, column : column + TILE].astype(cfg.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[wg, slot], target(column))


class _RowsTile:
    """A tile of rows times matrices: which rows and columns, and the groups that it visits."""

    def __init__(self, cfg, refs, index):
        place = lax.div(index, cfg.n_columns)
        self.row = refs["tiles"][place, 0] * ROWS
        self.first, self.visits = refs["tiles"][place, 1], refs["tiles"][place, 2]
        self.column = lax.rem(index, cfg.n_columns) * cfg.columns


def _compute_rows(cfg, refs, smem, bars, wg):
    (a_s, b_s, out_s), (full, empty) = smem, bars
    steps = cfg.inputs // TILE

    def work(index, done):
        tile = _RowsTile(cfg, refs, index)
        row = tile.row + wg * TILE

        def visit(number, acc):
            start, end = refs["groups"][tile.first + number, 1], refs["groups"][tile.first + number, 2]
            whole = (start <= row) & (row + TILE <= end)

            def step(k, acc, masked):
                at = done + number * steps + k
                slot = lax.rem(at, cfg.stages)
                plgpu.barrier_wait(full.at[slot])
                if masked:
                    of_tile = row + tile_index(0)
                    clear_rows(a_s.at[slot, wg], (start <= of_tile) & (of_tile < end), cfg.dtype)
                    plgpu.commit_smem()
                right = b_s.at[slot]
                _multiply(cfg, acc, a_s.at[slot, wg], right.T if cfg.transposed else right, at, done, empty)

            loop_with(acc, jnp.where(whole, steps, 0), functools.partial(step, masked=False))
            loop_with(acc, jnp.where(whole, 0, steps), functools.partial(step, masked=True))

        end = done + tile.visits * steps

        def sums(acc):
            loop_with(acc, tile.visits, visit)
            return _finish(cfg, acc, end, done, empty)

        def target(column):
            return refs["y"].at[pl.ds(row, TILE), pl.ds(tile.column + column, TILE)]

        _store(cfg, accumulate(sums, cfg.columns), out_s, wg, target)
        return end

    _each_tile(cfg, cfg.tiles, work)
    plgpu.wait_smem_to_gmem(0)


def _produce_rows(cfg, refs, smem, bars):
    (a_s, b_s, _), (full, empty) = smem, bars
    steps = cfg.inputs // TILE

    def work(index, done):
        tile = _RowsTile(cfg, refs, index)
        columns = pl.ds(tile.column, cfg.columns)

        def visit(number, done):
            group = refs["groups"][tile.first + number, 0]

            def step(k, _):
                slot = _free(cfg, done + k, empty)
                inner = pl.ds(k * TILE, TILE)
                for half in range(2):
                    rows = pl.ds(tile.row + half * TILE, TILE)
                    plgpu.copy_gmem_to_smem(refs["x"].at[rows, inner], a_s.at[slot, half], full.at[slot])
                matrix = (group, columns, inner) if cfg.transposed else (group, inner, columns)
                plgpu.copy_gmem_to_smem(refs["w"].at[matrix], b_s.at[slot], full.at[slot])

            lax.fori_loop(0, steps, step, None)
            return done + steps

        return lax.fori_loop(0, tile.visits, visit, done)

    drain(_each_tile(cfg, cfg.tiles, work), cfg.stages, (empty,))


class _WeightsTile:
    """A tile of the matrices' gradients: its group, inputs and outputs, and the blocks of rows to sum over: the first
    begins at `row`, those from `whole` to `rest` have rows of the group alone."""

    def __init__(self, cfg, refs, index):
        per_group = cfg.inputs // ROWS * cfg.n_columns
        place, rest = lax.div(index, per_group), lax.rem(index, per_group)
        self.group, self.row, self.start, self.end = (refs["groups"][place, i] for i in range(4))
        self.input = lax.div(rest, cfg.n_columns) * ROWS
        self.column = lax.rem(rest, cfg.n_columns) * cfg.columns
        self.steps = lax.div(self.end - self.row + TILE - 1, TILE)
        self.whole = jnp.where(self.start > self.row, jnp.minimum(self.steps, 1), 0)
        self.rest = jnp.maximum(self.whole, lax.div(self.end - self.row, TILE))


def _compute_weights(cfg, refs, smem, bars, wg):
    (a_s, b_s, out_s), (full, empty, meet) = smem, bars

    def work(index, done):
        tile = _WeightsTile(cfg, refs, index)

        def step(k, acc, masked):
            at = done + k
            slot = lax.rem(at, cfg.stages)
            plgpu.barrier_wait(full.at[slot])
            if masked:
                row = tile.row + k * TILE + tile_index(0)
                real = (tile.start <= row) & (row < tile.end)
                clear_rows(a_s.at[slot, wg], real, cfg.dtype)
                half = cfg.columns // 2
                for column in range(0, half, TILE):
                    clear_rows(b_s.at[slot, :, pl.ds(wg * half + column, TILE)], real, cfg.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(meet)
                plgpu.barrier_wait(meet)  # the other warpgroup has cleared its half of the outputs
            _multiply(cfg, acc, a_s.at[slot, wg].T, b_s.at[slot], at, done, empty)

        end = done + tile.steps

        def sums(acc):
            for begin, stop, masked in (
                (0, tile.whole, True),
                (tile.whole, tile.rest, False),
                (tile.rest, tile.steps, True),
            ):
                loop_with(acc, stop - begin, lambda k, acc, begin=begin, masked=masked: step(begin + k, acc, masked))
            return _finish(cfg, acc, end, done, empty)

        def target(column):
            return refs["dw"].at[tile.group, pl.ds(tile.input + wg * TILE, TILE), pl.ds(tile.column + column, TILE)]

        _store(cfg, accumulate(sums, cfg.columns), out_s, wg, target)
        return end

    _each_tile(cfg, cfg.weight_tiles, work)
    plgpu.wait_smem_to_gmem(0)


def _produce_weights(cfg, refs, smem, bars):
    (a_s, b_s, _), (full, empty, _) = smem, bars

    def work(index, done):
        tile = _WeightsTile(cfg, refs, index)

        def step(k, _):
            slot = _free(cfg, done + k, empty)
            rows = pl.ds(tile.row + k * TILE, TILE)
            for half in range(2):
                inner = pl.ds(tile.input + half * TILE, TILE)
                plgpu.copy_gmem_to_smem(refs["x"].at[rows, inner], a_s.at[slot, half], full.at[slot])
            columns = pl.ds(tile.column, cfg.columns)
            plgpu.copy_gmem_to_smem(refs["dy"].at[rows, columns], b_s.at[slot], full.at[slot])

        lax.fori_loop(0, tile.steps, step, None)
        return done + tile.steps

    drain(_each_tile(cfg, cfg.weight_tiles, work), cfg.stages, (empty,))


def _body(cfg, names, compute, produce, meets, *flat):
    refs, wg = dict(zip(names, flat, strict=True)), lax.axis_index("wg")
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    right = (cfg.columns, TILE) if cfg.transposed else (TILE, cfg.columns)
    scratch = [tile((cfg.stages, 2, TILE, TILE)), tile((cfg.stages, *right)), tile((2, SLOTS, TILE, TILE))]

    def scoped(smem, *bars):
        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            compute(cfg, refs, smem, bars, wg)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            produce(cfg, refs, smem, bars)

    pl.run_scoped(
        scoped,
        scratch,
        plgpu.Barrier(num_arrivals=3, num_barriers=cfg.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=cfg.stages),
        *[plgpu.Barrier(num_arrivals=2)] * meets,
        collective_axes="wg",
    )


def _call(cfg, name, names, out, compute, produce, tiles, *arrays, meets: bool = False):
    kernel = plgpu.kernel(
        named_body(name, _body, cfg, names, compute, produce, meets),
        out_type=out,
        grid=(_programs(cfg, tiles),),
        grid_names=("program",),
        num_threads=3,
        thread_name="wg",
        # Shared memory is written after a wait of the whole warpgroup for its last readers, and read by products after
        # a commit: no barriers are needed beside those of commits and waits.
        compiler_params=LANE_PARAMS,
    )
    return call_varying(kernel, *arrays)


def rows_times_matrices(cfg: Product, x, w, tiles, groups):
    """y ``[rows, outputs]``.

    tiles ``[n_rows, 3]`` int32, in the order of work: a tile, the first of the groups that it visits, their number;
    groups ``[G, 3]`` int32, those with rows first: a group, its first row and the one behind its last.
    """
    out = jax.ShapeDtypeStruct((cfg.rows, cfg.outputs), cfg.dtype)
    names = ("x", "w", "tiles", "groups", "y")
    work = _compute_rows, _produce_rows, cfg.tiles
    return _call(cfg, "grouped_dot_rows", names, out, *work, x, w, tiles, groups)


def matrix_gradients(cfg: Product, x, dy, groups):
    """dw ``[groups, inputs, outputs]``.

    groups ``[G, 4]`` int32, in the order of work: a group, the last multiple of 8 up to its first row, that row and the
    one behind its last; the first three the same where there is none.
    """
    out = jax.ShapeDtypeStruct((cfg.groups, cfg.inputs, cfg.outputs), cfg.dtype)
    names = ("x", "dy", "groups", "dw")
    work = _compute_weights, _produce_weights, cfg.weight_tiles
    return _call(cfg, "grouped_dot_matrices", names, out, *work, x, dy, groups, meets=True)
