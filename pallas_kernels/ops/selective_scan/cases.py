# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `selective_scan` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids

DECAYS = ("typical", "weak", "strong", "mixed", "zero")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of selective_scan. `decay` says how dt is drawn, `layout` is a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    width: int  # D
    state: int  # N
    groups: int | None = None  # None: B and C without a group axis
    layout: str = "dense"
    decay: str = "typical"
    skip: bool = True
    initial: bool = False
    final: bool = False
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 6, 4, initial=True, final=True),
    Case("short", 2, 7, 6, 8, 2, initial=True, final=True),
    Case("no_skip", 1, 33, 6, 4, skip=False),
    Case("groups", 2, 64, 8, 4, 4, initial=True, final=True),
    Case("state_of_one", 1, 50, 5, 1, initial=True, final=True),
    Case("weak", 1, 100, 6, 4, decay="weak", initial=True, final=True),
    Case("strong", 1, 100, 6, 4, decay="strong", initial=True, final=True),
    Case("mixed", 2, 120, 6, 4, decay="mixed", initial=True, final=True),
    Case("zero_dt", 1, 40, 6, 4, decay="zero", initial=True, final=True),
    Case("packed", 2, 100, 6, 4, layout="packed", initial=True, final=True),
    Case("edges", 2, 64, 6, 4, layout="edges", initial=True, final=True),
    Case("singles", 2, 50, 6, 4, layout="singles", initial=True, final=True),
    Case("right", 2, 70, 6, 4, layout="right", initial=True, final=True),
    Case("left", 2, 70, 6, 4, layout="left", initial=True, final=True),
    Case("interior", 2, 70, 6, 4, layout="interior", initial=True, final=True),
    Case("scattered", 2, 70, 6, 4, 2, layout="scattered", decay="mixed", initial=True, final=True),
    Case("empty", 2, 40, 6, 4, layout="empty", initial=True, final=True),
)

# The rows that are timed: those that others are compared at, widths of Mamba 130M, Falcon-Mamba 7B and Jamba.
BENCH_CASES = (
    Case("b4_t4096_d4096", 4, 4096, 4096, 16),
    Case("b1_t16384_d4096", 1, 16384, 4096, 16),
    Case("b8_t2048_d1536", 8, 2048, 1536, 16),
    Case("b1_t8192_d8192", 1, 8192, 8192, 16),
    Case("b8_t2048_d1536_packed", 8, 2048, 1536, 16, layout="packed"),
    Case("tiny", 8, 256, 256, 16, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}

_SMALL = Case("small", 2, 24, 6, 4, 2, initial=True, final=True)
CONTRACT = dict.fromkeys(("reference", "xla", "tpu", "gpu"), _SMALL)


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (x, dt, A, B, C, D, segment_ids, initial_state); x, B, C have `dtype`, the rest float32.

    A is that of Mamba-1's initialisation, -1 to -N in each channel, times a random number near 1. Decays: typical as at
    Mamba-1's initialisation; weak keeps almost everything; strong forgets almost everything each token; mixed draws dt
    log-uniformly from 1e-6 to 80 token by token; zero is typical with a third of dt (and x) 0.
    """
    if case.decay not in DECAYS:
        raise ValueError(f"decay ({case.decay!r}) not one of {', '.join(DECAYS)}")
    rng = np.random.default_rng(case.seed)
    shape = (case.batch, case.tokens, case.width)
    groups = () if case.groups is None else (case.groups,)
    maps = (case.batch, case.tokens, *groups, case.state)
    x = rng.standard_normal(shape, np.float32)
    b, c = (rng.standard_normal(maps, np.float32) / np.sqrt(case.state) for _ in range(2))
    a = -np.arange(1, case.state + 1) * np.exp(0.1 * rng.standard_normal((case.width, case.state)))
    low, high = {"weak": (1e-6, 1e-4), "strong": (5.0, 20.0), "mixed": (1e-6, 80.0)}.get(case.decay, (1e-3, 1e-1))
    dt = np.exp(rng.uniform(np.log(low), np.log(high), shape))
    if case.decay == "zero":
        dt = np.where(rng.random(shape) < 1 / 3, 0.0, dt)
        x = np.where(rng.random(shape) < 1 / 3, 0.0, x)
    return {
        "x": np.asarray(x).astype(jnp.dtype(dtype)),
        "dt": dt.astype(np.float32),
        "A": a.astype(np.float32),
        "B": b.astype(jnp.dtype(dtype)),
        "C": c.astype(jnp.dtype(dtype)),
        "D": rng.standard_normal(case.width, np.float32) if case.skip else None,
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": rng.standard_normal((case.batch, case.width, case.state), np.float32)
        if case.initial
        else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments of selective_scan."""
    return {"return_final_state": case.final}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass: decay times state, plus dt x times B, times C."""
    return 6 * case.batch * case.tokens * case.width * case.state
