# SPDX-License-Identifier: Apache-2.0
"""Probes by the words of a command line or a config: NAME, or NAME:FIELD=VALUE,FIELD=VALUE."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from hybridlm.config.probe import split_task
from hybridlm.errors import require, within
from hybridlm.probes import PROBES
from hybridlm.probes.repeated_bigrams import RepeatedBigrams
from hybridlm.probes.task import Task

AnyProbe = Task | RepeatedBigrams
KNOWN: Mapping[str, Any] = {**PROBES, "repeated_bigrams": RepeatedBigrams()}
"""Tasks, and what is read of held-out text."""


def probe_of(word: str, at: str, more: Mapping[str, Any] | None = None) -> AnyProbe:
    """The probe of a word, with further fields; at: the option that it stands in. ConfigError, one line, for no name of
    one, no field of it, and a value that the field cannot have."""
    name, fields = split_task(word, at)
    require(name in KNOWN, f"{at} ({name}): no task of that name: there are {', '.join(KNOWN)}")
    known, new = [f.name for f in dataclasses.fields(KNOWN[name])], {**fields, **(more or {})}
    for field, value in new.items():
        near = difflib.get_close_matches(field, known, n=1) or [", ".join(known)]
        require(field in known, f"unknown field --{name}.{field}: {name} has no {field}: did you mean {near[0]}?")
        if isinstance(getattr(KNOWN[name], field), tuple) and not isinstance(value, tuple):
            new[field] = (value,)
    with within(f"{name}."):
        return dataclasses.replace(KNOWN[name], **new)
