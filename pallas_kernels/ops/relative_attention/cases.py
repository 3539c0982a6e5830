# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `relative_attention` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `layout` is a name of pallas_kernels.layouts (queries and keys alike)."""

    name: str
    batch: int
    tokens: int  # T, and S
    heads: int
    kv_heads: int
    width: int  # P
    extent: int  # E
    profiles: int = 3  # R
    v_width: int | None = None
    window: int | None = None
    layout: str = "dense"
    positions: bool = False  # given, counted within each document
    initial: bool = False  # there is no state
    seed: int = 0


# Small shapes: every property of the contract at least once, more tokens than a block among them.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 2, 8, 5),
    Case("dense", 2, 40, 4, 2, 8, 5),
    Case("far", 2, 40, 4, 4, 8, 64),
    Case("own_alone", 2, 20, 2, 1, 8, 1),
    Case("wide_v", 1, 50, 4, 1, 8, 7, v_width=12),
    Case("window", 2, 70, 4, 2, 8, 6, window=6),
    Case("blocks", 1, 300, 2, 1, 8, 20),
    Case("blocks_window", 1, 300, 2, 2, 8, 9, window=20),
    Case("blocks_window_far", 1, 300, 2, 1, 8, 40, window=20, layout="packed"),
    Case("packed", 2, 60, 4, 2, 8, 9, layout="packed"),
    Case("positions", 2, 60, 4, 2, 8, 9, layout="packed", positions=True),
    Case("scattered", 2, 40, 2, 1, 8, 9, window=4, layout="scattered"),
    Case("empty", 2, 40, 2, 1, 8, 9, layout="empty"),
)

# The rows that are timed: Inkling's heads.
BENCH_CASES = (
    Case("b1_t4096", 1, 4096, 64, 8, 128, 1024, 16),
    Case("b1_t4096_window", 1, 4096, 64, 16, 128, 512, 16, window=512),
    Case("tiny", 2, 256, 4, 2, 32, 64, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4, 2, 8, 5))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (q, k, v, r, profiles, segment_ids, positions); all but profiles have `dtype`."""
    rng = np.random.default_rng(case.seed)
    segment_ids = make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed)
    draw = lambda *shape: rng.standard_normal((case.batch, case.tokens, *shape), np.float32).astype(jnp.dtype(dtype))
    return {
        "q": draw(case.heads, case.width),
        "k": draw(case.kv_heads, case.width),
        "v": draw(case.kv_heads, case.v_width or case.width),
        "r": draw(case.heads, case.profiles),
        "profiles": rng.standard_normal((case.profiles, case.extent), np.float32),
        "segment_ids": segment_ids,
        "positions": _within(segment_ids) if case.positions and segment_ids is not None else None,
    }


def _within(segment_ids: np.ndarray) -> np.ndarray:
    """Positions within documents."""
    positions = np.zeros_like(segment_ids)
    for row, ids in zip(positions, segment_ids, strict=True):
        for t in range(1, len(row)):
            row[t] = row[t - 1] + 1 if ids[t] == ids[t - 1] else 0
    return positions


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"window": case.window}


def count_flops(case: Case) -> float:
    """Of the scores and sums of visible pairs, one document a row, and of the terms of all distances."""
    seen = np.minimum(np.arange(1, case.tokens + 1), case.window or case.tokens).sum()
    pairs = 2.0 * case.heads * (case.width + (case.v_width or case.width)) * seen
    return case.batch * (pairs + 2.0 * case.tokens * case.heads * case.profiles * case.extent)
