# SPDX-License-Identifier: Apache-2.0
"""generate: greedy equals recomputing, ragged prompts, end of text, sampling; and clear errors."""

import jax
import numpy as np
import pytest

import hybridlm
from hybridlm.model import generation
from hybridlm.model.generation import generate
from tests.model.model_support import QUICK, VOCAB, build, random_tokens, small


@pytest.fixture(scope="module")
def model():
    return build(small("M*w"))


@pytest.fixture(scope="module")
def greedy(model):
    """20 tokens by full forwards, of rows that start with 9 and with 4 tokens."""
    forward = jax.jit(lambda tokens: model(tokens), compiler_options=QUICK)
    tokens, ends = np.zeros((2, 29), np.int32), np.array([9, 4])
    tokens[:, :9] = random_tokens(2, 9)
    for step in range(20):
        logits = np.asarray(forward(tokens))
        tokens[[0, 1], ends + step] = logits[[0, 1], ends + step - 1].argmax(-1)
    return np.stack([tokens[row, end : end + 20] for row, end in enumerate(ends)])


def test_greedy_equals_recomputing(model, greedy):
    prompts = random_tokens(2, 9)
    assert len(np.unique(greedy)) > 4
    np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=20, lengths=[9, 4]), greedy)
    np.testing.assert_array_equal(generate(model, prompts[:1], max_new_tokens=20), greedy[:1])
    assert hybridlm.generate is generate


def test_rows_end_with_eos(model, greedy):
    eos = int(greedy[0, 6])
    end = [int(np.argmax(row == eos)) if eos in row else 19 for row in greedy]
    new = np.asarray(generate(model, random_tokens(2, 9), max_new_tokens=20, lengths=[9, 4], eos_id=eos))
    for row in range(2):
        np.testing.assert_array_equal(new[row, : end[row] + 1], greedy[row, : end[row] + 1])
        assert (new[row, end[row] + 1 :] == eos).all()


def test_prompt_lengths_share_programs(model):
    generate(model, random_tokens(2, 5), max_new_tokens=3)
    programs = generation._prefill._cache_size(), generation._decode._cache_size()
    for tokens in (1, 7, 16):
        generate(model, random_tokens(2, tokens), max_new_tokens=3)
    assert programs == (generation._prefill._cache_size(), generation._decode._cache_size())


def test_sampling(model):
    prompts, key = np.tile(random_tokens(1, 6), (256, 1)), jax.random.key(0)
    log_p = np.asarray(jax.nn.log_softmax(model(prompts[:1])[0, -1]))
    first = np.asarray(generate(model, prompts, 1, temperature=2.0, key=key))[:, 0]
    np.testing.assert_array_equal(first, np.asarray(generate(model, prompts, 1, temperature=2.0, key=key))[:, 0])
    p = np.exp(log_p / 2) / np.exp(log_p / 2).sum()
    counts = np.bincount(first, minlength=VOCAB)
    assert ((counts - 256 * p) ** 2 / (256 * p)).sum() < 70  # chi squared of 28 degrees of freedom: p < 2e-5
    order = np.argsort(-log_p)
    top = np.asarray(generate(model, prompts, 1, temperature=5.0, top_k=3, key=key))[:, 0]
    assert set(top) == set(order[:3])
    nucleus = np.asarray(generate(model, prompts, 1, temperature=2.0, top_p=0.5, key=key))[:, 0]
    n_kept = int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1
    assert set(nucleus) <= set(order[:n_kept])
    assert len(set(nucleus)) > 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens_BT": np.zeros(3, np.int32)}, ValueError, r"tokens_BT must be \[batch, tokens\].*\(3,\)"),
        ({"tokens_BT": np.zeros((1, 3))}, TypeError, r"tokens_BT \(float64\)"),
        ({"tokens_BT": np.full((1, 3), VOCAB)}, ValueError, rf"holds {VOCAB}, outside of vocab_size \({VOCAB}\)"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens \(0\)"),
        ({"temperature": -1.0}, ValueError, r"temperature \(-1\.0\)"),
        ({"temperature": 1.0}, ValueError, "needs a key"),
        ({"top_k": 0}, ValueError, r"top_k \(0\)"),
        ({"top_p": 1.5}, ValueError, r"top_p \(1\.5\)"),
        ({"lengths": [4]}, ValueError, r"lengths \(4\.\.4\) must be in 1\.\.3"),
        ({"lengths": [1, 2]}, ValueError, r"lengths \(2,\) must have one entry"),
    ],
)
def test_errors(model, changes, error, message):
    with pytest.raises(error, match=message):
        generate(**{"model": model, "tokens_BT": np.zeros((1, 3), np.int32), "max_new_tokens": 2, **changes})
