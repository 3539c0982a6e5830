# SPDX-License-Identifier: Apache-2.0
"""Remat policies change what is kept, not the numbers; a scan over groups equals the sublayers one by one."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import ConfigError, MeshConfig
from hybridlm.exchange import GATHERED
from hybridlm.layers.block import Tokens, walk
from hybridlm.model import remat
from hybridlm.model.model import HybridLM
from hybridlm.model.pattern import groups, places
from hybridlm.sharding import make_mesh
from tests.model.model_support import HYBRID, QUICK, VARIANTS, build, log_likelihoods, named, packed_rows, small
from tests.tolerances import check_close

PATTERN = "MM-" * 2 + "*"
PACKED = packed_rows()


def value_and_grads(model):
    graphdef, params = nnx.split(model)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return log_likelihoods(model, PACKED.tokens[:2], PACKED.targets[:2], PACKED.segment_ids[:2]).mean()

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


@pytest.fixture(scope="module")
def expected():
    return value_and_grads(build(small(PATTERN)))


@pytest.mark.parametrize(
    "policy",
    [
        "kernels",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("mamba_ssd, attention_out,mlp_hidden", "full", "dots", "mixer")
        ),
    ],
)
def test_equals_none(policy, expected):
    loss, grads = value_and_grads(build(small(PATTERN, remat=policy)))
    check_close(loss, expected[0], dtype="float32", what="loss")
    for path, grad in named(expected[1]).items():
        check_close(named(grads)[path], grad, dtype="float32", what=path)


@functools.cache
def residual_bytes(policy: str, pattern: str, example: str | None = None, tensor: int = 1) -> int:
    """Bytes of what the forward hands to the backward. example: what X stands for in the pattern. tensor: devices."""
    blocks = HYBRID if example is None else {"X": VARIANTS[example]}
    graphdef, params = nnx.split(build(small(pattern, blocks, remat=policy)))
    run = lambda p: jax.vjp(lambda p: nnx.merge(graphdef, p)(PACKED.tokens).sum(), p)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor), jax.devices()[:tensor])):
        _, backward = jax.eval_shape(run, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_policies_keep_less():
    sizes = {
        policy: residual_bytes(policy, PATTERN) for policy in ("none", "mixer", "dots", "kernels", "mlp_hidden", "full")
    }
    assert sizes["full"] < sizes["mlp_hidden"] < sizes["none"]
    assert sizes["full"] < sizes["dots"] < sizes["none"]
    assert sizes["mlp_hidden"] < sizes["kernels"] < sizes["none"]
    assert sizes["full"] < sizes["mixer"] < sizes["none"]


def test_mixer_policy_leaves_feed_forward_alone():
    assert residual_bytes("mixer", "--") == residual_bytes("none", "--")
    assert residual_bytes("mixer", "MM") == residual_bytes("full", "MM")


MIXED = "M*-"
OFTEN = {name for symbol in MIXED for _, block in walk(HYBRID[symbol]) for name in block.KEPT}
"""Intermediates of the blocks that most models have."""


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in sorted(remat.kept([]))]
)
def test_every_name_is_an_intermediate(name):
    """Keeping it keeps more than keeping nothing, in some model."""
    if name in remat.OF_SUBLAYER:
        over = {"tensor": 2 if name == GATHERED else 1}  # of one device nothing is gathered
        assert residual_bytes(name, MIXED, **over) > residual_bytes("full", MIXED, **over)
        return
    holding = [example for example, block in VARIANTS.items() if any(name in inside.KEPT for _, inside in walk(block))]
    models = [(MIXED, None)] * (name in OFTEN) + [("X", example) for example in holding]
    assert any(residual_bytes(name, *model) > residual_bytes("full", *model) for model in models)


@pytest.mark.parametrize("policy", ["some", "mamba_ssd,ssd", "", "none,full"])
def test_unknown_names(policy):
    with pytest.raises(ConfigError, match=r"known are none, full, dots, mixer, kernels, or .*mamba_ssd") as error:
        HybridLM(small("M", remat=policy), rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_scanned_groups_equal_an_unrolled_model(expected):
    """Each sublayer of the pattern by itself, its parameters cut out of the stacks."""
    model = build(small(PATTERN))
    assert [group.repeats for group in groups(PATTERN)] != [1]
    graphdef, params = nnx.split(model)
    sublayers = []
    for place in places(PATTERN):
        definition, state = nnx.split(model.groups[place.group][place.position])
        sublayers.append((definition, jax.tree.map(lambda a, place=place: a[place.repeat], state)))

    class Unrolled:
        def __init__(self, params, states):
            self.model, self.states = nnx.merge(graphdef, params), states

        def __call__(self, tokens_BT, segment_ids):
            x_BTD = self.model.embedding[...][tokens_BT]
            for (definition, _), state in zip(sublayers, self.states):
                x_BTD = nnx.merge(definition, state)(x_BTD, Tokens(segment_ids)).y_BTD
            return self.model.logits(self.model.norm(x_BTD))

    def loss(params, states):
        model = Unrolled(params, states)
        return log_likelihoods(model, PACKED.tokens[:2], PACKED.targets[:2], PACKED.segment_ids[:2]).mean()

    states = [state for _, state in sublayers]
    value, (_, grads) = jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=QUICK)(params, states)
    scan_value, scan_grads = expected
    check_close(scan_value, value, dtype="float32", what="loss")
    scan_grads = named(scan_grads)
    for place, grad in zip(places(PATTERN), grads):
        for path, expected_grad in named(grad).items():
            actual = scan_grads[f"groups.{place.group}.{place.position}.{path}"][place.repeat]
            check_close(actual, expected_grad, dtype="float32", what=f"{place} {path}")


def test_program_does_not_grow_with_depth():
    def size(repeats):
        model = nnx.eval_shape(lambda: HybridLM(small("M*-" * repeats), rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(model)
        jaxpr = jax.make_jaxpr(lambda params: nnx.merge(graphdef, params)(np.zeros((1, 4), np.int32)))(params)
        return len(str(jaxpr).splitlines())

    assert size(2) == size(9)
