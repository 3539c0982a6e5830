# SPDX-License-Identifier: Apache-2.0
"""Runs the Hopper kernels of attention in Mosaic's interpreter, as a process: `mosaic_interpreter.py CASE...`.

The interpreter knows no initialised matrix-unit accumulators, no adding copies and no tiles outside an array. So
products are plain ones here, adding copies read and write, and tokens are padded to whole blocks; the rest (barriers,
slots, ranges, masks, layouts of the arguments) is the kernels' own. One thread waits for another: XLA must have enough
of them (NPROC in the environment), whatever the machine has.
"""

import dataclasses
import functools
import importlib
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NAMES = ("packed_wide", "window_wide", "softcap_sinks", "packed_window", "heads_of_256", "one_token", "cache", "mapped")
DECODING = ("decode", "decode_window", "decode_rows", "decode_layer")


class Accumulator:
    """Stands for one set of accumulator registers."""

    def __init__(self, shape, dtype=jnp.float32, value=None):
        self.shape, self.dtype = shape, dtype
        self.value = jnp.zeros(shape, dtype) if value is None else value

    def __getitem__(self, index):
        return self.value

    def __setitem__(self, index, value):
        self.value = value


class Specs:
    def __call__(self, shape, dtype):
        return lambda: Accumulator(shape, dtype)

    def init(self, value):
        return lambda: Accumulator(value.shape, value.dtype, value)


def read(operand):
    return operand if isinstance(operand, jax.Array) else operand[...]


def multiply(accumulator, left, right):
    accumulator.value += jnp.dot(read(left), read(right), preferred_element_type=jnp.float32)


@functools.cache
def install_once() -> None:
    """`install`, with sizes at which small arrays have several tiles."""
    install()
    gpu = importlib.import_module("pallas_kernels.ops.attention.gpu.api")
    gpu.TOKEN_MULTIPLE = gpu.ROW_MULTIPLE
    gpu.gpu_forward.MULTIPROCESSORS = 3  # so that a thread block has several tiles
    gpu.DECODE_KEYS = 128


def install() -> None:
    """Replaces what the interpreter lacks, in this process."""
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

    pl.run_scoped, pl.run_state = scoped, run_state
    plgpu.ACC, plgpu.wgmma, plgpu.copy_smem_to_gmem = Specs(), multiply, copy_or_add
    plgpu.wgmma_accumulator_load = lambda accumulator, wait_n=0: accumulator.value


def make_case(cases, name: str):
    many = {"batch": 1, "heads": 2, "kv_heads": 1}
    if name == "packed_wide":
        return cases.Case(name, queries=400, keys=400, width=128, layout="packed", sinks=True, **many)
    if name == "window_wide":
        return cases.Case(name, queries=300, keys=300, width=128, window=90, gate="head", **many)
    if name == "mapped":  # by vmap over the batch
        return cases.Case(name, 2, 200, 200, 2, 1, 64)
    if name == "heads_of_256":
        return cases.Case(name, queries=150, keys=150, width=200, layout="packed", softcap=20.0, **many)
    if name in ("decode", "decode_layer"):
        return cases.Case(name, 2, 1, 768, 8, 2, 64, q_offset=500)
    if name == "decode_rows":  # q_offset given by row: one fills the cache, the other leaves most parts without a key
        return cases.Case(name, 2, 2, 700, 8, 2, 128)
    if name == "decode_window":
        changes = {"window": 300, "sinks": True, "softcap": 10.0, "gate": "head", "q_offset": 700}
        return cases.Case(name, 2, 3, 768, 8, 2, 128, **changes)
    return dataclasses.replace(cases.CASES[name], batch=1)


def compare(name: str) -> bool:
    """Prints the error of every tensor of a case; whether all are within the tolerance table."""
    from pallas_kernels import assume_platform, oracle
    from pallas_kernels.ops.attention import cases

    case = make_case(cases, name)
    inputs, settings = cases.make_inputs(case, "bfloat16"), cases.make_settings(case)
    if name == "decode_rows":
        settings["q_offset"] = jnp.array([698, 3])
    arrays, fixed = oracle.split("attention", inputs)

    def call(arrays):
        return oracle.call("attention", {**arrays, **fixed}, implementation="gpu", **settings)[0]

    def layer(arrays):
        """Keys and values as a layer of stacked caches."""
        stacks = {name: jnp.stack([3 * arrays[name], arrays[name]]) for name in ("k", "v")}
        given = {**arrays, **stacks, **fixed}
        return oracle.call("attention", given, implementation="gpu", layer=jnp.int32(1), **settings)[0]

    def mapped(arrays):
        return jax.vmap(lambda row: call({key: array[None] for key, array in row.items()})[0])(arrays)

    function = {"mapped": mapped, "decode_layer": layer}.get(name, call)
    if name in DECODING:  # without gradients
        with plgpu.force_gpu_interpret_mode(), assume_platform("gpu"):
            actual = {"out0": function(arrays)}
        expected = {"out0": oracle.oracle("attention", inputs, **settings)["out0"]}
        return report(name, actual, expected)
    with plgpu.force_gpu_interpret_mode(), assume_platform("gpu"):
        out, pull = jax.vjp(function, arrays)
        [weights] = oracle.make_weights([out.shape])
        [grads] = pull(jnp.asarray(weights, out.dtype))
    actual = {"out0": out} | {f"d{name}": grad for name, grad in grads.items()}
    expected = oracle.oracle("attention", inputs, **settings)
    return report(name, actual, expected)


def report(name: str, actual: dict, expected: dict) -> bool:
    """Prints the errors of a case's tensors; whether all are within the table."""
    from pallas_kernels import oracle

    largest = max((oracle.rms(value) for key, value in expected.items() if key.startswith("d")), default=0.0)
    good = True
    for key, value in expected.items():
        floor = oracle.SMALL_GRADIENT * largest if key.startswith("d") else 0.0
        error, limit = oracle.relative_rms(actual[key], value, floor), oracle.bound("bfloat16", f"attention.{key}")
        good &= error <= limit
        print(f"{name}.{key}: relative RMS {error:.1e} of {limit:.0e}{'' if error <= limit else ' FAIL'}", flush=True)
    return good


def main(names: list[str]) -> int:
    install_once()
    return int(not all([compare(name) for name in names]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [*NAMES, *DECODING]))
