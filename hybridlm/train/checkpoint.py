# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written by Orbax in the background, valid or not as a whole, broken ones never loaded.

One checkpoint is one folder named after its step with the arrays of the train state in two items (the parameters;
optimizer, counters and random key), two JSON records (the resolved config, and the loop's: position in the data,
running means), and the manifest of all its files, which is written before the folder gets its name. Before any value
is used, the hosts verify the files in shares, and the step in the folder's name, the arrays and the record are
compared. Orbax takes a third of a second to import, which is done when a run's first step is being compiled.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from hybridlm import storage
from hybridlm.cluster import from_first, gathered, one_problem
from hybridlm.errors import ConfigError, RunError
from hybridlm.train.keep import Keep
from hybridlm.train.manifest import find_odd, is_sealed, verify
from hybridlm.train.orbax_s3 import teach_s3
from hybridlm.train.records import finished_steps, move_aside, read_json

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

log = logging.getLogger(__name__)

STAMP = "checkpoint"
"""Key of the loop's record under which a checkpoint says what it is: {"format": 2, "step": step}."""
FORMAT = 2
Check = Callable[[dict], None]
"""Raises for a loop record that cannot be gone on from. A ConfigError is the user's to mend, all else is damage."""


class Checkpoints:
    """The checkpoints under a folder; one process (or one of each host) has them open."""

    def __init__(
        self, folder: Path, keep: int, read_only: bool = False, every: int = 0, best: int = 0,
        may_finish: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """Opens the folder and, unless read_only, makes it and clears what unfinished writes left there.

        keep: the newest so many stay; and, where not 0, those of every `every`-th step, and the `best` of those whose
        validation loss is known (`rate`). may_finish: see SealedPath. RunError where the folder cannot be used.
        """
        self.folder = storage.absolute(folder)
        if storage.scheme_of(folder) == "s3":
            teach_s3()
        self._pending: int | None = None
        self._began = 0.0
        self._keep = Keep(keep, every, best, lambda: finished_steps(self.folder))
        self._manager = None
        if not read_only:
            from hybridlm.train.sealed_path import SealedPath

            SealedPath.may_finish = staticmethod(may_finish)
            self._manager = self._guard("open", self._open)
        self.newest: int | None = None
        """Step of the checkpoint that was restored or, in the background, written last."""
        self.on_saved: Callable[[int, float], None] | None = None
        """Called with the step and the seconds of each save once it is complete on disk."""
        if not read_only:
            for step, loss, good in from_first(self._stored):
                self.rate(step, loss)
                self._keep.judge(step, good)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first, as the first process sees them."""
        return from_first(lambda: finished_steps(self.folder))

    def good_steps(self) -> list[int]:
        """Those of them that were saved while the run was sound."""
        return [step for step in self.steps() if self._keep.good(step)]

    def rate(self, step: int, loss: float) -> None:
        """Takes the validation loss of the parameters after a step, for those that are kept as the best."""
        self._keep.rate(step, loss)

    def save(self, step: int, state, config: dict, loop: dict) -> None:
        """Starts writing; returns when the arrays are copied from the devices. RunError where a save failed.

        loop: the loop's record, JSON; its `val_loss`, if it has one, is that of these parameters, and its `health`
        says whether the steps before it were sound.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._keep.judge(step, _is_good(loop))
        self.rate(step, loop.get("val_loss"))
        params, trainer = _split(state)
        items = {"trainer": ocp.args.StandardSave(trainer)} if trainer else {}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params), **items, config=ocp.args.JsonSave(config),
            loop=ocp.args.JsonSave(loop | {STAMP: {"format": FORMAT, "step": step}}),
        )  # fmt: skip
        self._pending, self._began = step, time.monotonic()
        self._guard("write", lambda: self._manager.save(step, args=args, force=True))
        self.newest = step

    def wait(self) -> None:
        """Returns when the last save is complete on disk; RunError, one line, where it failed."""
        if self._manager is None:
            return
        self._guard("write", self._manager.wait_until_finished)
        step, self._pending = self._pending, None
        if step is not None and self.on_saved is not None:
            self.on_saved(step, time.monotonic() - self._began)

    def restore_latest(
        self, like, steps: list[int] | None = None, check: Check | None = None
    ) -> tuple[int, Any, dict] | None:
        """(step, state, loop record) of the newest checkpoint that is valid as a whole; None where there is none.

        All processes take the same one: what one of them cannot read is broken for all. Those that are broken are moved
        to `broken/` with a warning once an older one could be read; RunError, with nothing moved, where none can.

        like: the state's shapes, types and shardings, which may be those of another mesh than the one that saved.
        steps: those to choose from; None: all. check: what else a record has to hold.
        """
        self.wait()
        broken: dict[int, str] = {}
        for step in reversed(self.steps() if steps is None else steps):
            (state, record), problem = self._read(step, like, check)
            if problem is not None:
                broken[step] = problem
                continue
            for bad, reason in broken.items():
                log.warning("checkpoint of step %d cannot be read (%s): going back to step %d", bad, reason, step)
                self._move(bad, "broken")
            self.newest = step
            return step, state, record
        if broken:
            step, reason = next(iter(broken.items()))
            raise RunError(f"none of the checkpoints in {self.folder} can be read; that of step {step}: {reason}")
        return None

    def restore(self, step: int, like, check: Check | None = None) -> tuple[Any, dict]:
        """(state, loop record) of one checkpoint; RunError, one line, where it is not valid.

        like: as for restore_latest; {"params": ...} alone reads the parameters alone.
        """
        self.wait()
        found, problem = self._read(step, like, check)
        if problem is not None:
            raise RunError(f"checkpoint of step {step} in {self.folder} cannot be read: {problem}")
        return found

    def supersede(self, after: int) -> list[int]:
        """Moves the checkpoints of later steps to `superseded/`; which they were."""
        self.wait()
        self._keep.forget(after)
        later = [step for step in self.steps() if step > after]
        for step in later:
            self._move(step, "superseded")
        return later

    def close(self) -> None:
        """Waits for the last save and lets the folder go; RunError where that save failed."""
        self.on_saved = None
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()

    def _open(self) -> "ocp.CheckpointManager":
        import orbax.checkpoint as ocp

        from hybridlm.train.sealed_path import SealedObjects, SealedPath

        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep, cleanup_tmp_directories=True, enable_background_delete=True,
            lightweight_initialize=True,
            temporary_path_class=SealedObjects if storage.in_bucket(self.folder) else SealedPath,
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._barrier()),
        )  # fmt: skip
        return ocp.CheckpointManager(self.folder, options=options)

    def _barrier(self) -> Callable | None:
        """Where processes wait for each other during a save: each first says what it wrote; None with one process."""
        if jax.process_count() == 1 or storage.in_bucket(self.folder):
            return None
        import orbax.checkpoint as ocp

        from hybridlm.train.sealed_path import TMP_SUFFIX, seal_own

        wait = ocp.multihost.get_barrier_sync_fn()

        def sync(*, key: str, timeout_ms: int) -> None:
            if "async_write_complete" in key:  # else the first process reads all: slower, and as right
                try:
                    seal_own(self.folder / f"{self._pending}{TMP_SUFFIX}", jax.process_index())
                except OSError as error:
                    log.warning("the files of process %d are left to the first: %s", jax.process_index(), error)
            wait(key=key, timeout_ms=timeout_ms)

        return sync

    def _stored(self) -> list[tuple[int, float | None, bool]]:
        """(step, validation loss, whether it is good) of the records that are there, as far as they can be read."""
        found = []
        for step in finished_steps(self.folder):
            try:
                record = read_json(self.folder / str(step) / "loop" / "metadata")
                found.append((step, record.get("val_loss"), _is_good(record)))
            except (OSError, ValueError, AttributeError):
                continue  # a broken one has no loss, and is set aside when it is read
        return found

    def _read(self, step: int, like, check: Check | None) -> tuple[tuple[Any, dict], str | None]:
        """((state, loop record), what is wrong or None), the latter the same in all processes, none of which waits for
        one that has failed."""
        folder = self.folder / str(step)
        record, problem = _attempt(lambda: _verified_record(folder, step, check, complete="opt_state" in like))
        problem = one_problem(problem)
        state = None
        if problem is None:
            state, problem = _attempt(lambda: _arrays(folder, step, like))
            problem = one_problem(problem)
        return (state, record), problem

    def _move(self, step: int, where: str) -> None:
        """Moves a checkpoint out of the way of the one that will be written at its step again, on the first process."""
        if self._manager is None:
            return
        from_first(lambda: move_aside(self.folder / str(step), self.folder.parent / where))
        gathered(None)
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


def _is_good(record: dict) -> bool:
    health = record.get("health")
    return not isinstance(health, dict) or health.get("good", True) is True


class _Damaged(Exception):
    """What is wrong with a checkpoint, in a few words."""


def _verified_record(folder: Path, step: int, check: Check | None, complete: bool) -> dict:
    """The loop's record of a checkpoint whose files are as they were written.

    complete: the whole train state is asked for, not the parameters alone.
    """
    share = jax.process_index(), jax.process_count()
    read = lambda name: complete or not name.startswith("trainer/")  # what generation never reads does not count
    problem = verify(folder, share, read) if is_sealed(folder) else None
    if problem is None and (odd := find_odd(folder)) is not None:
        problem = f"{odd} is neither a file nor a folder"
    if problem is not None:
        raise _Damaged(problem)
    record = read_json(folder / "loop" / "metadata")
    if not isinstance(record, dict):
        raise _Damaged("its loop record is no object")
    stamp = record.pop(STAMP, None)
    if stamp is not None and not is_sealed(folder):
        raise _Damaged("manifest.json is missing")
    if complete and not storage.exists(folder / "trainer"):
        raise _Damaged("it holds parameters alone: --init.run=RUN starts a new run from them")
    said = stamp["step"] if stamp is not None else _step_of_old(record, complete)
    if said is not None and said != step:
        raise _Damaged(f"its loop record is of step {said}")
    if stamp is None and jax.process_index() == 0:
        log.warning("%s was written before checkpoints had checksums: its arrays are taken as they are", folder)
    if check is not None:
        check(record)
    return record


def _step_of_old(record: dict, complete: bool) -> int | None:
    """The step in a record of before there were stamps: the number of the next batch was that of the steps taken."""
    if not complete and "data" not in record:
        return None  # parameters of a published checkpoint
    data = record["data"]
    missing = {"split", "seed", "batch_size", "seq_len", "fingerprint"} - data.keys()
    if missing:
        raise _Damaged(f"its loop record lacks data.{min(missing)}")
    return data["step"]


def _arrays(folder: Path, step: int, like) -> dict:
    """The train state, or its parameters."""
    params, trainer = _split(like)
    state = {"params": _item(folder / "params", params)}
    if trainer:
        state |= _item(folder / "trainer", trainer)
    if "step" in state and (said := int(np.asarray(jax.device_get(state["step"])))) != step:
        raise _Damaged(f"its arrays are of step {said}")
    return state


def _item(folder: Path, like):
    """The arrays of one item. Not through Orbax's manager, in which all processes would wait for one that fails."""
    import orbax.checkpoint as ocp

    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.restore(epath.Path(folder), args=ocp.args.StandardRestore(like))
    finally:
        handler.close()


def _attempt(action: Callable) -> tuple[Any, str | None]:
    """(what it gives, None), or (None, why it failed); a ConfigError is the user's, not the checkpoint's."""
    try:
        return action(), None
    except ConfigError:
        raise
    except Exception as error:  # whatever Orbax and its storage raise for missing, cut or altered files
        text = str(error).strip()
        line = text.splitlines()[0] if text else ""
        line = line.partition(" [source locations")[0].partition("<bound method")[0].strip()
        if isinstance(error, OSError) and error.strerror and error.filename:
            line = f"{Path(error.filename).name}: {error.strerror}"
        return None, line[:160] or type(error).__name__


def _split(state: dict) -> tuple[Any, dict]:
    """Parameters, and the rest of the train state: generation reads the first alone."""
    return state["params"], {key: value for key, value in state.items() if key != "params"}


_STORAGE_WORDS = (
    "No space left", "RESOURCE_EXHAUSTED", "Permission denied", "PERMISSION_DENIED", "Read-only file system",
    "Not a directory", "File too large", "Disk quota", "Input/output error", "File exists", "No such file",
    "NOT_FOUND", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED",
    "Error writing", "Error reading",
)  # fmt: skip


def _chain(error: BaseException):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_storage_error(error: BaseException) -> bool:
    told = storage.reason(error) is not None
    return told or any(isinstance(e, OSError) or any(w in str(e) for w in _STORAGE_WORDS) for e in _chain(error))


def _storage_reason(error: BaseException) -> str:
    for e in _chain(error):
        if isinstance(e, OSError) and e.strerror:
            return e.strerror
        for word in _STORAGE_WORDS[:-2]:
            if word in str(e):
                return word
    return str(error).strip().splitlines()[0]
