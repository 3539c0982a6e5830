# SPDX-License-Identifier: Apache-2.0
"""Processes one after the other, or so many at once, each with devices of its own; signals go on to all of them."""

import glob
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hybridlm import storage
from hybridlm.errors import ConfigError, require

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1
MOST = 64
"""Processes at once."""
PARENT = "HYBRIDLM_PARENT"
"""The variable that tells a process whose end, however that comes, is its own: `end_with_parent`."""


class Job(NamedTuple):
    """A process to be."""

    name: str
    words: list[str]
    log: Path | None
    """Takes what it says, behind what is there; None: it says it here."""


def logs_of(purpose: str, folder: Path) -> Path:
    """The folder, made, in which processes write what they say: that one, or of a bucket's one of this machine."""
    logs = storage.local(purpose, folder)
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def slots(n: int, environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """What n processes at once have in their environments: GPUs of their own where there are some, as many for each.

    ConfigError where there are fewer GPUs than processes, and on TPUs, which one process has as a whole.
    """
    require(1 <= n <= MOST, f"--parallel ({n}) must be between 1 and {MOST}")
    if n == 1 or environment.get("JAX_PLATFORMS", "") == "cpu":
        return [{}] * n
    if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        raise ConfigError(f"--parallel ({n}): a process takes all TPUs of a host; leave it out")
    gpus = _gpus(environment)
    if not gpus:
        return [{}] * n
    require(n <= len(gpus), f"--parallel ({n}): there are {len(gpus)} GPUs ({', '.join(gpus)})")
    each = len(gpus) // n
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(n)]


def at_once(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes this host computes with at once without one waiting for another: one a GPU, one for all TPUs,
    else one a core."""
    if environment.get("JAX_PLATFORMS", "") != "cpu":
        if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
            return 1
        if gpus := _gpus(environment):
            return min(len(gpus), MOST)
    return min(cores(), MOST)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment_with(more: dict[str, str]) -> dict[str, str]:
    """What processes of this installation have beside this one's environment: the installation first, and `more`."""
    root = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))} | more


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them; no library is asked, which would take
    them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [word.strip() for word in visible.split(",") if word.strip() not in ("", "-1")]
    found = (re.fullmatch(r"/dev/nvidia(\d+)", path) for path in glob.glob("/dev/nvidia*"))
    return sorted((match[1] for match in found if match), key=int)


def run_jobs(
    jobs: Sequence[Job], places: Sequence[dict[str, str]], began: Callable[[Job], None],
    ended: Callable[[Job, int], bool],
) -> int | None:  # fmt: skip
    """Runs the jobs, len(places) at once, in order; the signal that ended this early, or None.

    began: told before each. ended: told the exit code of each (128 + signal where one ended it); False starts no more.
    A signal goes on to the processes that run, which save and end; no further one is begun. Where this process is gone
    without a word (SIGKILL), those that call `end_with_parent` do so too.
    """
    waiting, free, going = list(jobs), list(range(len(places))), True
    running: dict[subprocess.Popen, tuple[Job, int, BinaryIO | None]] = {}
    with _signals() as received:
        try:
            passed = 0
            while running or (waiting and going and not received):
                while waiting and free and going and not received:
                    job, place = waiting.pop(0), free.pop(0)
                    began(job)
                    out = None if job.log is None else open(job.log, "ab")  # noqa: SIM115 (closed when it ends)
                    env = os.environ | places[place] | {PARENT: str(os.getpid())}
                    process = subprocess.Popen(job.words, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
                    running[process] = job, place, out
                for number in received[passed:]:  # one from the terminal has reached them too: that counts once
                    for process in running:
                        process.send_signal(number)
                    passed += 1
                for process in [process for process in running if process.poll() is not None]:
                    job, place, out = running.pop(process)
                    free.append(place)
                    if out is not None:
                        out.close()
                    code = process.returncode
                    going = ended(job, code if code >= 0 else 128 - code) and going
                time.sleep(POLL_SECONDS)
        finally:
            for process in running:  # only where this process itself fails
                process.terminate()
    return received[0] if received else None


def end_with_parent() -> None:
    """Has this process get SIGTERM, upon which a run saves and ends, once the one that started it by `run_jobs` is no
    more; nothing for a process that nobody has started so."""
    parent = os.environ.pop(PARENT, "")

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent.isdecimal():
        threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that have come, in order; one that the caller ignores (nohup) stays ignored."""
    received: list[int] = []
    wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda came, _: received.append(came)) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
