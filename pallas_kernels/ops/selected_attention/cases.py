# SPDX-License-Identifier: Apache-2.0
"""Named shapes of `selected_attention` and makers of their inputs (NumPy arrays), shared by tests and benchmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: rows of documents, of which each is cut into blocks."""

    name: str
    batch: int
    tokens: int  # T, and S where no more keys are said
    heads: int
    kv_heads: int
    width: int  # P
    block: int  # tokens of a block
    n_chosen: int  # C
    v_width: int | None = None
    keys: int | None = None  # S; queries are at the last ones
    documents: int = 1  # of a row
    padding: int = 0  # last keys of a row that are in no block
    initial: bool = False  # there is no state
    seed: int = 0


# Small shapes: every property of the contract at least once, more tokens than a block of queries among them.
TEST_CASES = (
    Case("one_token", 2, 1, 4, 2, 8, 4, 2),
    Case("dense", 2, 40, 4, 2, 8, 4, 3),
    Case("blocks_of_one", 2, 20, 2, 1, 8, 1, 5),
    Case("one_chosen", 2, 20, 2, 2, 8, 3, 1),
    Case("wide_v", 1, 50, 4, 1, 8, 7, 3, v_width=12),
    Case("many", 1, 300, 2, 1, 8, 16, 6),
    Case("documents", 2, 60, 4, 2, 8, 4, 4, documents=3, padding=7),
    Case("cached", 2, 5, 4, 2, 8, 4, 3, keys=42),
    Case("one_cached", 2, 1, 4, 2, 8, 4, 3, keys=42),
)

# The rows that are timed: Qwen3.8-Flash-Next's heads, budget and blocks.
BENCH_CASES = (
    Case("b1_t4096", 1, 4096, 24, 2, 256, 4, 513),
    Case("b8_decode_s16384", 8, 1, 24, 2, 256, 4, 513, keys=16_384),
    Case("tiny", 2, 256, 4, 2, 32, 8, 5, documents=2),
)

CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}
CONTRACT = dict.fromkeys(("reference", "xla"), Case("small", 2, 24, 4, 2, 8, 4, 3))


def make_inputs(case: Case, dtype="float32") -> dict[str, np.ndarray | None]:
    """Arguments by name (q, k, v, chosen, blocks, places): each query's own block, and others before it at random."""
    rng = np.random.default_rng(case.seed)
    n_keys = case.keys or case.tokens
    draw = lambda *shape: rng.standard_normal((case.batch, *shape), np.float32).astype(jnp.dtype(dtype))
    starts = np.zeros(n_keys, bool)
    for cut in np.array_split(np.arange(n_keys - case.padding), case.documents):
        starts[cut[:: case.block]] = True
    blocks = np.cumsum(starts).astype(np.int32) - 1
    places = np.arange(n_keys - case.tokens, n_keys, dtype=np.int32)
    chosen = np.full((case.batch, case.tokens, case.n_chosen), -1, np.int32)
    for row in chosen:
        for own, place in zip(row, places, strict=True):
            others = rng.permutation(blocks[place])[: case.n_chosen - 1]
            own[0], own[1 : 1 + len(others)] = blocks[place], others
    if case.padding:
        blocks[-case.padding :] = -1
    return {
        "q": draw(case.tokens, case.heads, case.width),
        "k": draw(n_keys, case.kv_heads, case.width),
        "v": draw(n_keys, case.kv_heads, case.v_width or case.width),
        "chosen": chosen,
        "blocks": np.tile(blocks, (case.batch, 1)),
        "places": np.tile(places, (case.batch, 1)) if case.keys else None,
    }


def make_settings(case: Case) -> dict:
    """The other arguments: none."""
    return {}


def count_flops(case: Case) -> float:
    """Of the scores and sums of visible pairs, the query's own block counted as half full."""
    seen = (case.n_chosen - 0.5) * case.block
    return 2.0 * case.batch * case.tokens * case.heads * (case.width + (case.v_width or case.width)) * seen
