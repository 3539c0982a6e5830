# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `cache_write` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of cache_write. `outside`: the last row's tokens are of slots before the first or behind the last."""

    name: str
    batch: int
    slots: int  # S
    tokens: int
    kv_heads: int  # K
    width: int  # P
    layers: int | None = None  # L of stacked caches, of which the last but one is written; None: not stacked
    outside: bool = False
    seed: int = 0


TEST_CASES = (
    Case("one_token", 2, 9, 1, 2, 8),
    Case("layer", 2, 9, 1, 2, 8, layers=3),
    Case("tokens", 3, 20, 5, 1, 8),
    Case("tokens_of_a_layer", 3, 20, 5, 1, 8, layers=2),
    Case("outside", 3, 140, 1, 2, 8, layers=2, outside=True),
    Case("tokens_outside", 2, 9, 3, 2, 8, outside=True),
)

BENCH_CASES = (
    Case("b8_s131072", 8, 131072, 1, 8, 128, layers=4),
    Case("b8_s131072_p64", 8, 131072, 1, 8, 64, layers=4),
    Case("tiny", 8, 256, 1, 2, 32, layers=2),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}

_SMALL = Case("small", 2, 9, 3, 2, 8)
CONTRACT = {"reference": _SMALL, "xla": _SMALL, "tpu": Case("tpu", 2, 140, 1, 2, 64)}


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray]:
    """Arguments of cache_write by name (array, slots, value)."""
    rng = np.random.default_rng(case.seed)
    layers = () if case.layers is None else (case.layers,)
    slots = np.stack([rng.permutation(case.slots)[: case.tokens] for _ in range(case.batch)]).astype(np.int32)
    if case.outside:
        slots[-1] = np.where(np.arange(case.tokens) % 2, case.slots, -1 - np.arange(case.tokens))
    draw = lambda *shape: np.asarray(rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype))
    return {
        "array": draw(*layers, case.batch, case.slots, case.kv_heads, case.width),
        "slots": slots,
        "value": draw(case.batch, case.tokens, case.kv_heads, case.width),
    }


def make_settings(case: Case) -> dict:
    """The other arguments of cache_write."""
    return {"layer": None if case.layers is None else max(0, case.layers - 2)}


def count_flops(case: Case) -> float:
    """None: it copies."""
    return 0.0
