# SPDX-License-Identifier: Apache-2.0
"""The processes of a run of several: each notices when another is lost, and all end together.

They talk through the key-value store of JAX's coordination service, which process 0 hosts. Each puts a number there
that grows; process 0 watches the others' numbers, and the others watch whether it answers. A process that has not been
heard of for `run.heartbeat` seconds is lost, and the rest end with exit code 75. JAX has heartbeats of its own, but its
answer to a lost process is to abort all others with a native stack; its switch `jax_enable_recoverability` stops that
for every process but 0, and with it the barrier at the end. So its heartbeats stay as a second net, longer than ours,
and its callback is ours.

A process that stood still (SIGSTOP, a paused machine) and goes on must not write into a run that others may have
started again: `check()`, before every write, returns only while this process is heard of.
"""

import contextlib
import ctypes
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed  # the key-value store has no public name
from jaxlib import _jax

from hybridlm.errors import Exit
from hybridlm.train.ending import leave

SIGNS = 6
"""Signs of life in a heartbeat."""
END, STOP, SIGN, MEET = "hybridlm/end", "hybridlm/stop", "hybridlm/sign", "hybridlm/meet"
NCCL = "--xla_gpu_nccl_terminate_on_error"
FOR_EVER = 7 * 24 * 3600 * 1000  # milliseconds
STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
"""How an error of the runtime begins that reaches Python as a ValueError."""


class Peers:
    """The processes of a run; of a single one, nothing but `count == 1`.

    Enter `joining()` around `jax.distributed.initialize(**options)`, then `start()`; at the end `close()` or `fail()`.
    """

    def __init__(self, heartbeat: float = 30.0, resume: str = "the same command"):
        """heartbeat: seconds without a sign of life after which a process is lost. resume: the command to type then."""
        self.index, self.count = 0, 1
        self._heartbeat, self._resume = heartbeat, resume
        self._client = None
        self._fresh = time.monotonic()
        self._closed = threading.Event()
        self._settled = False
        self._code: int = Exit.AGAIN
        self._threads: list[threading.Thread] = []

    @contextlib.contextmanager
    def joining(self) -> Iterator[dict]:
        """Around `jax.distributed.initialize`, with these options: what it does on a failure is ours."""
        jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would replace train/stop.py's
        flags = os.environ.get("XLA_FLAGS", "")
        if NCCL not in flags:  # on GPUs XLA aborts the process where NCCL fails
            os.environ["XLA_FLAGS"] = f"{flags} {NCCL}=false".strip()
        connect = _jax.get_distributed_runtime_client
        told = functools.partial(connect, missed_heartbeat_callback=lambda *_: self._service_failed())
        _jax.get_distributed_runtime_client = told  # initialize() does not hand a callback on
        _at_bad_cast(self._service_failed)
        try:
            yield {"heartbeat_timeout_seconds": int(3 * self._heartbeat) + 10}
        finally:
            _jax.get_distributed_runtime_client = connect

    def start(self, on_stop: Callable[[int], None]) -> None:
        """Begins to give signs of life, where there are others. on_stop: called once, with the signal."""
        state = distributed.global_state
        if state.client is None or state.num_processes == 1:
            return
        self._client, self.index, self.count = state.client, state.process_id, state.num_processes
        self._fresh = time.monotonic()
        heard = {
            "signs": self._give_signs,
            "watch": self._watch if self.index else None,
            "end": lambda: self._hear(END, self._end),
            "stop": lambda: self._hear(STOP, lambda text: on_stop(int(text))),
        }
        self._threads = [threading.Thread(target=f, name=f"peers-{n}", daemon=True) for n, f in heard.items() if f]
        for thread in self._threads:
            thread.start()

    # What a run asks ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Returns while this process is heard of; ends it where it is not. Before every write."""
        while self.count > 1 and time.monotonic() - self._fresh > self._heartbeat / 2:
            time.sleep(0.05)

    def tell_to_stop(self, signum: int) -> None:
        """All processes call their `on_stop`, this one too; the first signal counts."""
        self._put_once(STOP, str(signum))

    def latest(self, turn: int) -> int:
        """The largest `turn` of all processes, each of which calls this once."""
        try:
            self._client.key_value_set(f"{MEET}/{self.index}", str(turn))
            self._client.wait_at_barrier(f"{MEET}/put", FOR_EVER)
            turns = [int(value) for _, value in self._client.key_value_dir_get(MEET)]
            self._client.wait_at_barrier(f"{MEET}/read", FOR_EVER)
        except jax.errors.JaxRuntimeError:
            self._lost(0, "it is gone")
        return max(turns)

    def leave_together(self, code: int, line: str) -> None:
        """Ends this process, as all others do now: none of them takes the end of another for a loss."""
        self._code = code
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # one that left by itself meanwhile
            self._client.wait_at_barrier("hybridlm/leave", int(self._heartbeat * 1000))
        self._linger()
        leave(code, line, sys.stdout)

    def fail(self, code: int, line: str) -> None:
        """Tells the others why this process ends, and ends it; they end with the same code and line."""
        if self.count == 1:
            return
        self._code = code
        self._put_once(END, f"{code} process {self.index}: {line}")
        self._linger()
        leave(code, f"error: {line}")

    def settle(self, error: BaseException) -> None:
        """After an error, before it is written or told: ends this process if it is not heard of, or, where the error is
        of a computation that others take part in, if one of them is lost."""
        if self.count == 1:
            return
        if not self._settled and _in_a_computation(error):
            time.sleep(self._heartbeat * (SIGNS + 4) / SIGNS)
        self._settled = True
        self.check()

    def close(self, code: int) -> None:
        """At the end of a run, which has the exit code: waits until all are there, and leaves the cluster."""
        if self.count == 1:
            return
        self._client.wait_at_barrier("hybridlm/close", FOR_EVER)
        self._code = code
        self._closed.set()
        if self.index == 0:
            for key in (END, STOP):  # lets their threads go
                self._put_once(key, "")
        for thread in self._threads:
            thread.join(timeout=self._heartbeat)
        self.count = 1
        jax.distributed.shutdown()

    # Threads ------------------------------------------------------------------------------------------------------

    def _give_signs(self) -> None:
        signs, others = 0, {k: Other() for k in range(self.count) if k != self.index}
        while not self._closed.wait(self._heartbeat / SIGNS):
            signs, began = signs + 1, time.monotonic()
            try:
                self._client.key_value_set(f"{SIGN}/{self.index}", str(signs), allow_overwrite=True)
                found = self._client.key_value_dir_get(SIGN) if self.index == 0 else ()
            except jax.errors.JaxRuntimeError:
                self._lost(0, "it does not answer")
                return
            if self.index:
                self._fresh = began
                continue
            for key, value in found:
                if (other := others.get(int(key.rpartition("/")[2]))) is not None:
                    other.heard(value, began)
            for k, other in others.items():
                other.missed += 1
                if other.missed > SIGNS + 1:
                    self._lost(k, f"no sign of life for {time.monotonic() - other.at:.0f} s")
            self._fresh = min(other.at for other in others.values())

    def _watch(self) -> None:
        """Whether process 0 answers: the call that waits for it has no limit. Counts turns, not time: a process that
        stood still hears first what has come meanwhile."""
        silent, last = 0, self._fresh
        while not self._closed.wait(self._heartbeat / SIGNS):
            silent, last = (silent + 1, last) if self._fresh == last else (0, self._fresh)
            if silent > SIGNS + 1:
                self._lost(0, f"no answer for {time.monotonic() - last:.0f} s")

    def _hear(self, key: str, act: Callable[[str], None]) -> None:
        """Waits for a word of any process, and acts on it."""
        while True:
            try:
                text = self._client.blocking_key_value_get(key, FOR_EVER)
                break
            except jax.errors.JaxRuntimeError as error:
                if self._closed.is_set():
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._lost(0, "it is gone")
        if text:
            act(text)

    def _end(self, text: str) -> None:
        code, _, line = text.partition(" ")
        if not line.startswith(f"process {self.index}:"):
            about_me = line.startswith(f"lost process {self.index} ")
            leave(int(code), f"error: {'given up by the others, who ' if about_me else ''}{line}")

    # Endings ------------------------------------------------------------------------------------------------------

    def _lost(self, k: int, why: str) -> None:
        if self._closed.is_set():
            return
        if self._code != Exit.AGAIN:  # about to end for another reason, as the others are
            time.sleep(self._heartbeat / SIGNS)
        line = f"lost process {k} ({why}); to resume, start all processes again: {self._resume}"
        if self.index == 0:
            self._put_once(END, f"{self._code:d} {line}")
            self._linger()
        leave(self._code, f"error: {line}")

    def _service_failed(self) -> None:
        """What JAX calls, and what it aborts in place of calling: its service, in process 0, is gone or gave us up."""
        if self._closed.is_set():
            os._exit(self._code)
        self._lost(0, "its coordination service is gone")

    def _put_once(self, key: str, text: str) -> None:
        """Says a word to all, unless somebody has said one; does not wait long for a service that stands still."""

        def put() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # already said, or nobody is there
                self._client.key_value_set(key, text)

        putting = threading.Thread(target=put, daemon=True)
        putting.start()
        putting.join(self._heartbeat / SIGNS)

    def _linger(self) -> None:
        """Process 0 stays until the others have heard: its end takes the key-value store away."""
        if self.index == 0:
            time.sleep(min(1.0, self._heartbeat / SIGNS))


class Other:
    """What process 0 knows of another one."""

    def __init__(self):
        self.value, self.at, self.missed = None, time.monotonic(), 0

    def heard(self, value: str, now: float) -> None:
        """Its number, which grows while it lives."""
        if value != self.value:
            self.value, self.at, self.missed = value, now, 0


def _at_bad_cast(act: Callable[[], None]) -> None:
    """Lets C++ exceptions of type bad_cast that nobody catches call `act` instead of aborting.

    JAX's binding cannot hand the argument of `missed_heartbeat_callback` to Python (jaxlib 0.10, 0.11): calling it
    throws one in a thread of JAX, which then aborts in place of the callback. Where C++'s library has no such names,
    JAX aborts as it always did.
    """
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        type_of_current, set_terminate = library["__cxa_current_exception_type"], library["_ZSt13set_terminatePFvvE"]
    except (OSError, AttributeError):
        return
    handler = ctypes.CFUNCTYPE(None)
    type_of_current.restype = ctypes.c_void_p
    set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)

    @handler
    def at_end():
        kind = type_of_current()  # a std::type_info: after the pointer to its functions, its name
        if kind and ctypes.c_char_p.from_address(kind + ctypes.sizeof(ctypes.c_void_p)).value == b"St8bad_cast":
            act()
        handler(previous)()

    _kept.append(at_end)
    previous = set_terminate(ctypes.cast(at_end, ctypes.c_void_p))


_kept: list = []  # what C++ calls must not be collected


def _in_a_computation(error: BaseException | None) -> bool:
    """Whether JAX raised it: where a process is lost, what the others compute with it fails."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        if isinstance(error, ValueError) and STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
