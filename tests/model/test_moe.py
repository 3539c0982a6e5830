# SPDX-License-Identifier: Apache-2.0
"""MoE: routers against loops, experts against a dense loop over them, gradients included; sharding; statistics."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import MLP, Branch, ConfigError, MeshConfig, MoE, Parallel, Router
from hybridlm.layers.experts import routed_per_device
from hybridlm.layers.mlp import ACTIVATIONS, GATED
from hybridlm.layers.moe import MoEFeedForward, route
from hybridlm.model import init
from hybridlm.model.model import param_info
from hybridlm.model.statistics import statistics, summarise
from hybridlm.optim.muon import muon_dims
from hybridlm.plan.collectives import of_traced, totals
from pallas_kernels import assume_platform
from tests.model.model_support import QUICK, VARIANTS, build, log_likelihoods, named, random_tokens, small
from tests.tolerances import check_close

BLOCKS = {
    "jamba": MoE(n_experts=4, d_ff=6),
    "granite": MoE(n_experts=5, d_ff=6, router=Router(3, "softmax_after"), shared=MLP(7)),
    "qwen": MoE(4, 6, "geglu", Router(2, renormalise=True), MLP(7, "geglu"), shared_gate=True),
    "nemotron": VARIANTS["moe"],
    "inkling": MoE(4, 6, router=Router(2, "sigmoid", renormalise=True, scaling=2.0, selection_bias=True), sinks=2),
}
ROUTERS = {name: block.router for name, block in BLOCKS.items()} | {
    "deepseek_v2": Router(3, scaling=16.0, n_groups=4, top_groups=2, group_top=1),
    "bias": Router(2, "softmax_after", selection_bias=True),
    "all": Router(8, "sigmoid"),
}


def make(block, seed=0) -> MoEFeedForward:
    """A layer of width 8, float32, all of its parameters drawn."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray((0.5 * rng.normal(size=leaf.shape)).astype(np.float32))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: MoEFeedForward(block, 8, rngs=nnx.Rngs(0), dtype="float32")))
    return nnx.merge(graphdef, jax.tree.map(draw, shapes))


@jax.jit
def call(layer, x_BTD, ids=None):
    return layer(x_BTD, ids)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_choose_and_weigh_as_published(name):
    """Token by token, with sorted lists."""
    r, rng = ROUTERS[name], np.random.default_rng(0)
    n_experts = BLOCKS[name].n_experts if name in BLOCKS else 8
    logits, bias = rng.normal(size=(2, 9, n_experts)), 0.3 * rng.normal(size=n_experts)
    bias = bias if r.selection_bias else np.zeros(n_experts)
    experts, weights, _ = jax.jit(lambda a, b: route(r, a, b))(*(a.astype(np.float32) for a in (logits, bias)))
    for place in np.ndindex(2, 9):
        z = logits[place]
        scores = 1 / (1 + np.exp(-z)) if r.score == "sigmoid" else np.exp(z) / np.exp(z).sum()
        choice = list((z if r.score == "softmax_after" else scores) + bias)
        size = n_experts // r.n_groups
        groups = [sorted(choice[g * size : g * size + size])[-r.group_top :] for g in range(r.n_groups)]
        best = sorted(range(r.n_groups), key=lambda g: -sum(groups[g]))[: r.top_groups]
        chosen = sorted((e for e in range(n_experts) if e // size in best), key=lambda e: -choice[e])[: r.top_k]
        np.testing.assert_array_equal(experts[place], chosen)
        wanted = np.array([np.exp(z[e]) if r.score == "softmax_after" else scores[e] for e in chosen])
        wanted = wanted / wanted.sum() if r.renormalise or r.score == "softmax_after" else wanted
        np.testing.assert_allclose(weights[place], wanted * r.scaling, rtol=1e-5)


def dense(layer, x_BTD, real_BT):
    """Every expert on every token, weighed by what the router says: no sorting, no groups of rows."""
    c, w = layer.config, {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(layer))}
    act = ACTIVATIONS[GATED.get(c.activation, c.activation)]
    logits, E = x_BTD @ w["router"], c.n_experts
    experts, weights, _ = route(c.router, logits[..., :E], w.get("selection_bias"), logits[..., E:])
    weights, of_sinks = weights[..., : c.router.top_k], weights[..., c.router.top_k :]
    u = x_BTD if c.d_latent is None else x_BTD @ w["latent_in"] + w["latent_in_bias"][None, None]
    y = 0.0
    for e in range(c.n_experts):
        h = jnp.tensordot(u, w["w_in"][e], 1)
        h = act(h[:, :, 0]) * h[:, :, 1] if c.gated else act(h)
        y += (h @ w["w_out"][e]) * jnp.sum(weights * (experts == e), -1)[..., None] * real_BT[..., None]
    y = y if c.d_latent is None else y @ w["latent_out"] + w["latent_out_bias"][None, None]
    if c.shared is not None:
        h = jnp.tensordot(x_BTD, w["shared.w_in"], 1)
        h = act(h[:, :, 0]) * h[:, :, 1] if c.gated else act(h)
        gate = jax.nn.sigmoid(x_BTD @ w["shared_gate"]) if c.shared_gate else 1.0
        y += h @ w["shared.w_out"] * gate
    for j in range(c.sinks):
        h = act(x_BTD @ w["sink_in"][:, 0, j]) * (x_BTD @ w["sink_in"][:, 1, j])
        y += h @ w["sink_out"][j] * of_sinks[..., j, None]
    return y


def test_sinks_are_weighed_with_the_chosen():
    """The weights of both sum to the scaling, each a sigmoid over the sum of all; the bias is for the choice alone."""
    router, rng = BLOCKS["inkling"].router, np.random.default_rng(0)
    logits, sinks, bias = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 2)), rng.normal(size=4)
    experts, weights, _ = route(router, *(jnp.asarray(a, jnp.float32) for a in (logits, bias, sinks)))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    for place in np.ndindex(2, 3):
        chosen = sorted(range(4), key=lambda e: -(sigmoid(logits[place][e]) + bias[e]))[:2]
        np.testing.assert_array_equal(experts[place], chosen)
        wanted = np.concatenate([sigmoid(logits[place][chosen]), sigmoid(sinks[place])])
        np.testing.assert_allclose(weights[place], 2.0 * wanted / wanted.sum(), rtol=1e-5)
    with pytest.raises(ConfigError, match=r"^sinks \(1\) need router.score=sigmoid and router.renormalise$"):
        MoE(4, 6, sinks=1)


@pytest.mark.quick
@pytest.mark.parametrize(("name", "platform"), [*((name, "cpu") for name in BLOCKS), ("granite", "gpu")])
def test_equals_a_dense_loop_over_experts(name, platform):
    """Outputs, and gradients of the input and of every parameter. On a GPU weights multiply before the last product."""
    block = BLOCKS[name]
    graphdef, state = nnx.split(make(block))
    rng = np.random.default_rng(1)
    x_BTD, weight = (rng.normal(size=(2, 7, 8)).astype(np.float32) for _ in range(2))
    ids = np.array([[1] * 7, [2] * 4 + [0] * 3], np.int32)

    def run(oracle, state, x):
        layer = nnx.merge(graphdef, state)
        y = dense(layer, x, ids != 0) if oracle else layer(x, ids)[0]
        return jnp.sum(y * weight), y

    grad = jax.jit(jax.value_and_grad(run, argnums=(1, 2), has_aux=True), static_argnums=0, compiler_options=QUICK)
    with assume_platform(platform):
        (_, y), (grads, dx) = grad(False, state, x_BTD)
    (_, wanted), (wanted_grads, wanted_dx) = grad(True, state, x_BTD)
    check_close(y, wanted, dtype="float32", what="output")
    check_close(dx, wanted_dx, dtype="float32", what="gradient of x")
    for path, value in named(wanted_grads).items():
        check_close(named(grads)[path], value, dtype="float32", what=f"gradient of {path}")
        assert np.any(value) == (path != "selection_bias")


def sharded_step(config, mesh_config, n_devices, batch):
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:n_devices])
    graphdef, params = nnx.split(init.init_sharded(config, mesh, seed=3))

    def loss(params, tokens, targets, ids):
        model = nnx.merge(graphdef, params)
        stats = summarise(config, model.hidden_with_stats(tokens, ids)[1])
        scores = log_likelihoods(model, tokens, targets, ids)
        return (scores * (ids != 0)).mean() + stats["router_loss"], stats

    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
        (value, stats), grads = step(params, *batch)
    return value, stats, named(grads)


DIVISIBLE = {
    "E": replace(BLOCKS["nemotron"], n_experts=12, d_ff=6, shared=MLP(6, "relu2")),
    "G": replace(BLOCKS["granite"], n_experts=4, shared=MLP(8)),
}
SHARDED = replace(small("E", DIVISIBLE), vocab_size=32, init_std=0.3)
IDS = np.array([[1] * 5 + [2] * 7, [1] * 10 + [0] * 2] * 4, np.int32)
BATCH = [random_tokens(8, 12), random_tokens(8, 12, seed=1), IDS]


@pytest.fixture(scope="module")
def one():
    return sharded_step(SHARDED, MeshConfig(1), 1, BATCH)


SPLIT = {
    "fsdp 2, expert 4": MeshConfig(1, fsdp=2, expert=4),
    "fsdp 2, tensor 2, expert 2": MeshConfig(1, fsdp=2, tensor=2, expert=2),
    "data 2, context 2, expert 2": MeshConfig(2, context=2, expert=2),
    "data 4, tensor 2": MeshConfig(4, tensor=2),
}


@pytest.mark.slow  # one mesh by default: test_mixers.py
@pytest.mark.parametrize("mesh", SPLIT)
def test_one_device_equals_eight(mesh, one):
    value, stats, grads = sharded_step(SHARDED, SPLIT[mesh], 8, BATCH)
    check_close(value, one[0], dtype="float32", what="loss")
    for name, number in one[1].items():
        check_close(stats[name], number, dtype="float32", what=name)
    assert stats["router_dropped"] == 0
    for path, grad in one[2].items():
        check_close(grads[path], grad, dtype="float32", what=f"gradient of {path}")


TOKENS = np.arange(48).reshape(4, 12, 1)
ROUTINGS = {
    "even": np.concatenate([2 * TOKENS, 2 * TOKENS + 1], axis=-1) % 8,
    "most to few": np.concatenate([TOKENS % 8 * (TOKENS % 3 == 0), 7 - TOKENS % 4 // 2], axis=-1),
    "all to one": np.broadcast_to([5, 4], (4, 12, 2)),
    "one row to none": np.where(TOKENS // 12 == 2, 8, np.concatenate([TOKENS, TOKENS + 3], axis=-1) % 8),
}
"""Experts of 48 tokens; 8 is none."""


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def over_four(request):
    """(x, experts, weights, matrices) -> value, (output, kept), gradients: over four devices, as on a platform."""
    mesh = sharding.make_mesh(MeshConfig(1, expert=4), jax.devices()[:4])

    def loss(arrays, experts_BTk, dy_BTD):
        x_BTD, weights_BTk, w_in, w_out = arrays
        sizes = {"n_experts": 8, "d_ff": 6, "capacity": None}
        y_BTD, kept = routed_per_device(x_BTD, experts_BTk, weights_BTk, w_in, w_out, jax.nn.silu, **sizes)
        return jnp.sum(y_BTD * dy_BTD), (y_BTD, kept)

    def run(*arrays):
        with jax.set_mesh(mesh), assume_platform(request.param):
            return step(*arrays)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    return run


@functools.partial(jax.jit, compiler_options=QUICK)
@functools.partial(jax.value_and_grad, has_aux=True)
def every_expert(arrays, experts_BTk, dy_BTD):
    """The same on one device: every expert on every token."""
    x_BTD, weights_BTk, w_in, w_out = arrays
    h = jnp.einsum("btd,edsf->besft", x_BTD, w_in)
    y_BETD = jnp.einsum("beft,efd->betd", jax.nn.silu(h[:, :, 0]) * h[:, :, 1], w_out)
    y_BTD = jnp.einsum("betd,btke,btk->btd", y_BETD, jax.nn.one_hot(experts_BTk, 8), weights_BTk)
    return jnp.sum(y_BTD * dy_BTD), y_BTD


@pytest.mark.parametrize("name", ROUTINGS)
def test_any_routing_over_a_mesh(name, over_four):
    """Outputs and gradients of all operands beside every expert on every token. An even load fits a round of rows,
    tokens that all want the experts of one device take nine."""
    rng = np.random.default_rng(0)
    experts_BTk, shapes = ROUTINGS[name], [(4, 12, 8), (4, 12, 2), (8, 8, 2, 6), (8, 6, 8), (4, 12, 8)]
    *arrays, dy_BTD = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    experts_BTk = experts_BTk.astype(np.int32)
    (_, (y_BTD, kept)), grads = over_four(arrays, experts_BTk, dy_BTD)
    (_, y_wanted), grads_wanted = every_expert(arrays, experts_BTk, dy_BTD)
    np.testing.assert_array_equal(kept, experts_BTk < 8)
    check_close(y_BTD, y_wanted, dtype="float32", what="output")
    for what, grad, expected in zip(("x", "weights", "w_in", "w_out"), grads, grads_wanted, strict=True):
        check_close(grad, expected, dtype="float32", what=f"gradient of {what}")


def test_tokens_cross_an_expert_axis_once():
    """Forward and back, as many tokens as there are, not as many as have experts: k = 3 of them."""
    layer = make(replace(BLOCKS["granite"], n_experts=8))
    graphdef, state = nnx.split(layer)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, expert=4), jax.devices()[:4])):
        loss = lambda state, x_BTD: nnx.merge(graphdef, state)(x_BTD)[0].sum()
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(state, jnp.ones((4, 10, 8)))
    numbers = {kind: n.bytes // 4 for kind, n in totals(of_traced(traced), by_axes=False).items()}
    tokens, routing = 40 * 8, 40 * 3
    assert numbers["all-gather"] == 2 * tokens + 2 * routing  # x and the gradient of y; experts and weights
    assert numbers["reduce-scatter"] == 2 * tokens + 2 * routing
    assert "all-to-all" not in numbers


@pytest.mark.slow
def test_two_kinds_of_experts_on_a_mesh():
    config = replace(small("GE", DIVISIBLE), vocab_size=32, init_std=0.3)
    expected, actual = (
        sharded_step(config, mesh, n, BATCH) for mesh, n in ((MeshConfig(1), 1), (MeshConfig(1, fsdp=2, expert=4), 8))
    )
    for path, grad in expected[2].items():
        check_close(actual[2][path], grad, dtype="float32", what=f"gradient of {path}")


def test_rows_that_the_mesh_does_not_divide():
    """One row over eight devices: every device does all of it."""
    config = replace(small("E", {"E": BLOCKS["jamba"]}), vocab_size=32)
    mesh = sharding.make_mesh(MeshConfig(2, expert=4))
    model = init.init_sharded(config, mesh, seed=3)
    tokens_BT, run = random_tokens(1, 5), jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICK)
    with jax.set_mesh(mesh):
        sharded = np.asarray(run(model, tokens_BT))
    alone = jax.device_put(nnx.state(model), jax.devices()[0])
    check_close(sharded, run(nnx.merge(nnx.graphdef(model), alone), tokens_BT), dtype="float32", what="logits")


def test_capacity_drops_what_does_not_fit_and_counts_it(monkeypatch):
    """All tokens want the same two experts, of one device; room for twice an even load is room for half of them."""
    mesh = sharding.make_mesh(MeshConfig(1, expert=4), jax.devices()[:4])
    x_BTD = np.random.default_rng(0).normal(size=(4, 32, 8)).astype(np.float32)
    layer = make(replace(BLOCKS["jamba"], n_experts=8, router=Router(2, "sigmoid", selection_bias=True)))
    layer.selection_bias[...] = jnp.array([9.0, 9.0, 0, 0, 0, 0, 0, 0])
    graphdef, state = nnx.split(layer)

    def run(capacity):
        layer = nnx.merge(graphdef, state)
        layer.config = replace(layer.config, capacity=capacity)
        with jax.set_mesh(mesh):
            return jax.jit(lambda x: layer(x), compiler_options=QUICK)(x_BTD)

    (whole, none), (part, some), (roomy, fits) = run(None), run(2.0), run(4.0)
    assert none["dropped"] == fits["dropped"] == 0
    check_close(roomy, whole, dtype="float32", what="output")
    assert none["max_load"] == 4
    room = 40  # 2 * 64 / 4 + 1, rounded up
    assert some["dropped"] == 4 * (64 - room)
    kept = np.isclose(part, whole, rtol=1e-4, atol=1e-6).all(axis=-1)  # last bits differ by CPU
    assert kept.sum() == 4 * (room - 32)  # expert 0 is first in the buffer, expert 1's later tokens are left out
    assert kept[:, : room - 32].all()


def test_statistics():
    layer, x_BTD = make(BLOCKS["jamba"]), np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    stats = call(layer, x_BTD)[1]
    p = np.exp(x_BTD @ np.asarray(layer.router[...]))
    p = (p / p.sum(-1, keepdims=True)).reshape(12, 4)
    share = np.mean([np.isin(range(4), np.argsort(row)[-2:]) for row in p], axis=0) / 2
    assert stats["balance"] == pytest.approx(4 * share @ p.mean(0), rel=1e-5)
    assert stats["max_load"] == pytest.approx(4 * share.max())
    assert stats["entropy"] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-5)
    ids = np.array([[1] * 6, [1] * 3 + [0] * 3], np.int32)
    noisy, clean = call(layer, np.where(ids[..., None] != 0, x_BTD, 100.0), ids), call(layer, x_BTD, ids)
    assert noisy[1] == clean[1]
    layer.router[...] = jnp.zeros((8, 4))
    even = call(layer, x_BTD)[1]
    assert even["balance"] == pytest.approx(1)
    assert even["z"] == pytest.approx(np.log(4) ** 2)
    assert even["max_load"] == 2  # ties go to the first two
    assert even["loss"] == pytest.approx(0.01 + 1e-3 * np.log(4) ** 2)


def test_losses_reach_the_router():
    layer, x_BTD = make(BLOCKS["jamba"]), np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    graphdef, state = nnx.split(layer)
    grads = jax.jit(jax.grad(lambda state: call(nnx.merge(graphdef, state), x_BTD)[1]["loss"]))(state)
    assert {path for path, grad in named(grads).items() if np.any(grad)} == {"router"}


def test_summary_over_layers():
    model, tokens_BT = build(small("EE-", {"E": BLOCKS["granite"], "-": VARIANTS["mlp"]})), random_tokens(2, 5)
    stats = jax.jit(lambda model: model.hidden_with_stats(tokens_BT)[1], compiler_options=QUICK)(model)
    values = np.concatenate([s["z"] for group in stats for s in group if s])
    assert values.shape == (2,)
    found = summarise(model.config, stats)
    assert found["router_z"] == pytest.approx(values.mean(), rel=1e-5)
    assert found["router_max_load"] == max(s["max_load"].max() for group in stats for s in group if s)
    mlps = small("--", {"-": VARIANTS["mlp"]})
    assert summarise(mlps, [[{}]]) == statistics(mlps) == {}


def test_experts_beside_another_mixer():
    """In a Parallel block their statistics come through, under the branch's name."""
    both = Parallel({"experts": Branch(BLOCKS["jamba"]), "mlp": Branch(VARIANTS["mlp"])})
    model, tokens_BT = build(small("P", {"P": both})), random_tokens(2, 5)
    stats = jax.jit(lambda model: model.hidden_with_stats(tokens_BT)[1], compiler_options=QUICK)(model)
    names = {f"router_{name}" for name in ("loss", "balance", "z", "entropy", "max_load", "dropped")}
    assert set(summarise(model.config, stats)) == set(statistics(model.config)) == names


def test_optimizer_sees_each_expert_as_a_matrix():
    flat = nnx.to_flat_state(param_info(make(BLOCKS["granite"])))
    info = {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}
    assert muon_dims(info["w_in"]) == ((1,), (3,))  # [E, D, 2, F]
    assert muon_dims(info["w_out"]) == ((1,), (2,))
    assert muon_dims(info["router"]) == ((0,), (1,))
    assert {info[name].kind for name in ("w_in", "w_out", "router")} == {"matrix"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, r"n_experts \(0\) must be positive"),
        ({"n_experts": 6, "router": Router(n_groups=4)}, r"n_experts \(6\) not divisible by router.n_groups \(4\)"),
        ({"n_experts": 8, "router": Router(3, n_groups=4)}, r"router.top_k \(3\) exceeds the 2 experts to choose from"),
        ({"shared_gate": True}, "shared_gate needs shared experts"),
        ({"latent_bias": True}, "latent_bias needs d_latent"),
        ({"z_weight": -1.0}, r"z_weight \(-1.0\) must not be negative"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        MoE(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k \(0\) must be positive"),
        ({"n_groups": 2, "top_groups": 3}, r"top_groups \(3\) must not exceed n_groups \(2\)"),
        ({"score": "softmax_after", "renormalise": True}, "softmax_after sums to one already"),
    ],
)
def test_routers_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        Router(**options)


def test_meshes_that_do_not_fit():
    config = replace(small("E", {"E": BLOCKS["granite"]}), vocab_size=32)
    with pytest.raises(ConfigError, match=r"model.blocks.E.n_experts \(5\) not divisible by mesh.expert \(2\)"):
        init.check_model(config, sharding.make_mesh(MeshConfig(4, expert=2)))
