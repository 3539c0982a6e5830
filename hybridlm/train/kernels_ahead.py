# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU kernels of a program, compiled from when each is lowered, beside all that a start does meanwhile.

XLA compiles them when it is through with a program's passes, one after the other. Every call of a kernel holds its
text, hundreds of kilobytes, which XLA reads and prints again and again. A process keeps each kernel that it has
compiled by the hash of its text. So here programs of one kernel each are compiled in threads, and beside them the
program itself, whose calls hold hashes alone: when XLA asks for a kernel, behind its passes, all are there, or wait for
the lock in front of it.

That lock is of LLVM's options, which are a process's. Kernels have others than what XLA compiles itself, so that some
of the one are compiled side by side, or some of the other. A kernel's program wants both, XLA's first: kernels that
come together are compiled together, and one that comes later waits until they are through.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import config  # no public name keeps the programs of one thread out of the cache
from jax.sharding import Mesh, SingleDeviceSharding

from hybridlm.train.kernels_apart import lower_apart, processes
from pallas_kernels.platform import platform_of

TARGET = "mosaic_gpu_v2"
"""How JAX names the call of a kernel; where it names it otherwise, none is found."""
CALL = "stablehlo.custom_call"
WORDS = "mhlo.backend_config"
PLAIN = {"use_custom_barrier": False, "uses_xla_collective_metadata": False}
"""What a call says beside the text and its hash, as far as it is compiled otherwise for it."""
EVERY = 0.1
"""Seconds between two looks at what has been lowered."""
NEVER = 1e9
"""Seconds that no program takes to compile."""
MOST = 32
"""Threads: each kernel has one of its own, so that none comes to the lock when others are through; they wait there."""
SOON = 0.2
"""Seconds in which a kernel's program comes to the lock."""

log = logging.getLogger(__name__)


def compile_ahead(
    trace: Callable[[], jax.stages.Traced], mesh: Mesh, then: Callable[[], None] = lambda: None
) -> jax.stages.Compiled:
    """`trace().lower().compile()`, for the devices of a mesh; raises what that raises.

    then: is called when XLA alone is left, for which Python has nothing to do: what else is traced before delays it.
    Where XLA asks for a kernel that is not compiled yet, the program is compiled once more when all are. Whatever is
    wrong with a kernel's own program, or with a program without texts, this one is compiled as it is.
    """
    kernels = Kernels(mesh.devices.flat[0])
    with kernels.from_known(_known):
        lowered = lower_apart(trace().lower, processes() if platform_of(kernels.device) == "gpu" else 0)
    then()
    tries = 2 if kernels.of(lowered) else 0
    kernels.settle()
    while tries > 0 and not kernels.failed():
        tries -= 1 if kernels.waiting() else 2
        try:
            with without_texts(lowered):
                return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            log.info("compiled once more: %s", _first_line(error))
        kernels.wait()
    return lowered.compile()


class Kernels:
    """Those of a process that are compiled ahead. Nothing here raises."""

    def __init__(self, device: jax.Device):
        self.device, self.started = device, dict[bytes, Future]()
        self._pool, self._latest = ThreadPoolExecutor(MOST, "kernel"), -math.inf

    def start(self, words: Mapping[str, Any]) -> None:
        """Compiles the kernel of a call in a thread, once; its future says whether that was done."""
        if words["kernel_hash"] not in self.started:
            self._latest = time.monotonic()
            self.started[words["kernel_hash"]] = self._pool.submit(self._compile, dict(words))

    def settle(self) -> None:
        """Until all that are waiting wait for the lock."""
        while self.waiting() and (left := self._latest + SOON - time.monotonic()) > 0:
            time.sleep(min(left, EVERY))

    def waiting(self) -> bool:
        """Whether any is not through."""
        return not all(one.done() for one in list(self.started.values()))

    def failed(self) -> bool:
        """Whether one that is through is not compiled."""
        return any(one.done() and not one.result() for one in list(self.started.values()))

    def wait(self) -> None:
        """Until all are through."""
        wait(list(self.started.values()))

    @contextmanager
    def from_known(self, known: Callable[[], Mapping[bytes, bytes]]) -> Iterator[None]:
        """Within, starts each kernel as soon as it is known. known: () -> texts by hash, of all that were lowered."""
        if platform_of(self.device) != "gpu":
            yield
            return
        before, over = set(known()), threading.Event()

        def watch() -> None:
            while not over.wait(EVERY):
                for name, text in list(known().items()):
                    if name not in before:
                        self.start(PLAIN | {"kernel_hash": name, "module": text})

        thread = threading.Thread(target=watch, name="kernels")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def of(self, lowered: jax.stages.Lowered) -> bool:
        """Starts those that a program calls; whether it calls any, and is for a GPU."""
        if platform_of(self.device) != "gpu":
            return False
        try:
            called = calls(lowered)
            for words in called:
                self.start(words)
            self._pool.shutdown(wait=False)
            return bool(called)
        except Exception as error:  # whatever JAX calls things by then
            log.info("kernels are not compiled ahead: %s", _first_line(error))
            return False

    def _compile(self, words: dict[str, Any]) -> bool:
        try:
            with not_kept():
                call_alone(words, self.device).compile()
            return True
        except Exception as error:
            log.info("a kernel is not compiled ahead: %s", _first_line(error))
            return False


def calls(lowered: jax.stages.Lowered) -> list[dict[str, Any]]:
    """What each call of a kernel in a program says, by name: `module`, the text, and `kernel_hash` are bytes."""
    said = ({item.name: item.attr for item in operation.attributes[WORDS]} for operation in _calls(lowered))
    plain = lambda value: value.value_bytes if hasattr(value, "value_bytes") else value.value
    return [{name: plain(value) for name, value in words.items()} for words in said]


def call_alone(words: Mapping[str, Any], device: jax.Device) -> jax.stages.Lowered:
    """A program that calls a kernel without its arguments: to be compiled, never to be run."""
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((1,), np.float32))
    return jax.jit(lambda: call(**words), out_shardings=SingleDeviceSharding(device)).lower()


@contextmanager
def not_kept() -> Iterator[None]:
    """Within, JAX's cache on disk gets no program of this thread: one read back there has compiled no kernel here."""
    with config.persistent_cache_min_compile_time_secs(NEVER):
        yield


@contextmanager
def without_texts(lowered: jax.stages.Lowered) -> Iterator[None]:
    """Within, calls of kernels in a program have hashes alone."""
    from jax.extend.mlir import ir

    before = [(operation, operation.attributes[WORDS]) for operation in _calls(lowered)]
    with lowered.compiler_ir().context:
        none = ir.StringAttr.get(b"")
        for operation, words in before:
            said = {item.name: none if item.name == "module" else item.attr for item in words}
            operation.attributes[WORDS] = ir.DictAttr.get(said)
    try:
        yield
    finally:
        for operation, words in before:
            operation.attributes[WORDS] = words


def _known() -> Mapping[bytes, bytes]:
    """Texts of all kernels that this process has lowered, by hash, as JAX keeps them."""
    return getattr(sys.modules.get("jax.experimental.mosaic.gpu.core"), "KNOWN_KERNELS", {})


def _calls(lowered: jax.stages.Lowered) -> list:
    """Operations that call kernels."""
    found = _operations(lowered.compiler_ir().operation)
    return [one for one in found if one.name == CALL and one.attributes["call_target_name"].value == TARGET]


def _operations(operation) -> Iterator:
    """All within an operation of MLIR."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
