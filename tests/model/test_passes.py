# SPDX-License-Identifier: Apache-2.0
"""What a block hands from depth to depth, past the sublayers between: the state of a router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import Branch, ConfigError, DepthMoE, Parallel, Shared
from hybridlm.layers.block import Tokens
from tests.model.model_support import QUICK, VARIANTS, build, named, random_tokens, small
from tests.tolerances import check_close

BLOCKS = {"D": VARIANTS["depth_moe"], "-": VARIANTS["mlp"]}
CONFIG = small("D-" * 3, BLOCKS)


def logits_and_gradients(config):
    tokens_BT = random_tokens(2, 5)
    graphdef, params = nnx.split(build(config))

    def loss(params):
        logits = nnx.merge(graphdef, params)(tokens_BT)
        return logits.std(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)
    return logits, {path: np.asarray(a) for path, a in named(grads).items()}


def test_it_comes_to_the_next_depth_and_so_do_gradients():
    """Depth by depth by hand, with the states that go from one to the next; in loops, and recomputed."""
    model = build(CONFIG)

    def by_hand(model):
        x_BTD, state_BTR = model.embedding[...][random_tokens(2, 5)], jnp.zeros((2, 5, 6))
        for depth in range(3):
            graphdef, params = nnx.split(model.groups[0])
            experts, mlp = nnx.merge(graphdef, jax.tree.map(lambda a, depth=depth: a[depth], params))
            (x_BTD, state_BTR), _ = experts((x_BTD, state_BTR), Tokens(gaps=False))
            x_BTD, _ = mlp(x_BTD, Tokens(gaps=False))
        return model.logits(model.norm(x_BTD))

    expected = jax.jit(by_hand, compiler_options=QUICK)(model)
    logits, grads = logits_and_gradients(CONFIG)
    check_close(logits, expected, dtype="float32", what="logits")
    scale = next(grad for path, grad in grads.items() if "state_scale" in path)
    assert not scale[0].any() and scale[1].all() and scale[2].all()  # zeros come to the first
    again, remade = logits_and_gradients(small("D-" * 3, BLOCKS, remat="full", unroll=3))
    check_close(again, logits, dtype="float32", what="logits")
    for path, grad in grads.items():
        check_close(remade[path], grad, dtype="float32", what=f"gradient of {path}")


def test_one_width_and_no_branch():
    other = DepthMoE(n_experts=4, d_ff=8, d_router=8)
    with pytest.raises(ConfigError, match=r"^model.blocks: what they hand on has several widths \(6, 8\)$"):
        small("Dd", {"D": VARIANTS["depth_moe"], "d": other})
    with pytest.raises(ConfigError, match=r"^branches.a.mixer \(DepthMoE\) hands on to depths: no branch can$"):
        Parallel({"a": Branch(VARIANTS["depth_moe"])}).check(16)
    with pytest.raises(ConfigError, match=r"^mixer \(DepthMoE\) hands on to depths: it cannot be$"):
        Shared(VARIANTS["depth_moe"]).check(16)
