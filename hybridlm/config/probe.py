# SPDX-License-Identifier: Apache-2.0
"""What a run is probed with while it trains; docs/probes.md."""

import ast
from dataclasses import dataclass
from typing import Any

from hybridlm.errors import ConfigError, require
from hybridlm.fields import check_fields


@dataclass(frozen=True)
class ProbeConfig:
    """Tasks whose answers stand in the context, and associative recall in the held-out text."""

    tasks: tuple[str, ...] = ()
    """Tasks (docs/probes.md), each with numbers of its own: mqar, mqar:pairs=4,vocab_size=64; none: no probe."""
    every: int | None = None
    """Steps between probes; 0: only after the last step; None: with each evaluation (run.eval_every)."""
    lengths: tuple[int, ...] = ()
    """Tokens of an example; several make a task's map of lengths; none: data.seq_len."""
    examples: int = 64
    """Of each task and length; the same ones each time."""
    seed: int = 0
    """That they are drawn by."""

    def __post_init__(self):
        check_fields(self, "probe.")
        for word in self.tasks:
            split_task(word, "probe.tasks")
        require(len(set(self.tasks)) == len(self.tasks), f"probe.tasks ({' '.join(self.tasks)}): one is there twice")
        for length in self.lengths:
            require(length >= 1, f"probe.lengths ({length}) must be at least 1")
        require(len(set(self.lengths)) == len(self.lengths), f"probe.lengths {self.lengths}: one is there twice")
        require(self.examples >= 1, f"probe.examples ({self.examples}) must be at least 1")
        require(self.seed >= 0, f"probe.seed ({self.seed}) must not be negative")
        every = self.every
        require(every is None or every >= 0, f"probe.every ({every}) must be a number of steps, 0 (at the end) or None")


def split_task(word: str, at: str) -> tuple[str, dict[str, Any]]:
    """(name, fields) of NAME or NAME:FIELD=VALUE,FIELD=VALUE; a value is a word or as in Python: over=tokens,
    depths=(0,50). ConfigError, one line, for what is none; at: the option that it stands in."""
    name, colon, given = word.partition(":")
    wrong = ConfigError(f"{at} ({word}) must be NAME or NAME:FIELD=VALUE,FIELD=VALUE")
    if not colon:
        return name, {}
    try:
        call = ast.parse(f"fields({given})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args or not call.keywords:
            raise wrong
        fields = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise wrong from None
    if "None" in fields or not name:  # `**` has no name
        raise wrong
    return name, fields


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
