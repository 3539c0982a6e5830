# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `long_conv` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `layout` is a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    width: int  # D
    lags: int | None = None  # None: as many as tokens
    skip: bool = True
    layout: str = "dense"
    initial: bool = False  # there is no state
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 6),
    Case("dense", 2, 100, 6),
    Case("few_lags", 2, 50, 6, 7, layout="packed"),
    Case("many_lags", 1, 30, 5, 50, skip=False, layout="packed"),
    Case("packed", 2, 100, 6, layout="packed"),
    Case("edges", 2, 64, 6, layout="edges"),
    Case("scattered", 2, 70, 6, layout="scattered"),
    Case("empty", 2, 40, 6, layout="empty"),
)

# The rows that are timed: the width of HyenaDNA.
BENCH_CASES = (
    Case("b8_t2048_d256", 8, 2048, 256),
    Case("b1_t131072_d256", 1, 131072, 256),
    Case("tiny", 2, 512, 64, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (x, h, skip, segment_ids); x has `dtype`, the rest float32. Filters fade, as Hyena's do."""
    rng = np.random.default_rng(case.seed)
    n_lags = case.lags or case.tokens
    h = rng.standard_normal((n_lags, case.width), np.float32) * np.exp(-np.arange(n_lags) / n_lags)[:, None]
    return {
        "x": rng.standard_normal((case.batch, case.tokens, case.width), np.float32).astype(jnp.dtype(dtype)),
        "h": h.astype(np.float32),
        "skip": rng.standard_normal(case.width, np.float32) if case.skip else None,
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
    }


def make_settings(case: Case) -> dict:
    """The other arguments: none."""
    return {}


def count_flops(case: Case) -> float:
    """Of three transforms of twice the length, 2.5 n log2 n each, and the product between them."""
    size = 2 * case.tokens
    return case.batch * case.width * (2 * 2.5 * size * math.log2(size) + 3 * size) if case.tokens > 1 else 0.0
