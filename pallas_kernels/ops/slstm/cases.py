# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `slstm` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `layout` is a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    heads: int
    width: int  # P
    bias: bool = True
    layout: str = "dense"
    initial: bool = True
    final: bool = True
    seed: int = 0


# Small shapes: every property of the contract at least once.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 4),
    Case("no_state", 1, 33, 2, 4, bias=False, initial=False, final=False),
    Case("slabs", 1, 300, 2, 4),
    Case("packed", 2, 140, 2, 4, layout="packed"),
    Case("scattered", 2, 140, 2, 4, layout="scattered"),
)

# The rows that are timed.
BENCH_CASES = (
    Case("b8_t2048_h4", 8, 2048, 4, 256, initial=False, final=False),
    Case("tiny", 2, 128, 4, 16, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 2, 4))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name; x has `dtype`, the rest float32."""
    rng = np.random.default_rng(case.seed)
    heads = (case.heads, case.width)
    x = rng.standard_normal((case.batch, case.tokens, 4, *heads), np.float32)
    state = (case.batch, *heads)
    states = {
        "initial_y": rng.uniform(-1, 1, state),
        "initial_c": rng.standard_normal(state),
        "initial_n": rng.uniform(0.5, 2, state),
        "initial_m": rng.standard_normal(state),
    }
    return {
        "x": x.astype(jnp.dtype(dtype)),
        "R": rng.standard_normal((case.heads, 4, case.width, case.width), np.float32) / np.sqrt(case.width),
        "b": rng.standard_normal((4, *heads), np.float32) if case.bias else None,
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        **{name: state.astype(np.float32) if case.initial else None for name, state in states.items()},
    }


def make_settings(case: Case) -> dict:
    """The other arguments."""
    return {"return_final_state": case.final}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the recurrent products."""
    return 8 * case.batch * case.tokens * case.heads * case.width**2
