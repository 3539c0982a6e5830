# SPDX-License-Identifier: Apache-2.0
"""The file that says what a run has gone back to: the batches that it leaves out from there on are in no checkpoint
until the next one is saved.

It vouches for itself. Where it is lost or damaged the run diverges again as it did, and goes back again.
"""

import logging
from pathlib import Path
from typing import NamedTuple, Self

from hybridlm import storage
from hybridlm.errors import RunError
from hybridlm.train.manifest import of_vouched, vouched

log = logging.getLogger(__name__)


class Rollback(NamedTuple):
    """A return to a checkpoint."""

    to: int
    """Its step."""
    left_out: int
    """Batches that do not come any more, of those that would come next there."""
    done: bool
    """Whether later checkpoints have been moved away."""
    from_step: int | None
    """run.from_step of the start that went back: a user who goes back with another one begins there anew."""

    def write(self, file: Path) -> None:
        """In one piece. RunError, one line, where that fails."""
        try:
            storage.write_bytes(file, vouched(self._asdict()))
        except OSError as error:
            raise RunError(f"cannot write {file}: {error.strerror}") from error

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """That of a run; None where it never went back, or the file is damaged."""
        try:
            values = of_vouched(storage.read_bytes(file)) if storage.exists(file) else None
        except OSError as error:
            raise RunError(f"cannot read {file}: {error.strerror}") from error
        if values is None and storage.exists(file):
            log.warning("%s is damaged: what it says is not heeded", file)
        return None if values is None else cls(**values)
