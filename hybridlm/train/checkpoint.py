# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written by Orbax in the background, newest few kept, broken ones never loaded.

One checkpoint is one folder named after its step with the arrays of the train state in two items (the parameters;
optimizer, counters and random key) and two JSON records: the resolved config, and the loop's (position in the data,
running means).
"""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from hybridlm.errors import RunError

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints under a folder; one process (or one of each host) has them open."""

    def __init__(self, folder: Path, keep: int, read_only: bool = False):
        """Opens the folder and, unless read_only, makes it and clears what unfinished writes left there."""
        self.folder = folder.resolve()
        self._read_only = read_only
        self._pending: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(keep), read_only=read_only, create=not read_only,
            cleanup_tmp_directories=not read_only, enable_background_delete=True,
        )  # fmt: skip
        self._manager = self._guard("open", lambda: ocp.CheckpointManager(self.folder, options=options))
        self.newest: int | None = None
        """Step of the checkpoint that was restored or, in the background, written last."""

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, config: dict, loop: dict) -> None:
        """Starts writing; returns when the arrays are copied from the devices. RunError where a save failed."""
        self.wait()
        params, trainer = _split(state)
        items = {"trainer": ocp.args.StandardSave(trainer)} if trainer else {}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params), **items, config=ocp.args.JsonSave(config),
            loop=ocp.args.JsonSave(loop),
        )  # fmt: skip
        self._pending = step
        self._guard("write", lambda: self._manager.save(step, args=args, force=True))
        self.newest = step

    def wait(self) -> None:
        """Returns when the last save is complete on disk; RunError, one line, where it failed."""
        self._guard("write", self._manager.wait_until_finished)
        self._pending = None

    def restore_latest(self, like, steps: list[int] | None = None) -> tuple[int, Any, dict] | None:
        """(step, state, loop record) of the newest checkpoint that can be read whole; None where there is none.

        like: the state's shapes, types and shardings, which may be those of another mesh than the one that saved.
        Those that cannot be read are moved to `broken/` with a warning once an older one could be; RunError, with
        nothing moved, where none can. steps: those to choose from; None: all.
        """
        broken: dict[int, str] = {}
        for step in reversed(self.steps() if steps is None else steps):
            try:
                state, loop = self.restore(step, like)
            except Exception as error:  # whatever Orbax and its storage raise for missing, cut or altered files
                broken[step] = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
                continue
            for bad, reason in broken.items():
                log.warning("checkpoint of step %d cannot be read (%s): going back to step %d", bad, reason, step)
                self._set_aside(bad)
            self.newest = step
            return step, state, loop
        if broken:
            step, reason = next(iter(broken.items()))
            raise RunError(f"none of the checkpoints in {self.folder} can be read; that of step {step}: {reason}")
        return None

    def restore(self, step: int, like) -> tuple[Any, dict]:
        """(state, loop record) of one checkpoint; raises what Orbax raises where it cannot be read.

        like: as for restore_latest; {"params": ...} alone reads the parameters alone.
        """
        params, trainer = _split(like)
        items = {"params": ocp.args.StandardRestore(params), "loop": ocp.args.JsonRestore()}
        if trainer:
            items["trainer"] = ocp.args.StandardRestore(trainer)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {"params": restored["params"], **(restored["trainer"] if trainer else {})}, restored["loop"]

    def close(self) -> None:
        """Waits for the last save and lets the folder go; RunError where that save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _set_aside(self, step: int) -> None:
        """Moves a broken checkpoint out of the way of the one that will be written at its step again."""
        if self._read_only or jax.process_index() != 0:
            return
        broken = self.folder.parent / "broken" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        broken.parent.mkdir(exist_ok=True)
        shutil.move(self.folder / str(step), broken)
        self._manager.reload()

    def _guard(self, verb: str, action):
        """Runs an action of Orbax; an error of the file system becomes one line that says what is still safe."""
        try:
            return action()
        except Exception as error:  # Orbax and tensorstore wrap file errors in types of their own
            if not _is_storage_error(error):
                raise
            what = f"checkpoint of step {self._pending}" if self._pending is not None else "checkpoints"
            kept = [s for s in finished_steps(self.folder) if s != self._pending]
            safe = f"; the checkpoint of step {kept[-1]} is untouched" if kept else ""
            raise RunError(f"cannot {verb} the {what} in {self.folder}: {_storage_reason(error)}{safe}") from error


def _split(state: dict) -> tuple[Any, dict]:
    """Parameters, and the rest of the train state: generation reads the first alone."""
    return state["params"], {key: value for key, value in state.items() if key != "params"}


def finished_steps(folder: Path) -> list[int]:
    """Steps whose folders have their final name, oldest first."""
    return sorted(int(f.name) for f in folder.glob("*") if f.name.isdigit()) if folder.is_dir() else []


_STORAGE_WORDS = (
    "No space left", "RESOURCE_EXHAUSTED", "Permission denied", "PERMISSION_DENIED", "Read-only file system",
    "Not a directory", "File too large", "Disk quota", "Input/output error", "File exists",
)  # fmt: skip


def _chain(error: BaseException):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_storage_error(error: BaseException) -> bool:
    return any(isinstance(e, OSError) or any(w in str(e) for w in _STORAGE_WORDS) for e in _chain(error))


def _storage_reason(error: BaseException) -> str:
    for e in _chain(error):
        if isinstance(e, OSError) and e.strerror:
            return e.strerror
        for word in _STORAGE_WORDS:
            if word in str(e):
                return word
    return str(error).strip().splitlines()[0]
