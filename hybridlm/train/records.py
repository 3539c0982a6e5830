# SPDX-License-Identifier: Apache-2.0
"""Files of a run's folder as they are found there, sound or not: JSON, checkpoints by step, what is set aside."""

import json
import re
import shutil
import time
from pathlib import Path


def read_json(path: Path):
    """The JSON value of a file. OSError where it cannot be read, ValueError where it holds no JSON."""
    return parse_json(path.read_bytes())


def parse_json(content: bytes):
    """The JSON value of a text in UTF-8; ValueError where it is none that can be read."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def finished_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints under a folder that have their final name, oldest first."""
    if not folder.is_dir():
        return []
    names = [f.name for f in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", f.name) and f.is_dir()]
    return sorted(map(int, names))


def move_aside(path: Path, folder: Path) -> str:
    """Moves a file or folder into another folder, under its name and the time; where it is now."""
    folder.mkdir(exist_ok=True)
    name = f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = sum(other.name.startswith(name) for other in folder.iterdir())
    target = folder / (f"{name}-{taken + 1}" if taken else name)
    shutil.move(path, target)
    return str(target)
