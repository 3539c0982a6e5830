# SPDX-License-Identifier: Apache-2.0
"""Beyond the trained length: the loss by position of models that are read to several times the rows of their training,
by scaling of their rotary embedding, with and without the output gate of their attention.

The claim that it asks about is that of Qiu et al. 2025 ("Gated Attention for Large Language Models"): a model with the
gate loses less where YaRN extends its context. Words that set a scaling are made here; who reads models with them, and
trains them, is the command.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.keys import hint_of
from hybridlm.config.tree import walk
from hybridlm.errors import ConfigError, require
from hybridlm.eval.report import strict
from hybridlm.fields import fits
from hybridlm.layers.rope import Rope, dynamic_ntk

METHODS = {
    "none": "as trained",
    "linear": "position interpolation",
    "ntk": "NTK-aware",
    "dynamic": "NTK-aware, rows of each length with a factor of their own",
    "yarn": "YaRN",
}
"""What is done to rotary embeddings -> its words."""
GATES = ("none", "elementwise", "head")
"""What a gate of attention can be set to."""


class Bucket(NamedTuple):
    """Tokens that follow more than `above` and at most `to` tokens of their document."""

    label: str
    above: int
    to: int
    tokens: int
    loss: float
    """Nats a token."""


class Row(NamedTuple):
    """One model, read by one scaling."""

    run: str
    """Its folder."""
    step: int
    """Of its checkpoint."""
    gate: str
    seed: int
    method: str
    tuned: int
    """Steps that it was trained at the rows that are read here, with the scaling; 0: the scaling is new to it."""
    trained: int
    """Tokens of a row that it was trained at, before those steps."""
    length: int
    """Tokens of a row that it is read to."""
    read: tuple[str, ...]
    """What else says what is read."""
    buckets: tuple[Bucket, ...]
    """Of documents that fill a row, up to its end."""

    @property
    def key(self) -> tuple:
        """What makes a second reading of the same the same."""
        return self._replace(gate="", seed=0, buckets=())


# What is set ---------------------------------------------------------------------------------------------------------


def ropes(config: Config) -> list[str]:
    """Dotted names of the rotary embeddings of the pattern's blocks."""
    return [path for path, node in _of_pattern(config) if path.endswith(".rope") and isinstance(node, Rope)]


def gates(config: Config) -> list[str]:
    """Dotted names of the output gates of the pattern's softmax attention."""
    return [path for path, _ in _of_pattern(config) if path.endswith(".gate") and _is_gate(config, path)]


def gate_of(config: Config) -> str:
    """What those are, `-` where there are none that could be."""
    values = {path: node for path, node in _of_pattern(config)}
    return "/".join(dict.fromkeys(str(values[path] or "none") for path in gates(config))) or "-"


def gated(config: Config, gate: str) -> list[str]:
    """The words that set the gates. ConfigError where there are none."""
    found = gates(config)
    require(bool(found), f"--gates ({gate}): no attention of {config.name} can have a gate: leave it out")
    return [f"--{path}={'None' if gate == 'none' else gate}" for path in found]


def readings(config: Config, method: str, length: int) -> list[tuple[int, list[str]]]:
    """(tokens of a row, words that set the scaling) of each reading that gives losses up to a length.

    A method is one reading of that length, its factor the ratio to the trained one; `dynamic` is one of each length on
    the way, in doubles. ConfigError where there is nothing to scale.
    """
    trained = config.data.seq_len
    if method == "none":
        return [(length, [])]
    found = ropes(config)
    require(bool(found), f"--methods ({method}): {config.name} has no rotary embedding to scale: give --methods none")
    values = {path: node for path, node in _of_pattern(config)}
    for path in found:
        there = values[path].scaling
        require(there is None, f"--methods ({method}): {path}.scaling ({there}) is there already: give --methods none")
    if method != "dynamic":
        return [(length, [word for path in found for word in _scaling(path, method, trained, length)])]
    lengths = [trained * 2**i for i in range(math.ceil(math.log2(length / trained)))] + [length]
    alphas = [dynamic_ntk(tokens, trained).alpha for tokens in lengths]
    return [
        (tokens, [word for path in found for word in (f"--{path}.scaling=NTK", f"--{path}.scaling.alpha={alpha!r}")])
        for tokens, alpha in zip(lengths, alphas)
    ]


def _scaling(path: str, method: str, trained: int, length: int) -> list[str]:
    factor = length / trained
    match method:
        case "linear":
            return [f"--{path}.scaling=Linear", f"--{path}.scaling.factor={factor!r}"]
        case "ntk":
            return [f"--{path}.scaling=NTK", f"--{path}.scaling.alpha={factor!r}"]
        case "yarn":
            at = f"--{path}.scaling"
            return [f"{at}=YaRN", f"{at}.factor={factor!r}", f"{at}.original_max_positions={trained}"]
    raise ConfigError(f"--methods ({method}): there are {', '.join(METHODS)}")


def _of_pattern(config: Config) -> Iterable[tuple[str, Any]]:
    """(dotted name, node) of all that is in a block that the pattern uses."""
    used = tuple(f"model.blocks.{symbol}." for symbol in config.model.pattern)
    return ((path, node) for path, node in walk(config) if path.startswith(used))


def _is_gate(config: Config, path: str) -> bool:
    hint = hint_of(config, path)
    return all(fits(None if gate == "none" else gate, hint) for gate in GATES)


def joined(parts: Sequence[Sequence[Bucket]]) -> tuple[Bucket, ...]:
    """The buckets of readings to longer and longer rows: of each those that shorter ones do not reach."""
    found: list[Bucket] = []
    for buckets in parts:
        reached = found[-1].to if found else 0
        found += [bucket for bucket in buckets if bucket.to > reached and bucket.tokens]
    return tuple(found)


# What is kept --------------------------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[Row]:
    """The rows of a study's file; none where it is not there. ConfigError, one line, where it cannot be read."""
    if not storage.exists(file):
        return []
    try:
        found = json.loads(storage.read_bytes(file))["rows"]
        rows = [Row(**row) for row in found]
        return [row._replace(read=tuple(row.read), buckets=tuple(map(_bucket, row.buckets))) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is no record of this study ({error}): move it away") from error


def write_rows(file: Path, rows: Sequence[Row], shown: Sequence[Row]) -> None:
    """All rows, and the summary of those that are shown, whole or not at all; null for a number that is none."""
    plain = [{**row._asdict(), "buckets": [bucket._asdict() for bucket in row.buckets]} for row in rows]
    content = {"summary": [line._asdict() for line in summary(shown)], "gates": compared(shown), "rows": plain}
    storage.write_text(file, json.dumps(strict(content), indent=1, allow_nan=False) + "\n")


def _bucket(values: Mapping[str, Any]) -> Bucket:
    found = Bucket(**values)
    return found if found.loss is not None else found._replace(loss=math.nan)


# What is said --------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Seeds of one gate and one scaling together."""

    gate: str
    method: str
    tuned: int
    seeds: list[int]
    losses: dict[str, float]
    """Label of each bucket -> mean over seeds, from the end of the trained length on."""
    rise: float
    """Loss in the last bucket less that at the end of the trained length, mean over seeds."""
    deviation: float | None
    """Of the rise over seeds; None of one."""


def summary(rows: Sequence[Row]) -> list[Line]:
    """A line for each gate and scaling, in the order of the rows."""
    lines = []
    for group, of_group in _grouped(rows).items():
        losses, rises = [_beyond(row) for row in of_group], [rise(row) for row in of_group]
        labels = [label for label in losses[0] if all(label in of for of in losses)]
        means = {label: statistics.fmean(of[label] for of in losses) for label in labels}
        deviation = statistics.stdev(rises) if len(rises) > 1 else None
        lines.append(Line(*group, [row.seed for row in of_group], means, statistics.fmean(rises), deviation))
    return lines


def rise(row: Row) -> float:
    """How much the loss is higher at the end of what is read than at the end of the trained length."""
    losses = list(_beyond(row).values())
    return losses[-1] - losses[0]


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each scaling and each gate: how much less the loss rises than without a gate, seed by seed."""
    groups = _grouped(rows)
    found = []
    for (gate, method, tuned), of_gate in groups.items():
        plain = {row.seed: rise(row) for row in groups.get(("none", method, tuned), ())}
        less = {row.seed: plain[row.seed] - rise(row) for row in of_gate if row.seed in plain}
        if gate != "none" and less:
            mean = statistics.fmean(less.values())
            found.append({"gate": gate, "method": method, "tuned": tuned, "less": mean, "by_seed": less})
    return found


def as_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(head, cells) of the table."""
    lines = summary(rows)
    labels = list(lines[0].losses)
    cells = []
    for line in lines:
        spread = "" if line.deviation is None else f" ± {line.deviation:.4f}"
        losses = (f"{line.losses[label]:.4f}" if label in line.losses else "-" for label in labels)
        cells.append([line.gate, _named(line.method, line.tuned), str(len(line.seeds)), *losses,
                      f"{line.rise:+.4f}{spread}"])  # fmt: skip
    return ["gate", "scaling", "seeds", *labels, "rise"], cells


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the comparison of gates says, one line a scaling."""
    said = []
    for found in compared(rows):
        by_seed, less = found["by_seed"], found["less"]
        fewer = sum(value > 0 for value in by_seed.values())
        said.append(
            f"{_named(found['method'], found['tuned'])}: with gate {found['gate']} the loss rises {abs(less):.4f} nats "
            f"{'less' if less > 0 else 'more'} than without (less in {fewer} of {len(by_seed)} seeds)"
        )
    return said


def _named(method: str, tuned: int) -> str:
    return f"{method}, {tuned} steps" if tuned else method


def _grouped(rows: Sequence[Row]) -> Mapping[tuple[str, str, int], list[Row]]:
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.gate, row.method, row.tuned), []).append(row)
    return groups


def _beyond(row: Row) -> dict[str, float]:
    """Label -> loss of the last bucket within the trained length and of all behind it."""
    within = [bucket for bucket in row.buckets if bucket.to <= row.trained]
    return {bucket.label: bucket.loss for bucket in [*within[-1:], *row.buckets[len(within) :]]}
