# SPDX-License-Identifier: Apache-2.0
"""Sizes of caches are those of caches that are made: of every block, at several lengths, with prefixes, on a mesh."""

import json
import re
import time
from dataclasses import replace

import jax
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.cli import main
from hybridlm.config import Config, ConfigError, LatentAttention, MeshConfig
from hybridlm.config.find import config_names, load_config
from hybridlm.infer.cache_claims import CLAIMS
from hybridlm.infer.cache_size import (
    KEYS,
    LENGTHS,
    SHARED,
    STATES,
    WINDOWED,
    WINDOWS,
    CacheSize,
    cache_size,
    transformer_beside,
)
from hybridlm.layers.block import passes, sees_ahead
from hybridlm.layers.cache import CacheTypes
from hybridlm.layers.hyena import Hyena
from hybridlm.model import pattern
from hybridlm.model.init import abstract, init_sharded
from tests.model.model_support import QUICK, VARIANTS, random_tokens, small

SMALL = CacheTypes(keys="int8", states="bfloat16")
LATENTS, HISTORY = LatentAttention.GROWS["latent"], Hyena.GROWS["history"]
D, GIB = 16, 2**30
BLOCKS = {chr(0x4E00 + i): block for i, block in enumerate(VARIANTS.values()) if not sees_ahead(block)}
SYMBOLS = dict(zip(VARIANTS, (chr(0x4E00 + i) for i in range(len(VARIANTS))), strict=True))
ROUTED = {symbol: block for symbol, block in BLOCKS.items() if passes(block, D) not in (0, D)}
"""What they hand on is of a width of its own: in a model apart."""
HOLDS = {
    "mamba2": {STATES, WINDOWS},
    "mamba3": {STATES},
    "attention": {KEYS},
    "window": {WINDOWED},
    "latent": {LATENTS},
    "hyena": {HISTORY, WINDOWS},
    "shared": {SHARED, STATES, WINDOWS},
    "convolved": {KEYS, WINDOWS},
    "convolved_window": {WINDOWED, WINDOWS},
    "rwkv7": {STATES, WINDOWS},
    "gated_conv": {WINDOWS},
    "memory_context": {WINDOWED, STATES, WINDOWS},
    "parallel": {KEYS, STATES, WINDOWS},
    "mlp": set(),
}
FEW = ("mamba2", "attention", "window", "latent", "hyena", "shared", "mlp")
"""Made by the minute."""
MISTAKES = {
    "--context 0": r"context \(0\) must be between 1 and 2147483647",
    "--context 8 --batch -1": r"batch \(-1\) must be between 1 and",
    "--context many": "argument --context: invalid int value: 'many'",
    "--context 8 --cache.keys=int4": r"argument --cache\.keys: invalid choice: 'int4'",
    "--context 8 --cache.state=bfloat16": r"unknown option --cache\.state: did you mean --cache\.states\?",
    "--context 8 --mesh.tensor=3": r"model\.\S* \(\d+\) not divisible by mesh\.tensor \(3\)",
    "--context 8 --cache_dtype int8": "unknown option --cache_dtype",
}


def made(config, batch: int, lengths: tuple[int, ...], types: CacheTypes) -> list:
    """Caches of several lengths, their arrays' shapes and types."""
    model = abstract(config).model()
    return jax.eval_shape(lambda: [model.init_cache(batch, n, types) for n in lengths])


def bytes_of(arrays) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def weighed(config, cache) -> tuple[dict[str, int], int]:
    """Bytes of a cache that is there, of each symbol and of all of it."""
    spots = [spot for loop in pattern.loops(config.pattern, 1) for spot in loop.spots()]
    caches = [of_spot for of_loop in cache.groups for of_spot in of_loop]
    found = dict.fromkeys(config.pattern, 0)
    for spot, of_spot in zip(spots, caches, strict=True):
        found[spot.symbol] += bytes_of(of_spot)
    return found, bytes_of(cache)


def of_symbols(size: CacheSize, of_part) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in size.parts:
        found[part.symbol] = found.get(part.symbol, 0) + of_part(part)
    return found


@pytest.mark.parametrize(
    "symbols",
    [[SYMBOLS[name] for name in FEW], pytest.param(BLOCKS.keys() - ROUTED, marks=pytest.mark.slow), ROUTED],
    ids=["each kind", "every block", "routed"],
)
@pytest.mark.parametrize("types", [CacheTypes(), SMALL], ids=["as computed", "smaller"])
def test_bytes_are_those_of_a_cache_that_is_made(symbols, types):
    """Of blocks at two depths: constant and slope exact, and a row that is shorter than the windows."""
    config, batch = small("".join(sorted(symbols)) * 2, BLOCKS), 3
    lengths = (2, 30, 41)
    for n_tokens, cache in zip(lengths, made(config, batch, lengths, types), strict=True):
        size, (expected, all_bytes) = cache_size(config, batch, n_tokens, types=types), weighed(config, cache)
        assert size.total().bytes == size.total().device_bytes == all_bytes
        got = {symbol: 0 for symbol in expected} | of_symbols(size, lambda part: batch * part.row_bytes)
        assert {symbol: got[symbol] for symbol in expected} == expected
        if n_tokens > 2:
            line = lambda part, n=n_tokens: batch * (part.constant + n * part.per_token)
            line = of_symbols(size, line)
            assert {symbol: line.get(symbol, 0) for symbol in expected} == expected


def test_what_arrays_hold():
    """In float32, too, where types do not tell states from windows."""
    for dtype, names in (("float32", HOLDS), ("bfloat16", FEW)):
        for name in names:
            expected = HOLDS[name]
            size = cache_size(small(SYMBOLS[name], BLOCKS, compute_dtype=dtype), 1, 30)
            assert set(size.kinds) == expected | {LENGTHS}, name
            assert size.dtypes.get(STATES, "float32") == "float32"
            assert {size.dtypes[kind] for kind in expected - {STATES}} <= {dtype}


def test_prefix_tokens_are_kept_once():
    config = small("*w", prefix_tokens=2)
    graphdef, shapes, _ = abstract(config)
    cache = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(2, 9), shapes)
    size = cache_size(config, 2, 9)
    assert size.total().bytes == bytes_of(cache)
    assert size.total().bytes == 2 * (size.total().constant + 9 * size.total().per_token)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HOLDS, "mamba1", "rglru", "delta", "kimi", "titans", "mlstm"])
def test_a_device_holds_its_share(name):
    """As a prompt and a token behind it leave the cache on eight devices: rows split, heads where they divide."""
    config, n_tokens = replace(small(SYMBOLS[name] * 2, BLOCKS), vocab_size=32), 6
    mesh_config = MeshConfig(2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:8])
    model = init_sharded(config, mesh, seed=0)

    def read(model, tokens_BT):
        cache = model.extend_hidden(tokens_BT[:, :-1], model.init_cache(4, n_tokens))[1]
        return cache, model.extend_hidden(tokens_BT[:, -1:], cache)[1]

    tokens_BT = jax.device_put(random_tokens(4, n_tokens), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        caches = jax.jit(read, compiler_options=QUICK)(model, tokens_BT)
    size = cache_size(config, 4, n_tokens, mesh_config)
    counted = size.total().device_bytes - size.total(LENGTHS).device_bytes
    held = [sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(c.groups)) for c in caches]
    assert held == [counted, counted]


def test_what_a_mesh_splits():
    """Rows and heads, where they divide: of two key/value heads each device of two has one, one is whole on both."""
    config = replace(small("Maw*"), vocab_size=32)
    alone, size = (cache_size(config, 4, 6, mesh) for mesh in (None, MeshConfig(2, fsdp=2, tensor=2)))
    assert size.mesh == {"data": 2, "fsdp": 2, "tensor": 2} and size.rows_split
    assert size.kinds[STATES].device_bytes == alone.kinds[STATES].bytes // 8
    assert size.kinds[WINDOWED].device_bytes == alone.kinds[WINDOWED].bytes // 8
    two_heads, one_head = (6 * 4 * 2 * n_heads * width * 4 for n_heads, width in ((2, 6), (1, 8)))
    assert alone.kinds[KEYS].bytes == two_heads + one_head
    assert size.kinds[KEYS].device_bytes == two_heads // 8 + one_head // 4
    odd = cache_size(config, 3, 6, MeshConfig(2, fsdp=2, tensor=2))
    assert not odd.rows_split and odd.kinds[STATES].device_bytes == odd.kinds[STATES].bytes // 2


def test_hybrid_8b_by_hand():
    config = load_config("hybrid_8b")
    size = cache_size(config.model, 8, 262_144)
    assert size.kinds[KEYS] == (4, 0, 4 * 2 * 8 * 128 * 2, 32 * GIB, 32 * GIB)
    assert size.kinds[STATES].constant == 24 * 128 * 64 * 128 * 4
    assert size.kinds[WINDOWS].constant == 24 * 3 * (128 * 64 + 2 * 8 * 128) * 2
    assert size.kinds[LENGTHS].bytes == 8 * 4
    beside = transformer_beside(config.model, size)
    assert (beside.mixers, beside.attention) == (28, "model.blocks.*")
    assert beside.size.of_tokens.bytes == 7 * 32 * GIB
    shared = cache_size(config.model, 8, 262_144, MeshConfig(1, fsdp=-1, tensor=8))
    assert shared.kinds[KEYS].device_bytes == 4 * GIB


@pytest.mark.parametrize(
    ("name", "gib", "share"),
    [
        ("hybrid_1b", None, 1 / 8),
        ("jamba:52b", 4, 1 / 8),
        ("jamba:398b", 9, 1 / 8),
        ("kimi_linear:48b-a3b", None, 7 / 27),
    ],
)
def test_published_figures(name, gib, share):
    """7 to 1 keeps an eighth; Jamba's tables; 7 of 27 layers of Kimi Linear keep latents."""
    config = load_config(name)
    claim = CLAIMS[config.name]
    size = cache_size(config.model, 1, claim.context or 4096)
    assert gib is None or size.of_tokens.bytes == gib * GIB
    assert size.of_tokens.bytes / transformer_beside(config.model, size).size.of_tokens.bytes == share
    assert size.kinds.get(LATENTS, size.of_tokens).per_token == size.of_tokens.per_token
    if LATENTS in size.kinds:
        assert size.kinds[LATENTS].per_token == 7 * (512 + 64) * 2


def test_every_claim_is_of_a_config():
    stems = {name.partition(":")[0] for name in config_names()}
    for name in CLAIMS:
        stem = next(stem for stem in sorted(stems, key=len, reverse=True) if name.startswith(stem))
        assert name == stem or load_config(f"{stem}:{name.removeprefix(f'{stem}_')}").name == name


@pytest.mark.parametrize(
    ("name", "attention", "mixers", "per_token"),
    [
        ("samba:421m", "model.blocks.*, without its window", 12, 12 * 2 * 12 * 128 * 2),
        ("hymba:1.5b", "model.blocks.G.branches.attention.mixer", 32, 32 * 2 * 5 * 64 * 2),
        ("mamba2:1.3b", "none in the config: 16 heads of 128, 8 of keys and values", 48, 48 * 2 * 8 * 128 * 2),
        ("rwkv7:0.1b", "none in the config: 6 heads of 128, 2 of keys and values", 12, 12 * 2 * 2 * 128 * 2),
    ],
)
def test_a_transformer_of_the_same_size(name, attention, mixers, per_token):
    """Windows are let go, mixers without attention become it, feed-forwards stay, those that read the token before
    too."""
    model = load_config(name).model
    beside = transformer_beside(model, cache_size(model, 1, 64))
    assert beside.mixers == mixers
    assert (beside.attention, beside.size.total().per_token) == (attention, per_token)


def test_a_model_of_feed_forwards_alone():
    config = small("--")
    size = cache_size(config, 2, 9)
    assert size.total().bytes == 8 == transformer_beside(config, size).size.total().bytes


def test_bidirectional_models_have_none():
    name = next(name for name, block in VARIANTS.items() if sees_ahead(block))
    config = small("X", {"X": VARIANTS[name]})
    with pytest.raises(ConfigError, match=r"^the model cannot be decoded token by token, and has no cache: model\.blo"):
        cache_size(config, 1, 8)


def test_the_command(capsys):
    words = ["cache", "--config", "hybrid_8b", "--context", "262144", "--batch", "8"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for said in ("keys and values", "32.00 GiB", "recurrent states", "85.7% less", "28 sublayers: model.blocks.*"):
        assert said in shown
    assert "each device" not in shown
    assert main([*words, "--mesh.tensor=8", "--mesh.fsdp=3"]) == 2
    capsys.readouterr()
    assert main([*words, "--mesh.tensor=8", "--mesh.fsdp=16"]) == 0
    shown = capsys.readouterr().out
    assert "on each device" in shown and "does not divide 8 rows" in shown


def test_stored_smaller(capsys):
    """By hand: a byte for each number and four for each head and token; states of two bytes; the transformer alike."""
    words = ["cache", "--config", "hybrid_8b", "--context", "262144", "--cache.keys=int8", "--cache.states", "bfloat16"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"][KEYS]["bytes"] == 262_144 * 4 * 2 * 8 * (128 + 4)
    assert found["kinds"][KEYS]["dtype"] == "int8 + float32"
    assert found["kinds"][STATES] | {"dtype": "bfloat16", "constant": 24 * 128 * 64 * 128 * 2} == found["kinds"][STATES]
    assert found["transformer"]["kinds"][KEYS]["bytes"] == 7 * found["kinds"][KEYS]["bytes"]
    assert found["types"] == {"keys": "int8", "states": "bfloat16"}
    assert main(words) == 0
    assert "stored smaller: states bfloat16, computed in float32; keys, values and latents int8; the rest" in (
        capsys.readouterr().out
    )
    model = load_config("hybrid_8b").model
    split = cache_size(model, 8, 4096, MeshConfig(1, fsdp=-1, tensor=8), SMALL)
    assert split.kinds[KEYS].device_bytes * 8 == split.kinds[KEYS].bytes


def test_json(capsys):
    assert main(["cache", "--config", "jamba:52b", "--context", "1000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"][KEYS]["bytes"] == 1000 * 4 * 2 * 8 * 128 * 2
    assert found["published"]["here_bytes"] == 4 * GIB
    assert found["transformer"]["mixers"] == 32
    assert sum(part["row_bytes"] for part in found["parts"]) == found["total"]["bytes"]


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(words, capsys):
    assert main(["cache", "--config", "hybrid_tiny", *words.split()]) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert re.search(MISTAKES[words], said.err)


@pytest.mark.slow
@pytest.mark.parametrize("name", config_names())
def test_every_config_in_two_seconds(name):
    """And as its model makes it."""
    config: Config = load_config(name)
    if config.model.sees_ahead:
        pytest.skip("it has no cache")
    start = time.process_time()
    size = cache_size(config.model, 2, 5000)
    beside = transformer_beside(config.model, size)
    took = time.process_time() - start
    assert beside.size.total().bytes > 0
    if not config.model.prefix_tokens:
        model = abstract(config.model).model()
        leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(2, 5000)))
        assert size.total().bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert took < 2, f"{took:.1f} s"
