# SPDX-License-Identifier: Apache-2.0
"""Parallel and Shared blocks: what they compute, one set of weights, their caches together, config."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import Branch, Config, Parallel, Shared
from hybridlm.config.overrides import override
from hybridlm.errors import ConfigError
from hybridlm.layers.block import Tokens
from hybridlm.model.model import HybridLM
from tests.model import properties
from tests.model.model_support import HYBRID, QUICK, VARIANTS, build, named, random_tokens, small
from tests.tolerances import check_close

BLOCKS = HYBRID | {"P": VARIANTS["parallel"], "S": VARIANTS["shared"], "T": VARIANTS["shared"]}
T = 9


TURNS = small("SPT" * 2, BLOCKS)
"""Two shared transformers that take turns, each at two depths, beside parallel branches."""


@pytest.fixture(scope="module")
def model():
    return build(TURNS)


def test_pieces_equal_the_full_forward():
    properties.check_cache(TURNS)


@pytest.mark.slow
def test_parallel_adds_its_branches():
    """x + out_1 mixer_1(in_1 norm(x)) + out_2 mixer_2(in_2 norm(x)), the mixers by themselves."""
    model = build(small("P", BLOCKS))
    graphdef, state = nnx.split(model.groups[0][0])
    sublayer = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
    x = np.random.default_rng(0).normal(size=(2, T, 16)).astype(np.float32)
    u, mixers = sublayer.norm(x), sublayer.mixer.branches
    by_hand = x + 0.7 * mixers["mamba"](1.2 * u) + 1.1 * mixers["attention"](0.9 * u)
    check_close(sublayer(x, Tokens()).y_BTD, by_hand, dtype="float32", what="output")


def test_shared_by_hand():
    """x + mixer(norm(x + link)), the shared matrices with their adapters put in."""
    model = build(small("S", BLOCKS))
    graphdef, state = nnx.split(model.groups[0][0])
    of_shared, shared_state = nnx.split(model.shared["S"])
    x, e = np.random.default_rng(0).normal(size=(2, 2, T, 16)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(state, shared_state):
        sublayer = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
        actual = sublayer(x, Tokens(embedded_BTD=e, shared=nnx.merge(of_shared, shared_state))).y_BTD
        merged = nnx.merge(of_shared, shared_state)
        for adapter in ("q", "k", "v"):
            a, b = (sublayer.link.adapters[adapter].a[...], sublayer.link.adapters[adapter].b[...])
            weight = getattr(merged.attention, f"w_{adapter}")
            weight[...] = weight[...] + jnp.tensordot(a, b, 1)
        mlp = sublayer.link.adapters["mlp"]
        merged.mlp.w_in[...] = merged.mlp.w_in[...] + jnp.tensordot(mlp.a[...], mlp.b[...], 1)
        attended = merged.attention(merged.norm(jnp.concatenate([x, e], axis=-1)))
        link = merged.mlp(merged.mlp_norm(attended)) @ sublayer.link.linear[...]
        return actual, x + sublayer.mixer(sublayer.norm(x + link))

    actual, by_hand = both(state, shared_state)
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


def test_the_cache_has_a_limit(model):
    with pytest.raises(ValueError, match=r"\(9\) exceed max_len \(8\)"):
        model.extend(random_tokens(2, T), model.init_cache(2, 8))


# Config -------------------------------------------------------------------------------------------------------------


def test_command_line():
    config = Config(model=small("PST", BLOCKS))
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


def test_weights_are_shared_over_depths_alone():
    inner = VARIANTS["shared"]
    with pytest.raises(ConfigError, match=r"blocks.P.branches.a.mixer \(Shared\) shares weights over depths"):
        small("P", {"P": Parallel({"a": Branch(inner)})})
    with pytest.raises(ConfigError, match=r"blocks.S.mixer \(Shared\) shares weights over depths"):
        small("S", {"S": Shared(inner)})


def test_a_parallel_block_has_branches():
    with pytest.raises(ConfigError, match="branches must have at least one entry"):
        Parallel({})
    with pytest.raises(ConfigError, match="branches key"):
        Parallel({"a b": Branch()})
