# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `ssd` and makers of their inputs, shared by tests, benchmarks and tuning. Inputs are NumPy arrays."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids

DECAYS = ("typical", "weak", "strong", "mixed", "zero")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of ssd. `decay` says how dt and A are drawn, `layout` is a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    heads: int
    width: int  # P
    groups: int
    state: int  # N
    layout: str = "dense"
    decay: str = "typical"
    skip: str | None = "H"  # shape of D: None, "H" or "HP"
    initial: bool = False
    final: bool = False
    seed: int = 0
    apart: bool = False  # log decays of their own in place of dt A


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 8, 2, 8, initial=True, final=True),
    Case("short", 2, 7, 2, 16, 1, 16, initial=True, final=True),
    Case("no_skip", 1, 33, 2, 8, 1, 16, skip=None),
    Case("groups", 2, 64, 4, 16, 2, 16, skip="HP", initial=True, final=True),
    Case("groups_all", 1, 50, 4, 8, 4, 8, initial=True, final=True),
    Case("weak", 1, 100, 2, 16, 1, 16, decay="weak", initial=True, final=True),
    Case("strong", 1, 100, 2, 16, 1, 16, decay="strong", initial=True, final=True),
    Case("mixed", 2, 200, 3, 16, 1, 16, decay="mixed", initial=True, final=True),
    Case("zero_dt", 1, 40, 2, 8, 1, 8, decay="zero", initial=True, final=True),
    Case("packed", 2, 100, 2, 16, 1, 16, layout="packed", initial=True, final=True),
    Case("edges", 2, 64, 2, 16, 1, 16, layout="edges", initial=True, final=True),
    Case("singles", 2, 50, 2, 16, 1, 16, layout="singles", initial=True, final=True),
    Case("right", 2, 70, 2, 16, 1, 16, layout="right", initial=True, final=True),
    Case("left", 2, 70, 2, 16, 1, 16, layout="left", initial=True, final=True),
    Case("interior", 2, 70, 2, 16, 1, 16, layout="interior", initial=True, final=True),
    Case("scattered", 2, 70, 2, 16, 2, 16, layout="scattered", decay="mixed", skip="HP", initial=True, final=True),
    Case("empty", 2, 40, 2, 16, 1, 16, layout="empty", initial=True, final=True),
    Case("apart", 2, 100, 4, 16, 2, 16, decay="mixed", initial=True, final=True, apart=True),
    Case("apart_scattered", 2, 70, 2, 16, 1, 16, "scattered", "mixed", None, True, True, apart=True),
)

# Shapes the kernels must serve in full width (state and head widths), still small enough to interpret.
WIDTH_CASES = tuple(
    Case(f"p{width}_n{state}", 1, 160, 2, width, 1, state, layout="packed", initial=True, final=True)
    for width, state in ((32, 16), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256))
)

# The rows that are timed.
BENCH_CASES = (
    Case("b8_t2048", 8, 2048, 64, 64, 1, 128),
    Case("b1_t16384", 1, 16384, 64, 64, 1, 128),
    Case("b2_t8192_h128_g8", 2, 8192, 128, 64, 8, 128),
    Case("b1_t65536", 1, 65536, 64, 64, 1, 128),
    Case("b8_t2048_h48_n256", 8, 2048, 48, 64, 1, 256),
    Case("b8_t2048_packed", 8, 2048, 64, 64, 1, 128, layout="packed"),
    Case("b8_t2048_g8", 8, 2048, 64, 64, 8, 128),
    Case("b8_t2048_n64", 8, 2048, 64, 64, 1, 64),
    Case("b8_t2048_p128", 8, 2048, 32, 128, 1, 128),
    Case("tiny", 8, 256, 8, 32, 1, 32, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *WIDTH_CASES, *BENCH_CASES)}

_SMALL = Case("small", 2, 24, 4, 8, 2, 8, skip="HP", initial=True, final=True)
CONTRACT = {
    "reference": _SMALL,
    "xla": _SMALL,
    "tpu": Case("tpu", 2, 140, 2, 32, 1, 16, initial=True, final=True),
    "gpu": Case("gpu", 2, 140, 2, 64, 1, 64, initial=True, final=True),
}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments of ssd by name (x, dt, A, B, C, D, segment_ids, initial_state); x, B, C have `dtype`, the rest float32.

    Decays: typical as at Mamba-2's initialisation; weak keeps almost everything; strong forgets almost everything each
    token; mixed draws A * dt log-uniformly from -1e-6 to -80 token by token; zero is typical with a third of dt (and
    x) 0.
    """
    if case.decay not in DECAYS:
        raise ValueError(f"decay ({case.decay!r}) not one of {', '.join(DECAYS)}")
    rng = np.random.default_rng(case.seed)
    shape = (case.batch, case.tokens, case.heads)
    x = rng.standard_normal((*shape, case.width), np.float32)
    b = rng.standard_normal((case.batch, case.tokens, case.groups, case.state), np.float32) / np.sqrt(case.state)
    c = rng.standard_normal((case.batch, case.tokens, case.groups, case.state), np.float32)
    a = -rng.uniform(1.0, 16.0, case.heads)
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))
    if case.decay == "weak":
        dt = np.exp(rng.uniform(np.log(1e-6), np.log(1e-4), shape))
    elif case.decay == "strong":
        dt = rng.uniform(1.0, 5.0, shape)
    elif case.decay == "mixed":
        dt = np.exp(rng.uniform(np.log(1e-6), np.log(80.0), shape)) / -a
    elif case.decay == "zero":
        dropped = rng.random(shape) < 1 / 3
        dt = np.where(dropped, 0.0, dt)
        x = np.where(rng.random(shape)[..., None] < 1 / 3, 0.0, x)
    decay = dt * a
    if case.apart:
        dt = rng.uniform(0.1, 1.0, shape)
    skip_shape = {None: None, "H": (case.heads,), "HP": (case.heads, case.width)}[case.skip]
    state_shape = (case.batch, case.heads, case.width, case.state)
    return {
        "x": np.asarray(x).astype(jnp.dtype(dtype)),
        "dt": dt.astype(np.float32),
        "A": None if case.apart else a.astype(np.float32),
        "B": b.astype(jnp.dtype(dtype)),
        "C": c.astype(jnp.dtype(dtype)),
        "D": None if skip_shape is None else rng.standard_normal(skip_shape, np.float32),
        "decay": decay.astype(np.float32) if case.apart else None,
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": rng.standard_normal(state_shape, np.float32) if case.initial else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments of ssd."""
    return {"return_final_state": case.final}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass in chunks of 128 tokens."""
    chunk = min(128, case.tokens)
    a_token = case.heads * (chunk * case.width + 4 * case.width * case.state) + case.groups * chunk * case.state
    return case.batch * case.tokens * a_token
