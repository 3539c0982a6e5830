# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `grouped_dot` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of grouped_dot. `load`: even, skewed (group sizes fall off), one (all rows in the last group), or part
    (as skewed, but a third of the rows is in no group)."""

    name: str
    rows: int  # M
    width: int  # K
    outputs: int  # N
    groups: int  # G
    load: str = "skewed"
    seed: int = 0


TEST_CASES = (
    Case("one_row", 1, 8, 4, 3),
    Case("even", 24, 8, 4, 4, "even"),
    Case("skewed", 40, 8, 6, 5),
    Case("one", 10, 8, 6, 5, "one"),
    Case("part", 40, 8, 6, 5, "part"),
)

# Tokens times experts a token of one device; Jamba-v0.1 and Nemotron-3 Nano.
BENCH_CASES = (
    Case("m16384_k4096_n28672_g16", 16384, 4096, 28672, 16),
    Case("m49152_k2688_n1856_g128", 49152, 2688, 1856, 128),
    Case("tiny", 512, 128, 256, 8),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}

_SMALL = Case("small", 24, 8, 6, 3, "part")
CONTRACT = {
    "reference": _SMALL,
    "xla": _SMALL,
    "tpu": Case("tpu", 150, 128, 128, 3, "part"),
    "gpu": Case("gpu", 300, 128, 128, 3, "part"),
}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray]:
    """Arguments of grouped_dot by name (x, w, sizes)."""
    rng = np.random.default_rng(case.seed)
    share = {"even": np.ones(case.groups), "one": np.eye(case.groups)[-1]}.get(case.load)
    share = 1 / np.arange(1, case.groups + 1) if share is None else share
    in_groups = case.rows * 2 // 3 if case.load == "part" else case.rows
    ends = np.round(np.cumsum(share) / share.sum() * in_groups).astype(np.int32)
    return {
        "x": rng.standard_normal((case.rows, case.width), np.float32).astype(jnp.dtype(dtype)),
        "w": (rng.standard_normal((case.groups, case.width, case.outputs), np.float32) / np.sqrt(case.width)).astype(
            jnp.dtype(dtype)
        ),
        "sizes": np.diff(ends, prepend=0).astype(np.int32),
    }


def make_settings(case: Case) -> dict:
    """The other arguments of grouped_dot: none."""
    return {}


def count_flops(case: Case) -> float:
    """Multiplications and additions of the forward pass."""
    return 2 * case.rows * case.width * case.outputs
