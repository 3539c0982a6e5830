# SPDX-License-Identifier: Apache-2.0
"""Caches over a mesh: split from their first array to the last token, as much on each device as `cache_size` counts."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import MeshConfig
from hybridlm.infer.cache_size import cache_size
from hybridlm.layers.block import sees_ahead
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.model import decoding
from hybridlm.model.decoding import Sampling, Writer
from hybridlm.model.init import abstract, init_sharded
from tests.model.model_support import VARIANTS, random_tokens, small
from tests.tolerances import check_close

MESH = MeshConfig(2, fsdp=2, tensor=2)
SMALL = CacheTypes(keys="int8", states="bfloat16")


def mesh():
    return sharding.make_mesh(MESH, jax.devices()[:8])


def config_of(*names: str):
    blocks = {chr(0x4E00 + i): VARIANTS[name] for i, name in enumerate(names)}
    return replace(small("".join(blocks) * 2, blocks), vocab_size=32)


def check_split(config, cache, room: int, types) -> None:
    """Each device holds what is counted of it: an array that is whole where it should be split is more."""
    counted = cache_size(config, cache.length_B.shape[0], room, MESH, types).total().device_bytes
    for i in range(8):
        assert sum(leaf.addressable_shards[i].data.nbytes for leaf in jax.tree.leaves(cache)) == counted


@pytest.mark.parametrize("types", [AS_COMPUTED, SMALL], ids=["as computed", "smaller"])
def test_caches_are_born_split(types):
    """Outside of a jitted function, too: rows over four devices, heads and channels over two."""
    config = config_of("mamba2", "attention", "window", "latent")
    model = abstract(config).model()
    with jax.set_mesh(mesh()):
        check_split(config, model.init_cache(4, 9, types), 9, types)
        check_split(config, model.init_cache(3, 9, types), 9, types)  # rows that four do not divide are everywhere


FIRST = {type(block): name for name, block in reversed(VARIANTS.items()) if not sees_ahead(block)}
"""The first example of each class."""
STORED = ("mamba2", "attention", "window", "latent", "shared", "convolved_window", "parallel", "slstm")
"""Of what can be stored smaller: rings, grouped heads, a single one, blocks in blocks."""
CASES = [pytest.param(name, AS_COMPUTED, id=name) for name in (*FIRST.values(), "window", "convolved_window")]
CASES += [pytest.param(name, SMALL, id=f"{name} smaller") for name in STORED]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "types"), CASES)
def test_eight_devices_write_as_one(name, types):
    """Ragged prompts in pieces, tokens for which the cache grows: the same, and split all along."""
    blocks = {"X": VARIANTS[name], "-": VARIANTS["mlp"]}
    config, lengths = replace(small("X-X-", blocks), vocab_size=32), np.array([9, 27, 3, 25])
    model, tokens = init_sharded(config, mesh(), seed=0), random_tokens(4, 27)

    def write(model, check):
        writer = Writer(model, 16, types)
        states = [writer.start(4, 1)]
        check(states[-1])
        states.append(writer.read(states[-1], tokens[:, :20], np.minimum(lengths, 20)))
        check(states[-1])
        states.append(writer.read(states[-1], tokens[:, 20:], np.maximum(lengths - 20, 0)))
        check(states[-1])
        new, state = writer.write(states[-1], 9, Sampling())
        check(state)
        assert state.room > states[-1].room
        return np.asarray(new), state

    with jax.set_mesh(mesh()):
        new, state = write(model, lambda state: check_split(config, state.cache, state.room, types))
    graphdef, params = nnx.split(model)
    alone = nnx.merge(graphdef, jax.device_put(jax.device_get(params), jax.devices()[0]))
    expected, one = write(alone, lambda state: None)
    np.testing.assert_array_equal(new, expected)
    check_close(state.x_BD, one.x_BD, dtype="float32", what="hidden vectors")
    assert state.cache.length_B.tolist() == (lengths + 9).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("types", [AS_COMPUTED, SMALL], ids=["as computed", "smaller"])
def test_no_program_makes_an_array_of_the_cache_whole(types):
    """What is compiled for each device, prompts and tokens: no array of the size of a whole one of all devices."""
    config = config_of("mamba2", "attention", "window")
    devices, room, batch = mesh(), 512, 4
    model = init_sharded(config, devices, seed=0)
    texts = []
    with jax.set_mesh(devices):
        writer = Writer(model, 16, types)
        graphdef, params, state = writer._graphdef, writer._params, writer.start(batch, room)
        tokens, lengths = np.zeros((batch, 16), np.int32), np.full(batch, 16, np.int32)
        texts.append(decoding._empty.lower(graphdef, params, batch, room, types))
        texts.append(decoding._read.lower(state.cache, state.x_BD, graphdef, params, tokens, lengths))
        arrays, at = (state.x_BD, state.done_B, state.last_B), (np.int32(0), np.int32(1))
        drawn = (jax.random.key(0), *at, 0.0, None, np.array([-1], np.int32), True, None)
        texts.append(decoding.writing("cpu").lower(state.cache, graphdef, params, *arrays, *drawn))
        texts = [lowered.compile().as_text() for lowered in texts]
    whole = {}
    for leaf in jax.tree.leaves(state.cache.groups):
        if leaf.addressable_shards[0].data.size < leaf.size:
            whole[",".join(map(str, leaf.shape))] = leaf.dtype.name
    assert len(whole) >= 4
    for text in texts:
        assert not set(re.findall(r"\[([\d,]+)\]", text)) & set(whole)


def test_room_is_that_of_all_devices_of_the_mesh(monkeypatch):
    """A cache that one device cannot hold is not refused where eight do."""
    from hybridlm.model import generation

    model = abstract(config_of("attention")).model()
    monkeypatch.setattr(generation, "memory", lambda: 1000)
    monkeypatch.setattr(generation, "memory_of", lambda devices: 100_000 * len(list(devices)))
    with pytest.raises(ValueError, match=r"max_new_tokens \(20\) needs"):
        generation.check_room(model, 4, 9, 20)
    with jax.set_mesh(mesh()):
        generation.check_room(model, 4, 9, 20)
