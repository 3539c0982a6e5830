# SPDX-License-Identifier: Apache-2.0
"""Sublayers on shares of the rows, side by side, against all rows at once: values, gradients and a whole step."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.config import Attention, MoE, Shared
from hybridlm.layers.block import Output, Tokens
from hybridlm.model.row_parts import side_by_side
from hybridlm.plan import collectives
from tests.tolerances import check_close
from tests.train.conftest import make_batch, small_program

BLOCK = Attention(n_heads=2, n_kv_heads=1, d_head=2)


def toy(weights, shared, x_BTD, tokens):
    """A sublayer that reads the rows' ids and positions."""
    gate = jnp.tanh(x_BTD * weights["w"][None, None] + tokens.positions[..., None] * tokens.segment_ids[..., None])
    return Output(x_BTD + gate, {})


@pytest.mark.parametrize("n", [2, 3, 4])
def test_equals_all_rows_at_once(n):
    """Gradients of weights and stream included; 4 does not divide 6 rows, so that they stay together."""
    rng = np.random.default_rng(0)
    x_BTD, weights = rng.normal(size=(6, 3, 4)).astype(np.float32), {"w": rng.normal(size=4).astype(np.float32)}
    tokens = Tokens(*rng.integers(0, 5, (2, 6, 3)).astype(np.int32))
    runs = []

    def counted(weights, shared, x_BTD, tokens):
        runs.append(x_BTD.shape[0])
        return toy(weights, shared, x_BTD, tokens)

    def loss(call, weights, x_BTD):
        return jnp.sum(jnp.sin(call(weights, None, x_BTD, tokens).y_BTD) * jnp.arange(6.0)[:, None, None])

    of = lambda call: jax.value_and_grad(partial(loss, call), (0, 1))(weights, x_BTD)
    for a, b in zip(jax.tree.leaves(of(side_by_side(counted, BLOCK, n))), jax.tree.leaves(of(toy)), strict=True):
        check_close(a, b, dtype="float32", what="gradient")
    assert runs == ([6 // n] * n if 6 % n == 0 else [6])


def test_what_reads_the_batch_as_a_whole_is_not_split():
    """Experts, whose balance is one of all tokens; blocks that share weights; inspection; what is handed on."""
    for block in (MoE(n_experts=2, d_ff=4), Shared()):
        assert side_by_side(toy, block, 2) is toy
    assert side_by_side(toy, BLOCK, 1) is toy
    seen = []
    run = side_by_side(lambda *args: seen.append(args[2]), BLOCK, 2)
    x_BTD = jnp.zeros((4, 3, 2))
    for x, tokens in ((x_BTD, Tokens(inspect=True)), ((x_BTD, x_BTD), Tokens())):
        run(None, None, x, tokens)
        assert seen.pop() is x


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 2, 2), (1, 1, 1, 2)], ids=["tensor", "fsdp, tensor", "context"])
def test_a_step_over_devices_equals_one_device(sizes):
    """Three steps; over `tensor` each exchange of the stream becomes two of half the bytes."""

    def steps(words, sizes):
        config, mesh, program = small_program(("optim.name=adamw", *words), sizes)
        with jax.set_mesh(mesh):
            state, history = program.init(), []
            for step in range(3):
                batch = jax.device_put(make_batch(config, step), program.batch_sharding)
                state, metrics = program.train_step(state, batch)
                history.append(jax.device_get({name: metrics[name].value() for name in ("loss", "grad_norm")}))
            traced = program.train_step.trace(program.state_like, program.batch_like(config.data))
        return jax.device_get(state["params"]), history, collectives.totals(collectives.of_traced(traced))

    params, history, _ = steps((), (1, 1, 1))
    whole = steps((), sizes)[2]
    many, many_history, apart = steps(("model.row_parts=2",), sizes)
    for a, b in zip(many_history, history, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4)
    pairs = zip(jax.tree.leaves(many), jax.tree.leaves(params), strict=True)
    assert max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6) for a, b in pairs) < 5e-4
    if sizes[2] > 1:
        for kind in ("all-gather tensor", "reduce-scatter tensor"):
            assert apart[kind].runs > 1.5 * whole[kind].runs
            assert apart[kind].bytes == pytest.approx(whole[kind].bytes, rel=0.1)
