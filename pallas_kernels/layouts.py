# SPDX-License-Identifier: Apache-2.0
"""Named segment layouts, shared by the cases of all ops. NumPy only; every maker returns int32 [batch, tokens]."""

import numpy as np

LAYOUTS = (
    "dense",
    "one",
    "packed",
    "edges",
    "singles",
    "right",
    "left",
    "interior",
    "scattered",
    "empty",
)


def make_segment_ids(layout: str, batch: int, tokens: int, *, seed: int = 0, edge: int = 16) -> np.ndarray | None:
    """Segment ids of a named layout.

    dense: None. one: all ones. packed: documents of random lengths. edges: documents that end on multiples of `edge`.
    singles: runs of one-token documents between longer ones. right, left: padding on that side of packed rows.
    interior: padding inside documents. scattered: padding anywhere, ids that repeat later in the row. empty: row 0 is
    all padding, the others are packed. Raises ValueError for an unknown name.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout ({layout!r}) not one of {', '.join(LAYOUTS)}")
    if layout == "dense":
        return None
    rng = np.random.default_rng(seed)
    ids = np.ones((batch, tokens), np.int32)
    if layout == "one":
        return ids
    for row in ids:
        row[:] = _packed_row(layout, tokens, rng, edge)
    if layout == "right":
        for row in ids:
            row[tokens - rng.integers(0, tokens) :] = 0
    elif layout == "left":
        for row in ids:
            row[: rng.integers(0, tokens)] = 0
    elif layout == "interior":
        for row in ids:
            start = rng.integers(0, tokens)
            row[start : start + rng.integers(1, max(2, tokens // 3))] = 0
    elif layout == "scattered":
        ids = np.where(rng.random(ids.shape) < 0.3, 0, (ids - 1) % 2 + 1).astype(np.int32)
    elif layout == "empty":
        ids[0] = 0
    return ids


def _packed_row(layout: str, tokens: int, rng: np.random.Generator, edge: int) -> np.ndarray:
    if layout == "edges":
        starts = np.arange(0, tokens, edge)
    elif layout == "singles":
        starts = np.flatnonzero(rng.random(tokens) < 0.5)
    else:
        starts = np.unique(rng.integers(0, tokens, size=max(1, min(8, tokens // 4))))
    is_start = np.zeros(tokens, np.int32)
    is_start[starts] = 1
    is_start[0] = 1
    return np.cumsum(is_start).astype(np.int32)


DECAYS = ("typical", "weak", "strong", "mixed")


def make_log_decays(decay: str, shape: tuple, rng: np.random.Generator) -> np.ndarray:
    """Log decays, float32 <= 0, drawn log-uniformly. Raises ValueError for an unknown name.

    weak keeps almost everything, strong forgets almost everything each token, mixed is all between.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay ({decay!r}) not one of {', '.join(DECAYS)}")
    low, high = {"weak": (1e-6, 1e-3), "strong": (5.0, 60.0), "mixed": (1e-6, 80.0)}.get(decay, (1e-3, 1.0))
    return -np.exp(rng.uniform(np.log(low), np.log(high), shape)).astype(np.float32)
