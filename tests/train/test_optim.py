# SPDX-License-Identifier: Apache-2.0
"""Schedules at exact points, which parameters are decayed and orthogonalised, Muon's matrices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hybridlm.config import AdamW, Config, Constant, Muon, OptimConfig
from hybridlm.config.overrides import override
from hybridlm.config.stored import from_dict
from hybridlm.config.tree import to_dict
from hybridlm.layers.params import ParamInfo
from hybridlm.model.model import HybridLM, param_info
from hybridlm.optim.muon import muon_dims
from hybridlm.optim.optimizer import make_optimizer
from hybridlm.optim.rules import is_bounded
from hybridlm.optim.schedule import make_schedule
from hybridlm.sharding import MeshConfig, make_mesh
from tests.tolerances import check_close
from tests.train.conftest import small_config


def points(steps, **fields):
    schedule = make_schedule(OptimConfig(lr=1.0, final_lr_ratio=0.1, **fields), steps, 1.0)
    return lambda step: float(schedule(step))


def test_cosine():
    at = points(101, schedule="cosine", warmup_steps=20)
    assert at(0) == 0 and at(10) == pytest.approx(0.5) and at(20) == pytest.approx(1.0)
    assert at(60) == pytest.approx(0.55) and at(100) == pytest.approx(0.1) and at(200) == pytest.approx(0.1)


def test_linear():
    at = points(101, schedule="linear", warmup_steps=0)
    assert at(0) == 1 and at(50) == pytest.approx(0.55) and at(100) == pytest.approx(0.1)


def test_warmup_stable_decay():
    at = points(101, schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    assert at(5) == pytest.approx(0.5) and at(10) == 1 and at(50) == 1 and at(80) == 1
    assert at(90) == pytest.approx(0.55) and at(100) == pytest.approx(0.1)


def test_constant():
    at = points(10, schedule="constant", warmup_steps=4)
    assert [at(s) for s in (0, 2, 4, 9, 99)] == [0, 0.5, 1, 1, 1]
    assert points(3, schedule="constant", warmup_steps=0)(0) == 1


def test_one_step_runs():
    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert np.isfinite(points(1, schedule=schedule, warmup_steps=0)(0))


def test_a_run_shorter_than_its_warmup_is_warmup():
    for schedule in ("cosine", "linear", "wsd"):
        at = points(10, schedule=schedule, warmup_steps=100)
        assert [at(s) for s in (0, 5, 9)] == pytest.approx([0, 0.05, 0.09])


def test_decay_is_cut_to_what_the_warmup_leaves():
    at = points(10, schedule="wsd", warmup_steps=5, decay_fraction=0.8)
    assert [at(s) for s in (0, 5, 7, 9)] == pytest.approx([0, 1, 0.55, 0.1])


INFO = {
    "embedding": ParamInfo(("vocab", "d_model"), "embedding", 0, (), False, (8, 4)),
    "w": ParamInfo(("d_model", "heads", None), "matrix", 1, (), True, (3, 4, 2, 2)),
    "out": ParamInfo(("heads", None, "d_model"), "matrix", 2, (), True, (3, 2, 2, 4)),
    "in_zx": ParamInfo(("d_model", None, "heads", None), "matrix", 1, (1,), True, (3, 4, 2, 2, 2)),
    "norm": ParamInfo(("d_model",), "norm", 0, (), True, (3, 4)),
    "bias": ParamInfo(("heads", None), "bias", 0, (), True, (3, 2, 2)),
    "A_log": ParamInfo(("heads",), "recurrence", 0, (), True, (3, 2)),
    "conv": ParamInfo(("heads", None, None), "conv", 0, (), True, (3, 2, 2, 4)),
    "sinks": ParamInfo(("heads",), "sink", 0, (), True, (3, 2)),
}
MATRICES = {"w", "out", "in_zx"}


def test_muon_dimension_numbers():
    numbers = {name: muon_dims(info) for name, info in INFO.items()}
    assert {name for name, n in numbers.items() if n is not None} == MATRICES
    assert numbers["w"] == ((1,), (2, 3)) and numbers["out"] == ((1, 2), (3,)) and numbers["in_zx"] == ((1,), (3, 4))
    flat = muon_dims(ParamInfo(("d_model", "d_ff"), "matrix", 1, (), False, (4, 8)))
    assert flat == ((0,), (1,))


def one_update(grad_value=None, **fields):
    """Updates of one step with a learning rate of 0.1 (AdamW) and 0.2 (Muon) from parameters of ones."""
    config = OptimConfig(lr=0.1, muon_lr=0.2, warmup_steps=0, schedule="constant", clip_norm=None, **fields)
    optimizer, _ = make_optimizer(config, 10, INFO)
    keys = jax.random.split(jax.random.key(0), len(INFO))
    params = {name: jnp.ones(info.shape) for name, info in INFO.items()}
    grads = {name: jax.random.normal(key, info.shape) for key, (name, info) in zip(keys, INFO.items(), strict=True)}
    if grad_value is not None:
        grads = jax.tree.map(lambda g: jnp.full_like(g, grad_value), grads)
    return optimizer.update(grads, optimizer.init(params), params)[0], grads


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    updates, _ = one_update(0.0, name=name, weight_decay=0.5)
    rate = {"adamw": 0.1, "muon": 0.2}[name]
    for leaf, update in updates.items():
        np.testing.assert_allclose(update, -rate * 0.5 if leaf in MATRICES else 0.0, rtol=1e-6, err_msg=leaf)


def test_adamw_is_optax_adamw():
    updates, grads = one_update(name="adamw", weight_decay=0.5)
    params = jax.tree.map(jnp.ones_like, grads)
    for leaf in INFO:
        rule = optax.adamw(0.1, 0.9, 0.95, 1e-8, weight_decay=0.5 if leaf in MATRICES else 0.0)
        expected, _ = rule.update(grads[leaf], rule.init(params[leaf]), params[leaf])
        np.testing.assert_allclose(updates[leaf], expected, rtol=1e-5, err_msg=leaf)


def test_muon_orthogonalises_each_matrix_of_each_layer():
    updates, grads = one_update(name="muon", weight_decay=0.0)

    def check(update, grad):
        """A gradient matrix [inputs, outputs] and what Muon makes of it, by the singular value decomposition."""
        u, _, vh = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
        scale = 0.2 * np.sqrt(max(1, grad.shape[1] / grad.shape[0]))
        inner = u.T @ (np.asarray(update, np.float64) / -scale) @ vh.T  # u (about 1 on the diagonal) v^T
        assert np.all((np.diag(inner) > 0.6) & (np.diag(inner) < 1.3)), np.diag(inner)
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.02

    for layer in range(3):
        check(updates["w"][layer].reshape(4, 4), grads["w"][layer].reshape(4, 4))
        check(updates["out"][layer].reshape(4, 4), grads["out"][layer].reshape(4, 4))
        for part in range(2):
            check(updates["in_zx"][layer][:, part].reshape(4, 4), grads["in_zx"][layer][:, part].reshape(4, 4))
    for leaf in set(INFO) - MATRICES:
        np.testing.assert_allclose(np.abs(updates[leaf]), 0.1, rtol=1e-4, err_msg=leaf)  # Adam's first step


def test_every_parameter_of_a_model_goes_where_it_belongs():
    model = nnx.eval_shape(lambda: HybridLM(small_config().model, rngs=nnx.Rngs(0)))
    table = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(param_info(model)))[0]
    matrices = {path[-1].key for path, info in table if muon_dims(info) is not None}
    others = {path[-1].key for path, info in table if muon_dims(info) is None}
    assert matrices == {"in_zx", "in_BC", "in_dt", "out", "w_q", "w_k", "w_v", "w_gate", "w_o", "w_in", "w_out"}
    assert others >= {"embedding", "A_log", "dt_bias", "D", "conv_x", "conv_BC", "norm", "weight", "sinks"}


def muon_of(info, grouped=True):
    """(rule, parameters, gradients)."""
    config = OptimConfig(lr=0.1, rule=Muon(grouped=grouped), schedule=Constant(), warmup_steps=0, weight_decay=0.1)
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(info)))
    params, grads = ({leaf: jax.random.normal(next(keys), of.shape) for leaf, of in info.items()} for _ in range(2))
    return make_optimizer(config, 10, info)[0], params, grads


WIDER = {
    "up": ParamInfo(("d_model", "d_ff"), "matrix", 1, (), True, (3, 4, 8)),
    "gated": ParamInfo(("d_model", None, "d_ff"), "matrix", 1, (1,), False, (4, 2, 8)),
    "down": ParamInfo(("d_ff", "d_model"), "matrix", 1, (), False, (8, 4)),
}
"""Of two more shapes, 4 x 8 twice and 8 x 4."""


def test_muon_compiles_one_iteration_of_five():
    """Three products a matrix, whatever the number of iterations; grouped, on one device, three a shape."""

    def count(grouped):
        rule, params, grads = muon_of(INFO | WIDER, grouped)
        return str(jax.make_jaxpr(rule.update)(grads, rule.init(params), params)).count("dot_general")

    assert count(False) == 3 * (len(MATRICES) + len(WIDER)) and count(True) == 3 * 3
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        assert count(True) == count(False)


def test_matrices_updated_together_are_those_updated_alone():
    """Their updates, and the state after two steps, leaf by leaf."""

    def two_steps(grouped):
        rule, params, grads = muon_of(INFO | WIDER, grouped)
        first, state = rule.update(grads, rule.init(params), params)
        return first, rule.update(grads, state, params)

    together, alone = two_steps(True), two_steps(False)
    assert jax.tree.structure(together) == jax.tree.structure(alone)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(together), jax.tree.leaves(alone), strict=True):
        check_close(a, b, dtype="float32", what=jax.tree_util.keystr(path))


def test_where_adamw_says_so_its_updates_are_bounded():
    """By the bound of its docstring, whatever the gradients: one, tiny, growing as fast as they can, in turn."""
    for betas in ((0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.95, 0.91)):
        assert AdamW(betas).bounded
        first, second = betas
        most = (1 - first) / np.sqrt((1 - second) * (1 - first**2 / second)) / (1 - first)
        update = jax.jit(optax.scale_by_adam(*betas, eps=1e-8).update)
        state = optax.scale_by_adam(*betas).init(jnp.zeros(4))
        for step in range(150):
            growing = min((second / max(first, 0.1)) ** step, 1e15) * 1e-5
            grads = jnp.array([1e18 if step == 0 else 0.0, 1e-30, growing, 1e18 if step % 40 < 20 else 1e-18])
            updates, state = update(grads, state)
            assert np.abs(updates).max() <= most * 1.001
    for betas, eps in (((0.99, 0.5), 1e-8), ((0.9, 1 - 1e-12), 1e-8), ((0.9, 0.95), 1e-60)):
        assert not AdamW(betas, eps).bounded
    assert is_bounded(AdamW()) and not is_bounded(Muon())


def optimizer_of_before(name, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, weight_decay=0.1, clip_norm=1.0):
    """AdamW at 0.1 and Muon at 0.2 as versions built them in which one class held all numbers: what wrote the optimizer
    states of their checkpoints."""
    is_matrix = jax.tree.map(lambda leaf: leaf.kind == "matrix", INFO)
    constant = optax.constant_schedule
    adam, scale = optax.scale_by_adam(*betas, eps=eps), optax.scale_by_learning_rate(_joined(constant(0.1)))
    if name == "adamw":
        rule = optax.chain(adam, optax.add_decayed_weights(weight_decay, mask=is_matrix), scale)
    else:
        labels = jax.tree.map(lambda matrix: "muon" if matrix else "adam", is_matrix)
        dims = jax.tree.map(lambda leaf: muon_dims(leaf) or optax.MaskedNode(), INFO)
        muon = optax.contrib.muon(
            _joined(constant(0.2)), beta=momentum, weight_decay=weight_decay, eps=eps,
            muon_weight_dimension_numbers=dims,
        )  # fmt: skip
        rule = optax.partition({"muon": muon, "adam": optax.chain(adam, scale)}, labels)
    return optax.chain(optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm), rule)


def _joined(schedule):
    return optax.join_schedules([schedule], [])


@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_is_that_of_versions_before(name, clip_norm):
    """The same tree with the same names, and to the bit the same updates from it."""
    rule = {"adamw": AdamW(), "muon": Muon(lr=0.2)}[name]
    config = OptimConfig(lr=0.1, rule=rule, schedule=Constant(), warmup_steps=0, clip_norm=clip_norm)
    now, before = make_optimizer(config, 10, INFO)[0], optimizer_of_before(name, clip_norm=clip_norm)
    params = {leaf: jnp.ones(info.shape) for leaf, info in INFO.items()}
    grads = {leaf: jax.random.normal(jax.random.key(i), x.shape) for i, (leaf, x) in enumerate(params.items())}
    state = before.init(params)
    assert _paths(now.init(params)) == _paths(state)
    for _ in range(2):
        expected, next_state = before.update(grads, state, params)
        updates, ours = now.update(grads, state, params)
        for a, b in zip(jax.tree.leaves((updates, ours)), jax.tree.leaves((expected, next_state)), strict=True):
            np.testing.assert_array_equal(a, b)
        assert jax.tree.structure(ours) == jax.tree.structure(next_state)
        state = next_state


def _paths(state):
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


@dataclass(frozen=True)
class Signs:
    """An update rule of one's own: a share of the sign of the gradient."""

    share: float = 0.5

    def transform(self, rate, lr, weight_decay, info):
        """See rules.py."""
        return optax.chain(optax.scale_by_sign(), optax.scale(self.share), optax.scale_by_learning_rate(rate(lr)))


def test_a_rule_of_ones_own():
    """It trains, is overridden, stored and read again without a word in RULES."""
    whole = override(Config(optim=OptimConfig(rule=Signs(0.7))), {"optim.rule.share": 0.25})
    assert whole.optim.rule == Signs(0.25) and from_dict(to_dict(whole), like=whole) == whole
    config = OptimConfig(lr=0.1, rule=Signs(), schedule=Constant(), warmup_steps=0, clip_norm=None)
    optimizer, schedule = make_optimizer(config, 10, INFO)
    grads = {"w": jnp.asarray([3.0, -2.0])}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(updates["w"], [-0.05, 0.05])
    assert schedule(5) == pytest.approx(0.1)
