# SPDX-License-Identifier: Apache-2.0
"""What every block has to satisfy, as functions of an example of it.

`test_mixers.py` calls them for all of BLOCKS, a new block's own test for the new one. Sizes of an example should divide
by 2, where a mesh has to divide them.
"""

import functools
from collections.abc import Mapping
from dataclasses import is_dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import Config, ConfigError, Masked, MeshConfig, ModelConfig, NextToken, OptimConfig
from hybridlm.layers.block import Block, Make, Tokens, free_fields, sees_ahead
from hybridlm.model.init import abstract, check_model, init_sharded
from hybridlm.model.model import HybridLM
from hybridlm.model.pattern import places
from hybridlm.model.statistics import statistics, summarise
from tests.model.model_support import QUICK, build, drawn, log_likelihoods, named, packed_rows, random_tokens, small
from tests.tolerances import check_close

D = 16
FREE_VALUES = {"chunk": (1, 5, 64, None)}
"""Field of FREE -> values under which results have to be the same."""


def model_of(block: Block, pattern: str = "XX", **changes) -> ModelConfig:
    """A float32 config of width 16 with the block alone."""
    return small(pattern, {"X": block}, **changes)


@functools.lru_cache(maxsize=256)
def mixer_of(block: Block, seed: int = 0):
    """(graphdef, parameters) of the block's mixer by itself, none of them 0 or 1; drawn once."""
    return drawn(lambda rngs: block.build(D, Make(rngs, init_std=0.3, dtype="float32")), seed)


def run_sublayers(model: HybridLM, x_BTD: jax.Array, segment_ids=None) -> jax.Array:
    """The model behind its embedding."""
    embedded_BTD = x_BTD
    for symbol, place in zip(model.config.pattern, places(model.config.pattern), strict=True):
        graphdef, state = nnx.split(model.groups[place.group][place.position])
        sublayer = nnx.merge(graphdef, jax.tree.map(lambda a, place=place: a[place.repeat], state))
        tokens = Tokens(segment_ids, embedded_BTD=embedded_BTD, shared=model.shared.get(symbol), gaps=False)
        x_BTD = sublayer(x_BTD, tokens).y_BTD
    return x_BTD


def check_causal(config: ModelConfig, seen_TS: np.ndarray, *segment_ids: list[int], rounding: float = 0.0) -> None:
    """The gradient of each token's output reaches the tokens of seen_TS and no others, in its row alone.

    segment_ids: of rows without padding, in which a token reaches those of its document alone; none: one document. For
    a bidirectional block seen_TS is everything. rounding: share of the largest gradient that still counts as none, for
    what goes through Fourier space.
    """
    model, n_tokens = build(config), len(seen_TS)
    graphdef, params = nnx.split(model)
    x_BTD = model.embedding[...][random_tokens(2, n_tokens)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def jacobian(x_BTD, ids_BT):  # row by row: jax.lax.ragged_dot has no vmap over the rows of its results
        pull = jax.vjp(lambda x: run_sublayers(nnx.merge(graphdef, params), x, ids_BT)[0].sum(-1), x_BTD)[1]
        return jax.lax.map(lambda weight_T: pull(weight_T)[0], jnp.eye(n_tokens))

    for ids in segment_ids or (None,):
        of_one = True if ids is None else np.equal.outer(ids, ids)
        reach_TBS = np.abs(np.asarray(jacobian(x_BTD, None if ids is None else np.array([ids] * 2, np.int32)))).max(-1)
        assert not reach_TBS[:, 1].any()
        np.testing.assert_array_equal(reach_TBS[:, 0] > rounding * reach_TBS.max(), seen_TS & of_one)


def check_packed(config: ModelConfig) -> None:
    """A packed row gives its documents' logits, loss and gradients of all parameters, padding wherever it stands. One
    program, of as many rows."""
    graphdef, params = nnx.split(build(config))
    packed = packed_rows()
    tokens, targets, mask = packed.alone()
    index = np.concatenate(packed.places)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, tokens, targets, ids):
        scores = log_likelihoods(nnx.merge(graphdef, params), tokens, targets, ids)
        return jnp.where(ids != 0, scores, 0).sum() / len(index), scores

    more = [(0, len(mask) - len(packed.tokens)), (0, 0)]
    together = [np.pad(rows, more) for rows in (packed.tokens, packed.targets, packed.segment_ids)]
    (loss, scores), grads = jax.device_get(run(params, *together))
    (expected, alone), expected_grads = jax.device_get(run(params, tokens, targets, mask.astype(np.int32)))
    check_close(scores.reshape(-1)[index], alone[mask], dtype="float32", what="scores of documents")
    check_close(loss, expected, dtype="float32", what="loss")
    check_trees(grads, expected_grads)


def check_padding(block: Block) -> None:
    """The mixer by itself, called on arrays: documents in rows with padding anywhere, and with ids that come back, give
    what they give one a row; values, and gradients of the input and of all parameters. One program, of as many rows."""
    graphdef, params = mixer_of(block)
    packed, rng = packed_rows(), np.random.default_rng(0)
    n_rows, n_tokens = len(packed.places), packed.tokens.shape[1]
    mask = np.arange(n_tokens) < np.array([len(place) for place in packed.places])[:, None]
    alone, weight = (rng.normal(size=(n_rows, n_tokens, D)).astype(np.float32) for _ in range(2))
    weight *= mask[:, :, None]
    index = np.concatenate(packed.places)

    def in_rows(array, rest):
        """Documents' vectors at their places in the rows, the rest at padding."""
        rest.reshape(-1, D)[index] = array[mask]
        return rest

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x, ids, weight):
        y = nnx.merge(graphdef, params)(x, ids)
        y = y[0] if isinstance(y, tuple) else y
        return jnp.sum(y * weight), y

    ids = np.zeros((n_rows, n_tokens), np.int32)
    ids[: len(packed.segment_ids)] = packed.segment_ids
    noise = 3.0 * rng.normal(size=alone.shape).astype(np.float32)
    rows = params, in_rows(alone, noise), ids, in_rows(weight, np.zeros_like(weight))
    (_, y), (grads, dx) = jax.device_get(run(*rows))
    (_, expected), (expected_grads, expected_dx) = jax.device_get(run(params, alone, mask.astype(np.int32), weight))
    check_close(y.reshape(-1, D)[index], expected[mask], dtype="float32", what="output")
    check_close(dx.reshape(-1, D)[index], expected_dx[mask], dtype="float32", what="gradient of x")
    check_trees(grads, expected_grads)


def check_cache(config: ModelConfig) -> None:
    """Tokens read in padded pieces and one by one give the logits of one forward pass; padding is not read."""
    model, size, n_tokens = build(config), 3, 8
    if config.sees_ahead:
        with pytest.raises(ConfigError, match=r"^the model cannot be decoded token by token: model\.blocks\.\S"):
            model.init_cache(2, n_tokens)
        return
    tokens_BT = random_tokens(2, n_tokens)
    forward = jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICK)
    extend = jax.jit(lambda model, tokens, cache, ids: model.extend(tokens, cache, ids), compiler_options=QUICK)
    expected, cache = np.asarray(forward(model, tokens_BT)), model.init_cache(2, n_tokens)
    ids = np.array([[0, 1, 1, 1], [1, 0, 1, 1]], np.int32)  # padding in front and inside
    for start in (0, size):
        padded = np.full((2, size + 1), 3, np.int32)
        padded[ids == 1] = tokens_BT[:, start : start + size].reshape(-1)
        logits, cache = extend(model, padded, cache, ids)
        got = np.asarray(logits)[ids == 1].reshape(2, size, -1)
        check_close(got, expected[:, start : start + size], dtype="float32", what=f"logits from {start}")
    before = cache
    for t in range(2 * size, n_tokens):  # the second row waits
        logits, cache = extend(model, tokens_BT[:, t : t + 1], cache, np.array([[1], [0]], np.int32))
        check_close(np.asarray(logits)[0], expected[0, t : t + 1], dtype="float32", what=f"logits of token {t}")
    before, cache = jax.device_get((before, cache))
    for old, new in zip(jax.tree.leaves(before.groups), jax.tree.leaves(cache.groups), strict=True):
        np.testing.assert_array_equal(new[:, 1], old[:, 1])
    np.testing.assert_array_equal(cache.length_B - config.prefix_tokens, [n_tokens, 2 * size])


def check_cache_alone(block: Block) -> None:
    """The mixer by itself: `extend` over a piece with padding anywhere, then a token, gives what one call gives."""
    graphdef, params = mixer_of(block)
    if sees_ahead(block):
        with pytest.raises(ConfigError, match=r"^a bidirectional mixer has no cache"):
            nnx.merge(graphdef, params).init_cache(2, 8)
        return
    x_BTD = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
    real = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 0, 1]], bool)
    piece_BTD = np.full((2, 6, D), 5.0, np.float32)
    piece_BTD[real] = x_BTD[:, :4].reshape(-1, D)

    def both(params):
        mixer = nnx.merge(graphdef, params)
        y, cache = mixer.extend(piece_BTD, mixer.init_cache(2, 8), jnp.zeros(2, jnp.int32), real)
        last, _ = mixer.extend(x_BTD[:, 4:], cache, jnp.full(2, 4, jnp.int32))
        return jnp.concatenate([y[real].reshape(2, 4, D), last], axis=1), mixer.mix(x_BTD, Tokens()).y_BTD

    got, expected = jax.jit(both, compiler_options=QUICK)(params)
    check_close(got, expected, dtype="float32", what="output")


def check_free(block: Block) -> None:
    """Results do not depend on the fields of FREE."""
    tokens_BT = random_tokens(2, 21)

    def logits(changed):
        model = build(model_of(changed, "X"), drawn_for=model_of(block, "X"))
        return jax.jit(lambda model: model(tokens_BT), compiler_options=QUICK)(model)

    expected = logits(block) if free_fields(block) else None
    for path in sorted(free_fields(block)):
        for value in FREE_VALUES[path.rsplit(".", 1)[-1]]:
            check_close(logits(with_field(block, path, value)), expected, dtype="float32", what=f"{path} {value}")


def check_remat(block: Block, *policies: str) -> None:
    """Gradients under remat policies are those without."""
    tokens_BT = random_tokens(2, 9)

    def gradients(policy):
        graphdef, params = nnx.split(build(model_of(block, remat=policy)))
        loss = lambda params: nnx.merge(graphdef, params)(tokens_BT).std()
        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)

    expected = gradients("none")
    for policy in policies:
        check_trees(gradients(policy), expected)


def check_devices(block: Block, mesh: MeshConfig, **words) -> None:
    """Parameters, loss, statistics and gradients on eight devices are those on one. words: of the model's config."""
    config = replace(model_of(block), vocab_size=32, init_std=0.3, **words)
    ids = np.array([[1] * 5 + [2] * 7, [1] * 10 + [0] * 2] * 4, np.int32)
    batch = [random_tokens(8, 12), random_tokens(8, 12, seed=1), ids]
    kinds = statistics(config)

    def step(mesh_config, n_devices):
        mesh = sharding.make_mesh(mesh_config, jax.devices()[:n_devices])
        graphdef, params = nnx.split(init_sharded(config, mesh, seed=3))

        def loss(params, tokens, targets, ids):
            model = nnx.merge(graphdef, params)
            x_BTD, stats = model.hidden_with_stats(tokens, ids)
            log_p = jax.nn.log_softmax(model.logits(x_BTD), axis=-1)
            scores = jnp.take_along_axis(log_p, targets[:, :, None], axis=-1)[:, :, 0]
            stats = summarise(config, stats)
            return (scores * (ids != 0)).mean() + sum(stats[name] for name in kinds if kinds[name].loss), stats

        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
            (value, stats), grads = step(params, *placed)
        return params, value, stats, grads

    (params, loss, stats, grads), (one, expected, one_stats, one_grads) = step(mesh, 8), step(MeshConfig(1), 1)
    for path, value in named(one).items():
        np.testing.assert_array_equal(named(params)[path], value, err_msg=path)
    check_close(loss, expected, dtype="float32", what="loss")
    for name, value in one_stats.items():
        check_close(stats[name], value, dtype="float32", what=name)
    check_trees(grads, one_grads)


def check_split(block: Block) -> None:
    """`split` names what a mesh has to divide: where it finds nothing, parameters can be laid out, and only there."""
    config = replace(model_of(block, "X"), vocab_size=120)
    for axis in ("fsdp", "tensor", "expert"):
        for size in (2, 3, 4, 5, 8):
            mesh = sharding.make_mesh(replace(MeshConfig(1), **{axis: size}), jax.devices()[:size])
            refused = []
            for check in (check_model, lambda config, mesh: sharding.param_shardings(abstract(config).info, mesh)):
                try:
                    check(config, mesh)
                except ConfigError as error:
                    refused.append(str(error))
            assert len(refused) in (0, 2), f"mesh.{axis} {size}: {refused}"


def check_bfloat16(block: Block) -> None:
    """Logits in bfloat16 are near those in float32, parameters float32 in both."""
    tokens_BT = random_tokens(2, 9)
    run = lambda model: jax.jit(lambda: model(tokens_BT), compiler_options=QUICK)()
    model = build(model_of(block, compute_dtype="bfloat16"))
    logits, exact = run(model), run(build(model_of(block)))
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 0.05 * np.std(exact)
    assert all(leaf.dtype == np.float32 for leaf in named(nnx.state(model)).values())


def check_config(block: Block) -> None:
    """Checks itself at any width, is equal to itself resolved and says so once; parameters follow from the resolved."""
    block.check(D)
    resolved = block.resolved(D)
    assert resolved.resolved(D) == resolved
    assert hash(model_of(block)) == hash(replace(model_of(block)))
    infos = [jax.tree.leaves(abstract(model_of(one, "X")).info) for one in (block, resolved)]
    assert infos[0] == infos[1]
    assert block.flops(D, 8) == resolved.flops(D, 8) > 0
    assert isinstance(block.MIXES_TOKENS, bool)


def check_json(block: Block) -> None:
    """The config of a model with the block, stored and read again. For blocks of BLOCKS."""
    from hybridlm.config.stored import from_dict
    from hybridlm.config.tree import to_dict

    optim = OptimConfig(objective=Masked() if sees_ahead(block) else NextToken())
    config = Config(model=model_of(block), optim=optim)
    assert from_dict(to_dict(config)) == config


def flops_by_hand(block: Block, of_op: float, share: Mapping[str, float] = {}) -> float:
    """Two for each entry of each matrix and convolution, and `of_op`.

    share: of parameters that a token does not use whole, by a part of their path.
    """
    total = of_op
    for path, info in nnx.to_flat_state(nnx.State(abstract(model_of(block, "X")).info)):
        name = ".".join(map(str, path))
        if info.kind in ("matrix", "conv") and not name.startswith("embedding"):
            used = [part for key, part in share.items() if key in name]
            total += 2 * np.prod(info.shape) * (used[0] if used else 1)
    return float(total)


def check_trees(actual, expected) -> None:
    """Gradients of all parameters."""
    actual = named(actual)
    for path, grad in named(expected).items():
        check_close(actual[path], grad, dtype="float32", what=f"gradient of {path}")


def with_field(node, path: str, value):
    """A dataclass or dict with the field of a dotted path replaced."""
    name, _, rest = path.partition(".")
    if isinstance(node, dict):
        return node | {name: with_field(node[name], rest, value) if rest else value}
    assert is_dataclass(node)
    return replace(node, **{name: with_field(getattr(node, name), rest, value) if rest else value})
