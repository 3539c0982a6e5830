# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU kernels of a program, compiled beside the compiler's first passes over it.

XLA compiles them when it is through with a program's passes, one after the other, and nothing else meanwhile: they
change LLVM's options, which are those of the process. A process keeps each kernel that it has compiled, by the hash of
its text. So programs of one kernel each, compiled in threads as soon as the text is there, leave XLA nothing to do.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

TARGET = "mosaic_gpu_v2"
"""How JAX names the call of a kernel; where it names it otherwise, none is found."""
CALL = "stablehlo.custom_call"
WORDS = "mhlo.backend_config"
MOST = 8
"""Threads: `hybrid_1b` has 11 kernels, of which the longest takes a third of the time of all."""

log = logging.getLogger(__name__)


def compile_kernels(lowered: jax.stages.Lowered, mesh: Mesh) -> list[Future]:
    """Starts to compile the kernels that a program for the devices of a mesh calls; a future for each.

    Never raises, nor do the futures: what is not compiled here is compiled with the program.
    """
    try:
        found = kernels(lowered)
        if not found:
            return []
        pool = ThreadPoolExecutor(min(MOST, len(found), max(1, (os.cpu_count() or 2) // 2)), "kernel")
        device = mesh.devices.flat[0]
        futures = [pool.submit(_compile, words, device) for words in found]
        pool.shutdown(wait=False)
        return futures
    except Exception as error:  # whatever JAX calls things by then
        log.info("kernels are not compiled ahead: %s", type(error).__name__)
        return []


def kernels(lowered: jax.stages.Lowered) -> list[dict[str, bytes | bool]]:
    """What the calls of kernels say, by name, one call of each kernel, the longest text first. `module` is the text."""
    found = {}
    for operation in _operations(lowered.compiler_ir().operation):
        if operation.name != CALL or operation.attributes["call_target_name"].value != TARGET:
            continue
        words = operation.attributes[WORDS]
        said = {item.name: item.attr for item in words}
        said = {name: getattr(value, "value_bytes", None) or value.value for name, value in said.items()}
        found[said["kernel_hash"]] = said
    return sorted(found.values(), key=lambda said: len(said["module"]), reverse=True)


def call_alone(words: dict[str, bytes | bool], device: jax.Device) -> jax.stages.Lowered:
    """A program that calls a kernel without its arguments: to be compiled, never to be run."""
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((1,), np.float32))
    return jax.jit(lambda: call(**words), out_shardings=SingleDeviceSharding(device)).lower()


def _compile(words: dict[str, bytes | bool], device: jax.Device) -> None:
    try:
        call_alone(words, device).compile()
    except Exception as error:
        log.info("a kernel is not compiled ahead: %s", str(error).strip().partition("\n")[0][:200])


def _operations(operation) -> Iterator:
    """All within an operation of MLIR."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)
