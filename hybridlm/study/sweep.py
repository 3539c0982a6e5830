# SPDX-License-Identifier: Apache-2.0
"""The members of a sweep: the product over keys whose values are alternatives, each a run with a folder of its own."""

import hashlib
import itertools
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.find import load_to_train
from hybridlm.config.keys import hint_of
from hybridlm.config.mesh import check_config
from hybridlm.config.resume import refused
from hybridlm.data.config import DataConfig
from hybridlm.data.find import find
from hybridlm.data.held_out import held_out_sets
from hybridlm.errors import ConfigError, require, within
from hybridlm.sharding import make_mesh
from hybridlm.study.reading import is_run, read_run
from hybridlm.train.sinks import check as check_sinks

MOST = 1000
"""Members of a sweep."""
OURS = ("run.dir", "name")
"""What a sweep sets itself."""
NAME_LENGTH = 120


class Member(NamedTuple):
    """One run of a sweep."""

    name: str
    """Of its folder: `lr=0.001,pattern=M-`."""
    folder: str
    words: list[str]
    """All overrides."""


def read_alternatives(words: Sequence[str]) -> dict[str, list[str]]:
    """Key -> its values, in order, of `optim.lr=1e-3 optim.lr=3e-4 model.pattern=M-`. ConfigError for what is none."""
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        require(bool(equals) and "." in key, f"--sweep ({word}) must be SECTION.KEY=VALUE")
        require(key not in OURS, f"--sweep ({word}): each run has a folder of its own; --dir is that of the sweep")
        values = found.setdefault(key, [])
        require(value not in values, f"--sweep ({word}) is there twice")
        values.append(value)
    require(bool(found), "--sweep is missing: give SECTION.KEY=VALUE for each alternative")
    return found


def members(config: Config, alternatives: dict[str, list[str]], folder: Path, overrides: Sequence[str]) -> list[Member]:
    """Those of the product, the last key's values next to each other; a name says the values alone, so that a sweep to
    which values are added finds the runs that it has."""
    n_members = 1
    for values in alternatives.values():
        n_members *= len(values)
    require(n_members <= MOST, f"--sweep has {n_members} combinations: at most {MOST}")
    short = _short_keys(list(alternatives))
    found = []
    for values in itertools.product(*alternatives.values()):
        pairs = list(zip(alternatives, values))
        name = _named(",".join(f"{short[key]}={_plain(value)}" for key, value in pairs))
        here = folder / name
        words = [word for key, value in pairs for word in _words(config, key, value)]
        found.append(Member(name, str(here), [*overrides, *words, f"--run.dir={here}"]))
    return found


def _short_keys(keys: list[str]) -> dict[str, str]:
    """The last part of each, or all of it where two would be the same."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends)}


def _plain(value: str) -> str:
    """A value in a file's name: nobody else's, without what means something to shells and buckets."""
    plain = re.sub(r"[^A-Za-z0-9._+-]", "_", value)
    return plain if plain == value and value not in ("", ".", "..") else f"{plain}-{_digest(value)}"


def _named(text: str) -> str:
    """A name that a file system takes, however long the values are."""
    return text if len(text) <= NAME_LENGTH else f"{text[:NAME_LENGTH]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()


def _words(config: Config, key: str, value: str) -> list[str]:
    """The words of a value; that of a key with several, in quotes, as several."""
    try:
        hint = hint_of(config, key)
        several = tuple in (typing.get_origin(part) for part in (hint, *typing.get_args(hint)))
    except ConfigError:  # a key of what another value chooses
        several = False
    return [f"--{key}", *value.split()] if several and " " in value else [f"--{key}={value}"]


def check_members(
    name: str, found: Sequence[Member], also: Callable[[Config], None] = lambda config: None
) -> list[str]:
    """The state of each member before the sweep, "new" where there is nothing yet.

    also: what else raises for a config that cannot be. ConfigError, with the member's name, for the first that cannot
    be trained with the devices of this process, or whose folder has another run.
    """
    states = []
    for member in found:
        with within(f"{member.name}: "):
            states.append(_check(name, member, also))
    return states


def _check(name: str, member: Member, also: Callable[[Config], None]) -> str:
    config = load_to_train(name, member.words)
    check_config(config, make_mesh(config.mesh))
    check_sinks(config.run)
    also(config)
    for argument, patterns in _text_of(config.data):
        find([p for p in patterns if not storage.in_bucket(storage.as_path(p))], argument)
    folder = storage.as_path(member.folder)
    if not is_run(storage.names(folder)):
        return "new"
    run = read_run(folder, like=config)
    changed = refused(run.parsed, config) if run.parsed is not None and run.checkpoints else {}
    shown = ", ".join(f"{key} ({a} there, {b} now)" for key, (a, b) in list(changed.items())[:3])
    require(not changed, f"{folder} holds a run with another config: {shown}; choose another --dir")
    again = run.state.word == "complete" and run.steps < config.run.steps
    return "stopped" if again else run.state.word


def _text_of(data: DataConfig) -> list[tuple[str, Sequence[str]]]:
    """(argument, patterns) of each source, as a run opens them: those of a mixture and held-out sets by themselves."""
    train = [(pattern,) for pattern in data.path] if data.weights else [data.path]
    sets = held_out_sets(data.val_path).values()
    return [*(("data.path", patterns) for patterns in train), *(("data.val_path", patterns) for patterns in sets)]
