# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `mamba3` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

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
    groups: int
    key: int  # N
    angles: int  # S
    rank: int | None = None  # None: one input and output
    norm: bool = False
    gate: bool = True
    pairs: str = "adjacent"
    decay: str = "typical"
    layout: str = "dense"
    initial: bool = True
    final: bool = True
    chunk: int | None = 16
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 8, 2, 8, 2),
    Case("no_gate", 1, 33, 2, 8, 1, 8, 4, gate=False, initial=False, final=False),
    Case("mixed", 2, 40, 4, 8, 2, 8, 4, decay="mixed"),
    Case("packed", 2, 50, 2, 8, 1, 8, 2, decay="weak", layout="packed"),
    Case("scattered", 2, 50, 2, 8, 1, 8, 2, decay="mixed", layout="scattered"),
    Case("mimo", 2, 40, 2, 8, 1, 8, 4, rank=2, pairs="half", layout="scattered"),
    Case("mimo_norm", 1, 40, 4, 8, 2, 8, 2, rank=4, pairs="half", norm=True, layout="packed"),
)

# The rows that are timed.
BENCH_CASES = (
    Case("b8_t2048_h32", 8, 2048, 32, 64, 1, 128, 32, initial=False, final=False, chunk=None),
    Case("b8_t2048_h32_r4", 8, 2048, 32, 64, 1, 128, 32, rank=4, pairs="half", initial=False, final=False, chunk=None),
    Case("tiny", 2, 128, 4, 32, 1, 32, 8, layout="packed", chunk=None),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
_SMALL = Case("small", 2, 24, 4, 4, 2, 8, 2, rank=2, norm=True, chunk=8)
_KERNELS = Case("gpu", 1, 140, 2, 64, 1, 64, 8, chunk=None)
_TPU = Case("tpu", 1, 70, 2, 64, 1, 64, 8, rank=2, pairs="half", chunk=None)
CONTRACT = dict.fromkeys(("reference", "xla"), _SMALL) | {"gpu": _KERNELS, "tpu": _TPU}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name; q, k, v, z have `dtype`, the rest float32."""
    rng = np.random.default_rng(case.seed)
    by_token, by_head = (case.batch, case.tokens), (case.batch, case.tokens, case.heads)
    ranks = () if case.rank is None else (case.rank,)
    normal = lambda *shape: np.asarray(rng.standard_normal(shape, np.float32))
    typed = {
        "q": normal(*by_token, *ranks, case.groups, case.key) / np.sqrt(case.key),
        "k": normal(*by_token, *ranks, case.groups, case.key),
        "v": normal(*by_head, case.width),
        "z": normal(*by_head, case.width) if case.gate else None,
    }
    mimo = dict.fromkeys(("mimo_v", "mimo_z", "mimo_o"))
    if ranks:
        mimo = {name: 1 + 0.5 * normal(case.heads, *ranks, case.width) for name in mimo}
        mimo["mimo_z"] = mimo["mimo_z"] if case.gate else None
    state = (case.batch, case.heads)
    states = {
        "initial_angle": rng.uniform(0, 2 * np.pi, (*state, case.angles)).astype(np.float32),
        "initial_ssm": normal(*state, case.width, case.key),
        "initial_k": normal(*state, *ranks, case.key),
        "initial_v": normal(*state, *ranks, case.width),
    }
    return {
        **{name: None if array is None else array.astype(jnp.dtype(dtype)) for name, array in typed.items()},
        "adt": make_log_decays(case.decay, by_head, rng),
        "dt": np.exp(rng.uniform(np.log(1e-2), 0, by_head)).astype(np.float32),
        "trap": normal(*by_head),
        "angles": normal(*by_head, case.angles),
        "q_bias": 1 + 0.1 * normal(case.heads, *ranks, case.key),
        "k_bias": 1 + 0.1 * normal(case.heads, *ranks, case.key),
        "D": normal(case.heads),
        "norm_weight": 1 + 0.1 * normal(case.heads, case.width) if case.norm else None,
        **mimo,
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        **{name: array if case.initial else None for name, array in states.items()},
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"rotary_pairs": case.pairs, "return_final_state": case.final, "chunk": case.chunk}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass in chunks of 64 tokens."""
    rank = case.rank or 1
    a_token = min(64, case.tokens) * rank**2 * (case.key + case.width) + 4 * rank * case.key * case.width
    return case.batch * case.tokens * case.heads * a_token
