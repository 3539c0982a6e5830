# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `linear_scan` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_log_decays, make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `decay` and `layout` are names of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    width: int  # D
    decay: str = "typical"
    layout: str = "dense"
    initial: bool = True
    final: bool = True
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 6),
    Case("mixed", 2, 100, 6, decay="mixed"),
    Case("strong", 1, 50, 5, decay="strong", initial=False, final=False),
    Case("packed", 2, 100, 6, decay="weak", layout="packed"),
    Case("scattered", 2, 70, 6, decay="mixed", layout="scattered"),
    Case("empty", 2, 40, 6, layout="empty"),
)

# The rows that are timed: the width of RecurrentGemma 2B.
BENCH_CASES = (
    Case("b8_t2048_d2560", 8, 2048, 2560, initial=False, final=False),
    Case("tiny", 2, 256, 128, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (x, g, segment_ids, initial_state); x has `dtype`, the rest float32."""
    rng = np.random.default_rng(case.seed)
    shape = (case.batch, case.tokens, case.width)
    return {
        "x": rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)),
        "g": make_log_decays(case.decay, shape, rng),
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": rng.standard_normal((case.batch, case.width), np.float32) if case.initial else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"return_final_state": case.final}


def count_flops(case: Case) -> float:
    """A product and a sum for each number."""
    return 2 * case.batch * case.tokens * case.width
