# SPDX-License-Identifier: Apache-2.0
"""Caches: any way of feeding tokens in gives the logits of one full forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.model.init import abstract
from tests.model.model_support import QUICK, build, random_tokens, small
from tests.tolerances import check_close

T = 13
extend = jax.jit(lambda model, tokens, cache, ids=None: model.extend(tokens, cache, ids), compiler_options=QUICK)
forward = jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICK)


@pytest.fixture(scope="module")
def model():
    """All mixers, two of each, scanned; the window of 3 is shorter than the row."""
    return build(small("Mm*-aw" * 2))


@pytest.fixture(scope="module")
def expected(model):
    return np.asarray(forward(model, random_tokens(2, T)))


@pytest.mark.parametrize("sizes", [[T], [1] * T, [4, 4, 4, 1], [1, 4, 4, 4], [4, 1, 1, 4, 1, 1, 1]], ids=str)
def test_any_split_equals_the_full_forward(model, expected, sizes):
    tokens_BT, cache, start, logits = random_tokens(2, T), model.init_cache(2, T), 0, []
    for size in sizes:
        chunk, cache = extend(model, tokens_BT[:, start : start + size], cache)
        logits.append(chunk)
        start += size
    check_close(np.concatenate(logits, axis=1), expected, dtype="float32", what="logits")
    np.testing.assert_array_equal(cache.length_B, [T, T])


def test_ragged_prompts(model, expected):
    """Rows of different lengths, prefilled in two padded chunks and continued token by token."""
    tokens_BT, starts = random_tokens(2, T), np.array([7, 2])
    cache = model.init_cache(2, T)
    for first, last in ((0, 4), (4, 8)):
        ids = (np.arange(first, last) < starts[:, None]).astype(np.int32)
        noisy = np.where(ids, tokens_BT[:, first:last], 3)
        logits, cache = extend(model, noisy, cache, ids)
        for row in range(2):
            real = ids[row].astype(bool)
            what = f"logits of row {row} from {first}"
            if real.any():
                check_close(np.asarray(logits)[row][real], expected[row, first:last][real], dtype="float32", what=what)
    np.testing.assert_array_equal(cache.length_B, starts)
    for step in range(5):
        logits, cache = extend(model, tokens_BT[[0, 1], starts + step][:, None], cache)
        check_close(
            np.asarray(logits)[:, 0], expected[[0, 1], starts + step], dtype="float32", what=f"logits of step {step}"
        )


@pytest.mark.parametrize("tokens", [1, 4])
def test_padding_leaves_the_cache_as_it_is(model, tokens):
    _, cache = extend(model, random_tokens(2, 4), model.init_cache(2, T))
    ids = np.zeros((2, tokens), np.int32)
    ids[1] = 1
    _, after = extend(model, random_tokens(2, tokens), cache, ids)
    for old, new in zip(*(jax.tree.leaves(jax.device_get(c.groups)) for c in (cache, after)), strict=True):
        np.testing.assert_array_equal(new[:, 0], old[:, 0])
    np.testing.assert_array_equal(after.length_B, [4, 4 + tokens])


def test_padding_on_the_left_and_inside(model, expected):
    tokens_BT = np.array(
        [[9, 9, *random_tokens(2, T)[0, :2]], [random_tokens(2, T)[1, 0], 9, 9, random_tokens(2, T)[1, 1]]]
    )
    logits, cache = extend(model, tokens_BT, model.init_cache(2, T), np.array([[0, 0, 1, 1], [1, 0, 0, 1]]))
    logits = np.asarray(logits)
    check_close(logits[0, 2:], expected[0, :2], dtype="float32", what="left")
    check_close(logits[1, [0, 3]], expected[1, :2], dtype="float32", what="inside")
    np.testing.assert_array_equal(cache.length_B, [2, 2])


def test_states_are_float32_and_do_not_grow():
    model = abstract(small("Mmaw", compute_dtype="bfloat16")).model()
    short, long = (jax.eval_shape(lambda model, n=n: model.init_cache(1, n), model) for n in (8, 64))
    ((mamba, _, full, window),) = short.groups
    ((long_mamba, _, long_full, long_window),) = long.groups
    assert mamba["state"].dtype == jnp.float32
    assert full["k"].dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, mamba) == jax.tree.map(jnp.shape, long_mamba)
    assert window["k"].shape == long_window["k"].shape == (1, 1, 3, 2, 8)
    assert (full["k"].shape[2], long_full["k"].shape[2]) == (8, 64)


def test_decoding_in_bfloat16_follows_the_forward():
    model = build(small("M*-w", compute_dtype="bfloat16"))
    tokens_BT, cache, logits = random_tokens(2, T), model.init_cache(2, T), []
    for t in range(T):
        step, cache = extend(model, tokens_BT[:, t : t + 1], cache)
        logits.append(step)
    expected = np.asarray(forward(model, tokens_BT))
    error = np.concatenate(logits, axis=1) - expected
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.std(expected)


def test_more_than_max_len(model):
    cache = model.init_cache(2, T)
    for _ in range(3):
        _, cache = extend(model, random_tokens(2, 4), cache)
    with pytest.raises(ValueError, match=r"\(14\) exceed max_len \(13\)"):
        model.extend(random_tokens(2, 2), cache)
    logits, cache = extend(model, random_tokens(2, 1), cache)
    assert np.isfinite(logits).all()
    logits, _ = extend(model, random_tokens(2, 1), cache)
    assert np.isnan(logits).all()


def test_recurrent_models_have_no_limit():
    model, tokens_BT = build(small("Mw")), random_tokens(2, 8)
    _, cache = extend(model, tokens_BT[:, :4], model.init_cache(2, 3))
    logits, _ = extend(model, tokens_BT[:, 4:], cache)
    check_close(logits, np.asarray(forward(model, tokens_BT))[:, 4:], dtype="float32", what="logits beyond max_len")


@pytest.mark.parametrize(("batch", "max_len"), [(0, 4), (1, 0)])
def test_cache_sizes_are_positive(model, batch, max_len):
    with pytest.raises(ValueError, match=r"\(0\) must be positive"):
        model.init_cache(batch, max_len)
