# SPDX-License-Identifier: Apache-2.0
"""Matrices in eight bits: rounding and products against NumPy, models against those of the matrices they stand for."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from hybridlm import load_config
from hybridlm.config import MLP, Attention, ConfigError, MeshConfig, ModelConfig, QuantizeConfig
from hybridlm.layers import quantized
from hybridlm.layers.block import sees_ahead
from hybridlm.layers.params import contracted_axes
from hybridlm.layers.quantized import Quantized, Rounding, Wide
from hybridlm.model import init, quantize
from hybridlm.model.decoding import _prepared
from hybridlm.model.lora import flat, unflat
from hybridlm.model.model import HybridLM
from hybridlm.sharding import make_mesh, param_shardings
from pallas_kernels.oracle import relative_rms
from tests.model.model_support import ALIKE, APART, HYBRID, QUICK, VARIANTS, VOCAB, build, random_tokens, small
from tests.tolerances import check_close

pytestmark = pytest.mark.quantize
INT8, FP8 = QuantizeConfig("int8"), QuantizeConfig("fp8")
WHOLE = QuantizeConfig("int8", "int8")


def with_positive_ends(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Largest numbers positive: 127.5 steps are rounded to int8's 127; to -127 or -128 the last bit of a quotient."""
    largest = np.abs(array).max(axis=axes, keepdims=True)
    return np.where(np.abs(array) == largest, largest, array).astype(np.float32)


def by_hand(w: np.ndarray, contracted: tuple[int, ...], weights: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, scales): the largest of a channel stands at the end of the type, int8's being the middle of its last
    step, 127.5."""
    end = {"int8": np.float32(127.5), "fp8": np.float32(448.0)}[weights]
    scale = np.abs(w).max(axis=contracted, keepdims=True) / end
    scale = np.where(scale == 0, np.float32(1), scale)
    if weights == "int8":
        return np.clip(np.round(w / scale), -127, 127), scale
    return np.clip(w / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32), scale


def test_gradient_of_a_matrix_with_a_slot_is_not_rounded():
    """That of the slot is the product in float32; wherever else the matrix is read, its own gradient is as ever."""
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 7, 3, 4), (3, 4, 2, 5), (2, 7, 2, 5)))
    run = lambda x, w: quantized.dot(x, w, 2) + 3 * jnp.asarray(w[0, 0])[None, None]
    wide = Wide(w, jnp.zeros((1, *w.shape)))
    y, pull = jax.vjp(run, x, wide)
    plain, pull_plain = jax.vjp(run, x, w)
    np.testing.assert_array_equal(y, plain)
    (dx, dw), (dx_plain, dw_plain) = pull(dy), pull_plain(dy)
    np.testing.assert_array_equal(dx, dx_plain)
    exact = np.einsum("bthp,btco->hpco", *(np.asarray(a, np.float64) for a in (x, dy)))
    check_close(dw.slot[0], exact, dtype="float32", what="slot")
    elsewhere = np.zeros_like(exact)
    elsewhere[0, 0] = 3 * np.asarray(dy, np.float64).sum((0, 1))
    check_close(dw.value, elsewhere, dtype="bfloat16", what="value")
    check_close(dw_plain, exact + elsewhere, dtype="bfloat16", what="gradient")


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rounding_is_by_output_channel(weights):
    w = with_positive_ends(np.random.default_rng(0).normal(size=(2, 3, 8, 5)) * [1e-3, 1, 50, 1, 0], (0, 2))
    made = quantized.quantise(w, (0, 2), weights)
    values, scale = by_hand(w, (0, 2), weights)
    assert made.values.dtype == quantized.TYPES[weights] and made.scale.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(made.scale), scale, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(made.values, np.float32), values)
    assert relative_rms(made.dequantised(jnp.float32), w) < {"int8": 0.01, "fp8": 0.03}[weights]


def example(spec: str, contracted: tuple[int, ...], rows: int = 2, activations: str | None = None):
    """(x, the matrix in eight bits, its numbers in float64) of an einsum."""
    rng = np.random.default_rng(1)
    sizes = {"B": rows, "T": 3, "D": 300, "c": 2, "H": 4, "P": 6, "Q": 5, "R": 7}
    of_x, of_w = spec.split("->")[0].split(",")
    x, w = (rng.normal(size=[sizes[a] for a in letters]).astype(np.float32) for letters in (of_x, of_w))
    x = with_positive_ends(x, tuple(i for i, a in enumerate(of_x) if a not in spec.split("->")[1]))
    made = quantized.quantise(w, contracted, "int8")
    exact = np.asarray(made.values, np.float64) * np.asarray(made.scale, np.float64)
    return jnp.asarray(x), Quantized(made.values, made.scale, activations), exact


def cases(*few) -> list:
    """Each einsum, axes that its matrix contracts, inputs of `dot` or 0 for `einsum` alone; rows; activations."""
    specs = (
        ("BTD,DcHP->BTcHP", (0,), 1), ("BTHP,HPD->BTD", (0, 1), 2), ("BTHQ,QcHP->BTcHP", (0,), 0),
        ("BTcD,DcR->BTcR", (0,), 0),
    )  # fmt: skip
    every = [(*spec, rows, how) for spec in specs for rows in (2, 40) for how in (None, "int8")]
    return [case if i in few else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(every)]


@pytest.mark.parametrize(("spec", "contracted", "n", "rows", "activations"), cases(0, 7))
def test_products(spec, contracted, n, rows, activations):
    """Few rows and many, fused matrices and several axes."""
    x, w, exact = example(spec, contracted, rows, activations)
    summed = tuple(i for i, letter in enumerate(spec.split(",")[0]) if letter not in spec.split("->")[1])
    there = np.asarray(x, np.float64)
    if activations:
        values, scale = by_hand(np.asarray(x), summed, "int8")
        there = values.astype(np.float64) * scale
    expected = np.einsum(spec, there, exact)

    def check(y):
        if activations:  # a number of x at the edge of a step may fall to either side
            assert relative_rms(y, expected) < 1e-3
        else:
            check_close(y, expected, dtype="float32", what=spec)

    check(quantized.einsum(spec, x, w))
    low = quantized.einsum(spec, x.astype(jnp.bfloat16), w)
    assert low.dtype == jnp.bfloat16 and relative_rms(low.astype(jnp.float32), expected) < 2e-2
    if n:
        check(quantized.dot(x, w, n))


def test_parts_of_a_matrix_are_cut_where_each_has_its_scale():
    _, w, exact = example("BTD,DcHP->BTcHP", (0,))
    np.testing.assert_allclose(w[:, 1].dequantised(jnp.float32), exact[:, 1], rtol=1e-6)
    with pytest.raises(IndexError, match=r"cuts an axis of the quantised matrix \(300, 2, 4, 6\) that has one scale"):
        w[2:4]


def test_activations_are_rounded_with_the_gradient_of_the_float():
    x, w, exact = example("BTD,DcHP->BTcHP", (0,), activations="int8")
    near = Rounding(w.dequantised(jnp.float32))
    y, pull = jax.vjp(lambda x: quantized.dot(x, near), x)
    check_close(y, quantized.dot(x, w), dtype="float32", what="the product that a quantised model has")
    seen = np.random.default_rng(3).normal(size=y.shape).astype(np.float32)
    check_close(pull(jnp.asarray(seen))[0], np.einsum("BTcHP,DcHP->BTD", seen, exact), dtype="float32", what="gradient")


def test_products_of_training_in_fp8():
    """Forward and backward what arrays of two libraries' fp8 give, each with one scale; sums are float32's."""
    rng = np.random.default_rng(5)
    x, w, dy = (
        rng.normal(size=s).astype(np.float32) * scale
        for s, scale in (((6, 5, 96), 3), ((96, 2, 8), 0.1), ((6, 5, 2, 8), 1e-5))
    )

    def near(array, dtype, end):
        scale = np.abs(array).max() / np.float32(end)
        return (array / scale).astype(dtype).astype(np.float64) * scale

    x8, w8 = (near(a, ml_dtypes.float8_e4m3fn, 448) for a in (x, w))
    dy8 = near(dy, ml_dtypes.float8_e5m2, 57344)
    expected = {
        "y": np.einsum("btd,dch->btch", x8, w8),
        "dx": np.einsum("btch,dch->btd", dy8, w8),
        "dw": np.einsum("btch,btd->dch", dy8, x8),
    }
    y, pull = jax.vjp(lambda x, w: quantized.dot(x, Rounding(w, "fp8")), *map(jnp.asarray, (x, w)))
    for (name, exact), made in zip(expected.items(), (y, *pull(jnp.asarray(dy))), strict=True):
        check_close(made, exact, dtype="float32", what=name)
    exact = np.einsum("btd,dch->btch", x, w)
    assert 0.01 < relative_rms(y, exact) < 0.06
    kept = np.asarray(quantized.einsum("btd,dch->btch", jnp.asarray(x), Rounding(jnp.asarray(w), "fp8")))
    check_close(kept, exact, dtype="float32", what="other products")


# Models -------------------------------------------------------------------------------------------------------------


def stood_for(config, how, model) -> tuple[HybridLM, HybridLM]:
    """(the model quantised, the model of the matrices that it stands for)."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    small_types = quantize.parameters(config, how)(params)
    large = {
        path: leaf.dequantised(jnp.float32) if isinstance(leaf, Quantized) else leaf.astype(jnp.float32)
        for path, leaf in flat(small_types).items()
    }
    graphdef = quantize.abstract(config, how).graphdef
    return nnx.merge(graphdef, small_types), nnx.merge(init.abstract(config).graphdef, unflat(large))


def reading(graphdef, tokens_BT: np.ndarray, ahead: bool):
    """Parameters -> logits in parallel and, of models that decode, through the cache."""

    def read(params):
        model = nnx.merge(graphdef, params)
        found = [model(tokens_BT)]
        if not ahead:
            first, cache = model.extend(tokens_BT[:, :-1], model.init_cache(len(tokens_BT), tokens_BT.shape[1]))
            found += [first, model.extend(tokens_BT[:, -1:], cache)[0]]
        return found

    return read


def texts_read(model: HybridLM, tokens_BT: np.ndarray, ahead: bool) -> list[jax.Array]:
    """What `reading` gives of a model."""
    graphdef, params = nnx.split(model)
    return jax.jit(reading(graphdef, tokens_BT, ahead), compiler_options=QUICK)(params)


EVERY = [pytest.param(name, {name[0]: VARIANTS[name]}, id=name) for name in APART]
EVERY.append(pytest.param("M-*E1", HYBRID, id="hybrid"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks"), EVERY)
def test_models_compute_with_the_matrices_they_stand_for(name, blocks):
    """Every block, in each product of its matrices; a raw use of one would fail on the type."""
    config = small(name if blocks is HYBRID else 2 * name[0], blocks)
    few, large = stood_for(config, INT8, build(config))
    values = nnx.to_pure_dict(nnx.state(few, nnx.Param))
    like = quantize.abstract(config, INT8).shapes
    assert jax.tree.map(lambda a: (a.shape, a.dtype), values) == jax.tree.map(lambda a: (a.shape, a.dtype), like)
    assert any(isinstance(leaf, Quantized) for leaf in flat(values).values())
    tokens_BT, ahead = random_tokens(2, 9), bool(sees_ahead(config.blocks[name[0]]))
    for i, (a, b) in enumerate(
        zip(texts_read(few, tokens_BT, ahead), texts_read(large, tokens_BT, ahead), strict=True)
    ):
        check_close(a, b, dtype="float32", what=f"logits {i}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_no_option_uses_a_matrix_by_itself(name):
    """Of examples that differ in a line from one above, whose numbers are compared: each product takes eight bits."""
    config = small("XX", {"X": VARIANTS[name]})
    graphdef, few, _ = quantize.abstract(config, INT8)
    tokens_BT, ahead = random_tokens(2, 9), bool(sees_ahead(VARIANTS[name]))
    found = jax.eval_shape(reading(graphdef, tokens_BT, ahead), few)
    assert [logits.shape for logits in found] == [(2, n, VOCAB) for n in ([9] if ahead else [9, 8, 1])]


@pytest.mark.slow
@pytest.mark.parametrize("how", [FP8, WHOLE], ids=["fp8", "activations"])
def test_eight_devices_equal_one(how):
    """Values are split like their matrix, scales along its outputs. Activations are rounded by the part of a token that
    a device has."""
    config = replace(small("M-*EM-*E"), d_model=32, vocab_size=32)
    few, _ = stood_for(config, how, build(config))
    graphdef, params = nnx.split(few, nnx.Param)
    params, tokens_BT = nnx.to_pure_dict(params), random_tokens(4, 8)
    read = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens_BT), compiler_options=QUICK)
    alone = read(params)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices())
    with jax.set_mesh(mesh):
        info = quantize.abstract(config, how).info
        placed = jax.device_put(params, param_shardings(info, mesh))
        together = read(placed)
    assert all(
        not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed["groups"]) if leaf.dtype.itemsize == 1
    )
    assert relative_rms(together, alone) < (4e-2 if how.activations else 1e-5)


@pytest.mark.slow
def test_training_computes_what_the_quantised_model_will():
    """The program of a step, which rounds matrices and activations in float, is the model in eight bits."""
    config = small("M-*E", unroll=1)
    model = build(config)
    few, large = stood_for(config, WHOLE, model)
    params, exact = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, large))
    near = quantize.round_matrices(params, config, WHOLE)
    rounded = quantize.chosen(WHOLE, init.abstract(config).info)
    assert all(np.array_equal(flat(near)[path], flat(exact)[path]) for path in rounded)
    assert all(np.array_equal(leaf, flat(params)[path]) for path, leaf in flat(near).items() if path not in rounded)
    trained = nnx.merge(quantize.stacked_graphdef(config, WHOLE), _stacked(config, exact))
    tokens_BT = random_tokens(2, 9)
    small_types, floats, before = (texts_read(m, tokens_BT, True)[0] for m in (few, trained, large))
    beside = relative_rms(before, small_types)  # without rounding of activations
    assert beside > 1e-2  # a number at the edge of a step may fall to either side
    assert relative_rms(floats, small_types) < 0.25 * beside


def _stacked(config, params: dict) -> dict:
    model = nnx.merge(init.abstract(config).graphdef, params).stacked()
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_what_stays_as_it_is():
    """Recurrence parameters, routers, norms, convolutions, biases and sinks in float32, embeddings in bfloat16."""
    config = small("M-*E1w", tie_embeddings=False)
    how = QuantizeConfig("int8", keep=("in_dt", "w_[qk]"))
    _, shapes, info = quantize.abstract(config, how)
    kinds, left = flat(init.abstract(config).info), set()
    for path, value in flat(shapes).items():
        kind, name = kinds[path], path[-1]
        if isinstance(value, Quantized):
            left.add(name)
            assert kind.kind == "matrix" and value.shape == kind.shape and value.values.dtype == jnp.int8
            channels = [n for axis, n in enumerate(kind.shape) if axis not in contracted_axes(kind)]
            assert [n for n in value.scale.shape if n > 1] == [n for n in channels if n > 1]
        else:
            low = kind.kind in ("embedding", "matrix") and not kind.exact
            assert value.dtype == (jnp.bfloat16 if low else jnp.float32), path
    assert {"in_zx", "in_BC", "out", "w_in", "w_out", "w_v", "w_o", "x_proj"} <= left
    assert not left & {
        "in_dt",
        "w_q",
        "w_k",
        "router",
        "A_log",
        "dt_bias",
        "D",
        "conv",
        "weight",
        "embedding",
        "output",
    }
    assert jax.tree.structure(info) == jax.tree.structure(shapes)


def test_bytes_of_hybrid_8b():
    """16.2 GB in bfloat16, at most 9.3 GB with matrices in int8 (Nemotron-H: 18 to 9)."""
    model = load_config("hybrid_8b").model
    rows = {row.what: row for row in quantize.sizes(model, INT8)}
    before, after = (sum(getattr(row, name) for row in rows.values()) for name in ("before", "bytes"))
    assert 16.1e9 < before < 16.3e9 and after < 9.3e9
    assert sum(row.parameters for row in rows.values()) == 8_100_852_736
    assert rows["embeddings and output"].bytes == 2 * 2 * 131_072 * 4096
    leaves = jax.tree.leaves(quantize.abstract(model, INT8).shapes)
    assert after == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert rows["recurrence parameters"].dtype == rows["norms"].dtype == rows["convolutions"].dtype == "float32"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"activations": "int8"},
            r"quantize.activations \(int8\) needs quantised matrices: set --quantize.weights=int8",
        ),
        ({"weights": "fp8", "activations": "int8"}, "needs quantize.weights=int8, not fp8: integers are multiplied"),
        ({"weights": "int4"}, r"quantize.weights \('int4'\)|quantize.weights"),
        ({"weights": "int8", "products": "fp8"}, r"quantize.products \(fp8\) and quantize.weights \(int8\) exclude"),
        ({"weights": "int8", "keep": ("w_x",)}, r"quantize.keep \(w_x\) fits no matrix of the model, which has mixer"),
        ({"weights": "int8", "keep": ("*",)}, r"quantize.keep \(\*\) leaves no matrix to round"),
    ],
)
def test_errors(options, error):
    with pytest.raises(ConfigError, match=error) as found:
        quantize.sizes(small("M-"), QuantizeConfig(**options))
    assert "\n" not in str(found.value)


# The compiled step of decoding ----------------------------------------------------------------------------------------

ARRAY = re.compile(r"= \(?(?P<type>f32|bf16|s8|f8e4m3fn)\[(?P<shape>[\d,]*)\]")


def arrays_made(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(type, shape) of what a compiled program writes to memory: what stands inside of a fusion is not."""
    found, fused = set(), False
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY", "HloModule")):
            fused = "fused" in line.split("(")[0] or "region" in line.split("(")[0]
        if not fused and (match := ARRAY.search(line)) and " parameter(" not in line:
            found.add((match["type"], tuple(map(int, filter(None, match["shape"].split(","))))))
    return found


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(None, id="bfloat16"),
        pytest.param(INT8, id="int8"),
        pytest.param(FP8, id="fp8", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_makes_no_float_copy_of_a_matrix(how):
    """On a CPU; that of bfloat16 matrices, which copies them to float32, shows that the text would tell."""
    blocks = {"*": Attention(n_heads=4, n_kv_heads=1, d_head=64), "-": MLP(144)}
    config = ModelConfig(VOCAB, 272, "*-", blocks, compute_dtype="bfloat16")
    graphdef, shapes, info = init.abstract(config) if how is None else quantize.abstract(config, how)
    wide = {math.prod(leaf.shape) for leaf in jax.tree.leaves(info) if leaf.kind in ("matrix", "quantized")}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    graphdef, params = _prepared(*nnx.split(nnx.merge(graphdef, zeros)))

    def step(params, tokens_B1, cache):
        return nnx.merge(graphdef, params).extend_hidden(tokens_B1, cache)

    cache = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(1, 8), params)
    compiled = jax.jit(step, donate_argnums=2).lower(params, jnp.zeros((1, 1), jnp.int32), cache).compile()
    made = arrays_made(compiled.as_text())
    copied = {(kind, shape) for kind, shape in made if kind in ("f32", "bf16") and math.prod(shape) in wide}
    assert bool(copied) == (how is None), copied
