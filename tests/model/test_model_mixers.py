# SPDX-License-Identifier: Apache-2.0
"""Every mixer: causal through gradients; a packed batch trains as its documents would alone; chunks are invisible."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import Mamba2
from tests.model.model_support import QUICK, VARIANTS, build, log_likelihoods, named, packed_rows, random_tokens, small
from tests.tolerances import check_close

PATTERNS = {name: ("XX", {"X": block}) for name, block in VARIANTS.items()} | {"hybrid": ("Mm*-aw", None)}


def make(name):
    pattern, blocks = PATTERNS[name]
    return build(small(pattern, blocks) if blocks else small(pattern))


@pytest.mark.parametrize("name", PATTERNS)
def test_causal_through_gradients(name):
    """The gradient of each token's output reaches every token up to it and none after it, in its row alone."""
    model, tokens_BT = make(name), random_tokens(2, 11)
    graphdef, params = nnx.split(model)

    def outputs(x_BTD):
        return run_sublayers(nnx.merge(graphdef, params), x_BTD)[0].sum(-1)

    x_BTD = model.embedding[...][tokens_BT]

    def jacobian(x_BTD):  # row by row: jax.lax.ragged_dot has no vmap over the rows of its results
        pull = jax.vjp(outputs, x_BTD)[1]
        return jax.lax.map(lambda weight_T: pull(weight_T)[0], jnp.eye(11))

    jacobian_TBSD = jax.jit(jacobian, compiler_options=QUICK)(x_BTD)
    reach_TBS = np.abs(np.asarray(jacobian_TBSD)).max(-1)
    assert not reach_TBS[:, 1].any()
    reach_TS = reach_TBS[:, 0]
    assert not np.triu(reach_TS, 1).any()
    seen = np.tril(np.ones((11, 11), bool))
    if name in ("mlp", "moe"):
        seen &= np.eye(11, dtype=bool)
    elif name == "window":  # two layers of self and two before
        seen &= ~np.tril(np.ones((11, 11), bool), -5)
    np.testing.assert_array_equal(reach_TS > 0, seen)


def run_sublayers(model, x_BTD):
    """The model behind its embedding."""
    from hybridlm.model.pattern import places

    embedded_BTD = x_BTD
    for symbol, place in zip(model.config.pattern, places(model.config.pattern), strict=True):
        graphdef, state = nnx.split(model.groups[place.group][place.position])
        sublayer = nnx.merge(graphdef, jax.tree.map(lambda a, place=place: a[place.repeat], state))
        x_BTD, _ = sublayer(x_BTD, None, None, embedded_BTD, model.shared.get(symbol))
    return x_BTD


@pytest.mark.parametrize("name", PATTERNS)
def test_packed_equals_separate(name):
    """Logits of every token, loss and all parameter gradients."""
    graphdef, params = nnx.split(make(name))
    packed = packed_rows()
    real = np.concatenate(packed.places)

    def together(params):
        scores = log_likelihoods(nnx.merge(graphdef, params), packed.tokens, packed.targets, packed.segment_ids)
        return scores.reshape(-1)[real].mean(), scores

    tokens, targets, mask = packed.alone()

    def apart(params):
        scores = log_likelihoods(nnx.merge(graphdef, params), tokens, targets)
        return jnp.where(mask, scores, 0).sum() / mask.sum(), scores

    (loss, scores), grads = jax.jit(jax.value_and_grad(together, has_aux=True), compiler_options=QUICK)(params)
    (expected, alone), expected_grads = jax.jit(jax.value_and_grad(apart, has_aux=True), compiler_options=QUICK)(params)
    for row, place in enumerate(packed.places):
        actual = scores.reshape(-1)[place]
        check_close(actual, alone[row, : len(place)], dtype="float32", what=f"scores of document {row}")
    check_close(loss, expected, dtype="float32", what="loss")
    for path, grad in named(expected_grads).items():
        check_close(named(grads)[path], grad, dtype="float32", what=f"gradient of {path}")


def test_no_segment_ids_are_all_ones():
    model, tokens_BT = make("hybrid"), random_tokens(2, 13)
    run = jax.jit(lambda model, tokens, ids: model(tokens, ids), compiler_options=QUICK)
    check_close(
        run(model, tokens_BT, np.ones((2, 13), np.int32)), run(model, tokens_BT, None), dtype="float32", what="logits"
    )


@pytest.mark.parametrize("chunk", [1, 5, 64, None])
def test_chunk_is_invisible(chunk):
    tokens_BT = random_tokens(2, 21)
    block = Mamba2(d_state=4, d_head=4, n_groups=2, chunk=8)

    def logits(block):
        return jax.jit(lambda model: model(tokens_BT), compiler_options=QUICK)(build(small("X", {"X": block})))

    check_close(logits(replace(block, chunk=chunk)), logits(block), dtype="float32", what="logits")


def test_positions_given_are_those_that_rotate():
    """Rotary attention sees differences of positions only: shifted positions change nothing, spread ones do."""
    model, tokens_BT = make("attention"), random_tokens(2, 9)
    run = jax.jit(lambda positions: model(tokens_BT, None, positions), compiler_options=QUICK)
    index_BT = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    expected = run(index_BT)
    check_close(run(index_BT + 40), expected, dtype="float32", what="logits")
    assert np.abs(run(3 * index_BT) - expected).max() > 1e-3
