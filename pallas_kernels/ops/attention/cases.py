# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `attention` and makers of their inputs, shared by tests and benchmarks. Inputs are NumPy arrays."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention; `layout` is a name of pallas_kernels.layouts (queries and keys alike)."""

    name: str
    batch: int
    queries: int  # T
    keys: int  # S
    heads: int
    kv_heads: int
    width: int  # P
    v_width: int | None = None
    layout: str = "dense"
    gate: str | None = "elementwise"  # None, "elementwise" or "head"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    positions: bool = False  # given, counted within each document
    q_offset: int = 0
    seed: int = 0


TEST_CASES = (
    Case("one_token", 2, 1, 1, 4, 2, 8),
    Case("dense", 2, 40, 40, 4, 2, 8),
    Case("full", 2, 33, 33, 4, 4, 8, gate="head", causal=False),
    Case("mqa_wide_v", 1, 50, 50, 4, 1, 8, v_width=12, gate="head"),
    Case("window", 2, 70, 70, 4, 2, 8, window=5),
    Case("window_one", 1, 20, 20, 2, 2, 8, window=1, gate=None),
    Case("window_both_sides", 1, 40, 40, 2, 1, 8, causal=False, window=4, gate=None),
    Case("softcap_sinks", 2, 40, 40, 4, 2, 8, softcap=2.0, sinks=True),
    Case("packed", 2, 60, 60, 4, 2, 8, layout="packed", sinks=True),
    Case("packed_window", 2, 60, 60, 4, 2, 8, layout="packed", window=6, positions=True),
    Case("edges", 2, 64, 64, 2, 2, 8, layout="edges", causal=False),
    Case("singles", 2, 40, 40, 2, 1, 8, layout="singles"),
    Case("right", 2, 40, 40, 2, 1, 8, layout="right", sinks=True),
    Case("left", 2, 40, 40, 2, 1, 8, layout="left"),
    Case("interior", 2, 40, 40, 2, 1, 8, layout="interior", softcap=3.0),
    Case("scattered", 2, 40, 40, 2, 1, 8, layout="scattered", causal=False),
    Case("empty", 2, 40, 40, 2, 1, 8, layout="empty", sinks=True),
    Case("positions", 2, 40, 40, 4, 2, 8, layout="packed", positions=True),
    Case("cache", 2, 7, 50, 4, 2, 8, q_offset=43),
    Case("cache_one", 2, 1, 50, 4, 2, 8, q_offset=20, window=9),
    Case("before_all_keys", 2, 20, 30, 2, 1, 8, q_offset=-8),
    Case("behind_the_window", 1, 20, 30, 2, 1, 8, q_offset=25, window=8, sinks=True),
)

# Widths that kernels serve in other ways, and more tokens than a block.
WIDTH_CASES = (
    Case("width_64", 2, 1000, 1000, 4, 2, 64),
    Case("width_64_window", 1, 900, 900, 4, 2, 64, window=200, softcap=20.0),
    Case("width_96", 1, 500, 500, 4, 2, 96),
    Case("width_128", 2, 700, 700, 4, 2, 128),
    Case("width_128_packed", 2, 1000, 1000, 4, 1, 128, layout="packed", sinks=True, gate="head"),
    Case("width_128_full", 1, 512, 640, 4, 2, 128, causal=False),
    Case("width_192", 1, 500, 500, 2, 1, 192, layout="packed"),
    Case("width_256", 2, 600, 600, 4, 2, 256),
)

BENCH_CASES = (
    Case("b4_t4096", 4, 4096, 4096, 16, 4, 128),
    Case("b4_t4096_ungated", 4, 4096, 4096, 16, 4, 128, gate=None),
    Case("b1_t16384", 1, 16384, 16384, 16, 4, 128),
    Case("b4_t4096_p64", 4, 4096, 4096, 32, 8, 64),
    Case("b1_t16384_packed", 1, 16384, 16384, 16, 4, 128, layout="packed"),
    Case("b1_t16384_window", 1, 16384, 16384, 16, 4, 128, window=2048),
    Case("decode_s131072", 8, 1, 131072, 32, 8, 128, q_offset=131071),
    Case("tiny", 8, 256, 256, 4, 2, 32, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *WIDTH_CASES, *BENCH_CASES)}

_SMALL = Case("small", 2, 24, 24, 4, 2, 8, sinks=True)
CONTRACT = {
    "reference": _SMALL,
    "xla": _SMALL,
    "tpu": Case("tpu", 2, 140, 140, 2, 1, 64, sinks=True),
    "gpu": Case("gpu", 2, 140, 140, 2, 1, 64, sinks=True),
}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Array arguments of attention by name (q, k, v, gate, sinks, segment_ids, positions); activations have `dtype`."""
    rng = np.random.default_rng(case.seed)
    dtype = jnp.dtype(dtype)
    v_width = case.v_width or case.width
    gate_shape = (case.batch, case.queries, case.heads, v_width)[: 3 if case.gate == "head" else 4]
    segment_ids = make_segment_ids(case.layout, case.batch, case.queries, seed=case.seed)
    positions = None
    if case.positions:
        positions = np.zeros((case.batch, case.queries), np.int32)
        for row, ids in zip(positions, np.ones_like(positions) if segment_ids is None else segment_ids):
            for t in range(1, case.queries):
                row[t] = row[t - 1] + 1 if ids[t] == ids[t - 1] else 0

    def draw(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    return {
        "q": draw(case.batch, case.queries, case.heads, case.width),
        "k": draw(case.batch, case.keys, case.kv_heads, case.width),
        "v": draw(case.batch, case.keys, case.kv_heads, v_width),
        "gate": None if case.gate is None else draw(*gate_shape),
        "sinks": rng.standard_normal(case.heads, np.float32) if case.sinks else None,
        "segment_ids": segment_ids,
        "positions": positions,
    }


def make_settings(case: Case) -> dict:
    """The other arguments of attention."""
    return {name: getattr(case, name) for name in ("causal", "window", "softcap", "q_offset")}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass: those of visible pairs."""
    return 2 * case.heads * (case.width + (case.v_width or case.width)) * visible_pairs(case)


def visible_pairs(case: Case) -> int:
    """Pairs of query and visible key of a case, over the batch; documents taken as runs of one id."""
    ids = make_segment_ids(case.layout, case.batch, case.queries, seed=case.seed)
    index = np.arange(case.queries)
    if ids is None:
        seen = np.minimum(index + case.q_offset + 1, case.keys) if case.causal else np.full(case.queries, case.keys)
        seen = np.maximum(seen if case.window is None else np.minimum(seen, case.window), 0)
        return case.batch * int(seen.sum())
    total = 0
    for row in ids:
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        for start, end in zip(starts, [*starts[1:], case.queries]):
            if row[start]:
                seen = np.arange(1, end - start + 1) if case.causal else np.full(end - start, end - start)
                total += int((seen if case.window is None else np.minimum(seen, case.window)).sum())
    return total
