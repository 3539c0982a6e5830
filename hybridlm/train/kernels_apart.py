# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU kernels of a program, each lowered by a process of its own.

Of the time in which a program is lowered its kernels take most, one after the other, as Python has one thread for all.
So when a program is traced processes are forked, which lower it as this one does, each with its own part of the kernels
and nothing in the place of the others. This one takes from them, in the order in which it comes to them, what it would
have made itself.

A forked process has the memory of this one and none of its threads: it makes MLIR's threads anew, asks no device for
anything, writes to its pipe alone and ends without a word. Where one of them does not bring a kernel, whatever the
reason, this process lowers it.
"""

import inspect
import io
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import jax

POINT = "lower_jaxpr_to_module"
"""How JAX names what lowers a kernel; where it names it otherwise, no process is forked."""
NUMBERED = "mosaic_gpu.dump_basename"
"""Attribute with a kernel's number."""
MOST = 20
"""Processes. No config of ours has more kernels than that in one program."""
LEAST = 4
"""Cores with which a process forks: with fewer there is nothing to win."""
LATEST = 20.0
"""Seconds after which a forked process is ended, and no longer waited for."""

_thread = threading.local()
_lock = threading.Lock()
_kept: list[Any] = []
"""What a forked process must not free: of threads that it does not have."""


def processes() -> int:
    """How many to fork on this machine; 0: none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return min(cores - 1, MOST) if cores >= LEAST and jax.process_count() == 1 else 0


def lower_apart(lower: Callable[[], jax.stages.Lowered], count: int) -> jax.stages.Lowered:
    """`lower()`, whose kernels `count` forked processes lower; raises what that raises."""
    if count < 1 or not _can_be_asked():
        return lower()
    try:
        parts = _Parts(lower, count)
    except OSError:  # no more processes, memory or files
        return lower()
    with parts, _asking(parts.take):
        return lower()


class _Parts:
    """What forked processes lower, by the kernel's place in the program."""

    def __init__(self, lower: Callable[[], Any], count: int):
        """OSError where no process can be forked."""
        pipes = [Pipe(duplex=False) for _ in range(count)]
        self._found, self._place, self._change = dict[int, tuple[str, Any, bytes]](), 0, threading.Condition()
        self._open, self._end = {reader: place for place, (reader, _) in enumerate(pipes)}, time.monotonic() + LATEST
        self._count = count
        try:
            self._first = _fork()
        except OSError:
            for reader, writer in pipes:
                reader.close()
                writer.close()
            raise
        if self._first == 0:
            for reader in self._open:
                reader.close()
            _be_part(lower, [writer for _, writer in pipes])
        for _, writer in pipes:
            writer.close()
        self._reads = threading.Thread(target=self._read, name="kernels apart", daemon=True)

    def __enter__(self) -> None:
        self._reads.start()

    def __exit__(self, *error) -> None:
        with self._change:
            self._end = 0.0

    def take(self, lower: Callable[[], Any], name: str, outputs) -> Any:
        """The next kernel of the program: by another process, or by `lower()`."""
        place, self._place = self._place, self._place + 1
        with self._change:
            whole = lambda: place in self._found or place % self._count not in self._open.values()
            self._change.wait_for(whole, max(self._end - time.monotonic(), 0))
            found = self._found.pop(place, None)
        if found is None or found[0] != name:
            return lower()
        _, result, text = found
        return replace(result, module=_read_module(text))

    def _read(self) -> None:
        while self._open and time.monotonic() < self._end:
            for reader in wait(list(self._open), 1.0):
                try:
                    place, *found = reader.recv()
                except Exception:  # its end, or what is left of one that was ended
                    place, found = None, None
                with self._change:
                    if found is None:
                        del self._open[reader]
                        reader.close()
                    else:
                        self._found[place] = tuple(found)
                    self._change.notify_all()
        for reader in self._open:
            reader.close()
        os.waitpid(self._first, 0)


def _read_module(text: bytes) -> Any:
    """A kernel that another process has lowered. JAX numbers kernels in the order in which a process lowers them."""
    from jax._src.interpreters.mlir import ir
    from jax.experimental.mosaic.gpu import dialect

    module = ir.Module.parse(text)
    if NUMBERED in module.operation.attributes:
        del module.operation.attributes[NUMBERED]
        dialect.get_or_set_dump_options(module)
    return module


def _be_part(lower: Callable[[], Any], writers: list[Connection]) -> None:
    """In a process that was forked: is all of them, and does not return."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(int(LATEST))
        logging.disable()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(nothing, stream)
        mine, left = 0, len(writers)
        while left > 1:  # halves, so that none waits for all the others to be forked
            half = left // 2
            if _fork() == 0:
                mine, left = mine + left - half, half
            else:
                left -= half
        for place, writer in enumerate(writers):
            if place != mine:
                writer.close()
        _without_threads()
        with _asking(partial(_send, writers[mine], mine, len(writers), [0])):
            lower()
        writers[mine].close()
        while True:
            os.wait()
    except BaseException:
        pass
    finally:
        os._exit(0)


def _send(writer: Connection, mine: int, count: int, next_place: list[int], lower, name: str, outputs) -> Any:
    """In a forked process: the next kernel of the program is lowered and sent, or is another's."""
    place, next_place[0] = next_place[0], next_place[0] + 1
    from jax._src.interpreters.mlir import ir
    from jax._src.pallas.mosaic_gpu import lowering

    if place % count == mine:
        made = lower()
        if made.profiler_spec is None:
            text = io.BytesIO()
            made.module.operation.write_bytecode(text)
            writer.send((place, name, replace(made, module=None), text.getvalue()))
        return made
    return lowering.LoweringResult(ir.Module.create(), (1, 1, 1), (1, 1, 1), tuple(outputs), None, ())


def _fork() -> int:
    """`os.fork()`. What JAX and Python warn of is what a forked process keeps to here: it takes no part in threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def _without_threads() -> None:
    """In a forked process, has MLIR make threads of its own."""
    from jax._src.interpreters import mlir

    _kept.append(mlir.global_thread_pool)
    mlir.global_thread_pool = mlir.ir.ThreadPool()
    if (context := getattr(mlir, "_thread_local_context", None)) is not None:
        _kept.append(context.value)
        context.set_local(None)


@contextmanager
def _asking(part: Callable[..., Any]) -> Iterator[None]:
    """Within, kernels that this thread lowers are asked of `part`: (lower, name, outputs) -> what lowering gives."""
    before, _thread.part = getattr(_thread, "part", None), part
    try:
        yield
    finally:
        _thread.part = before


def _can_be_asked() -> bool:
    """Has JAX ask, once for all, who lowers a kernel; whether it does."""
    try:
        from jax._src.pallas.mosaic_gpu import lowering  # no public name lowers a kernel by itself

        with _lock:
            lower_now = getattr(lowering, POINT)
            if getattr(lower_now, "__module__", None) == __name__:
                return True
            form = inspect.signature(lower_now)
            if not {"jaxpr", "out_shapes"} <= form.parameters.keys():
                return False

            def asked(*args, **more):
                part, lower = getattr(_thread, "part", None), partial(lower_now, *args, **more)
                if part is None:
                    return lower()
                said = form.bind(*args, **more).arguments
                kinds = " ".join(str(v.aval) for v in said["jaxpr"].invars)
                return part(lower, f"{said['jaxpr'].debug_info.func_name} {kinds}", said["out_shapes"])

            asked.__module__ = __name__
            setattr(lowering, POINT, asked)
            return True
    except (ImportError, AttributeError):
        return False
