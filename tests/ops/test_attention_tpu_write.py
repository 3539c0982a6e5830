# SPDX-License-Identifier: Apache-2.0
"""Tokens written into caches on a TPU: the kernel, interpreted, equals a scatter; a model's step copies no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.layers import cache as caches
from hybridlm.layers.attention import Attention, AttentionMixer
from pallas_kernels import assume_platform
from pallas_kernels.ops.cache_write.tpu import cache_write_tpu
from tests.ops.test_attention_tpu import TOPOLOGIES


@pytest.mark.quick
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_written_token_is_the_scatter(layer, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    cache, value_BTKP = draw(*([] if layer is None else [3]), 5, 300, 2, 64), draw(5, 1, 2, 64)
    slots_BT = jnp.asarray([[0], [300], [299], [130], [-1]])
    layer = None if layer is None else jnp.int32(layer)
    wanted = caches.write_slots(cache, layer, slots_BT, value_BTKP)
    actual = cache_write_tpu(cache, slots_BT, value_BTKP, layer=layer, interpret=True)
    np.testing.assert_array_equal(actual, wanted)
    assert not np.array_equal(actual, cache)


@pytest.mark.libtpu
@pytest.mark.parametrize("d_head, generation", [
    (64, "v5e"),
    (128, "v5e"),
    *(pytest.param(64, generation, marks=pytest.mark.slow) for generation in ("v5p", "v6e")),
    pytest.param(96, "v6e", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_step_of_scanned_layers_copies_no_cache(d_head, generation):
    """Compiled for a TPU, layers write their token and attend to their share of the stacked caches where it lies."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    n_layers, n_batch, n_keys, d_model = 3, 2, 4096, 256
    config = Attention(n_heads=32, n_kv_heads=8, d_head=d_head, gate="elementwise")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: AttentionMixer(config, d_model, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda a: array(*a.shape, dtype=a.dtype), state)

    def steps(state, k, v, length_B, x_BTD):
        mixer = nnx.merge(graphdef, state)

        def layer(carry, index):
            k, v, x_BTD = carry
            y_BTD, new = mixer.extend(x_BTD, {"k": k, "v": v}, length_B, None, index)
            return (new["k"], new["v"], y_BTD), None

        def step(carry, _):
            return jax.lax.scan(layer, carry, jnp.arange(n_layers))[0], None

        return jax.lax.scan(step, (k, v, x_BTD), None, length=2)[0]

    cache = array(n_layers, n_batch, n_keys, config.kv_heads, d_head)
    args = state, cache, cache, array(n_batch, dtype=jnp.int32), array(n_batch, 1, d_model)
    with jax.set_mesh(mesh), assume_platform("tpu"):
        compiled = jax.jit(steps, donate_argnums=(1, 2)).lower(*args).compile()
    assert "attention_decode" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.size * 2 / n_layers  # keys of a layer
