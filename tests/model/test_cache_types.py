# SPDX-License-Identifier: Apache-2.0
"""Caches that are stored smaller: what is written is what the rounded numbers give, and the default rounds nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from hybridlm.errors import ConfigError
from hybridlm.layers import AttentionMixer, ConvolvedAttentionMixer, LatentAttentionMixer
from hybridlm.layers.block import sees_ahead
from hybridlm.layers.cache import CacheTypes, Int8, Rounded, as_stored, in_int8
from hybridlm.model.decoding import Sampling, Writer
from hybridlm.model.init import abstract
from pallas_kernels.oracle import rms
from tests.model.model_support import APART, HYBRID, QUICK, VARIANTS, build, random_tokens, small
from tests.tolerances import check_close

SMALL = CacheTypes(keys="int8", states="bfloat16")
T = 13
PIECES = (4, 1, 4, 1, 1, 1, 1)
PROJECTED = {AttentionMixer: (1, 2), ConvolvedAttentionMixer: (1, 2), LatentAttentionMixer: (1,)}
"""Mixer -> which of what its `_project` gives is stored as keys and values."""
BLOCKS = HYBRID | {
    "l": VARIANTS["latent"],
    "Z": VARIANTS["shared"],
    "c": VARIANTS["convolved_window"],
    "g": VARIANTS["gla"],
}


extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache), compiler_options=QUICK)


def in_pieces(model, cache, tokens_BT, each=lambda cache: cache):
    """Logits of tokens read in PIECES, and the cache; each: what is done with a cache behind every piece."""
    start, logits = 0, []
    for size in PIECES:
        part, cache = extend(model, tokens_BT[:, start : start + size], cache)
        logits.append(part)
        cache, start = each(cache), start + size
    return np.concatenate(logits, axis=1), cache


def rounded_by_hand(x):
    """Each vector's numbers as whole multiples of a 127th of its largest."""
    step = jnp.abs(x).max(-1, keepdims=True) / 127
    return jnp.where(step > 0, jnp.round(x / jnp.where(step > 0, step, 1)) * step, 0)


@pytest.mark.parametrize("pattern", ["aw", pytest.param("lZc*", marks=pytest.mark.slow)])
def test_keys_in_int8_are_those_of_a_forward_with_rounded_keys(pattern, monkeypatch):
    """Grouped heads, a ring with sinks; latents, shared blocks: however the tokens come in."""
    model, tokens_BT = build(small(pattern, BLOCKS)), random_tokens(2, T)
    logits, cache = in_pieces(model, model.init_cache(2, T, CacheTypes(keys="int8")), tokens_BT)
    arrays = [leaf for leaf in jax.tree.leaves(cache.groups, is_leaf=lambda a: isinstance(a, Int8))]
    kept = [leaf for leaf in arrays if isinstance(leaf, Int8)]
    assert kept and all(leaf.values.dtype == jnp.int8 and leaf.scales.dtype == jnp.float32 for leaf in kept)

    def patched(original, part):
        def project(self, *args, **kwargs):
            found = list(original(self, *args, **kwargs))
            for i in part:
                found[i] = rounded_by_hand(found[i])
            return tuple(found)

        return project

    with monkeypatch.context() as patch:
        for cls, part in PROJECTED.items():
            patch.setattr(cls, "_project", patched(cls._project, part))
        expected = np.asarray(jax.jit(lambda: model(tokens_BT), compiler_options=QUICK)())
    check_close(logits, expected, dtype="float32", what="logits")


@pytest.mark.parametrize("pattern", ["g", pytest.param("m1-awg", marks=pytest.mark.slow)])
def test_states_are_updated_in_float32_and_rounded_behind_each_piece(pattern):
    model, tokens_BT = build(small(pattern, BLOCKS)), random_tokens(2, T)
    logits, typed = in_pieces(model, model.init_cache(2, T, CacheTypes(states="bfloat16")), tokens_BT)

    def by_hand(cache):
        def one(like, array):
            return array.astype(jnp.bfloat16).astype(jnp.float32) if isinstance(like, Rounded) else array

        is_rounded = lambda leaf: isinstance(leaf, Rounded)
        cache.groups = jax.tree.map(one, typed.groups, cache.groups, is_leaf=is_rounded)
        return cache

    expected, plain = in_pieces(model, model.init_cache(2, T), tokens_BT, by_hand)
    check_close(logits, expected, dtype="float32", what="logits")
    unrounded, _ = in_pieces(model, model.init_cache(2, T), tokens_BT)
    assert rms(unrounded - expected) > 20 * rms(logits - expected)
    state = jax.tree.leaves(typed.groups, is_leaf=lambda leaf: isinstance(leaf, Rounded))
    state = next(leaf for leaf in state if isinstance(leaf, Rounded)).rounded
    assert state.dtype == jnp.bfloat16
    assert plain.length_B.tolist() == [T, T]


def test_what_is_kept_in_which_type():
    """Sums of logarithms and angles, what counts, memories that learn, and windows stay; the default rounds nothing."""
    names = ("mamba2", "mlstm", "slstm", "rwkv4", "mamba3", "titans", "hyena", "window", "shared", "parallel")
    symbols = {chr(0x4E00 + i): VARIANTS[name] for i, name in enumerate(names)}
    model = abstract(small("".join(symbols), symbols, compute_dtype="bfloat16")).model()
    typed, plain = (jax.eval_shape(lambda t=t: model.init_cache(1, 8, t)).groups for t in (SMALL, CacheTypes()))
    (typed,), (plain,) = typed, plain
    kept = {name: {key: type(leaf).__name__ for key, leaf in of.items()} for name, of in zip(names, typed, strict=True)}
    array, state, key = "ShapeDtypeStruct", "Rounded", "Int8"
    assert kept["mamba2"] == {"state": state, "conv_x": array, "conv_BC": array}
    assert kept["mlstm"] == {"c": state, "n": state, "m": array}
    assert kept["slstm"] == {"y": state, "c": state, "n": state, "m": array, "conv": array}
    assert kept["rwkv4"] == {"a": state, "b": state, "m": array, "before": array}
    assert kept["mamba3"] == {"angle": array, "ssm": state, "k": array, "v": array}
    assert kept["titans"] == {"state": array, "conv": array}
    assert kept["hyena"] == {"conv": array, "history": array}
    assert kept["window"] == {"k": key, "v": key}
    shared, branches = typed[names.index("shared")], typed[names.index("parallel")]
    assert isinstance(shared["shared"]["k"], Int8) and isinstance(shared["mixer"]["state"], Rounded)
    assert isinstance(branches["attention"]["v"], Int8) and isinstance(branches["mamba"]["state"], Rounded)
    assert not [leaf for leaf in jax.tree.leaves(plain, is_leaf=lambda a: isinstance(a, Int8 | Rounded))
                if isinstance(leaf, Int8 | Rounded)]  # fmt: skip
    window = typed[names.index("window")]["k"]
    assert (window.shape, window.scales.shape) == ((1, 1, 3, 2, 8), (1, 1, 2, 3))


def test_vectors_in_int8():
    """Half a step off at most; zeros, the smallest numbers and what is not finite come back."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 16)).astype(np.float32) * np.logspace(-30, 30, 5, dtype=np.float32)[:, None, None]
    values, scale = in_int8(x)
    assert values.dtype == jnp.int8 and scale.shape == (5, 3)
    error = np.abs(np.asarray(values, np.float32) * np.asarray(scale)[..., None] - x)
    assert (error <= np.asarray(scale)[..., None] * 0.5001).all()
    assert (np.abs(np.asarray(values)).max(-1) == 127).all()
    back = as_stored(
        Int8(values, scale), np.array([[0.0, 0.0], [1e-42, 0.0], [np.nan, 1.0], [np.inf, 1.0]], np.float32)
    )
    assert (np.asarray(back)[:2] < 1e-40).all() and not np.isfinite(np.asarray(back)[2:, 0]).any()


def test_types_are_checked():
    with pytest.raises(ConfigError, match=r"^cache\.keys \('int4'\) must be one of bfloat16, int8 or None"):
        CacheTypes(keys="int4")
    with pytest.raises(ConfigError, match=r"^cache\.states \('int8'\) must be one of bfloat16 or None"):
        CacheTypes(states="int8")
    with pytest.raises(ConfigError, match=r"^cache_types \('int8'\) must be CacheTypes"):
        abstract(small("*")).model().init_cache(1, 4, "int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in APART if not sees_ahead(VARIANTS[name])])
def test_every_mixer_decodes_near_the_forward(name):
    """Both types together, of a float32 model; ragged, through a cache that grows, by `Writer` as in one piece."""
    model, tokens, lengths = (
        build(small("x-", {"x": VARIANTS[name], "-": VARIANTS["mlp"]})),
        random_tokens(2, 40),
        (33, 9),
    )
    writer = Writer(model, 5, SMALL)
    state = writer.read(writer.start(2, 1), tokens[:, :20], np.minimum(lengths, 20))
    state = writer.read(state, tokens[:, 20:], np.maximum(np.array(lengths) - 20, 0))
    rounds = any(isinstance(a, Int8 | Rounded) for a in jax.tree.leaves(
        state.cache.groups, is_leaf=lambda a: isinstance(a, Int8 | Rounded)))  # fmt: skip
    hidden = np.asarray(jax.jit(lambda model: model.hidden(tokens), compiler_options=QUICK)(model))
    for row, length in enumerate(lengths):  # what stands behind it it does not see
        full = hidden[row, length - 1]
        error = np.sqrt(np.mean((np.asarray(state.x_BD[row]) - full) ** 2))
        assert error < (0.05 if rounds else 1e-5) * np.std(full)
    assert state.room >= 33


@pytest.mark.slow
def test_pieces_and_growth_change_nothing_in_int8():
    """Keys are seen as they are stored, in a ring too, so a prompt may come in any pieces."""
    model, tokens = build(small("aw*-l", BLOCKS)), random_tokens(2, 40)
    keys = CacheTypes(keys="int8")
    outs = []
    for chunk, room in ((5, 1), (None, 60), (16, 41)):
        writer = Writer(model, chunk, keys)
        new, state = writer.write(writer.read(writer.start(2, room), tokens, np.array([40, 21])), 6, Sampling())
        outs.append((np.asarray(new), np.asarray(state.x_BD)))
    for new, x_BD in outs[1:]:
        np.testing.assert_array_equal(new, outs[0][0])
        check_close(x_BD, outs[0][1], dtype="float32", what="hidden vectors")
    np.testing.assert_array_equal(hybridlm.generate(model, tokens, 6, lengths=[40, 21], cache_types=keys), outs[0][0])


@pytest.mark.slow
def test_bfloat16_keys_of_a_float32_model():
    """As of a forward whose keys and values are rounded, up to what is near."""
    model, tokens_BT = build(small("aw")), random_tokens(2, T)
    logits, cache = in_pieces(model, model.init_cache(2, T, CacheTypes(keys="bfloat16")), tokens_BT)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.groups)} == {"bfloat16"}
    exact = np.asarray(jax.jit(lambda: model(tokens_BT), compiler_options=QUICK)())
    assert 1e-5 < np.sqrt(np.mean((logits - exact) ** 2)) / np.std(exact) < 0.01
