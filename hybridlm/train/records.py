# SPDX-License-Identifier: Apache-2.0
"""Files of a run's folder as they are found there, sound or not: JSON, checkpoints by step, what is set aside."""

import json
import re
import shutil
import time
from pathlib import Path

from hybridlm import storage


def read_json(path: Path):
    """The JSON value of a file. OSError where it cannot be read, ValueError where it holds no JSON."""
    return parse_json(storage.read_bytes(path))


def parse_json(content: bytes):
    """The JSON value of a text in UTF-8; ValueError where it is none that can be read."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None


ASIDE = "aside.json"
"""In a bucket, where nothing is moved: an object in a checkpoint that says why it does not count any more."""
LAST = "manifest.json"
"""In a bucket, where nothing is renamed: the object of a checkpoint that is written last."""


def finished_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints under a folder that have their final name, or in a bucket their last object, oldest
    first."""
    steps = [int(name) for name in storage.names(folder) if re.fullmatch("0|[1-9][0-9]*", name)]
    return sorted(step for step in steps if is_finished(folder / str(step)))


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, and was not set aside."""
    if not storage.in_bucket(checkpoint):
        return checkpoint.is_dir()
    there = storage.names(checkpoint)
    return LAST in there and ASIDE not in there


def move_aside(path: Path, folder: Path) -> str:
    """Moves a file or folder into another folder, under its name and the time; where it is now.

    In a bucket, a checkpoint stays, with a mark, until the run writes another one in its place.
    """
    if storage.in_bucket(path):
        return _mark_aside(path, folder)
    folder.mkdir(exist_ok=True)
    name = f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = sum(other.name.startswith(name) for other in folder.iterdir())
    target = folder / (f"{name}-{taken + 1}" if taken else name)
    shutil.move(path, target)
    return str(target)


def _mark_aside(path: Path, folder: Path) -> str:
    now = time.strftime("%Y%m%d-%H%M%S")
    if LAST in storage.names(path):
        storage.write_text(path / ASIDE, json.dumps({"why": folder.name, "time": now}))
        return str(path)
    target = folder / f"{path.name}-{now}"
    storage.copy(path, target)
    storage.remove(path)
    return str(target)
