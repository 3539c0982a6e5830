# SPDX-License-Identifier: Apache-2.0
"""Loops of decoding steps compiled for TPUs, where libtpu is: no cache is moved, nothing is sent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import assume_platform, attention
from pallas_kernels.ops.attention.tpu.api import attention_tpu
from tests.ops.test_attention_tpu import TOPOLOGIES
from tests.ops.test_attention_tpu_decode import step_of, write_token

pytestmark = pytest.mark.libtpu


@functools.cache
def devices_of(generation: str):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices


WHOLE = P()


def compile_loop(generation: str, shape=(1, 1), specs=WHOLE, *, queries=1, keys=4096, heads=8, kv_heads=2, width=128,
                 dtype=jnp.bfloat16, **options):  # fmt: skip
    """A loop of decoding steps, compiled for a mesh (data, tensor); (compiled, bytes of a device's cache)."""
    devices = np.array(devices_of(generation)[: np.prod(shape)])
    mesh = jax.sharding.Mesh(devices.reshape(shape), ("data", "tensor"))

    def array(*sizes, dtype=dtype, spec=specs):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def attend(q, k, v, q_offset, segment_ids):
        ids = jnp.repeat(segment_ids[0], queries, axis=1), segment_ids[1]
        return attention_tpu(q, k, v, gate=q, q_offset=q_offset, segment_ids=ids, **options)

    def loop(k, v, length_B, q, new):
        step = step_of(write_token, attend)
        return jax.lax.scan(lambda carry, _: step(carry, (q, new, new)), (k, v, length_B), None, length=4)

    cache, one = array(2, keys, kv_heads, width), P(*specs[:1])
    args = (
        cache,
        cache,
        array(2, dtype=jnp.int32, spec=one),
        array(2, queries, heads, width),
        array(2, 1, kv_heads, width),
    )
    in_specs = specs, specs, one, specs, specs
    split = jax.shard_map(
        loop, mesh=mesh, in_specs=in_specs, out_specs=((specs, specs, one), P(None, *specs)), check_vma=False
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(split, donate_argnums=(0, 1)).lower(*args).compile()
    return compiled, 2 * cache.size * dtype.dtype.itemsize // np.prod(shape)


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_a_generation_loop_moves_no_cache(generation):
    """Compiled for a TPU, the cache is updated in place and read where it lies."""
    compiled, n_bytes = compile_loop(generation, kv_heads=8)
    assert "attention_decode" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < n_bytes / 4


@pytest.mark.parametrize("width", [64, 128])
def test_a_loop_over_layers_moves_no_cache(width):
    """The caches of scanned layers are read in their stack."""
    mesh = jax.sharding.Mesh(np.array(devices_of("v5e")[:1]), ("one",))
    array = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        sizes, dtype, sharding=jax.sharding.NamedSharding(mesh, P())
    )
    n_batch, n_keys, kv_heads = 2, 4096, 8

    def loop(k, v, length_B, q, new):
        def layer(carry, index):
            k, v, x = carry
            for row in range(n_batch):
                start = index, row, length_B[row], 0, 0
                k, v = (jax.lax.dynamic_update_slice(a, new[None, row : row + 1], start) for a in (k, v))
            return (k, v, attention(x, k, v, gate=x, q_offset=length_B, layer=index)), None

        return jax.lax.scan(layer, (k, v, q), jnp.arange(4))[0]

    cache, new = array(4, n_batch, n_keys, kv_heads, width), array(n_batch, 1, kv_heads, width)
    args = cache, cache, array(n_batch, dtype=jnp.int32), array(n_batch, 1, 32, width), new
    with jax.set_mesh(mesh), assume_platform("tpu"):
        compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(*args).compile()
    assert "attention_decode" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.size * 2 / 4 / 4


def test_rows_and_heads_split_over_devices():
    compiled, n_bytes = compile_loop("v5e", (2, 2), P("data", None, "tensor"), kv_heads=4)
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce", text)
    assert compiled.memory_analysis().temp_size_in_bytes < n_bytes / 4


@pytest.mark.slow
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("sizes", [
    {"queries": 16, "heads": 32, "kv_heads": 8},
    {"queries": 16, "heads": 32, "kv_heads": 8, "keys": 1201},
    {"queries": 4, "heads": 16, "kv_heads": 1, "softcap": 20.0},
    {"width": 64}, {"width": 64, "queries": 9, "keys": 1111},
    {"width": 96}, {"width": 192}, {"width": 256, "kv_heads": 8}, {"kv_heads": 3, "heads": 9, "window": 300},
    {"dtype": jnp.float32, "queries": 3}, {"dtype": jnp.float32, "width": 64}, {"keys": 100}, {"keys": 1},
], ids=str)  # fmt: skip
def test_compiles(generation, sizes):
    compiled, _ = compile_loop(generation, **sizes)
    assert "attention_decode" in compiled.as_text()
