# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `rwkv4` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_log_decays, make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `spread` is that of the keys; `decay` and `layout` are names of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    width: int  # D
    spread: float = 1.0
    decay: str = "typical"
    layout: str = "dense"
    initial: bool = True
    final: bool = True
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 6),
    Case("no_state", 1, 33, 5, initial=False, final=False),
    Case("large_keys", 2, 100, 6, spread=30.0, decay="mixed"),
    Case("slabs", 1, 1100, 3, decay="weak"),
    Case("packed", 2, 100, 6, decay="weak", layout="packed"),
    Case("scattered", 2, 70, 6, spread=5.0, decay="mixed", layout="scattered"),
)

# The rows that are timed: the width of RWKV-4 1.5B.
BENCH_CASES = (
    Case("b8_t1024_d2048", 8, 1024, 2048, initial=False, final=False),
    Case("tiny", 2, 256, 128, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name; k and v have `dtype`, the rest float32."""
    rng = np.random.default_rng(case.seed)
    shape, state = (case.batch, case.tokens, case.width), (case.batch, case.width)
    states = {
        "initial_a": rng.standard_normal(state, np.float32),
        "initial_b": rng.uniform(0.5, 2, state).astype(np.float32),
        "initial_m": rng.standard_normal(state, np.float32),
    }
    return {
        "k": (case.spread * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype)),
        "v": rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)),
        "g": make_log_decays(case.decay, (case.width,), rng),
        "bonus": rng.standard_normal(case.width, np.float32),
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        **{name: array if case.initial else None for name, array in states.items()},
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"return_final_state": case.final}


def count_flops(case: Case) -> float:
    """Two recurrences and a quotient of each number, exponentials not counted."""
    return 10 * case.batch * case.tokens * case.width
