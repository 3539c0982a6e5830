# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `gated_delta_product` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_log_decays, make_segment_ids

GATES = (None, "head", "channel")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `gate` says what g is of, `decay` and `layout` are names of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    heads: int
    width: int  # P
    groups: int
    key: int  # N
    updates: int
    gate: str | None = "channel"
    decay: str = "typical"
    layout: str = "dense"
    normalize: bool = True
    initial: bool = True
    final: bool = True
    chunk: int | None = 16
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 8, 2, 8, 2),
    Case("no_gate", 1, 33, 2, 8, 1, 8, 2, gate=None, initial=False, final=False),
    Case("head", 2, 40, 4, 8, 2, 16, 2, gate="head", decay="mixed"),
    Case("channel", 2, 40, 4, 16, 2, 8, 2, decay="mixed"),
    Case("strong", 1, 50, 2, 8, 2, 8, 2, decay="strong"),
    Case("head_packed", 2, 50, 2, 8, 2, 8, 2, gate="head", decay="weak", layout="packed"),
    Case("scattered", 2, 50, 2, 8, 1, 8, 2, decay="mixed", layout="scattered"),
    Case("unit_keys", 2, 40, 2, 8, 2, 8, 2, gate="head", normalize=False),
)

# The rows that are timed.
BENCH_CASES = (
    Case("b8_t2048_h16", 8, 2048, 16, 128, 16, 128, 2, gate="head", initial=False, final=False, chunk=None),
    Case("b8_t2048_h16_channel", 8, 2048, 16, 128, 16, 128, 2, initial=False, final=False, chunk=None),
    Case("tiny", 2, 128, 4, 32, 2, 32, 2, gate="head", layout="packed", chunk=None),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4, 4, 2, 8, 2, chunk=8)) | {
    "gpu": Case("gpu", 2, 36, 2, 64, 1, 64, 2, gate="head", chunk=None),
}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (q, k, v, beta, g, segment_ids, initial_state); q, k, v have `dtype`, the rest float32.

    Keys are of about unit length, beta goes up to 2.
    """
    rng = np.random.default_rng(case.seed)
    by_head = (case.batch, case.tokens, case.heads)
    by_update = (case.batch, case.tokens, case.updates, case.heads)
    q = rng.standard_normal((case.batch, case.tokens, case.groups, case.key), np.float32)
    k = rng.standard_normal((*by_update[:3], case.groups, case.key), np.float32)
    if not case.normalize:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((*by_update, case.width), np.float32)
    g_shape = {None: None, "head": by_head, "channel": (*by_head, case.key)}[case.gate]
    state_shape = (case.batch, case.heads, case.key, case.width)
    return {
        "q": q.astype(jnp.dtype(dtype)),
        "k": k.astype(jnp.dtype(dtype)),
        "v": v.astype(jnp.dtype(dtype)),
        "beta": rng.uniform(0.0, 2.0, by_update).astype(np.float32),
        "g": None if g_shape is None else make_log_decays(case.decay, g_shape, rng),
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": rng.standard_normal(state_shape, np.float32) if case.initial else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"normalize": case.normalize, "return_final_state": case.final, "chunk": case.chunk}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass in chunks of 64 updates."""
    chunk = min(64, case.tokens)
    a_token = chunk * (2 * case.key + 2 * case.width) + chunk * (case.key + case.width) + 6 * case.key * case.width
    return case.batch * case.tokens * case.updates * case.heads * a_token
