# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: config.json, metrics.jsonl, checkpoints/, loss.png, sample.txt, tensorboard/, lock.

A run that goes on from a published checkpoint has published/ too, with that one's config.json and tokenizer.

A folder belongs to one config and one process at a time. A run found in it is resumed, never overwritten.
"""

import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from hybridlm.config import Config
from hybridlm.config.resume import refused
from hybridlm.config.stored import from_dict, save_config
from hybridlm.errors import ConfigError, RunError
from hybridlm.train.metrics_log import MetricsLog, read_metrics

log = logging.getLogger(__name__)


class RunFolder:
    """Paths and records of one run; a context manager that holds the folder's lock."""

    def __init__(self, config: Config, owner: bool = True):
        """owner: this process writes; of a cluster's, the first alone."""
        self.config, self.owner = config, owner
        self.path = Path(config.run_dir).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.plot = self.path / "loss.png"
        self.sample = self.path / "sample.txt"
        self.published = self.path / "published"
        self.profile = self.path / "profile"
        self._config_file = self.path / "config.json"
        self._lock = None

    def __enter__(self):
        """Makes and locks the folder. ConfigError where it cannot be written or is no run; RunError where in use."""
        if not self.owner:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_is_run()
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.dir ({self.path}) cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise RunError(f"{self.path} is in use by {holder}; another run goes to --run.dir=NEW") from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): see that no second process trains there", self.path, error.strerror)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        return self

    def __exit__(self, *_):
        if self.owner:
            self._lock.truncate(0)
            self._lock.close()  # releases; a process that dies releases too

    def _check_is_run(self) -> None:
        if not self._config_file.exists() and any(f.name != "lock" for f in self.path.iterdir()):
            raise ConfigError(f"run.dir ({self.path}) has files but no run (no config.json): choose --run.dir=NEW")

    def check_config(self, has_checkpoint: bool) -> None:
        """ConfigError, one line naming the keys, where the run found here cannot be resumed with this config."""
        if not self._config_file.exists() or not has_checkpoint:
            return
        fatal = refused(stored_config(self.path, like=self.config), self.config)
        if fatal:
            shown = ", ".join(f"{key} ({_short(a)} there, {_short(b)} now)" for key, (a, b) in list(fatal.items())[:4])
            more = f" and {len(fatal) - 4} more" if len(fatal) > 4 else ""
            raise ConfigError(
                f"{self.path} holds a run with another config: {shown}{more}; "
                "give the same values to resume it, or --run.dir=NEW for a new run"
            )

    def is_closed(self, step: int) -> bool:
        """Whether the end of the run at this step or later was written: a crash may come after the last save."""
        return any(r["kind"] == "end" and r["step"] >= step for r in read_metrics(self.metrics))

    def open_log(self, after: int) -> MetricsLog:
        """The records, to be continued after a step."""
        board = self.path / "tensorboard" if self.config.run.tensorboard else None
        return MetricsLog(self.metrics, after, self.owner, board)

    def write_config(self) -> None:
        """Stores the resolved config, whole or not at all."""
        if not self.owner:
            return
        part = self._config_file.with_suffix(".json.part")
        save_config(self.config, part)
        part.replace(self._config_file)


def stored_config(path: Path, like: Config | None = None) -> Config:
    """The config of a run's folder. ConfigError where there is none that can be read.

    like: a config whose own classes the run may have used; see from_dict.
    """
    file = path / "config.json"
    try:
        return from_dict(json.loads(file.read_text(encoding="utf-8")), like=like)
    except FileNotFoundError:
        raise ConfigError(f"{path} holds no run (no config.json)") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
