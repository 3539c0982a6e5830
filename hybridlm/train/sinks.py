# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a run's records go besides metrics.jsonl: TensorBoard files, Weights & Biases.

metrics.jsonl is the source: a sink is given what is written there, and nothing reads from one. A new sink is a class
and a row of SINKS.
"""

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.run import RunConfig
from hybridlm.config.tree import to_dict
from hybridlm.errors import ConfigError
from hybridlm.train.objects import Outbox
from hybridlm.train.records import read_json

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for a sink that sends."""


class Sink(Protocol):
    """What takes numbers by step."""

    def add(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a record."""

    def rewind(self, step: int) -> None:
        """The run has gone back to a step: what comes next is of the step after it."""

    def flush(self) -> None:
        """Returns when what was added has left this process."""

    def send(self) -> None:
        """Sends into the run's bucket what lies on this machine; called by another thread, from time to time."""

    def close(self) -> None:
        """flush, and an end; `send` may come once more."""


class Opening(NamedTuple):
    """What a sink is opened with."""

    config: Config
    folder: Path
    """Of the run."""
    step: int
    """What is gone on from."""


class Row(NamedTuple):
    """A kind of sink."""

    option: str
    """Field of RunConfig, which asks for it."""
    package: str
    extra: str
    """Of this project, that brings the package; empty: it comes with the project."""
    ready: Callable[[RunConfig], str | None]
    """What keeps it from being used though its package is there; None: nothing."""
    open: Callable[[Opening], Sink]


def check(run: RunConfig) -> None:
    """ConfigError, one line, for a sink that is asked for and cannot be used. One that is on without being asked for is
    a warning: it is left out."""
    for row in SINKS:
        if not getattr(run, row.option):
            continue
        install = f"pip install 'hybridlm[{row.extra}]'" if row.extra else f"pip install {row.package}"
        problem = row.ready(run) if _is_there(row.package) else f"needs the package {row.package}: {install}"
        if problem is not None and getattr(RunConfig, row.option) == getattr(run, row.option):
            log.warning("run.%s %s; it is left out", row.option, problem)
        elif problem is not None:
            raise ConfigError(f"run.{row.option} ({getattr(run, row.option)}) {problem}, or leave it out")


def _is_there(package: str) -> bool:
    """Whether a package is installed; a folder of its name, as Weights & Biases itself leaves one, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def open_sinks(opening: Opening) -> list[Sink]:
    """Those that the run's config asks for, of packages that are there."""
    run = opening.config.run
    wanted = [row for row in SINKS if getattr(run, row.option) and _is_there(row.package)]
    return [row.open(opening) for row in wanted]


class TensorBoard:
    """Event files in tensorboard/ of the run; of a run in a bucket, on this machine first.

    They are written by a thread, from the first record behind that of the start on: the package takes a second to
    import, two where it finds torch, which a start does not wait for. What goes wrong is raised by a later call.
    """

    def __init__(self, opening: Opening):
        target = opening.folder / "tensorboard"
        self._outbox = Outbox(target) if storage.in_bucket(target) else None
        self._folder = self._outbox.folder if self._outbox else target
        self._writer: Any = None
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._held: list[Callable[[], None]] | None = []
        self._under_way: list[Future] = []
        self.rewind(opening.step)

    def rewind(self, step: int) -> None:
        """What was written of later steps does not show any more."""
        self._do(partial(self._open, step))

    def _open(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        suffix = f".{time.time_ns()}"  # a name holds whole seconds, and a second file of one would replace the first
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1, filename_suffix=suffix)

    def add(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `kind/name`."""

        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

        self._do(write)
        if kind != "start":
            self._begin()

    def _do(self, what: Callable[[], None]) -> None:
        """Has the thread do it behind all before, once there is one."""
        if self._held is not None:
            self._held.append(what)
            return
        done = [future for future in self._under_way if future.done()]
        self._under_way = [future for future in self._under_way if future not in done]
        self._under_way.append(self._thread.submit(what))
        for future in done:
            future.result()

    def _begin(self) -> None:
        held, self._held = self._held or [], None
        for what in held:
            self._do(what)

    def _finish(self, what: Callable[[], None]) -> None:
        """Does it behind all before; returns when that is done."""
        self._begin()
        self._do(what)
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()

    def flush(self) -> None:
        """Writes what it holds."""
        self._finish(lambda: self._writer.flush())

    def send(self) -> None:
        """Sends the files."""
        if self._outbox is not None:
            self._outbox.send()

    def close(self) -> None:
        """flush, and an end."""
        try:
            self._finish(lambda: self._writer.close())
        finally:
            self._thread.shutdown()


class WandB:
    """A run of Weights & Biases, the same one in each start: its id lies in the run's folder.

    Steps that a run goes back behind are drawn twice there. Where the service does not answer, what is to be sent is
    written on this machine, as with WANDB_MODE=offline; a run does not end for that.
    """

    def __init__(self, opening: Opening):
        config, folder = opening.config, opening.folder
        here = storage.local("wandb", folder)
        here.mkdir(parents=True, exist_ok=True)
        entity, _, project = config.run.wandb.rpartition("/")
        wanted = {
            "project": project, "entity": entity or None, "dir": os.fspath(here), "id": _id_of(folder),
            "resume": "allow", "name": folder.name, "config": to_dict(config), "allow_val_change": True,
        }  # fmt: skip
        import wandb

        settings = {"console": "off", "init_timeout": CLOSE_SECONDS}
        try:
            self._run = wandb.init(**wanted, settings=wandb.Settings(**settings))
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            log.warning(
                "Weights & Biases cannot be reached (%s): written to %s, wandb sync sends it", why, here / "wandb"
            )
            self._run = wandb.init(**wanted, mode="offline", settings=wandb.Settings(**settings))
        self._run.define_metric("*", step_metric="step")

    def add(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `kind/name` over `step`."""
        if values:
            with self._told():
                self._run.log({f"{kind}/{name}": value for name, value in values.items()} | {"step": step})

    def rewind(self, step: int) -> None:
        """Nothing: what was sent is sent."""

    def flush(self) -> None:
        """Nothing: what was added is its own process's by then."""

    def send(self) -> None:
        """Nothing: it sends by itself."""

    def close(self) -> None:
        """Waits until all is sent, for CLOSE_SECONDS at most."""
        closing = threading.Thread(target=self._finish, name="wandb", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            log.warning("Weights & Biases has not taken all within %.0f s: wandb sync sends the rest", CLOSE_SECONDS)

    def _finish(self) -> None:
        with self._told():
            self._run.finish()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except Exception as error:
            log.warning("Weights & Biases: %s", " ".join(str(error).split())[:200])


def _id_of(folder: Path) -> str:
    """That of a run's folder, made where there is none."""
    file = folder / "wandb.json"
    with contextlib.suppress(OSError, ValueError):
        found = read_json(file)
        if isinstance(found, dict) and isinstance(found.get("id"), str) and found["id"].isalnum():
            return found["id"]
    new = uuid.uuid4().hex[:12]
    storage.write_text(file, json.dumps({"id": new}) + "\n")
    return new


def _not_logged_in(run: RunConfig) -> str | None:
    """Why Weights & Biases cannot be used here, without asking anybody on a terminal."""
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return None
    import wandb

    try:
        ready = wandb.login(prompt=False)
    except Exception as error:
        return f"cannot log in ({' '.join(str(error).split())[:200]}): run wandb login, or set WANDB_MODE=offline"
    return None if ready else "has no API key: run wandb login, set WANDB_API_KEY or WANDB_MODE=offline"


SINKS = (
    Row("tensorboard", "tensorboardX", "", lambda run: None, TensorBoard),
    Row("wandb", "wandb", "wandb", _not_logged_in, WandB),
)


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
