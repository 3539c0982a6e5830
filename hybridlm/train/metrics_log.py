# SPDX-License-Identifier: Apache-2.0
"""The records of a run: metrics.jsonl, in a bucket an object for each start, and what else takes their numbers."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hybridlm import storage
from hybridlm.errors import RunError
from hybridlm.train.objects import Objects, read_parts
from hybridlm.train.records import move_aside, parse_json
from hybridlm.train.sinks import Sink, numbers_of

log = logging.getLogger(__name__)

MANY = ("train", "inspect")
"""Kinds of records that are not kept in memory: nobody asks for them."""


class MetricsLog:
    """metrics.jsonl and sinks beside it: one record a line, appended.

    `kind` is train, val, inspect or end, or an event: start (what a start of the run was), config and data (what it
    changed), save, skipped (a step that was not finite), spike, rollback, window (batches left out), gave_up, and how a
    start ended before its time: stop (by a signal) or failed.
    """

    def __init__(
        self, path: Path, step: int, owner: bool = True, sinks: Sequence[Sink] = (), dropped: Path | None = None,
        may_write: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """Opens for appending after `step`: records of later steps, of a run that is being resumed, are dropped.

        owner: this process writes. sinks: given the numbers of each record, and closed with it. dropped: file that
        takes the dropped lines and those that are no records; None: they are lost. may_write: called before each
        record, which is not written where it raises. RunError where the file cannot be written.
        """
        self._path, self._owner, self._may_write = path, owner, may_write
        self._sinks, self._dropped = tuple(sinks), dropped
        self._values: dict[tuple[str, int], dict] = {}
        self.newest = step
        """The latest step that there is a record of, or that is gone on from."""
        self.n_dropped = 0
        """Lines of before that are not gone on from."""
        self._open(step)

    def _open(self, step: int) -> None:
        path, dropped = self._path, self._dropped
        lines = _lines(path)
        kept = [(line, record) for line, record in lines if record is not None and record["step"] <= step]
        self._values = {(r["kind"], r["step"]): r for _, r in kept if r["kind"] not in MANY}
        self.n_dropped = len(lines) - len(kept)
        if not self._owner:
            return
        self._far: Objects | None = None
        if storage.in_bucket(path):
            self._far = self._file = Objects(path, step, self._send)
            return
        try:
            if dropped is not None and self.n_dropped:
                dropped.parent.mkdir(exist_ok=True)
                rest = [line for line, record in lines if record is None or record["step"] > step]
                with open(dropped, "ab") as file:
                    file.write(b"".join(line + b"\n" for line in rest))
            part = self._path.with_suffix(".jsonl.part")
            part.write_bytes(b"".join(line + b"\n" for line, _ in kept))
            part.replace(self._path)
            if (objects := path.with_suffix("")).is_dir():  # what they held is in the file now
                move_aside(objects, path.parent / "superseded")
            # unbuffered, so that closing it has nothing left to fail at
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed in close())
        except OSError as error:
            raise RunError(f"cannot write {error.filename or self._path}: {error.strerror}") from error

    def rewind(self, step: int) -> None:
        """The run has gone back to a step: later records are dropped, as where a run is resumed there."""
        self.newest = step
        if self._owner:
            self._file.close()
            self._open(step)
            for sink in self._sinks:
                sink.rewind(step)
        else:  # the file is being written by another process
            self._values = {key: record for key, record in self._values.items() if key[1] <= step}

    def has(self, kind: str, step: int) -> bool:
        """Whether there is a record of the kind, which is none of MANY, at the step."""
        return (kind, step) in self._values

    def values(self, kind: str, name: str) -> dict[int, object]:
        """A value by step, of the records of a kind, which is none of MANY."""
        return {step: r[name] for (of, step), r in self._values.items() if of == kind and name in r}

    def write(self, kind: str, step: int, values: dict) -> None:
        """Appends a record and hands its numbers to the sinks. A number that is not finite is null in the file."""
        self.newest = max(self.newest, step)
        if kind not in MANY:
            self._values[kind, step] = {"kind": kind, "step": step, **values}
        if not self._owner:
            return
        self._may_write()
        record = {"kind": kind, "step": step, **{name: _strict(value) for name, value in values.items()}}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}") from error
        for sink in self._sinks:
            sink.add(kind, step, numbers_of(values))

    def flush(self) -> None:
        """Returns when all records are where they are kept: to a bucket, they are sent from time to time."""
        if self._owner and self._far is not None:
            for sink in self._sinks:
                sink.flush()
            self._far.flush()

    def _send(self) -> None:
        for sink in self._sinks:
            sink.send()

    def close(self) -> None:
        """Flushes and closes all."""
        if not self._owner:
            return
        for sink in self._sinks:
            sink.close()
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that is none, as the last one of a crash, is left out with a warning."""
    lines = _lines(path)
    bad = [number for number, (_, record) in enumerate(lines, start=1) if record is None]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        log.warning("%s: left out line %d%s, which is no record", path, bad[0], more)
    return [record for _, record in lines if record is not None]


def _lines(path: Path) -> list[tuple[bytes, dict | None]]:
    """(line, its record or None where it is no record) of a metrics.jsonl, or of a folder of objects in a bucket."""
    try:
        objects = storage.in_bucket(path) or path.with_suffix("").is_dir()  # it may have been in a bucket
        parts = read_parts(path.with_suffix("")) if objects else [(None, storage.read_bytes(path))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    lines: list[tuple[bytes, dict | None]] = []
    for after, content in parts:
        if after is not None:  # the start that wrote this went on from there
            lines = [(line, record) for line, record in lines if record is not None and record["step"] <= after]
        lines += [(line, _record(line)) for line in content.split(b"\n") if line.strip()]
    return lines


def _record(line: bytes) -> dict | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = record.get("step")
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _strict(value):
    """The value as JSON has it: without NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
