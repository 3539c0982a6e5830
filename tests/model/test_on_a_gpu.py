# SPDX-License-Identifier: Apache-2.0
"""What layers compute otherwise for a GPU, in plain array operations that run anywhere, against what they do elsewhere
and against float64."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import MeshConfig
from hybridlm.layers import norm, qk_norm
from hybridlm.layers.attention import Attention
from hybridlm.layers.block import Make, Tokens
from hybridlm.layers.mlp import MLP
from hybridlm.layers.norm import GATES, gated_rms_norm, rms_normalise
from hybridlm.layers.qk_norm import is_faster, normed_and_rotated
from hybridlm.layers.quantized import Joined
from hybridlm.layers.rope import Rope, YaRN
from hybridlm.layers.segments import with_padding_last
from hybridlm.model.config import ModelConfig
from hybridlm.model.sublayer import Sublayer
from pallas_kernels import assume_platform
from pallas_kernels.platform import platform
from tests.ops.interpreter import interpreted, needs_gpu_interpreter
from tests.tolerances import check_close

RNG = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return jnp.asarray(RNG.standard_normal(shape, np.float32).astype(dtype))


def both(function, *args) -> list[list]:
    """Result and gradients of random weights of it, for a GPU and for a CPU."""
    d_out, found = normal(*jax.eval_shape(function, *args).shape), []
    for where in (assume_platform("gpu", capability="8.0"), contextlib.nullcontext()):

        def run(*args):
            out, pull = jax.vjp(lambda *args: function(*args), *args)  # anew: each platform is traced
            return [out, *jax.tree.leaves(pull(d_out.astype(out.dtype)))]

        with where:
            found.append(jax.jit(run)(*args))
    return found


def check(function, *args, dtype="float32"):
    for i, (actual, expected) in enumerate(zip(*both(function, *args), strict=True)):
        assert actual.dtype == expected.dtype
        check_close(actual, expected, dtype=dtype, what=f"result or gradient {i}")


ROPES = {
    "none": None, "whole": Rope(), "half": Rope(fraction=0.5), "scaled": Rope(scaling=YaRN()),
    "interleaved": Rope(interleaved=True),
}  # fmt: skip


OTHERS = [pytest.param(rope, "bfloat16", marks=pytest.mark.slow) for rope in ("half", "scaled", "interleaved")]


@pytest.mark.parametrize(
    "how",
    [{}, {"qk_norm_offset": 1.0}, {"qk_norm_over": "all"}, {"qk_norm_rotated": True}],
)
@pytest.mark.parametrize(
    ("rope", "dtype"),
    [*((rope, "float32") for rope in ROPES), ("none", "bfloat16"), ("whole", "bfloat16"), *OTHERS],
)
def test_queries_and_keys(rope, how, dtype):
    """Norm and rotation are one function where all of a head is rotated, behind its own norm."""
    block = Attention(n_heads=3, d_head=8, rope=ROPES[rope], qk_norm=True, **how)
    graphdef, state = nnx.split(block.build(16, Make(nnx.Rngs(0), 0.02, 0.02, dtype, 1e-5)))
    positions_BT = jnp.asarray(RNG.integers(0, 5000, (2, 5)))
    x_BTHP = normal(2, 5, 3, 8, dtype=dtype).at[0, 1].set(0)  # heads of zeros: the root is that of eps

    def run(x, w):
        with_w = jax.tree.map_with_path(lambda path, a: w if "q_norm" in jax.tree_util.keystr(path) else a, state)
        mixer = nnx.merge(graphdef, with_w)
        return mixer._placed(x, mixer.q_norm, positions_BT, "q")

    w = state["q_norm"]["weight"].get_value()
    check(run, x_BTHP, w + normal(*w.shape) / 4, dtype=dtype)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_queries_times_their_scale(scale):
    """The whole mixer."""
    block = Attention(n_heads=4, n_kv_heads=2, d_head=8, qk_norm=True, scale=scale, softcap=3.0, gate="head")
    graphdef, state = nnx.split(block.build(16, Make(nnx.Rngs(0), 0.2, 0.2, "float32", 1e-5)))
    check(lambda x, state: nnx.merge(graphdef, state).mix(x, Tokens()).y_BTD, normal(2, 9, 16), state)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rope", ["none", "whole"])
def test_queries_and_keys_in_kernels(rope, wide, monkeypatch):
    """As `pallas_kernels.head_norm` is called; a gradient in float32 comes beside the other, or in its place."""

    def head_norm(x_RHP, weight_P, turn_RcC, eps, factor):
        y = rms_normalise(x_RHP, eps) * (weight_P * factor)[None, None]
        if turn_RcC is not None:
            cos, sin = (turn_RcC[:, i, None] for i in range(2))
            first, second = jnp.split(y, 2, axis=-1)
            y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return y.astype(x_RHP.dtype)

    def head_norm_gradients(x_RHP, weight_P, turn_RcC, dy_RHP, eps, factor):
        wide_x = x_RHP.astype(jnp.float32)
        dx, d_weight = jax.vjp(lambda x, w: head_norm(x, w, turn_RcC, eps, factor), wide_x, weight_P)[1](dy_RHP)
        return dx.astype(x_RHP.dtype), d_weight

    positions_BT, x, w = jnp.asarray(RNG.integers(0, 5000, (2, 5))), normal(2, 5, 3, 8), 1 + normal(8) / 4

    def run(x, w):
        args = x, w, positions_BT, ROPES[rope], 1e-6, "attention_q", "heads"
        if not wide:
            return normed_and_rotated(*args)
        y, same = normed_and_rotated(*args, factor=0.3, wide=True)
        return jnp.concatenate([y * 2, same])

    before = RNG.bit_generator.state
    in_passes = both(run, x, w)[0]
    called = []
    for kernel in (head_norm, head_norm_gradients):
        said = lambda *args, kernel=kernel, **more: called.append(kernel) or kernel(*args, **more)
        monkeypatch.setattr(qk_norm.head_norm, kernel.__name__, said)
    monkeypatch.setattr(qk_norm.head_norm, "why_not", lambda *_: None)
    monkeypatch.setattr(norm, "LEAST", 0)
    RNG.bit_generator.state = before
    in_kernels = both(run, x, w)[0]
    assert {head_norm, head_norm_gradients} == set(called)
    for actual, expected in zip(in_kernels, in_passes, strict=True):
        check_close(actual, expected, dtype="float32", what="result or gradient")


@needs_gpu_interpreter
def test_keys_beside_values(monkeypatch):
    """The mixer by kernels, interpreted, which read keys and values in the array of their one product, and put both
    gradients into one, beside plain arrays in float32."""
    monkeypatch.setattr(norm, "LEAST", 0)
    D, K, P, called = 48, 2, 64, []
    block = Attention(n_heads=4, n_kv_heads=K, d_head=P, qk_norm=True)
    wide, mixer = (nnx.split(block.build(D, Make(nnx.Rngs(0), 0.2, 0.2, of, 1e-5))) for of in ("float32", "bfloat16"))
    x, d_out = (jnp.asarray(RNG.standard_normal((1, 80, D)), jnp.bfloat16) for _ in range(2))
    w_kv = jnp.stack([wide[1][name].get_value() for name in ("w_k", "w_v")], axis=1).astype(jnp.bfloat16)
    tokens = Tokens(jnp.asarray([1] * 30 + [2] * 50, jnp.int32)[None])

    def mix(of, x, matrices, w_norm):
        values = {("w_k",): matrices[0], ("w_v",): matrices[1], ("k_norm", "weight"): w_norm}
        flat = [(path, leaf.replace(values.get(path, leaf.get_value()))) for path, leaf in nnx.to_flat_state(of[1])]
        return nnx.merge(of[0], nnx.from_flat_state(flat)).mix(x, tokens).y_BTD

    def apart(x, w_kv, w_norm):
        return mix(wide, x, (w_kv[:, 0], w_kv[:, 1]), w_norm)

    def together(x, w_kv, w_norm):
        joined = [Joined(None if i else w_kv.reshape(D, 1, -1), ((K, P),) * 2, i) for i in range(2)]
        return mix(mixer, x, joined, w_norm)

    args, w_norm = (x, w_kv), jnp.asarray(1 + RNG.standard_normal(P) / 4, jnp.float32)
    expected, back = jax.vjp(apart, *(a.astype(jnp.float32) for a in args), w_norm)
    kernel, reading = qk_norm.keys_beside_values, lambda *given: called.append(given) or kernel(*given)
    monkeypatch.setattr(qk_norm, "keys_beside_values", reading)
    with interpreted("attention", "gpu"):
        actual, pull = jax.vjp(together, *args, w_norm)
        grads = pull(d_out)
    assert called
    for a, b in zip([actual, *grads], [expected, *back(d_out.astype(jnp.float32))], strict=True):
        check_close(a, b, dtype="bfloat16", what="result or gradient")


def test_where_norm_and_rotation_are_one_function():
    served = [name for name, rope in ROPES.items() if is_faster(rope, 8)]
    with assume_platform("gpu", capability="8.0"):
        assert [name for name, rope in ROPES.items() if is_faster(rope, 8)] == ["none", "whole", "scaled"]
    assert not served  # on a CPU


@pytest.mark.parametrize("before_gate", [False, True])
@pytest.mark.parametrize("gating", ["silu", "sigmoid"])
@pytest.mark.parametrize("n_groups", [1, 2])
def test_gated_norm(n_groups, gating, before_gate):
    """Its roots are made again in the backward."""
    run = lambda y, z, w: gated_rms_norm(y, z, w, 1e-5, n_groups, before_gate, "float32", gating)
    check(run, normal(2, 5, 4, 8).at[0, 1].set(0), normal(2, 5, 4, 8), normal(4, 8))
    with assume_platform("gpu", capability="8.0"):
        kept = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *[normal(2, 5, 4, 8)] * 2, normal(4, 8))
    assert sorted(leaf.size for leaf in jax.tree.leaves(kept)) == [4 * 8, 320, 320]


def heads_in_kernels(monkeypatch) -> list:
    """Gated norms of heads by the definition of `pallas_kernels.gated_head_norm`, from here on, if for a GPU: which
    of both functions was called, and of how many rows."""

    def gated_head_norm(y_RP, z_RP, weight_P, eps, gating):
        return (rms_normalise(y_RP, eps) * weight_P[None] * GATES[gating](z_RP)).astype(y_RP.dtype)

    def gated_head_norm_gradients(y_RP, z_RP, weight_P, d_RP, eps, gating):
        return jax.vjp(lambda *args: gated_head_norm(*args, eps, gating), y_RP, z_RP, weight_P)[1](d_RP)

    called = []

    def saying(kernel, rows, *args, **more):
        called.append((kernel.__name__, len(rows)))
        return kernel(rows, *args, **more)

    for kernel in (gated_head_norm, gated_head_norm_gradients):
        monkeypatch.setattr(norm.gated_head_norm, kernel.__name__, partial(saying, kernel))
    monkeypatch.setattr(norm.gated_head_norm, "why_not", lambda *_: None if platform() == "gpu" else "no GPU")
    monkeypatch.setattr(norm, "LEAST", 10)
    return called


@pytest.mark.parametrize("gating", GATES)
def test_gated_norm_of_heads(gating, monkeypatch):
    """With one weight for all: without and with kernels, which keep what there is; roots on a CPU."""
    run = lambda y, z, w: gated_rms_norm(y, z, w, 1e-5, 4, True, "float32", gating)
    args = normal(2, 5, 4, 8).at[0, 1].set(0), normal(2, 5, 4, 8), normal(8)
    check(run, *args)
    called = heads_in_kernels(monkeypatch)
    check(run, *args)
    assert called == [("gated_head_norm", 40), ("gated_head_norm_gradients", 40)]
    with assume_platform("gpu", capability="8.0"):
        kept = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *args)
    assert sorted(leaf.size for leaf in jax.tree.leaves(kept)) == [8, 320, 320]


def test_gated_norms_that_no_kernel_of_heads_serves(monkeypatch):
    called, (y, z, w) = heads_in_kernels(monkeypatch), (normal(2, 5, 4, 8), normal(2, 5, 4, 8), normal(8))
    wide = jnp.broadcast_to(w, (4, 8))
    for args, n_groups, before_gate, dtype in [
        ((y, z, wide), 4, True, "float32"), ((y, z, w), 2, True, "float32"), ((y, z, w), 4, False, "float32"),
        ((y, z, w), 4, True, "bfloat16"), ((y[:, :4], z[:, :4], w), 4, True, "float32"),
    ]:  # fmt: skip
        more = 1e-5, n_groups, before_gate, dtype
        check(lambda y, z, w, more=more: gated_rms_norm(y, z, w, *more), *args, dtype=dtype)
    assert not called


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2, "context": 2}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_gated_norm_of_heads_of_several_devices(sizes, monkeypatch):
    """Each device by the kernels, its own heads of its own tokens."""
    called = heads_in_kernels(monkeypatch)
    args, d_out = (normal(4, 6, 4, 8), normal(4, 6, 4, 8), normal(8)), normal(4, 6, 4, 8)
    monkeypatch.setattr(norm, "LEAST", 6)

    def run(*args):
        out, pull = jax.vjp(lambda y, z, w: gated_rms_norm(y, z, w, 1e-5, 4, True, "float32"), *args)
        return out, *pull(d_out)

    expected = run(*args)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**{"data": 1, **sizes}))), assume_platform("gpu", capability="8.0"):
        found = jax.jit(lambda *args: run(*args))(*args)
    assert called == [("gated_head_norm", 12), ("gated_head_norm_gradients", 12)]
    for actual, wanted in zip(found, expected, strict=True):
        check_close(actual, wanted, dtype="float32", what="result or gradient")


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_what_is_added_to_the_stream(multiplier):
    """In rows, which a product adds to."""
    config = ModelConfig(
        vocab_size=8, d_model=16, pattern="-", blocks={"-": MLP(d_ff=8)}, compute_dtype="float32",
        residual_multiplier=multiplier,
    )  # fmt: skip
    graphdef, state = nnx.split(Sublayer("-", config, rngs=nnx.Rngs(0)))
    check(lambda x: nnx.merge(graphdef, state)(x, Tokens()).y_BTD, normal(2, 5, 16))


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_padding_is_moved_behind_real_tokens(where):
    """In their order, against NumPy; each platform does it another way."""
    segments = RNG.integers(0, 3, (5, 33)).astype(np.int32)
    batch = {"segment_ids": segments, "tokens": RNG.integers(0, 99, segments.shape).astype(np.int32)}
    with assume_platform(where):
        moved = jax.jit(lambda batch: with_padding_last(batch))(batch)  # anew: each platform is traced
    for name, rows in batch.items():
        expected = [np.concatenate([row[ids != 0], row[ids == 0]]) for row, ids in zip(rows, segments, strict=True)]
        np.testing.assert_array_equal(moved[name], np.stack(expected), name)
