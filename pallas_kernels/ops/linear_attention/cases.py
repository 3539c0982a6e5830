# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `linear_attention` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_log_decays, make_segment_ids
from pallas_kernels.ops.linear_attention.features import n_features


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
    gate: str | None = "channel"  # None, "constant", "head" or "channel"
    decay: str = "typical"
    layout: str = "dense"
    bonus: bool = False
    normalizer: bool = False
    features: str | None = None
    initial: bool = True
    final: bool = True
    chunk: int | None = 16
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 8, 2, 8, bonus=True),
    Case("no_gate", 1, 33, 2, 8, 1, 8, gate=None, initial=False, final=False),
    Case("constant", 2, 40, 4, 8, 2, 16, gate="constant", layout="scattered"),
    Case("head", 2, 40, 4, 8, 2, 16, gate="head", decay="mixed"),
    Case("head_packed", 2, 50, 2, 8, 2, 8, gate="head", decay="weak", layout="packed", normalizer=True),
    Case("channel", 2, 50, 4, 16, 2, 8, decay="mixed", layout="packed"),
    Case("strong", 1, 50, 2, 8, 2, 8, decay="strong"),
    Case("bonus", 2, 50, 2, 8, 1, 8, decay="mixed", layout="scattered", bonus=True),
    Case("normalizer", 2, 40, 2, 8, 2, 8, gate=None, layout="packed", normalizer=True),
    Case("taylor", 2, 40, 2, 8, 2, 4, gate=None, layout="scattered", normalizer=True, features="taylor"),
    Case("taylor_head", 1, 40, 2, 8, 2, 4, gate="head", features="taylor"),
)

# The rows that are timed.
BENCH_CASES = (
    Case("b8_t2048_h16", 8, 2048, 16, 128, 16, 128, "head", initial=False, final=False, chunk=None),
    Case("b8_t2048_h16_channel", 8, 2048, 16, 128, 16, 128, initial=False, final=False, chunk=None),
    Case("tiny", 2, 128, 4, 32, 2, 32, "head", layout="packed", chunk=None),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4, 4, 2, 8, chunk=8)) | {
    "gpu": Case("gpu", 2, 140, 2, 64, 1, 64, "head", chunk=None)
}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (q, k, v, g, bonus, segment_ids, initial_state); q, k, v have `dtype`, the rest float32.

    With a normalizer queries and keys are positive, so that no sum of weights comes near 0.
    """
    rng = np.random.default_rng(case.seed)
    by_head = (case.batch, case.tokens, case.heads)
    q, k = (rng.standard_normal((case.batch, case.tokens, case.groups, case.key), np.float32) for _ in range(2))
    if case.normalizer and case.features is None:
        q, k = np.abs(q), np.abs(k)
    v = rng.standard_normal((*by_head, case.width), np.float32)
    g_shape = {None: None, "constant": (case.heads,), "head": by_head, "channel": (*by_head, case.key)}[case.gate]
    state_shape = (case.batch, case.heads, n_features(case.features, case.key), case.width + case.normalizer)
    state = rng.standard_normal(state_shape, np.float32)
    return {
        "q": q.astype(jnp.dtype(dtype)),
        "k": k.astype(jnp.dtype(dtype)),
        "v": v.astype(jnp.dtype(dtype)),
        "g": None if g_shape is None else make_log_decays(case.decay, g_shape, rng),
        "bonus": rng.standard_normal((case.heads, case.key), np.float32) if case.bonus else None,
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": (np.abs(state) if case.normalizer else state) if case.initial else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {
        "normalizer": case.normalizer,
        "feature_map": case.features,
        "return_final_state": case.final,
        "chunk": case.chunk,
    }


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass in chunks of 64 tokens."""
    chunk, rows = min(64, case.tokens), n_features(case.features, case.key)
    a_token = chunk * (case.key + case.width) + 4 * rows * case.width
    return case.batch * case.tokens * case.heads * a_token
