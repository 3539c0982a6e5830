# SPDX-License-Identifier: Apache-2.0
"""Against the published implementations: logits, packed logits, greedy tokens, loss and gradient norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybridlm
from tests.model import golden_support
from tests.model.model_support import QUICK, named

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module", params=golden_support.FAMILIES)
def case(request):
    return golden_support.load(request.param)


def test_logits(case):
    model, golden, _ = case
    logits = jax.jit(lambda tokens: model(tokens), compiler_options=QUICK)(golden["input_ids"].astype(np.int32))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-4)


def test_packed_logits(case):
    model, golden, _ = case
    split = int(golden["packed_split"])
    ids = np.where(np.arange(17) < split, 1, 2).astype(np.int32)[None]
    tokens = golden["input_ids"][:1].astype(np.int32)
    logits = jax.jit(lambda tokens: model(tokens, ids), compiler_options=QUICK)(tokens)
    np.testing.assert_allclose(logits[0], golden["packed_logits"], rtol=0, atol=2e-4)


def test_greedy_tokens(case):
    model, golden, _ = case
    new = hybridlm.generate(model, golden["input_ids"].astype(np.int32), max_new_tokens=8)
    np.testing.assert_array_equal(new, golden["greedy_ids"])


def test_loss_and_gradient_norms(case):
    model, golden, meta = case
    graphdef, params = nnx.split(model)
    tokens = jnp.asarray(golden["input_ids"], jnp.int32)

    def loss(params):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    assert float(value) == pytest.approx(float(golden["loss"]), rel=1e-5)
    grads = named(grads)
    for name, norm in meta["grad_norms"].items():
        assert golden_support.gradient_norm(model.config, grads, name) == pytest.approx(norm, rel=1e-3), name
