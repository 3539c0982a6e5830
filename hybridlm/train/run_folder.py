# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: config.json, metrics.jsonl, checkpoints/, loss.png, report.html, sample.txt, tensorboard/,
tokenizer/, lock.

A run that goes on from a published checkpoint has published/ too, with that one's config.json and tokenizer. What is
damaged is moved to broken/, what is gone back behind to superseded/; config_history.jsonl has each config in turn.

In a bucket, metrics/ has an object for each start of the run, and the lock is a lease, which runs out. What is damaged
or gone back behind is marked, and stays until the run writes another in its place.

A folder belongs to one config and one process at a time. A run found in it is resumed, never overwritten. The config is
written first, so that a stop at any later moment leaves a run that can be resumed.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hybridlm import storage
from hybridlm.cluster import from_first
from hybridlm.config import Config
from hybridlm.config.resume import changes, refused
from hybridlm.config.stored import from_dict, save_config
from hybridlm.config.tree import to_dict
from hybridlm.errors import ConfigError, RunError, cut, require
from hybridlm.train.lease import Lease
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.records import finished_steps, move_aside, parse_json, read_json
from hybridlm.train.sinks import Opening, open_sinks
from hybridlm.train.tokenizer_copy import IDENTITY, check_tokenizer

log = logging.getLogger(__name__)

CONVERTING = "converting"
"""Stands in a folder while a published checkpoint is made into a run there (train/published.py)."""
OF_A_START = {"lock", "config.json.part", "checkpoints", "published", "tokenizer", CONVERTING}
"""What a start that was stopped may have left before there was a config, when that was not yet written first."""


class Found(NamedTuple):
    """What a run's folder has to go on from."""

    steps: list[int]
    """Steps of the checkpoints to choose from, oldest first."""
    back_to: int | None
    """Step that the user asked to go back to, and that the run did not go back to yet."""
    complete: bool
    """Whether there is nothing left to do."""


class RunFolder:
    """Paths and records of one run; a context manager that holds the folder's lock."""

    def __init__(self, config: Config, owner: bool = True):
        """owner: this process writes; of a cluster's, the first alone."""
        self.config, self.owner = config, owner
        self.path = storage.as_path(config.run_dir)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / ("metrics" if storage.in_bucket(self.path) else "metrics.jsonl")
        self.plot = self.path / "loss.png"
        self.sample = self.path / "sample.txt"
        self.report = self.path / "report.html"
        self.published = self.path / "published"
        self.profile = self.path / "profile"
        self.superseded = self.path / "superseded"
        self._config_file = self.path / "config.json"
        self._locks = []
        self._lease: Lease | None = None

    def __enter__(self):
        """Makes and locks the folder. ConfigError where it cannot be written or is no run; RunError where in use."""
        from_first(self._take)
        return self

    def __exit__(self, *_):
        for lock in self._locks:
            lock.close()  # releases; a process that dies releases too
        self._locks = []
        if self._lease is not None:
            self._lease.__exit__()
            self._lease = None

    def _take(self) -> None:
        try:
            if storage.in_bucket(self.path):
                self._take_lease()
                return
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
            self._check_is_run()
            self._lock_file()
        except OSError as error:
            self.__exit__()
            raise ConfigError(f"run.dir ({self.path}) cannot be written: {error.strerror}") from error
        except (ConfigError, RunError):
            self.__exit__()
            raise

    def _take_lease(self) -> None:
        storage.check(self.path, "run.dir", write=True)
        self._check_is_run()
        self._lease = Lease(self.path / "lock").__enter__()

    def _lock_folder(self) -> None:
        """Locks the folder itself, where that can be done: unlike a file in it, nobody deletes that by mistake."""
        folder = _Descriptor(os.open(self.path, os.O_RDONLY))
        self._locks.append(folder)
        try:
            _lock(folder)
        except BlockingIOError:
            self._in_use()
        except OSError:
            pass  # a network file system: it has the lock file

    def _lock_file(self) -> None:
        lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._locks.append(lock)
        try:
            _lock(lock)
        except BlockingIOError:
            self._in_use()
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): see that no second process trains there", self.path, error.strerror)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()

    def _in_use(self) -> None:
        try:
            holder = storage.read_bytes(self.path / "lock").decode("utf-8", "replace").strip()[:80]
        except OSError:
            holder = ""
        raise RunError(f"{self.path} is in use by {holder or 'another process'}; another run goes to --run.dir=NEW")

    def _check_is_run(self) -> None:
        if storage.exists(self._config_file) or finished_steps(self.checkpoints):
            return
        there = sorted(set(storage.names(self.path)) - OF_A_START)
        if there:
            shown = ", ".join(there[:4]) + (", ..." if len(there) > 4 else "")
            raise ConfigError(
                f"run.dir ({self.path}) has files but no run (no config.json, no checkpoints; there is {shown}): "
                "choose --run.dir=NEW"
            )

    def look(self) -> Found:
        """What is here to go on from, as the first process sees it. Where there is no config yet, it is written now.

        ConfigError, one line, where the run found here cannot be resumed with this config, or has lost what it needs.
        """
        return Found(*from_first(self._look))

    def _look(self) -> Found:
        steps, back_to = finished_steps(self.checkpoints), self.config.run.from_step
        if steps:
            stored = _first_readable(self._config_files(steps), self.config)
            self._check_config(stored, steps[-1])
            if stored.run.from_step == back_to:
                back_to = None  # the newest checkpoint was written after going back
        elif back_to != 0:
            self._check_nothing_lost()
        if back_to is not None and back_to != 0 and back_to not in steps:
            shown = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"run.from_step ({back_to}) has no checkpoint in {self.path}: there are {shown}")
        complete = bool(steps) and back_to is None and steps[-1] >= self.config.run.steps and self._is_closed(steps[-1])
        if not storage.exists(self._config_file):
            self.write_config()
        return Found(steps, back_to, complete)

    def _config_files(self, steps: list[int]) -> list[Path]:
        """Where the config of the run is held, that of the newest checkpoint first."""
        return [*(_config_of(self.path, step) for step in reversed(steps)), self._config_file]

    def _check_config(self, stored: Config, step: int) -> None:
        """ConfigError, one line naming the keys, where a run of the stored config cannot be resumed with this one."""
        said = f"{self.path} holds a quantised model, which is not trained on: train the run that it was made of"
        require(not stored.quantize.stored, said)
        fatal = refused(stored, self.config)
        identity = record_of(self.path, step).get(IDENTITY)
        if identity is not None:
            fatal = {key: values for key, values in fatal.items() if key not in TOKENIZER}  # its content counts
        if fatal:
            shown = ", ".join(f"{key} ({_short(a)} there, {_short(b)} now)" for key, (a, b) in list(fatal.items())[:4])
            more = f" and {len(fatal) - 4} more" if len(fatal) > 4 else ""
            raise ConfigError(
                f"{self.path} holds a run with another config: {shown}{more}; "
                "give the same values to resume it, or --run.dir=NEW for a new run"
            )
        check_tokenizer(self.config.data, identity, self.path)

    def _check_nothing_lost(self) -> None:
        """ConfigError where records say that there were checkpoints; a run that was stopped before its first is new."""
        records = read_metrics(self.metrics)
        saved = max((r["step"] for r in records if r["kind"] in ("save", "end")), default=0)
        if not saved and storage.exists(self._config_file) and records:  # a run of before saves were recorded
            with contextlib.suppress(ConfigError):
                every, last = stored_config(self.path, self.config).run.save_every, max(r["step"] for r in records)
                saved = last // every * every if 0 < every < last / 2 else 0
        if saved:
            left = ", ".join(name for name in storage.names(self.path) if name not in ("lock", "checkpoints"))
            raise ConfigError(
                f"{self.path} holds a run whose checkpoints are gone: by its metrics.jsonl it had one of step {saved}, "
                f"left is {left}; put checkpoints/ back to resume it, begin it again by --run.from_step=0, or choose "
                "--run.dir=NEW"
            )

    def _is_closed(self, step: int) -> bool:
        """Whether the end of the run at this step or later was written: a crash may come after the last save."""
        return any(r["kind"] == "end" and r["step"] >= step for r in read_metrics(self.metrics))

    def open_log(self, after: int, may_write: Callable[[], None] = lambda: None) -> MetricsLog:
        """The records, to be continued after a step; those of later steps go to superseded/. may_write: see there."""
        sinks = open_sinks(Opening(self.config, self.path, after)) if self.owner else ()
        dropped = self.superseded / "metrics.jsonl"
        return MetricsLog(self.metrics, after, self.owner, sinks, dropped, may_write)

    def check_there(self) -> None:
        """RunError where the folder was deleted, moved away or taken over while the run wrote to it."""
        if self._lease is not None:
            self._lease.check()
        elif self.owner and not self._config_file.exists():
            raise RunError(f"{self.path} was deleted while the run wrote to it: what it held is lost")

    def write_config(self) -> None:
        """Stores the resolved config, whole or not at all. One that cannot be read is kept in broken/."""
        if not self.owner:
            return
        try:
            if storage.exists(self._config_file):
                try:
                    _first_readable([self._config_file], self.config)
                except ConfigError:
                    move_aside(self._config_file, self.path / "broken")
            save_config(self.config, self._config_file)
        except OSError as error:
            raise RunError(f"cannot write {self._config_file}: {error.strerror}") from error

    def changed(self, step: int) -> dict[str, tuple[Any, Any]]:
        """What the config changes in the run of the checkpoint of a step, with the values before and now."""
        if not storage.exists(_config_of(self.path, step)):
            return {}
        try:
            stored = _first_readable([_config_of(self.path, step), self._config_file], self.config)
        except ConfigError as error:
            log.warning("%s: what changes since step %d is not recorded", error, step)
            return {}
        return {key: (to_dict(a), to_dict(b)) for key, (a, b) in changes(stored, self.config).items()}

    def write_history(self, step: int, changed: dict[str, tuple[Any, Any]]) -> None:
        """Appends the config to those that the run had, where it is another one than the last."""
        if not self.owner:
            return
        history, config = self.path / "config_history.jsonl", to_dict(self.config)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = {"step": step, "time": now, "changed": changed, "config": config}
        try:
            before = storage.read_bytes(history).splitlines() if storage.exists(history) else []
            with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
                if parse_json(before[-1])["config"] | {"cluster": None} == config | {"cluster": None}:
                    return
            storage.append(history, (json.dumps(line) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write {history}: {error.strerror}") from error


def _lock(file) -> None:
    """Locks a file for this process alone. BlockingIOError where another one has it for longer than it takes to see
    who does (train/holder.py)."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            held = error
            time.sleep(0.02)
    raise held


LOCK_TRIES = 5
TOKENIZER = ("data.tokenizer", "data.bos_token", "data.eos_token")
"""What names a tokenizer; where a checkpoint knows its content, that is compared in their place."""


class _Descriptor:
    """An open file descriptor that is closed like a file."""

    def __init__(self, fd: int):
        self._fd = fd

    def fileno(self) -> int:
        """What flock locks."""
        return self._fd

    def close(self) -> None:
        """Once."""
        os.close(self._fd)


def stored_config(path: Path, like: Config | None = None) -> Config:
    """The config of a run's folder, or where that is gone or damaged the one in its newest checkpoint.

    ConfigError where there is none that can be read. like: a config whose own classes the run may have used; see
    from_dict.
    """
    file = path / "config.json"
    copies = [_config_of(path, step) for step in reversed(finished_steps(path / "checkpoints"))]
    if not storage.exists(file) and not copies:
        raise ConfigError(f"{path} holds no run (no config.json)")
    if not copies and is_published(file):
        raise ConfigError(f"{path} holds a published checkpoint, not a run: --hf and --init.hf take it")
    return _first_readable([file, *copies], like)


def is_published(file: Path) -> bool:
    """Whether a config.json is that of transformers."""
    try:
        values = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


def _config_of(path: Path, step: int) -> Path:
    return path / "checkpoints" / str(step) / "config" / "metadata"


def record_of(path: Path, step: int) -> dict:
    """The loop's record of a checkpoint, unverified; empty where it cannot be read."""
    try:
        record = read_json(path / "checkpoints" / str(step) / "loop" / "metadata")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _first_readable(files: list[Path], like: Config | None) -> Config:
    """The config of the first file that holds one; the first file's ConfigError where none does."""
    errors = []
    for file in files:
        try:
            config = from_dict(read_json(file), like=like)
        except ConfigError as error:
            errors.append(error)
        except (OSError, ValueError) as error:
            errors.append(ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}"))
        else:
            if errors:
                log.warning("%s: the config in %s is taken", errors[0], file)
            return config
    raise errors[0]


def _short(value) -> str:
    return cut(str(value), 40)
