# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `causal_conv1d` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import make_segment_ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of causal_conv1d; `layout` is a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    width: int  # D
    taps: int  # W
    layout: str = "dense"
    activation: str | None = "silu"
    bias: bool = True
    initial: bool = False
    final: bool = False
    seed: int = 0


TEST_CASES = (
    Case("one_token", 2, 1, 6, 4, initial=True, final=True),
    Case("two_tokens", 2, 2, 6, 4, activation=None, initial=True, final=True),
    Case("one_tap", 2, 9, 6, 1, initial=True, final=True),
    Case("two_taps", 1, 20, 6, 2, activation=None, bias=False),
    Case("eight_taps", 2, 30, 6, 8, initial=True, final=True),
    Case("packed", 2, 40, 6, 4, layout="packed", initial=True, final=True),
    Case("edges", 2, 40, 6, 4, layout="edges", initial=True, final=True),
    Case("singles", 2, 40, 6, 4, layout="singles", initial=True, final=True),
    Case("right", 2, 40, 6, 4, layout="right", initial=True, final=True),
    Case("left", 2, 40, 6, 4, layout="left", initial=True, final=True),
    Case("interior", 2, 40, 6, 4, layout="interior", initial=True, final=True),
    Case("scattered", 2, 40, 6, 3, layout="scattered", initial=True, final=True),
    Case("scattered_no_state", 2, 40, 6, 3, layout="scattered", activation=None, bias=False),
    Case("empty", 2, 40, 6, 4, layout="empty", initial=True, final=True),
)

BENCH_CASES = (
    Case("b8_t2048", 8, 2048, 4352, 4),
    Case("b8_t2048_packed", 8, 2048, 4352, 4, layout="packed"),
    Case("b8_t2048_right", 8, 2048, 4352, 4, layout="right"),
    Case("b8_t2048_interior", 8, 2048, 4352, 4, layout="interior"),
    Case("b1_t16384", 1, 16384, 4352, 4),
    Case("b1_t65536", 1, 65536, 4352, 4),
    Case("tiny", 8, 256, 320, 4, layout="packed"),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}

_SMALL = Case("small", 2, 24, 6, 4, initial=True, final=True)
CONTRACT = {
    "reference": _SMALL,
    "xla": _SMALL,
    "tpu": _SMALL,
    "gpu": Case("gpu", 2, 40, 8, 4, initial=True, final=True),
}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments of causal_conv1d by name (x, w, b, segment_ids, initial_state); x and initial_state have `dtype`."""
    rng = np.random.default_rng(case.seed)
    dtype = jnp.dtype(dtype)
    state = rng.standard_normal((case.batch, case.taps - 1, case.width), np.float32)
    return {
        "x": rng.standard_normal((case.batch, case.tokens, case.width), np.float32).astype(dtype),
        "w": rng.standard_normal((case.width, case.taps), np.float32) / np.float32(np.sqrt(case.taps)),
        "b": rng.standard_normal(case.width, np.float32) if case.bias else None,
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
        "initial_state": state.astype(dtype) if case.initial else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments of causal_conv1d."""
    return {"activation": case.activation, "return_final_state": case.final}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass."""
    return 2 * case.batch * case.tokens * case.width * case.taps
