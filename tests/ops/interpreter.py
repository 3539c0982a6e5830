# SPDX-License-Identifier: Apache-2.0
"""Runs kernels where their accelerator is not: public ops, with implementation "gpu" or "tpu", in Pallas' interpreters.

    with interpreted("ssd", "gpu"):
        y = pallas_kernels.ssd(x, dt, A, B, C, implementation="gpu")

Whatever goes through an op's one door goes through here: jit, gradients, vmap, checkpoint, shard_map. A function that
was traced within stays interpreted, so trace anew outside.

Mosaic's interpreter of GPU kernels (JAX 0.11) runs a thread block's warpgroups on threads of XLA's that wait for each
other: it needs more of them than the machine may have (tests/conftest.py asks for them). It lacks matrix-unit
accumulators as a kernel uses them, adding copies and tiles that reach outside an array. So products are plain ones
here, adding copies read and write, and arrays are padded to whole blocks; barriers, slots, ranges, masks and layouts
are the kernels' own.
"""

import contextlib
import dataclasses
import functools
import importlib
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.ops import OPS
from pallas_kernels.platform import assume_platform
from tests.ops.support import QUICK

GENERATION = "v5p"  # of the TPU that is played: its two cores share a grid
MULTIPROCESSORS = 3  # of the GPU that is played: few, so that thread blocks of small arrays have several tiles each

needs_gpu_interpreter = pytest.mark.newer

LIMITS = {
    ("gpu", "check_checkpoint"): "its callbacks have effects, through which checkpoint does not differentiate",
    ("gpu", "check_hints", "ssd"): "as above: a hint of ssd asks for a checkpoint",
    ("gpu", "check_vmap", "causal_conv1d"): "its callbacks have effects, which vmap of a cond does not take",
    ("gpu", "check_shard_map"): "it runs one device at a time",
    ("gpu", "check_checked_shard_map"): "it runs one device at a time",
    ("tpu", "check_checked_shard_map", "attention"): "its loop over a grid of words that vary forgets that they do",
}
"""What the interpreters, not the kernels, cannot do: (platform, property of the contract, and the op, if of one)."""


def interpreted(op: str, platform: str, *, multiprocessors: int = MULTIPROCESSORS):
    """Context in which the op's kernel for a platform runs interpreted on this machine."""
    return _on_gpu(op, multiprocessors) if platform == "gpu" else _on_tpu(op)


@contextlib.contextmanager
def _on_tpu(op: str):
    implementations = OPS[op].implementations
    kernel = implementations["tpu"]
    function = functools.partial(kernel.load(), interpret=True)
    changed = {**implementations, "tpu": dataclasses.replace(kernel, function=function)}
    with mock.patch.dict(implementations, changed), assume_platform("tpu", generation=GENERATION):
        yield


def mosaic_interpreted():
    """Context in which Mosaic's GPU kernels that are no op's, `pallas_kernels.one_token`, run interpreted; what else is
    traced is for this machine."""
    return _on_gpu(None, MULTIPROCESSORS)


@contextlib.contextmanager
def _on_gpu(op: str | None, multiprocessors: int):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with contextlib.ExitStack() as stack:
        for target, changes in (*_words(), *_sizes(op), *_programs()):
            stack.enter_context(mock.patch.multiple(target, **changes))
        if op is not None:
            stack.enter_context(assume_platform("gpu", capability="9.0", multiprocessors=multiprocessors))
        stack.enter_context(plgpu.force_gpu_interpret_mode())
        stack.callback(_end_kernels)
        yield


def _end_kernels() -> None:
    """Waits for kernels, which run beside their caller where XLA has not made what they read or still makes something
    else, then forgets all of them: else what fails here fails whatever is interpreted later."""
    from jax._src.dispatch import runtime_tokens  # no public name, nor has the next
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    try:
        jax.effects_barrier()
    finally:
        runtime_tokens.clear()
        reset_gpu_interpret_mode_state()


def _sizes(op: str | None) -> list:
    """(module, its sizes): whole blocks, and cuts that small arrays show."""
    if op is None:
        names = ("pallas_kernels.one_token.one_row", "pallas_kernels.mosaic_gpu")
        loops = [(importlib.import_module(name), {"loop_with": _loop_with}) for name in names]
        return [*loops, (importlib.import_module("pallas_kernels.gated_product.products"), _gated_products())]
    op = {"gated_delta_product": "gated_delta_rule", "mamba3": "ssd"}.get(op, op)  # by whose kernels it runs
    api = importlib.import_module(f"pallas_kernels.ops.{op}.gpu.api")
    if op == "attention":
        backward_kernel = api._backward_kernel

        def backward(cfg, q, k, v, do, lse, delta, *rest):
            """The copy engine reads zeros behind what the forward has written, where q, padded here, goes on."""
            behind = ((0, 0), (0, 0), (0, q.shape[1] - lse.shape[2]))
            lse, delta = (jnp.pad(array[:, :, : lse.shape[2]], behind) for array in (lse, delta))
            return backward_kernel(cfg, q, k, v, do, lse, delta, *rest)

        sizes = {"TOKEN_MULTIPLE": api.ROW_MULTIPLE, "DECODE_KEYS": 128}
        return [(api, {**sizes, "_backward_kernel": backward})]
    if op == "causal_conv1d":
        kernels = importlib.import_module("pallas_kernels.ops.causal_conv1d.gpu.kernels")
        block = max(sizes[0] for sizes in (*api.FORWARD, *api.BACKWARD))
        return [(api, {"MARGIN": kernels.SEEN + block, "WIDTH_MULTIPLE": kernels.CHANNELS})]
    if op == "grouped_dot":
        kernels = importlib.import_module("pallas_kernels.ops.grouped_dot.gpu.kernels")
        return [(api, {"ROW_MULTIPLE": kernels.ROWS, "MARGIN": kernels.ROWS}), (kernels, {"loop_with": _loop_with})]
    if op in ("ssd", "linear_attention"):  # the latter by the kernels of the former
        return [(importlib.import_module("pallas_kernels.ops.ssd.gpu.grads"), {"loop_with": _loop_with})]
    if op == "gated_delta_rule":
        threads = importlib.import_module(f"pallas_kernels.ops.{op}.gpu.threads")
        return [(api, {"TOKEN_MULTIPLE": api.TILE}), (threads, _threads(threads))]
    if op == "selective_scan":
        names = ("forward", "backward", "threads")
        forward, backward, threads = (importlib.import_module(f"pallas_kernels.ops.{op}.gpu.{m}") for m in names)
        few = {"TILE": 8}  # written out: fewer are traced sooner
        patches = [(forward, few | {"exp2": lambda own, exponents, chosen: jnp.exp2(exponents)})]
        return [*patches, (backward, few | {"QUADS": 2}), (threads.Threads, _scan_threads(threads))]
    return []


def _gated_products() -> dict:
    """Of `pallas_kernels.gated_product.products`: warpgroups for warps, blocks that share nothing, and, of two views of
    the same memory, the one that is written."""
    from jax.experimental import pallas as pl

    def in_warps(*works):
        for number, work in enumerate(works):
            pl.when(lax.axis_index("wg") == 2 + number)(work)

    def store(ref, value):
        ref[...] = value

    joined = lambda views, slot: views[0][slot].reshape(views[1].shape[1:])
    return {"WARPGROUPS": 4, "CLUSTER": 1, "_in_warps": in_warps, "_joined": joined, "_store": store}


def _scan_threads(threads) -> dict:
    """Of `pallas_kernels.ops.selective_scan.gpu.threads.Threads`, for words that are not interpreted."""

    def spread(own):
        return lambda row: jnp.broadcast_to(row[:, None], (own.channels, threads.STATES))

    def widen(own):
        return lambda array, layout: array.astype(jnp.float32)

    def sum_own(own):
        return lambda array: array.reshape(own.channels, threads.QUAD, threads.HELD).sum(2)

    def sum_states(own):
        return lambda *tokens: jnp.stack([token.sum(1) for token in tokens])

    def sum_channels(own):
        def sums(*arrays):
            by_warp = jnp.stack([array.reshape(threads.WARPS, -1, threads.STATES).sum(1) for array in arrays], 1)
            by_warp = by_warp.reshape(threads.WARPS, -1)
            return jnp.stack([by_warp[:, int(place)] for place in np.argsort(threads.places().reshape(-1))], axis=1)

        return sums

    def store(own):
        def write(target, array):
            target[...] = array

        return write

    words = (widen, spread, sum_own, sum_states, sum_channels, store)
    return {word.__name__: property(word) for word in words}


def _threads(threads) -> dict:
    """`pallas_kernels.ops.gated_delta_rule.gpu.threads`, whose functions are in words that are not interpreted."""
    row, col = (functools.partial(lax.broadcasted_iota, jnp.int32, (threads.TILE,) * 2, axis) for axis in range(2))

    def keep(holds):
        return lambda tile: jnp.where(holds(row(), col()), tile, 0.0)

    def between(width):
        return keep(lambda row, col: (row // width % 2 == 1) & (row // width == col // width + 1))

    def invert_blocks(below):
        inverse = keep(jnp.equal)(jnp.ones_like(below))
        for i in range(threads.BLOCK - 1):  # row i of each block, times what each row behind it has in column i
            column, own = keep(lambda row, col, i=i: col % 16 == i), keep(lambda row, col: row // 16 == col // 16)
            inverse -= own(column(below)) @ inverse
        return inverse

    def two_terms(tile):
        high = lax.reduce_precision(tile, 8, 7)
        return high.astype(jnp.bfloat16), (tile - high).astype(jnp.bfloat16)

    blocks = lambda tile: tile.reshape(4, threads.BLOCK, -1)
    reverse = lambda tile: blocks(tile)[:, ::-1]

    def store_totals(row):
        def store(target, sums):
            target[...] = blocks(sums)[:, row]

        return store

    def others(holds):
        def sums(totals):
            block = lax.broadcasted_iota(jnp.int32, (4, 4), 0), lax.broadcasted_iota(jnp.int32, (4, 4), 1)
            return jnp.repeat(jnp.where(holds(*block), 1.0, 0.0) @ totals[...], threads.BLOCK, axis=0)

        return sums

    def distance(sums, bits):
        upto, row = sums[...][:, : threads.TILE], lax.broadcasted_iota(jnp.int32, (threads.TILE, 1), 0)
        width = 1 << bits
        middle = (row | (2 * width - 1)) - width
        moved = upto - jnp.where(col() == middle, 1.0, 0.0) @ upto
        return jnp.where((row & width) != 0, moved, -moved)

    def keep_level(tile, bits, transposed=False):
        behind, before = (col() >> bits, row() >> bits) if transposed else (row() >> bits, col() >> bits)
        return jnp.where((behind % 2 == 1) & (behind == before + 1), tile, jnp.zeros_like(tile))

    def store_padded(target, sums):
        target[...] = jnp.pad(sums, ((0, 0), (0, threads.PADDED - threads.TILE)))

    return {
        "sums_upto": lambda tile: jnp.cumsum(blocks(tile), axis=1).reshape(tile.shape),
        "sums_from": lambda tile: jnp.cumsum(reverse(tile), axis=1)[:, ::-1].reshape(tile.shape),
        "store_totals_upto": store_totals(threads.BLOCK - 1),
        "store_totals_from": store_totals(0),
        "others": {
            "before": others(jnp.greater),
            "behind": others(jnp.less),
            "all": others(lambda own, other: own == own),
        },
        "distance": distance,
        "store_padded": store_padded,
        "keep_level": keep_level,
        "hidden_zero": lambda: 0,
        "keep_lower": keep(jnp.greater_equal),
        "keep_strictly_lower": keep(jnp.greater),
        "keep_upper": keep(jnp.less_equal),
        "keep_diagonal": keep(jnp.equal),
        "keep_between": {width: between(width) for width in threads.keep_between},
        "invert_blocks": invert_blocks,
        "two_terms": two_terms,
    }


_LOCK, _PROGRAMS = threading.Lock(), {}


def _programs() -> list:
    """(module, its function that runs a thread's program): compiled once for all threads, and quickly.

    Left alone, each thread of the first thread block compiles it, optimised.
    """
    from jax._src.pallas.mosaic.interpret import thread_map  # no public name

    def run(jaxpr, consts, *args):
        with _LOCK:
            _, program = _PROGRAMS.get(id(jaxpr), (None, None))
            if program is None:
                traced = jax.jit(thread_map._run, static_argnums=0).trace(jaxpr, consts, *args)
                program = traced.lower().compile(compiler_options=QUICK)
                _PROGRAMS[id(jaxpr)] = jaxpr, program  # the former is kept, so that its id stays its own
        program(consts, *args)

    return [(thread_map, {"_run_jaxpr": run})]


class _Accumulator:
    """Stands for the registers of one accumulator."""

    def __init__(self, shape, dtype=jnp.float32, value=None):
        self.shape, self.dtype = shape, dtype
        self.value = jnp.zeros(shape, dtype) if value is None else value

    def __getitem__(self, index):
        return self.value

    def __setitem__(self, index, value):
        self.value = value


class _Specs:
    """Stands for `plgpu.ACC`."""

    def __call__(self, shape, dtype=jnp.float32):
        return lambda: _Accumulator(shape, dtype)

    def init(self, value):
        return lambda: _Accumulator(value.shape, value.dtype, value)


def _words() -> list:
    """(module, what stands for those of its words that the interpreter lacks)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    run_scoped, copy = pl.run_scoped, plgpu.copy_smem_to_gmem

    def scoped(body, *specs, **options):
        if specs and callable(specs[0]) and not isinstance(specs[0], type) and not options:
            return body(*(spec() for spec in specs))
        return run_scoped(body, *specs, **options)

    def run_state(body):
        def run(spec):
            accumulator = spec()
            body(accumulator)
            return accumulator.value

        return run

    def copy_or_add(source, target, reduction_op=None, **options):
        if reduction_op is None:
            return copy(source, target, **options)
        target[...] = target[...] + source[...]

    def multiply(accumulator, left, right):
        left, right = (operand if isinstance(operand, jax.Array) else operand[...] for operand in (left, right))
        accumulator.value += jnp.dot(left, right, preferred_element_type=jnp.float32)

    return [
        (pl, {"run_scoped": scoped, "run_state": run_state}),
        (
            plgpu,
            {
                "ACC": _Specs(),
                "wgmma": multiply,
                "wgmma_wait": lambda n: None,
                "wgmma_accumulator_load": lambda accumulator, wait_n=0: accumulator.value,
                "copy_smem_to_gmem": copy_or_add,
                "warp_map": lambda body: body(0),
            },
        ),
    ]


def _loop_with(accumulator, count, step) -> None:
    """`pallas_kernels.mosaic_gpu.loop_with`: the sums are carried."""

    def carried(i, value):
        own = _Accumulator(value.shape, value.dtype, value)
        step(i, own)
        return own.value

    accumulator.value = lax.fori_loop(0, count, carried, accumulator.value)
