# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, as text and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from hybridlm.eval.sets import Bucket, SetResult
from hybridlm.eval.subject import Subject
from hybridlm.train.progress import short


def about(subject: Subject) -> dict:
    """What was evaluated, and how, as JSON."""
    data = subject.config.data
    return {
        "model": subject.name,
        "step": subject.step,
        "objective": type(subject.config.optim.objective).__name__,
        "compute_dtype": subject.config.model.compute_dtype,
        "tokenizer": subject.tokenizer.name,
        "seq_len": data.seq_len,
        "packing": data.packing,
        "devices": subject.mesh.size,
    }


def sets_as_json(subject: Subject, results: Mapping[str, SetResult]) -> dict:
    """All of it; null in the place of a number that there is not."""
    return {**about(subject), "sets": {name: strict(asdict(result)) for name, result in results.items()}}


def sets_as_text(subject: Subject, results: Mapping[str, SetResult]) -> str:
    """Two tables, the sets and their losses by position, and what the last positions say of long documents."""
    rows = [["set", "documents", "tokens", "loss", "perplexity", "bits per byte"]]
    for name, r in results.items():
        counts = short(r.documents), short(r.tokens)
        rows.append([name, *counts, f"{r.loss:.4f}", f"{r.perplexity:.5g}", f"{r.bits_per_byte:.4f}"])
    parts = [_title(subject), table(rows), *_by_position(results)]
    parts += filter(None, (_at_the_end(name, result.by_position) for name, result in results.items()))
    return "\n\n".join(parts[:3]) + "".join(f"\n{part}" for part in parts[3:])


def _title(subject: Subject) -> str:
    said = about(subject)
    step = "" if said["step"] is None else f", step {said['step']}"
    what = "loss at hidden tokens" if subject.config.optim.objective.reads_ahead else "loss of the next token"
    return (
        f"{said['model']}{step}: {what}, rows of {said['seq_len']} tokens (packing {said['packing']}), "
        f"{said['compute_dtype']}, {said['devices']} device{'s' if said['devices'] > 1 else ''}"
    )


def _by_position(results: Mapping[str, SetResult]) -> list[str]:
    long = [name for name, result in results.items() if any(bucket.long_tokens for bucket in result.by_position)]
    rows = [["context", *results, *(f"{name}, long" for name in long)]]
    for at in zip(*(result.by_position for result in results.values()), strict=True):
        of_long = [bucket.long_loss for name, bucket in zip(results, at, strict=True) if name in long]
        losses = [*(bucket.loss for bucket in at), *of_long]
        if not all(math.isnan(loss) for loss in losses):
            rows.append([label(at[0]), *("-" if math.isnan(loss) else f"{loss:.4f}" for loss in losses)])
    note = "\n(long: documents that fill a row, and no other)" if long else ""
    return [f"loss by tokens of context:\n{table(rows)}{note}"]


def label(bucket: Bucket) -> str:
    """`16k-32k`: more than the first, at most the second; 1k is 1024."""
    return "1" if bucket.to == 1 else f"{_power(bucket.above)}-{_power(bucket.to)}"


def _power(n: int) -> str:
    for suffix, size in (("M", 2**20), ("k", 2**10)):
        if n >= size:
            return f"{n // size}{suffix}"
    return str(n)


def _at_the_end(name: str, buckets: Sequence[Bucket]) -> str:
    """Whether the loss of long documents still falls where rows end."""
    last = [bucket for bucket in buckets if bucket.long_tokens][-2:]
    if len(last) < 2:
        return ""
    change = last[1].long_loss - last[0].long_loss
    verb = "falls" if change < 0 else "does not fall"
    return (
        f"{name}: the loss of long documents {verb} from {label(last[0])} to {label(last[1])} tokens of context "
        f"({change:+.4f} nats, {short(last[1].long_tokens)} tokens)"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def strict(value):
    """The value as JSON has it: null for what is no finite number."""
    if isinstance(value, dict):
        return {key: strict(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [strict(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
