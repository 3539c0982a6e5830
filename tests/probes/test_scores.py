# SPDX-License-Identifier: Apache-2.0
"""Scores against counts by hand, of functions and of a model; heat maps; the size of a state."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import MLP, Attention, Bidirectional, Mamba2, ModelConfig
from hybridlm.errors import ConfigError
from hybridlm.model.model import HybridLM
from hybridlm.probes import UNSCORED, InContextRegression, Needle, StateTracking, StringCopying, heat_map, score
from hybridlm.probes.scoring import state_bits


def all_but(task, length: int, wrong, *, rows: int, seed: int = 0):
    """A function of logits that is right but where wrong(facets, t) is, of batches in order."""
    steps = iter(range(100))

    def logits_of(tokens_BT):
        examples = task.batch(seed, next(steps), rows, length)
        assert (examples.tokens_BT == tokens_BT).all()
        likeliest = np.where(examples.targets_BT == UNSCORED, 0, examples.targets_BT)
        facets = {name: values for name, values in examples.facets.items()}
        likeliest = np.where(wrong(facets), (likeliest + 1) % task.vocab_size, likeliest)
        return np.eye(task.vocab_size + 3)[likeliest]

    return logits_of


def test_counts_by_facet_and_row():
    task = StringCopying(letters=5)  # of 10 letters the places are 1, 2 2, 4 4 4 4, 8 8 8
    found = score(all_but(task, 21, lambda facets: facets["place"] == 4, rows=3), task, 21, rows=3, batches=2)
    assert found.by == {"place": {1: (6, 6), 2: (12, 12), 4: (0, 24), 8: (18, 18)}}
    assert (found.right, found.asked, found.rows, found.whole) == (36, 60, 6, 0)
    assert found.accuracy == 0.6 and found.accuracies("place")[4] == 0 and found.length == 21
    with pytest.raises(ConfigError, match="facet \\('depth'\\) is none of this task: place"):
        found.accuracies("depth")


def test_rows_that_ask_more_and_less():
    """Of regression rows ask different numbers of y; a row counts as whole by its own."""
    task, wrong = InContextRegression(inputs=2, most_x=1), lambda facets: facets["pairs"] >= 4
    rows = 32
    counts = task.batch(0, 0, rows, 14).scored_BT.sum(axis=1)
    assert len(set(counts.tolist())) > 1
    whole = score(
        all_but(task, 14, lambda facets: np.zeros((rows, 14), bool), rows=rows), task, 14, rows=rows, batches=1
    )
    assert (whole.right, whole.whole) == (counts.sum(), rows) and whole.asked == counts.sum()
    part = score(all_but(task, 14, wrong, rows=rows), task, 14, rows=rows, batches=1)
    examples = task.batch(0, 0, rows, 14)
    late_B = ((examples.facets["pairs"] >= 4) & examples.scored_BT).any(axis=1)
    assert late_B.sum() > 0 and part.whole == (~late_B).sum()
    assert part.right == sum(part.by["pairs"][n][1] for n in (1, 2) if n in part.by["pairs"])


def test_a_map_of_depths_and_lengths():
    task = Needle(over="tokens", tokens=32, depths=(0, 50, 100), digits=2)
    lengths = (16, 40)
    found = [
        score(all_but(task, n, lambda f, n=n: f["depth"] * (n == 40) == 50, rows=6), task, n, rows=6, batches=1)
        for n in lengths
    ]
    rows, columns, accuracy = heat_map(found)
    assert (rows, columns) == ([16, 40], [0, 50, 100]) and accuracy.tolist() == [[1, 1, 1], [1, 0, 1]]
    other = score(
        all_but(Needle(over="tokens", tokens=32, depths=(0, 25)), 40, lambda f: f["depth"] < 0, rows=2),
        Needle(over="tokens", tokens=32, depths=(0, 25)), 40, rows=2, batches=1,
    )  # fmt: skip
    _, columns, accuracy = heat_map([found[0], other])
    assert columns == [0, 25, 50, 100] and np.isnan(accuracy).tolist() == [
        [False, True, False, False],
        [False] * 2 + [True] * 2,
    ]


def model_of(pattern: str, vocab_size: int = 32, **blocks) -> HybridLM:
    """Shapes alone: what is refused, and what a cache holds, hangs on nothing else."""
    return nnx.eval_shape(lambda: make(pattern, vocab_size, **blocks))


def make(pattern: str, vocab_size: int, **blocks) -> HybridLM:
    known = {"M": Mamba2(d_state=8, d_head=8), "*": Attention(n_heads=2, n_kv_heads=1, d_head=8), "-": MLP(d_ff=16)}
    known |= blocks
    config = ModelConfig(
        vocab_size=vocab_size, d_model=16, pattern=pattern, blocks={symbol: known[symbol] for symbol in set(pattern)},
        compute_dtype="float32",
    )  # fmt: skip
    return HybridLM(config, rngs=nnx.Rngs(0))


def test_a_model_is_scored_by_its_likeliest_token():
    model, task = make("*", 32), StringCopying(letters=6)
    found = score(model, task, 24, rows=4, batches=2, seed=5)
    logits_of = jax.jit(lambda tokens: model(tokens))
    by_hand = score(logits_of, task, 24, rows=4, batches=2, seed=5)
    assert found == by_hand and found.asked == 88
    right = [
        (np.asarray(logits_of(batch.tokens_BT)).argmax(-1) == batch.targets_BT).sum()
        for batch in (task.batch(5, step, 4, 24) for step in range(2))
    ]
    assert found.right == sum(right)


def test_the_bits_of_a_state():
    mixer = Mamba2(d_state=8, d_head=8)
    of_mamba = state_bits(model_of("MM-"))
    cache = nnx.eval_shape(lambda: model_of("MM-").init_cache(1, 999))
    assert of_mamba == sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(cache.groups))
    assert of_mamba >= 2 * 32 * mixer.d_state * 2 * 16  # two layers of a float32 state, of twice the width
    assert state_bits(model_of("M*-")) is None


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: score(model_of("-"), StateTracking("S5"), 8),
         "StateTracking needs a vocabulary of 120 tokens, the model has 32: make the task's smaller"),
        (lambda: score(model_of("-"), StringCopying(), 2), "length (2) must be at least 3 for a string of one letter"),
        (lambda: score(model_of("-"), StringCopying(), 9, batches=0), "batches (0) must be at least 1"),
        (lambda: score(model_of("B", B=Bidirectional(Mamba2(d_state=8, d_head=8))), StringCopying(letters=3), 9),
         "a model that sees ahead reads the answers: model.blocks.B is bidirectional"),
        (lambda: score(lambda tokens: np.zeros((16, 9)), StringCopying(), 9),
         "logits (16, 9) must have the shape (rows, tokens, vocabulary) of tokens (16, 9)"),
        (lambda: score(lambda tokens: np.zeros((16, 9, 27)), StringCopying(), 9), "needs a vocabulary of 28 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_one_line(call, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as error:
        call()
    assert "\n" not in str(error.value)
