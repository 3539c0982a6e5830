# SPDX-License-Identifier: Apache-2.0
"""Words of earlier versions, in which one flat list held the numbers of all optimizers and schedules.

PLACES says where each has its place now. Config files, overrides and the configs stored with runs go through it alike,
for all of them build an OptimConfig. A rule or schedule may still be chosen by its name; it then keeps what was said
before, as the flat list did: what another rule or schedule was given, or a number that had no place until now.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from hybridlm.errors import ConfigError, require
from hybridlm.optim.adamw import AdamW
from hybridlm.optim.muon import Muon
from hybridlm.optim.rules import RULES
from hybridlm.optim.schedule import SCHEDULES, Constant, Cosine, LinearDecay, Wsd

PLACES = {
    "name": "rule",
    "muon_lr": "rule.lr",
    "betas": "rule.betas",
    "eps": "rule.eps",
    "muon_momentum": "rule.momentum",
    "decay_fraction": "schedule.decay_fraction",
    "final_lr_ratio": "schedule.final_lr_ratio",
}
"""Old word -> new place."""
NAMES = {
    "rule": {"adamw": AdamW, "muon": Muon},
    "schedule": {"cosine": Cosine, "linear": LinearDecay, "wsd": Wsd, "constant": Constant},
}
"""What each part was called by; newer classes have no old name."""
CLASSES = {"rule": RULES, "schedule": SCHEDULES}
BY_NAME = frozenset({"name", *CLASSES})


def _holder(place: str) -> type:
    """The first class that has a place's number."""
    part, _, field = place.partition(".")
    return next(kind for kind in CLASSES[part] if field in _fields(kind))


def _fields(kind) -> dict[str, Any]:
    """Field -> default."""
    return {f.name: f.default for f in dataclasses.fields(kind)}


HINTS = {
    word: typing.get_type_hints(_holder(place))[place.partition(".")[2]] if "." in place else Literal[*NAMES[place]]
    for word, place in PLACES.items()
}
"""Old word -> its type."""


def accepting(init: Callable) -> Callable:
    """OptimConfig's constructor, which takes the old words beside the new ones."""

    @functools.wraps(init)
    def construct(self, *values, **words):
        if values:
            raise TypeError("OptimConfig takes its values by name: OptimConfig(lr=3e-4, ...)")
        init(self, **placed(words))

    return construct


def placed(words: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's words with the old ones in their places.

    `numbers` among them (and in the result) holds, by place, what was said of any rule and schedule and is no default.
    Raises ConfigError, which names the word as it was given, for a name that is none and a value that is refused.
    """
    new = {word: value for word, value in words.items() if word not in PLACES}
    said = {PLACES[word]: _checked(word, value) for word, value in words.items() if word in PLACES}
    new |= {"rule": said.pop("rule")} if "rule" in said else {}
    numbers = {**(new.pop("numbers", None) or {}), **said}
    for part, classes in CLASSES.items():
        value, known = new.get(part, classes[0]()), said
        if isinstance(value, str):
            value, known = _class_of(part, value)(), numbers
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            here = {field: known[f"{part}.{field}"] for field in _fields(value) if f"{part}.{field}" in known}
            new[part] = dataclasses.replace(value, **here)
            _remember(numbers, part, new[part])
    return new | {"numbers": numbers}


def _remember(numbers: dict[str, Any], part: str, value) -> None:
    """Puts what is no default in a part's value among the numbers, and takes out what is."""
    for field, default in _fields(value).items():
        numbers.pop(f"{part}.{field}", None)
        if getattr(value, field) != default:
            numbers[f"{part}.{field}"] = getattr(value, field)


def _checked(word: str, value):
    """The value of an old word, where its place takes it: it may not be one that is used."""
    part, _, field = PLACES[word].partition(".")
    if not field:
        require(value in NAMES[part], f"optim.{word} ({value!r}) must be one of {', '.join(NAMES[part])}")
        return value
    try:
        _holder(PLACES[word])(**{field: value})
    except ConfigError as error:
        raise ConfigError(f"optim.{word}{str(error).removeprefix(field)}") from None
    return value


def read(optim, word: str):
    """The value of an old word: where its place is not in the rule or schedule chosen, what was said or the default."""
    place = PLACES.get(word)
    if place is None:
        raise AttributeError(f"OptimConfig has no field {word!r}")
    part, _, field = place.partition(".")
    value = getattr(optim, part)
    if not field:
        return next((name for name, kind in NAMES[part].items() if type(value) is kind), type(value).__name__)
    if field in _fields(value):
        return getattr(value, field)
    return optim.numbers.get(place, _fields(_holder(place))[field])


def _class_of(part: str, name: str) -> type:
    """The class of a part by its name, old or new."""
    classes = {kind.__name__: kind for kind in CLASSES[part]}
    known = classes | NAMES[part]
    require(name in known, f"optim.{part} ({name!r}) must be one of {', '.join(classes)}")
    return known[name]
