# SPDX-License-Identifier: Apache-2.0
"""Mutated inputs end in a result or in one line: no traceback, no hang, no input changed.

Commands run in this process, all that reads their inputs included; a training that would begin stops before anything
is compiled. python -m tests.faults.test_mutations N [FIRST] tries N seeds of each kind and prints what it counts.
"""

import contextlib
import io
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import jax
import pytest

from hybridlm.cli import main
from hybridlm.errors import RunError
from hybridlm.sharding import make_mesh
from tests.faults.mutations import KINDS, Case, Sound, make_case

SECONDS = 60
ENOUGH = "as far as the test goes"


class Hangs(BaseException):
    """A case that takes longer than SECONDS; no handler of errors takes it for one."""


def _too_long(*_):
    raise Hangs


@contextlib.contextmanager
def before_compiling():
    """A training ends, as one that fails does, where its inputs are read and its program would be made; it has one
    device."""
    from hybridlm.train import loop

    def stop(*_):
        raise RunError(ENOUGH)

    before = loop.make_program, loop.make_mesh
    loop.make_program, loop.make_mesh = stop, lambda config: make_mesh(config, jax.devices()[:1])
    try:
        yield
    finally:
        loop.make_program, loop.make_mesh = before


def content(folder: Path) -> dict[str, tuple]:
    """Kind, permissions, target and bytes of all that is under a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        regular = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else None
        found[str(path.relative_to(folder))] = (status.st_mode, target, regular)
    return found


def outcome(case: Case, folder: Path) -> str:
    """`accepted` or `refused`; AssertionError where it ends otherwise, or changes its inputs."""
    before = content(folder / "in")
    out, err = io.StringIO(), io.StringIO()
    former = signal.signal(signal.SIGALRM, _too_long)
    here = os.getcwd()
    os.chdir(folder / "out")
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), before_compiling():
            code = main(case.words)
    except Hangs:
        raise AssertionError(f"{case}: still there after {SECONDS} s") from None
    except BaseException as error:
        raise AssertionError(f"{case}: {''.join(traceback.format_exception(error))}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        os.chdir(here)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    said = f"{case}\n{out.getvalue()[-1000:]}\n{err.getvalue()[-2000:]}"
    assert code in (0, 1, 2), said
    assert len(lines) == (code != 0), said
    assert "Traceback" not in out.getvalue() + err.getvalue(), said
    piped = case.words[0] == "generate"  # whose text goes into a pipe as it is written; to a terminal: tests/infer
    assert "\x1b]" not in err.getvalue() + ("" if piped else out.getvalue()), said
    assert len("".join(lines)) < 6000, said  # the longest lists the names of all configs
    after = content(folder / "in")
    assert after == before, f"{case}: changed {[k for k in {*before, *after} if before.get(k) != after.get(k)]}"
    return "refused" if code and ENOUGH not in lines[0] else "accepted"


def try_all(sound: Sound, folder: Path, seeds: range) -> Counter:
    """What happened to a case of each kind for each seed; all failures together in one AssertionError."""
    counted, failures = Counter(), []
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        for kind in KINDS:
            for seed in seeds:
                place = folder / f"{kind}-{seed}".replace(" ", "-")
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        counted[kind, outcome(make_case(sound, place, kind, seed), place)] += 1
                except AssertionError as error:
                    failures.append(f"{kind} {seed}: {error}")
                    counted[kind, "FAILED"] += 1
                finally:
                    shutil.rmtree(place, ignore_errors=True)
    finally:
        logging.disable(level)
    assert not failures, f"{len(failures)} failures\n\n" + "\n\n".join(failures)
    return counted


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Sound inputs."""
    return Sound(tmp_path_factory.mktemp("sound"))


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_mutated_inputs_end_in_one_line_or_are_read(sound, tmp_path):
    counted = try_all(sound, tmp_path, range(10))
    assert sum(counted.values()) == 10 * len(KINDS)
    for kind in KINDS:
        assert counted[kind, "refused"], kind


@pytest.mark.slow
def test_1000_mutated_inputs_end_in_one_line_or_are_read(sound, tmp_path):
    counted = try_all(sound, tmp_path, range(100, 267))
    assert sum(counted.values()) >= 1000
    for kind in KINDS:
        assert counted[kind, "refused"] and counted[kind, "accepted"], kind


if __name__ == "__main__":
    n, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as there:
        made = Sound(Path(there) / "sound")
        counts = try_all(made, Path(there), range(first, first + n))
    for (kind, what), number in sorted(counts.items()):
        print(f"{kind}: {number} {what}")
