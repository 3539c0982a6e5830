# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `titans` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.ops.titans.memory import Sizes


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `layout` is a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    heads: int
    width: int  # P
    hidden: int  # F
    store: int = 1
    refresh: int | None = None
    momentum: bool = True
    layout: str = "dense"
    initial: bool = True
    final: bool = True
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 2, 8, 8),
    Case("chunks", 2, 22, 2, 8, 8, store=4, initial=False),
    Case("refreshed", 1, 30, 2, 8, 8, store=3, refresh=6, initial=False),
    Case("no_momentum", 1, 20, 2, 8, 8, store=4, refresh=4, momentum=False, initial=False, final=False),
    Case("packed", 2, 40, 1, 8, 8, store=4, layout="packed"),
    Case("scattered", 2, 40, 1, 8, 8, store=2, refresh=4, layout="scattered"),
)

# The rows that are timed.
BENCH_CASES = (
    Case("b8_t2048_h16", 8, 2048, 16, 64, 128, store=64, refresh=512, initial=False, final=False),
    Case("tiny", 2, 64, 2, 16, 32, store=8, initial=False),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
# Each token stores, so that each has a part in its own output, by all of its gates.
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 2, 8, 16, refresh=2))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name; q, k, v have `dtype`, the rest float32. The state is one between two chunks.

    Rates are small and much is forgotten: what a memory learns from what it has learnt grows, rounding too.
    """
    rng = np.random.default_rng(case.seed)
    shape, heads = (case.batch, case.tokens, case.heads), (case.heads, case.width)
    sizes = Sizes(case.width, case.hidden)
    state = np.zeros((case.batch, case.heads, sizes.state), np.float32)
    n = sizes.memory
    state[..., :n] = state[..., n : 2 * n] = 0.1 * rng.standard_normal((case.batch, case.heads, n))
    state[..., 2 * n : 3 * n] = 0.01 * rng.standard_normal((case.batch, case.heads, n))
    normal = lambda *shape: np.asarray(rng.standard_normal(shape, np.float32))
    return {
        **{name: normal(*shape, case.width).astype(jnp.dtype(dtype)) for name in ("q", "k", "v")},
        "rate": rng.uniform(2.5e-4, 2.5e-3, shape).astype(np.float32),
        "eta": normal(*shape) if case.momentum else None,
        "alpha": normal(*shape),
        "g": 0.1 * normal(*heads),
        "W1": normal(*heads, case.hidden) / np.sqrt(case.width).astype(np.float32),
        "W2": normal(case.heads, case.hidden, case.width) / np.sqrt(case.hidden).astype(np.float32),
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": state if case.initial else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"store_every": case.store, "refresh_every": case.refresh, "return_final_state": case.final}


def count_flops(case: Case) -> float:
    """Multiplications and additions: one forward and backward pass of the memory to store, one forward to read."""
    return 4 * 4 * case.batch * case.tokens * case.heads * case.width * case.hidden
