# SPDX-License-Identifier: Apache-2.0
"""A program of loops against its sublayers one after the other, values and gradients."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.layers.block import Output, Tokens
from hybridlm.model import depth
from hybridlm.model.pattern import loops, spans, spots
from pallas_kernels import assume_platform
from tests.tolerances import check_close

B, T, D = 2, 3, 4
PATTERN = "aab" * 2 + "c"


def toy(weights, shared, x_BTD, tokens):
    """A sublayer that reads all it can: its weights, what its symbol shares, the tokens' ids and the embedding."""
    more = 0.0 if shared is None else shared["s"]
    gate = jnp.tanh(x_BTD * weights["w"][None, None] + tokens.embedded_BTD * more + tokens.positions[:, :, None])
    return Output(x_BTD + gate * weights["v"], {"n": jnp.sum(tokens.positions), "mean": jnp.mean(gate)})


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    n = len(PATTERN)
    weights = {"w": rng.normal(size=(n, D)).astype(np.float32), "v": rng.normal(size=n).astype(np.float32)}
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    shared = {"b": {"s": np.float32(0.3)}}
    positions = rng.integers(0, 2, (B, T)).astype(np.int32)
    return weights, x_BTD, shared, positions


def one_by_one(weights, x_BTD, shared, positions):
    tokens, means = Tokens(positions=positions, embedded_BTD=x_BTD), []
    for i, symbol in enumerate(PATTERN):
        out = toy(jax.tree.map(lambda a, i=i: a[i], weights), shared.get(symbol), x_BTD, tokens)
        x_BTD = out.y_BTD
        means.append(out.stats["mean"])
    return jnp.sum(jnp.sin(x_BTD)) + jnp.sum(jnp.stack(means) * jnp.arange(1.0, len(PATTERN) + 1))


@cache
def by_hand():
    """Value and gradients."""
    return jax.jit(jax.value_and_grad(one_by_one, (0, 1, 2)))(*inputs())


def in_loops(weights, x_BTD, shared, positions, *, unroll, sums=None, span=1):
    of_spot = spots(PATTERN, unroll)
    stacked = [jax.tree.map(lambda a, s=spot: a[np.array(s.depths)], weights) for spot in of_spot]
    tokens = Tokens(positions=positions, embedded_BTD=x_BTD)
    run = depth.run if span == 1 else partial(depth.run_in_spans, length=span)
    args = {"weights": stacked, "x_BTD": x_BTD, "shared": shared, "tokens": tokens, "sums": sums}
    x_BTD, stats = run(loops(PATTERN, unroll), calls=[toy] * len(of_spot), **args)
    factors = [jnp.array([depth + 1.0 for depth in spot.depths]) for spot in of_spot]
    assert all(s["n"].shape == (len(spot.depths),) for s, spot in zip(stats, of_spot, strict=True))
    return jnp.sum(jnp.sin(x_BTD)) + sum(jnp.sum(s["mean"] * f) for s, f in zip(stats, factors, strict=True))


@pytest.mark.parametrize(("unroll", "span"), [(1, 1), (2, 1), (9, 1), (1, 2), (9, 2), (9, 3), (9, 99)])
def test_equals_one_by_one(unroll, span):
    *floats, positions = inputs()
    expected, loss = by_hand(), partial(in_loops, positions=positions, unroll=unroll, span=span)
    value, plain = jax.jit(lambda *a: (jax.value_and_grad(loss, (0, 1, 2))(*a), loss(*a)))(*floats)
    assert jax.tree.structure(value) == jax.tree.structure(expected)
    for path, want in jax.tree_util.tree_leaves_with_path(expected):
        got = dict(jax.tree_util.tree_leaves_with_path(value))[path]
        check_close(got, want, dtype="float32", what=jax.tree_util.keystr(path))
    check_close(plain, expected[0], dtype="float32", what="value without a gradient")


def test_a_span_keeps_its_first_input_alone():
    """Beside what comes in: of 7 sublayers in spans of 3 the inputs of 2, where otherwise each keeps what it needs."""
    weights, x_BTD, shared, positions = inputs()

    def kept(span):
        run = partial(in_loops, weights, shared=shared, positions=positions, unroll=9, span=span)
        backward = jax.eval_shape(lambda x_BTD: jax.vjp(run, x_BTD)[1], x_BTD)
        return sum(leaf.shape[-3:] == x_BTD.shape for leaf in jax.tree.leaves(backward))

    assert [len(loop.spots()) for (loop,) in spans(loops(PATTERN, 9), 3)] == [3, 3, 1]
    assert kept(3) < kept(1)


@pytest.mark.parametrize(("unroll", "span"), [(1, 1), (9, 3)])
def test_gradients_are_added_to_sums_in_their_type(unroll, span):
    weights, x_BTD, shared, positions = inputs()
    of_spot = spots(PATTERN, unroll)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights)
    start = [jax.tree.map(lambda a, s=s: np.ones((len(s.depths), *a.shape[1:]), np.float32), weights) for s in of_spot]

    def loss(weights, sums):
        return in_loops(weights, x_BTD, shared, positions, unroll=unroll, sums=sums, span=span)

    of_weights, of_sums = jax.jit(jax.grad(loss, (0, 1)))(low, start)
    alone = jax.jit(jax.grad(lambda w: in_loops(w, x_BTD, shared, positions, unroll=unroll)))(low)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_weights))
    for spot, total in zip(of_spot, of_sums, strict=True):
        for name, array in total.items():
            assert array.dtype == np.float32
            expected = 1.0 + np.asarray(alone[name], np.float32)[np.array(spot.depths)]
            np.testing.assert_array_equal(array, expected, err_msg=f"{spot} {name}")


@pytest.mark.parametrize("unroll", [1, 9])
@pytest.mark.parametrize("differentiate", [True, False])
def test_each_kind_is_traced_once(unroll, differentiate, monkeypatch):
    """Whatever the depths; on a mesh, too, of which shapes alone know nothing."""
    traced = []
    plain = toy
    monkeypatch.setitem(globals(), "toy", lambda *args: traced.append(args[1] is not None) or plain(*args))
    loss = partial(in_loops, unroll=unroll)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        arrays = jax.device_put(inputs(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        jax.jit(jax.grad(loss) if differentiate else loss).trace(*arrays)
    assert sorted(traced) == [False, False, True]  # a, c and b, which alone has something shared


def test_kept_arrays_have_their_tokens_behind_on_a_tpu():
    """Whatever stands between tokens and the last dim moves in front of both; small or narrow arrays stay."""
    traced = lambda shape: str(jax.make_jaxpr(lambda a: depth._laid_out(a))(jnp.zeros(shape)))
    pinned = lambda *shape: traced(shape).partition("major_to_minor=")[2]
    with assume_platform("tpu", generation="v5p"):
        assert pinned(4, 64, 2, 256).startswith("(0, 2, 1, 3)")
        assert pinned(1, 64, 256).startswith("(0, 1, 2)")
        assert not pinned(1, 64, 96) and not pinned(64, 256)
    assert not pinned(4, 64, 2, 256)
