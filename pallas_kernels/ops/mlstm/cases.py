# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `mlstm` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `spread` is that of the gates before their functions, `layout` a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    heads: int
    width: int  # P
    groups: int
    key: int  # N
    spread: float = 1.0
    layout: str = "dense"
    initial: bool = True
    final: bool = True
    chunk: int | None = 16
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 8, 2, 8),
    Case("no_state", 1, 33, 2, 8, 2, 8, initial=False, final=False),
    Case("groups", 2, 40, 4, 8, 2, 16),
    Case("large_gates", 2, 50, 2, 8, 2, 8, spread=2.5),
    Case("packed", 2, 50, 2, 8, 2, 8, layout="packed"),
    Case("scattered", 2, 50, 2, 8, 1, 8, spread=3.0, layout="scattered"),
)

# The rows that are timed: heads of xLSTM 7B, half as wide keys as values.
BENCH_CASES = (
    Case("b8_t2048_h8", 8, 2048, 8, 512, 8, 256, initial=False, final=False, chunk=None),
    Case("tiny", 2, 128, 4, 32, 4, 32, layout="packed", chunk=None),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4, 4, 2, 8, chunk=8))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name; q, k, v have `dtype`, the rest float32.

    Queries and keys have a common part, so that no divisor comes near its lower bound of exp(-m).
    """
    rng = np.random.default_rng(case.seed)
    by_head = (case.batch, case.tokens, case.heads)
    q, k = (1 + rng.standard_normal((*by_head[:2], case.groups, case.key), np.float32) for _ in range(2))
    v = rng.standard_normal((*by_head, case.width), np.float32)
    shape = (case.batch, case.heads, case.key, case.width)
    states = {
        "initial_c": rng.standard_normal(shape, np.float32),
        "initial_n": 1 + rng.uniform(0, 1, shape[:3]).astype(np.float32),
        "initial_m": rng.standard_normal(shape[:2], np.float32),
    }
    return {
        "q": q.astype(jnp.dtype(dtype)),
        "k": k.astype(jnp.dtype(dtype)),
        "v": v.astype(jnp.dtype(dtype)),
        "i": case.spread * rng.standard_normal(by_head, np.float32),
        "f": 2 + case.spread * rng.standard_normal(by_head, np.float32),
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        **{name: state if case.initial else None for name, state in states.items()},
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"return_final_state": case.final, "chunk": case.chunk}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass in chunks of 64 tokens."""
    a_token = min(64, case.tokens) * (case.key + case.width) + 4 * case.key * (case.width + 1)
    return case.batch * case.tokens * case.heads * a_token
