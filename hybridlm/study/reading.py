# SPDX-License-Identifier: Apache-2.0
"""Runs found under a folder, each with its config, its records and its state; what cannot be read is one line."""

import contextlib
import logging
import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.tree import to_dict
from hybridlm.errors import ConfigError, RunError, require
from hybridlm.study.state import State, state_of
from hybridlm.train.holder import holder
from hybridlm.train.metrics_log import read_metrics
from hybridlm.train.records import finished_steps, read_json
from hybridlm.train.run_folder import stored_config

OF_RUNS = {"metrics.jsonl", "metrics", "checkpoints", "config_history.jsonl"}
"""What the folder of a run has at least one of; a published checkpoint has a config.json, too."""
DEPTH = 3
"""Folders between the one that is asked for and a run."""
AT_ONCE = 8


@dataclass(frozen=True)
class Run:
    """A run as it stands."""

    path: Path
    config: dict[str, Any]
    """Its config as JSON."""
    parsed: Config | None
    """The same as a value; None where its blocks are of a config file that is not at hand."""
    records: list[dict]
    """Of metrics.jsonl, in order; a step that was taken twice is there once, as it was taken last."""
    checkpoints: list[int]
    state: State

    @property
    def asked(self) -> int | None:
        """Steps that its config asks for."""
        run = self.config.get("run")
        steps = run.get("steps") if isinstance(run, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def steps(self) -> int:
        """Steps that it has done."""
        done = [r["step"] for r in self.records if r["kind"] in ("train", "val", "end", "save")]
        return max([*done, *self.checkpoints], default=0)

    def of_kind(self, *kinds: str) -> list[dict]:
        """Its records of these kinds."""
        return [record for record in self.records if record["kind"] in kinds]

    def last(self, kind: str, name: str) -> float | None:
        """The last number of a name in its records of a kind."""
        return next((r[name] for r in reversed(self.of_kind(kind)) if is_number(r.get(name))), None)

    def middle(self, kind: str, name: str) -> float | None:
        """The median of a name in its records of a kind."""
        found = [r[name] for r in self.of_kind(kind) if is_number(r.get(name))]
        return statistics.median(found) if found else None


@dataclass(frozen=True)
class Broken:
    """A folder that holds no run, or one that cannot be read."""

    path: Path
    word: str
    """`broken` or `no run`."""
    why: str


def is_number(value) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: Path, like: Config | None = None, ours: bool = False) -> Run:
    """The run in a folder. ConfigError, RunError or OSError, one line, where there is none that can be read.

    like: see from_dict. ours: this process uses the folder, which does not count as running.
    """
    steps = finished_steps(path / "checkpoints")
    config, parsed = _config(path, like)
    in_bucket = storage.in_bucket(path)
    records = each_once(read_metrics(path / ("metrics" if in_bucket else "metrics.jsonl")))
    run = Run(path, config, parsed, records, steps, State("", ""))
    state = state_of(run.asked, records, steps, None if ours else holder(path))
    return Run(path, config, parsed, records, steps, state)


def _config(path: Path, like: Config | None) -> tuple[dict, Config | None]:
    """Where the classes of a config are not known, its JSON will do."""
    try:
        parsed = stored_config(path, like)
    except ConfigError:
        try:
            config = read_json(path / "config.json")
        except (OSError, ValueError):
            config = None
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise
        return config, None
    return to_dict(parsed), parsed


def each_once(records: Sequence[dict]) -> list[dict]:
    """Records without those of steps that were gone back behind: a start or a return to a step takes the later ones
    away, and so does a step that comes again."""
    kept: list[dict] = []
    newest: dict[str, int] = {}
    for record in records:
        kind, step = record["kind"], record["step"]
        if kind in ("start", "rollback") and any(at > step for at in newest.values()):
            kept = [r for r in kept if r["step"] <= step]
            newest = {of: min(at, step) for of, at in newest.items()}
        elif kind in ("train", "val", "probe") and step <= newest.get(kind, -1):
            kept = [r for r in kept if r["step"] < step or r["kind"] != kind]
        kept.append(record)
        newest[kind] = max(step, newest.get(kind, -1))
    return kept


def find_runs(folder: Path, like: Config | None = None) -> list[Run | Broken]:
    """The run in a folder or those in its folders, up to DEPTH deep; Broken for each that cannot be read, and for each
    of the folder's own folders without a run. ConfigError where the folder is not there."""
    storage.check(folder, "the folder of runs")
    require(storage.exists(folder), f"{folder} is not there: give the folder of runs")
    require(storage.in_bucket(folder) or folder.is_dir(), f"{folder} is a file: give the folder of runs")
    return read_each(list(_places(folder, DEPTH)), like)


def read_each(places: Sequence[Path | Broken], like: Config | None = None) -> list[Run | Broken]:
    """The runs in folders, in their order; Broken for those that cannot be read."""
    with _quiet(), ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda place: place if isinstance(place, Broken) else _run_or_broken(place, like), places))


def _run_or_broken(path: Path, like: Config | None) -> Run | Broken:
    try:
        return read_run(path, like)
    except (ConfigError, RunError) as error:
        return Broken(path, "broken", str(error))
    except OSError as error:
        return Broken(path, "broken", error.strerror or str(error))
    except Exception as error:  # whatever stands in those files
        return Broken(path, "broken", f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _places(folder: Path, depth: int) -> Iterator[Path | Broken]:
    """Folders of runs at or under a folder, and what stands for those right under it that have none."""
    try:
        names = _names(folder)
    except OSError as error:
        yield Broken(folder, "broken", error.strerror or str(error))
        return
    if is_run(names):
        yield folder
        return
    for name in names if depth else ():
        inner = folder / name
        if name.startswith(".") or not _is_folder(inner):
            continue
        found = list(_places(inner, depth - 1))
        yield from found
        if not found and depth == DEPTH:
            there = _names(inner)
            shown = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            yield Broken(inner, "no run", f"there is {shown}" if there else "it is empty")


def _names(folder: Path) -> list[str]:
    return storage.names(folder)


def _is_folder(path: Path) -> bool:
    if not storage.in_bucket(path):
        return path.is_dir() and not path.is_symlink()
    found = storage.names(path)
    return bool(found) and found != [path.name]


def is_run(names: Collection[str]) -> bool:
    """Whether a folder with these names in it is that of a run, sound or not."""
    return bool(OF_RUNS & set(names)) or {"config.json", "lock"} <= set(names)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A line that is being written now, or a config that was mended from a checkpoint, is no matter of a survey."""
    logger = logging.getLogger("hybridlm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
