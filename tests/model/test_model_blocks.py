# SPDX-License-Identifier: Apache-2.0
"""Parallel and Shared blocks: what they compute, one set of weights, caches, remat, devices, config."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import MLP, Attention, Branch, Config, MeshConfig, ModelConfig, Parallel
from hybridlm.config.overrides import override
from hybridlm.config.stored import from_dict
from hybridlm.config.tree import to_dict
from hybridlm.errors import ConfigError
from hybridlm.model.flops import block_flops
from hybridlm.model.init import init_sharded
from hybridlm.model.model import HybridLM
from hybridlm.sharding import make_mesh
from tests.model.model_support import HYBRID, QUICK, VARIANTS, build, named, random_tokens, small
from tests.tolerances import check_close

BLOCKS = HYBRID | {"P": VARIANTS["parallel"], "S": VARIANTS["shared"], "T": VARIANTS["shared"]}
T = 9
forward = jax.jit(lambda model, tokens, ids=None: model(tokens, ids), compiler_options=QUICK)
extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache), compiler_options=QUICK)


@pytest.fixture(scope="module")
def model():
    """Two shared transformers that take turns, each at two depths, beside parallel branches."""
    return build(small("MSP-MTP-" * 2, BLOCKS))


@pytest.fixture(scope="module")
def expected(model):
    return np.asarray(forward(model, random_tokens(2, T)))


def test_parallel_adds_its_branches():
    """x + out_1 mixer_1(in_1 norm(x)) + out_2 mixer_2(in_2 norm(x)), the mixers by themselves."""
    model = build(small("P", BLOCKS))
    graphdef, state = nnx.split(model.groups[0][0])
    sublayer = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
    x = np.random.default_rng(0).normal(size=(2, T, 16)).astype(np.float32)
    u, mixers = sublayer.norm(x), sublayer.mixer.branches
    by_hand = x + 0.7 * mixers["mamba"](1.2 * u) + 1.1 * mixers["attention"](0.9 * u)
    check_close(sublayer(x, None, None)[0], by_hand, dtype="float32", what="output")


def test_shared_by_hand():
    """x + mixer(norm(x + link)), the shared matrices with their adapters put in."""
    model = build(small("S", BLOCKS))
    graphdef, state = nnx.split(model.groups[0][0])
    sublayer, shared = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state)), model.shared["S"]
    x, e = np.random.default_rng(0).normal(size=(2, 2, T, 16)).astype(np.float32)
    actual = sublayer(x, None, None, e, shared)[0]
    merged = nnx.merge(*nnx.split(shared))
    for adapter in ("q", "k", "v"):
        a, b = (sublayer.link.adapters[adapter].a[...], sublayer.link.adapters[adapter].b[...])
        weight = getattr(merged.attention, f"w_{adapter}")
        weight[...] = weight[...] + jnp.tensordot(a, b, 1)
    mlp = sublayer.link.adapters["mlp"]
    merged.mlp.w_in[...] = merged.mlp.w_in[...] + jnp.tensordot(mlp.a[...], mlp.b[...], 1)
    attended = merged.attention(merged.norm(jnp.concatenate([x, e], axis=-1)))
    link = merged.mlp(merged.mlp_norm(attended)) @ sublayer.link.linear[...]
    by_hand = x + sublayer.mixer(sublayer.norm(x + link))
    check_close(actual, by_hand, dtype="float32", what="output")


def test_one_set_of_weights(model):
    """Two depths more of a shared symbol have links and mixers of their own, and no transformer; its gradient is the
    sum over its depths, zero at none."""
    shapes = lambda pattern: {
        path: leaf.shape for path, leaf in named_shapes(small(pattern, BLOCKS)).items() if path.startswith("shared.")
    }
    assert shapes("MS") == shapes("MS" * 3) != {}
    tokens = random_tokens(2, T)
    graphdef, params = nnx.split(model)
    loss = lambda params: nnx.merge(graphdef, params)(tokens).std()
    grads = named(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))
    assert {path.split(".")[1] for path in grads if path.startswith("shared.")} == {"S", "T"}
    assert all(np.any(grad) for grad in grads.values())


def named_shapes(config) -> dict:
    abstract = nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(abstract))}


def test_adapters_start_at_zero():
    """At initialisation a shared block computes what it would without adapters."""
    config = small("S", BLOCKS)
    bare = small("S", {"S": replace(BLOCKS["S"], mlp_adapter=None, attention_adapter=None)})
    draw = jax.jit(lambda key: nnx.state(HybridLM(config, rngs=nnx.Rngs(key))), compiler_options=QUICK)
    params = named(draw(jax.random.key(0)))
    assert not any(np.any(value) for path, value in params.items() if path.endswith(".b") and "adapters" in path)
    assert sum("adapters" in path for path in named_shapes(bare)) == 0


@pytest.mark.parametrize("sizes", [[T], [1] * T, [4, 1, 4]], ids=str)
def test_any_split_equals_the_full_forward(model, expected, sizes):
    tokens_BT, cache, start, logits = random_tokens(2, T), model.init_cache(2, T), 0, []
    for size in sizes:
        chunk, cache = extend(model, tokens_BT[:, start : start + size], cache)
        logits.append(chunk)
        start += size
    check_close(jnp.concatenate(logits, axis=1), expected, dtype="float32", what="logits")


def test_the_cache_has_a_limit(model):
    with pytest.raises(ValueError, match=r"\(9\) exceed max_len \(8\)"):
        model.extend(random_tokens(2, T), model.init_cache(2, 8))


@pytest.mark.parametrize("policy", ["full", *(pytest.param(p, marks=pytest.mark.slow) for p in ("mixer", "dots"))])
def test_remat_changes_nothing(policy):
    tokens = random_tokens(2, T)

    def gradients(policy):
        graphdef, params = nnx.split(build(small("SP" * 2, BLOCKS, remat=policy)))
        loss = lambda params: nnx.merge(graphdef, params)(tokens).std()
        return named(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))

    plain = gradients("none")
    for path, grad in gradients(policy).items():
        check_close(grad, plain[path], dtype="float32", what=f"gradient of {path}")


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_eight_devices_equal_one(sizes):
    """Logits and parameters, drawn and used on a mesh."""
    config = replace(small("MSP-" * 2, BLOCKS), vocab_size=32)
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])
    tokens = random_tokens(8, T)
    with jax.set_mesh(mesh):
        sharded = init_sharded(config, mesh, 0)
        logits = forward(sharded, tokens)
    one = init_sharded(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), 0)
    check_close(logits, forward(one, tokens), dtype="float32", what="logits")


# Config -------------------------------------------------------------------------------------------------------------


def test_json_and_command_line():
    config = Config(model=small("PST", BLOCKS))
    assert from_dict(to_dict(config)) == config
    changed = override(config, {
        "model.blocks.P.branches.attention.out_multiplier": 0.25,
        "model.blocks.P.branches.mamba.mixer.d_state": 8,
        "model.blocks.S.mlp.d_ff": 20,
        "model.blocks.T.mixer": "Mamba1",
    })  # fmt: skip
    blocks = changed.model.blocks
    assert blocks["P"].branches["attention"].out_multiplier == 0.25
    assert blocks["P"].branches["mamba"].mixer.d_state == 8
    assert (blocks["S"].mlp.d_ff, type(blocks["T"].mixer).__name__) == (20, "Mamba1")
    assert hash(changed.model) != hash(config.model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.blocks.P.branches.mamba.mixer.d_head", 5, "blocks.P.branches.mamba.mixer.expand .* d_head"),
        ("model.blocks.S.mixer.d_head", 5, "blocks.S.mixer.expand .* d_head"),
        ("model.blocks.S.mlp_adapter", 0, r"mlp_adapter \(0\) must be positive"),
    ],
)
def test_errors_name_the_part(key, value, message):
    with pytest.raises(ConfigError, match=message):
        override(Config(model=small("PS", BLOCKS)), {key: value})


def test_a_parallel_block_has_branches():
    with pytest.raises(ConfigError, match="branches must have at least one entry"):
        Parallel({})
    with pytest.raises(ConfigError, match="branches key"):
        Parallel({"a b": Branch()})


def test_flops_are_those_of_the_parts():
    """Matrix products counted from the parameters: two for each entry of each matrix."""
    parallel = Parallel({"a": Branch(Attention(2, d_head=4)), "b": Branch(MLP(12))})
    parts = sum(block_flops(branch.mixer, 16, 8) for branch in parallel.branches.values())
    assert block_flops(parallel, 16, 8) == parts
    shared = replace(BLOCKS["S"], mixer=MLP(12))
    config = ModelConfig(8, 16, "S", {"S": shared})
    matrices = sum(
        np.prod(leaf.shape) for path, leaf in named_shapes(config).items() if leaf.get_metadata()["kind"] == "matrix"
    )
    scores = 4.0 * shared.attention.n_heads * shared.attention.d_head * (8 + 1) / 2
    assert block_flops(shared, 16, 8) == 2 * matrices + scores
