# SPDX-License-Identifier: Apache-2.0
"""Any way in gives one forward: ragged prompts in random pieces, tokens behind them, rows together and alone."""

import jax
import numpy as np

from tests.model.model_support import QUICK
from tests.tolerances import check_close

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17)
"""Of the rows: one less, as many and one more than windows of 2 to 7 and blocks of 4, 8 and 16 have."""
NEW = 6
"""Tokens behind each, one by one."""
WIDTHS = (1, 8)
"""Of pieces, with padding: each row takes up to so many tokens."""


def check_pieces(model, seed: int = 0) -> None:
    """The logits of every token of every row are those of the full forward in float32, and so are those of a row that
    is read alone."""
    rng, lengths = np.random.default_rng(seed), np.array(LENGTHS)
    n_rows, n_tokens = len(lengths), lengths.max() + NEW
    tokens = rng.integers(0, model.config.vocab_size, (n_rows, n_tokens)).astype(np.int32)
    extend = jax.jit(lambda model, tokens, cache, ids: model.extend(tokens, cache, ids), compiler_options=QUICK)
    expected = np.asarray(jax.jit(lambda model: model(tokens), compiler_options=QUICK)(model))
    together = read(extend, model, tokens, lengths, rng)
    for row, length in enumerate(lengths):
        seen = slice(0, length + NEW)
        check_close(together[row, seen], expected[row, seen], dtype="float32", what=f"logits of a row of {length}")
    row = int(rng.integers(n_rows // 2, n_rows))
    alone = read(extend, model, tokens[row : row + 1], lengths[row : row + 1], rng)[0]
    seen = slice(0, lengths[row] + NEW)
    check_close(alone[seen], together[row, seen], dtype="float32", what=f"logits of a row of {lengths[row]} alone")


def read(extend, model, tokens, lengths, rng) -> np.ndarray:
    """Logits [B, T, V] of each row's first tokens in random pieces, and of NEW behind them."""
    n_rows, logits = len(tokens), None
    cache, done = model.init_cache(n_rows, tokens.shape[1]), np.zeros(n_rows, int)
    while (done < lengths + NEW).any():
        prompt = (done < lengths).any()
        width = int(rng.choice(WIDTHS)) if prompt else 1
        take = np.minimum(rng.integers(0, width + 1, n_rows), lengths - done) if prompt else np.ones(n_rows, int)
        ids = (np.arange(width) < take[:, None]).astype(np.int32)
        piece = np.full((n_rows, width), 3, np.int32)
        for row, n in enumerate(take):
            piece[row, :n] = tokens[row, done[row] : done[row] + n]
        part, cache = extend(model, piece, cache, ids)
        logits = np.zeros((*tokens.shape, part.shape[-1]), np.float32) if logits is None else logits
        for row, n in enumerate(take):
            logits[row, done[row] : done[row] + n] = part[row, :n]
        done += take
    np.testing.assert_array_equal(np.asarray(cache.length_B) - model.config.prefix_tokens, lengths + NEW)
    return logits
