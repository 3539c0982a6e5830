# SPDX-License-Identifier: Apache-2.0
"""The records of a run: metrics.jsonl, and TensorBoard beside it."""

import json
import logging
from pathlib import Path

from hybridlm.errors import RunError

log = logging.getLogger(__name__)


class MetricsLog:
    """metrics.jsonl and TensorBoard: one record a line, appended; `kind` is train, val or end."""

    def __init__(self, path: Path, step: int, owner: bool = True, tensorboard: Path | None = None):
        """Opens for appending after `step`: records of later steps, of a run that is being resumed, are dropped.

        owner: this process writes. tensorboard: folder of TensorBoard files; None: none.
        """
        self._path, self._owner = path, owner
        kept = [r for r in read_metrics(self._path) if r["step"] <= step]
        self._seen = {(r["kind"], r["step"]) for r in kept}
        if not self._owner:
            return
        part = self._path.with_suffix(".jsonl.part")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        part.replace(self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())
        self._board = None if tensorboard is None else _open_board(tensorboard, step)

    def has(self, kind: str, step: int) -> bool:
        """Whether the run that is resumed wrote a record of the kind at the step."""
        return (kind, step) in self._seen

    def write(self, kind: str, step: int, values: dict) -> None:
        """Appends a record and hands its numbers to TensorBoard."""
        if not self._owner:
            return
        record = {"kind": kind, "step": step, **values}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}") from error
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if not self._owner:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: left out a line that is not JSON: %.60s", path, line)
    return records


def _open_board(folder: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        log.warning("tensorboardX is not installed: no TensorBoard files (--run.tensorboard=False says so too)")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
