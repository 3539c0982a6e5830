# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `rwkv7` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

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
    heads: int
    width: int  # P
    key: int  # N
    decay: str = "typical"
    layout: str = "dense"
    initial: bool = True
    final: bool = True
    chunk: int | None = 16
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 8, 8),
    Case("mixed", 2, 40, 2, 16, 8, decay="mixed"),
    Case("strong", 1, 50, 2, 8, 16, decay="strong", initial=False, final=False),
    Case("packed", 2, 50, 2, 8, 8, decay="weak", layout="packed"),
    Case("scattered", 2, 50, 2, 8, 8, decay="mixed", layout="scattered"),
)

# The rows that are timed: RWKV-7 has heads of 64.
BENCH_CASES = (
    Case("b8_t2048_h32", 8, 2048, 32, 64, 64, initial=False, final=False, chunk=None),
    Case("tiny", 2, 128, 4, 32, 32, layout="packed", chunk=None),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 2, 4, 8, chunk=8))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (r, g, k, v, a, b, segment_ids, initial_state); g and the state are float32.

    As in RWKV-7: a is minus a key of unit length, b that key times a learning rate up to 1, channel by channel.
    """
    rng = np.random.default_rng(case.seed)
    shape = (case.batch, case.tokens, case.heads, case.key)
    r, k, key = (rng.standard_normal(shape, np.float32) for _ in range(3))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    rate = rng.uniform(0.0, 1.0, shape)
    state_shape = (case.batch, case.heads, case.key, case.width)
    arrays = {
        "r": r / np.sqrt(case.key),
        "k": k,
        "v": rng.standard_normal((*shape[:3], case.width), np.float32),
        "a": -key,
        "b": key * rate,
    }
    return {
        **{name: array.astype(np.float32).astype(jnp.dtype(dtype)) for name, array in arrays.items()},
        "g": make_log_decays(case.decay, shape, rng),
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": rng.standard_normal(state_shape, np.float32) if case.initial else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"return_final_state": case.final, "chunk": case.chunk}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass in chunks of 64 tokens."""
    chunk = min(64, case.tokens)
    a_token = chunk * (4 * case.key + 3 * case.width) + chunk * (case.key + case.width) + 8 * case.key * case.width
    return case.batch * case.tokens * case.heads * a_token
