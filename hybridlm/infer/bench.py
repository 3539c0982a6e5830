# SPDX-License-Identifier: Apache-2.0
"""How fast models write and read at lengths of context: several side by side in one process, in turns.

A cell is a model at a phase, a context and a batch. Of every cell of a context and batch one turn is timed, then the
next, so that what changes on the machine meanwhile meets all of them; the figures are medians over the rounds, with
the lowest and the highest. A first round compiles, and does not count. Models are all on the device where it can hold
them beside the largest cache, else each for its turn alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.errors import require
from hybridlm.fields import WHOLE
from hybridlm.infer.bench_models import DECODE, PHASES, Open, Subject
from pallas_kernels import platform

SPARE = 0.95
"""Share of the memory that counted bytes may take."""
COPIED = 2**30
"""Bytes that are copied to find the rate of the memory, or a sixteenth of it where that is less."""
OUT = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")
"""What errors say where memory did not suffice."""
SHRINKS = 4
"""Times that a batch which does not fit after all is made smaller by an eighth."""


class Key(NamedTuple):
    """Which cell."""

    config: str
    phase: str
    context: int
    batch: int
    """0: as many rows as the device holds."""


@dataclass(frozen=True)
class Row:
    """What is known of a cell. Sizes are bytes."""

    config: str
    kind: str
    phase: str
    context: int
    batch: int
    fills: bool = False
    """The batch was chosen as the largest that fits."""
    compute: str = ""
    filled: str = ""
    """What stood before the tokens that were written, or that they were read."""
    types: dict[str, str] = field(default_factory=dict)
    """Of what the cache holds, by kind."""
    tokens_per_second: float | None = None
    """Of all rows together, the median."""
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    """Of a token of every row; of reading, to the first token."""
    rounds: int = 0
    weights: int = 0
    cache: int = 0
    moved: dict[str, int] | None = None
    """Bytes that a token of every row has to move, by what they are."""
    copy_rate: float | None = None
    """Bytes a second that a copy reads and writes together, on this device in this run."""
    bound: float | None = None
    """Seconds that the bytes take at that rate."""
    share: float | None = None
    """Of the bound in what was measured: 1 is as fast as can be."""
    tflops: float | None = None
    """Reading: 10**12 multiplications and additions of the model a second."""
    in_use: int | None = None
    """On the device behind the last turn, as it says."""
    peak: int | None = None
    """The most of the process so far, as the device says."""
    why: str = ""
    """Why nothing was measured."""

    @property
    def key(self) -> Key:
        """Of the cell."""
        return Key(self.config, self.phase, self.context, 0 if self.fills else self.batch)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    phase: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    """0: as many rows as the device holds."""
    n_new: int = 64
    """Tokens of a turn of decoding."""
    rounds: int = 5
    memory: int | None = None
    """Bytes that may be used; None: what the device says."""
    most_seconds: float = 120.0
    """Of a turn: what would take longer, by what shorter contexts took, is left out."""

    def __post_init__(self):
        require(self.phase in PHASES, f"phase ({self.phase!r}) not one of {', '.join(PHASES)}")
        for name, values, least in (
            ("context", self.contexts, 2), ("batch", self.batches, 0), ("tokens", (self.n_new,), 1),
            ("rounds", (self.rounds,), 1),
        ):  # fmt: skip
            for value in values:
                require(least <= value <= WHOLE, f"{name} ({value}) must be between {least} and {WHOLE}")
        shortest = min(self.contexts)
        require(
            self.phase != DECODE or self.n_new < shortest,
            f"tokens ({self.n_new}) must be less than context ({shortest}): they are the last of the row",
        )

    @property
    def limit(self) -> int | None:
        """Bytes that may be used."""
        return platform.memory() if self.memory is None else self.memory


def measure(
    subjects: Sequence[Subject], plan: Plan, known: Sequence[Row] = (), say: Callable[[str], None] = lambda line: None
) -> Iterator[Row]:
    """Rows as they are known, those of a context and batch together. known: rows of before, which are not measured
    again. say: is told what is measured now."""
    done = {row.key: row for row in known}
    rate = copy_rate(plan.limit)
    for context in sorted(plan.contexts):
        for batch in plan.batches:
            todo = [s for s in subjects if Key(s.name, plan.phase, context, batch) not in done]
            cells = [_cell(subject, plan, context, batch, rate, done) for subject in todo]
            say(f"{plan.phase}, context {context:,}, {_rows(batch)}: {', '.join(s.name for s in todo) or 'known'}")
            for row in _measured(todo, cells, plan):
                done[row.key] = row
                yield row


def _rows(batch: int) -> str:
    return f"{batch:,} row{'' if batch == 1 else 's'}" if batch else "as many rows as fit"


def _cell(subject: Subject, plan: Plan, context: int, batch: int, rate: float, done: dict[Key, Row]) -> Row:
    """A row with what is counted; it says why where nothing can be measured."""
    limit, weights = plan.limit, subject.weights()
    rows = batch or _fitting(subject, context, limit)
    why = ""
    if not rows:
        rows, why = 1, _too_large(subject, context, 1, limit)
    elif limit is not None and _needed(subject, context, rows) > SPARE * limit:
        why = _too_large(subject, context, rows, limit)
    why = why or _too_long(subject, plan, context, batch, rows, done)
    n_bytes, types = subject.cache(rows, context)
    moved = subject.moved(rows, context) if plan.phase == DECODE else None
    bound = None if moved is None else moved.all / rate
    return Row(
        subject.name, subject.kind, plan.phase, context, rows, not batch, subject.compute,
        subject.filled if plan.phase == DECODE else "read", types, weights=weights, cache=n_bytes,
        moved=None if moved is None else moved._asdict(), copy_rate=rate, bound=bound, why=why,
    )  # fmt: skip


def _needed(subject: Subject, context: int, batch: int) -> int:
    return subject.weights() + subject.cache(batch, context)[0] + subject.beside(batch)


def _fitting(subject: Subject, context: int, limit: int | None) -> int:
    """The most rows that memory holds, of more than 16 a multiple of 8."""
    require(limit is not None, "fill: the device does not say how much memory it has: say so (--memory)")
    left = SPARE * (limit or 0) - subject.weights()
    rows = int(left // (subject.cache(2, context)[0] - subject.cache(1, context)[0] + subject.beside(1)))
    return max(0, rows if rows <= 16 else rows // 8 * 8)


def _too_large(subject: Subject, context: int, batch: int, limit: int | None) -> str:
    needs, have = _needed(subject, context, batch) / 2**30, (limit or 0) / 2**30
    return f"does not fit: needs {needs:,.1f} GiB, {have:,.1f} are there"


def _too_long(
    subject: Subject, plan: Plan, context: int, batch: int, rows: int, done: dict[Key, Row]
) -> str:  # fmt: skip
    """Reading grows faster than the context: told from the longest that was read, by FLOPs."""
    before = [
        row for key, row in done.items()
        if (key.config, key.phase, key.batch) == (subject.name, plan.phase, batch) and row.seconds is not None
    ]  # fmt: skip
    last = max(before, key=lambda row: row.context, default=None)
    if plan.phase == DECODE or last is None or last.seconds is None:
        return ""
    now, then = subject.flops(context), subject.flops(last.context)
    if now is None or not then:
        return ""
    seconds = last.seconds * now * rows / (then * last.batch)
    return "" if seconds <= plan.most_seconds else f"not measured: would take about {seconds:,.0f} s"


def _measured(subjects: Sequence[Subject], cells: Sequence[Row], plan: Plan) -> Iterator[Row]:
    """The cells of one context and batch."""
    turns: list[list[float]] = [[] for _ in cells]
    state = list(cells)
    places = [i for i, cell in enumerate(cells) if not cell.why]
    together = _together([subjects[i] for i in places], [cells[i] for i in places], plan.limit)
    with ExitStack() as stack:
        opened: dict[int, Open] = {}
        for n_round in range(plan.rounds + 1):
            for i in places:
                if state[i].why:
                    continue
                with ExitStack() as alone:
                    state[i], seconds = _turn(
                        subjects[i], state[i], plan, n_round == 0, opened, stack if together else alone, i
                    )
                    if n_round and not state[i].why:
                        turns[i].append(seconds)
                if not together:
                    opened.pop(i, None)
    for i, row in enumerate(state):
        yield _summed(subjects[i], row, turns[i], plan)


def _turn(
    subject: Subject, row: Row, plan: Plan, warm: bool, opened: dict[int, Open], stack: ExitStack, i: int
) -> tuple[Row, float]:
    """The row, which says why where memory did not suffice, and the seconds. A batch that was to fill the device and
    does not fit is made smaller, in the first round."""
    shrinks = SHRINKS if warm and row.fills else 0
    while True:
        try:
            if i not in opened:
                opened[i] = stack.enter_context(subject.opened())
            if plan.phase == DECODE:
                seconds = opened[i].decode(row.batch, row.context, plan.n_new, warm)
            else:
                seconds = opened[i].prefill(row.batch, row.context, warm)
        except (jax.errors.JaxRuntimeError, RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not any(word in str(error) for word in OUT):
                raise
            if shrinks and row.batch > 1:
                shrinks -= 1
                row = _resized(subject, row, row.batch - max(1, row.batch // 8))
                continue
            return replace(row, why="does not fit: memory ran out"), 0.0
        used = platform.memory_in_use()
        return (row if used is None else replace(row, in_use=used.now, peak=used.peak)), seconds


def _resized(subject: Subject, row: Row, batch: int) -> Row:
    """The same with another batch."""
    moved = None if row.moved is None else subject.moved(batch, row.context)
    bound = None if moved is None or not row.copy_rate else moved.all / row.copy_rate
    return replace(
        row, batch=batch, cache=subject.cache(batch, row.context)[0], bound=bound,
        moved=None if moved is None else moved._asdict(),
    )  # fmt: skip


def _together(subjects: Sequence[Subject], cells: Sequence[Row], limit: int | None) -> bool:
    """Whether all of these models can lie on the device beside the largest of their caches."""
    if limit is None or len(subjects) < 2:
        return True
    rest = max(cell.cache + subject.beside(cell.batch) for subject, cell in zip(subjects, cells, strict=True))
    return sum(cell.weights for cell in cells) + rest <= SPARE * limit


def _summed(subject: Subject, row: Row, seconds: Sequence[float], plan: Plan) -> Row:
    """The row with its figures."""
    if row.why or not seconds:
        return row
    n = row.batch * (plan.n_new if plan.phase == DECODE else row.context - 1)
    steps = plan.n_new if plan.phase == DECODE else 1
    middle = statistics.median(seconds)
    flops = subject.flops(row.context) if plan.phase != DECODE else None
    return replace(
        row, rounds=len(seconds), tokens_per_second=n / middle, low=n / max(seconds), high=n / min(seconds),
        seconds=middle / steps, share=None if row.bound is None else row.bound * steps / middle,
        tflops=None if flops is None else row.batch * flops / middle / 1e12,
    )  # fmt: skip


def copy_rate(limit: int | None = None) -> float:
    """Bytes a second that a copy of a large array reads and writes together: the best of several. limit: bytes that
    may be used."""
    n_bytes = COPIED if limit is None else min(COPIED, limit // 16)
    copy = jax.jit(lambda a: a + jnp.uint32(1))
    array = jax.block_until_ready(copy(jnp.zeros((max(1, n_bytes // 4),), jnp.uint32)))
    best, calls = 0.0, 10
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(calls):
            out = copy(array)
        jax.block_until_ready(out)
        best = max(best, 2 * array.nbytes * calls / (time.perf_counter() - began))
    return best


def as_dict(row: Row) -> dict[str, Any]:
    """For JSON."""
    return asdict(row)
