# SPDX-License-Identifier: Apache-2.0
"""What publications say of the speed of hybrids and recurrent models, beside what rows of a benchmark say."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hybridlm.infer.bench import Row
from hybridlm.infer.bench_models import DECODE
from hybridlm.infer.bound import HYBRID, RECURRENT, TRANSFORMER


class Claim(NamedTuple):
    """Tokens a second of one kind of model over those of another."""

    says: str
    source: str
    factor: float
    of: str
    """Kind of model that is faster, see `bound.kind_of`."""
    over: str = TRANSFORMER
    context: int | None = None
    """That it is said of; None: it names none, or several."""


CLAIMS = (
    Claim("Nemotron-H: up to 3 times", "Blakeman et al. 2025, arXiv:2504.03624", 3, HYBRID, context=65_536),
    Claim("NVIDIA's study: up to 8 times, predicted", "Waleffe et al. 2024, arXiv:2406.07887", 8, HYBRID),
    Claim("Mamba: 5 times", "Gu and Dao 2023, arXiv:2312.00752", 5, RECURRENT),
    Claim("15 times at 128 k", "often said of hybrids; no publication was found that measures it", 15, HYBRID,
          context=131_072),
)  # fmt: skip


class Ratio(NamedTuple):
    """Of two rows of one context."""

    times: float
    fast: Row
    slow: Row


def ratios(rows: Iterable[Row], of: str, over: str, context: int | None = None) -> list[Ratio]:
    """Tokens a second of rows of one kind over those of another, of one context and of equal batches, or where each
    fills the device; the largest first. context: of these alone."""
    timed = [row for row in rows if row.tokens_per_second and row.phase == DECODE]
    found = [
        Ratio((fast.tokens_per_second or 0) / (slow.tokens_per_second or 1), fast, slow)
        for fast in timed for slow in timed
        if (fast.kind, slow.kind) == (of, over) and fast.key[1:] == slow.key[1:] and context in (None, fast.context)
    ]  # fmt: skip
    return sorted(found, key=lambda ratio: -ratio.times)


def beside(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(claim, its source, what was measured) of each claim."""
    table = []
    for claim in CLAIMS:
        found = ratios(rows, claim.of, claim.over, claim.context)
        table.append((claim.says, claim.source, _said(found[0]) if found else _nothing(claim)))
    return table


def _said(ratio: Ratio) -> str:
    fast, slow = ratio.fast, ratio.slow
    rows = f"{fast.batch:,} and {slow.batch:,} rows, as many as fit" if fast.fills else f"batch {fast.batch:,}"
    return f"{ratio.times:.2f} times: {fast.config} over {slow.config}, context {fast.context:,}, {rows}"


def _nothing(claim: Claim) -> str:
    at = "" if claim.context is None else f" at {claim.context:,} tokens"
    return f"not measured: needs a {claim.of} and a {claim.over}{at}"
