# SPDX-License-Identifier: Apache-2.0
"""What mixers say of themselves, against what NumPy finds by hand, at every depth and however a model is run."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import Bidirectional, KimiDelta, MeshConfig
from hybridlm.layers import inspection
from hybridlm.layers.attention import stand
from hybridlm.layers.block import Tokens
from hybridlm.layers.mlp import MLP, FeedForward
from hybridlm.model.init import init_sharded
from hybridlm.model.pattern import places
from hybridlm.model.statistics import inspected
from tests.model import properties
from tests.model.model_support import HYBRID, QUICK, VARIANTS, build, random_tokens, small
from tests.tolerances import check_close

D = properties.D
IDS = np.array([[1] * 4 + [2] * 6 + [0] * 2, [3] * 12], np.int32)


def numbers_of(block, x_BTD, ids, gaps=True):
    """(what the block's mixer says of itself, its graphdef, its parameters)."""
    graphdef, params = properties.mixer_of(block)
    return jax.device_get(inspect(graphdef, params, x_BTD, ids, gaps)), graphdef, params


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK)
def inspect(graphdef, params, x_BTD, ids, gaps):
    return nnx.merge(graphdef, params).inspect(x_BTD, Tokens(ids, gaps=gaps))


def draw(rows, tokens, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, tokens, D)).astype(np.float32)


def check_numbers(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        check_close(found[name], value, dtype="float32", what=name)


def spread_by_hand(
    q_BTHP, k_BTKP, sinks_H, ids_BT, queries, window, scale, softcap, causal=True, terms_BTHE=None
):  # fmt: skip
    """Entropy and share of the first token, query by query, in float64: [B, Q, H] each, NaN for padding."""
    B, _, H, P = q_BTHP.shape
    entropy, first = (np.full((B, len(queries), H), np.nan) for _ in range(2))
    for b, h in np.ndindex(B, H):
        k_SP = k_BTKP[b, :, h // (H // k_BTKP.shape[2])].astype(np.float64)
        for i, t in enumerate(queries):
            if ids_BT[b, t] == 0:
                continue
            document = [s for s in range(t + 1 if causal else ids_BT.shape[1]) if ids_BT[b, s] == ids_BT[b, t]]
            keys = document if window is None else document[-window:]
            scores = k_SP[keys] @ q_BTHP[b, t, h].astype(np.float64) * (P**-0.5 if scale is None else scale)
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            if terms_BTHE is not None:  # by how many tokens of the document stand between
                behind = np.arange(len(keys))[::-1]
                near = behind < terms_BTHE.shape[-1]
                scores = scores + near * terms_BTHE[b, t, h, np.minimum(behind, terms_BTHE.shape[-1] - 1)]
            weights = np.exp(np.append(scores, [] if sinks_H is None else sinks_H[h]))
            p = weights / weights.sum()
            entropy[b, i, h] = -np.sum(p * np.log(p))
            first[b, i, h] = p[0] if keys[0] == document[0] else 0.0
    return entropy, first


@pytest.mark.parametrize("name", ["attention", "gated", "window", "long", "both_ways"])
def test_attention(name):
    block, ids, x_BTD = VARIANTS[{"long": "window", "both_ways": "attention"}.get(name, name)], IDS, draw(2, 12)
    if name == "both_ways":
        block = replace(block, direction="bidirectional", sinks=True)
    if name == "long":  # more queries than are looked at; padding inside of a document does not count for the window
        block, x_BTD = replace(block, window=20), draw(2, 150)
        ids = np.array([[1] * 30 + [0] * 5 + [1] * 50 + [2] * 65, [1] * 100 + [0] * 50], np.int32)
    found, graphdef, params = numbers_of(block, x_BTD, ids)

    def project(params):
        mixer = nnx.merge(graphdef, params)
        _, positions, _ = stand(x_BTD, Tokens(ids), block.window)
        return *mixer._project(x_BTD, positions, None)[:2], None if mixer.sinks is None else mixer.sinks[...]

    q, k, sinks = jax.device_get(jax.jit(project, compiler_options=QUICK)(params))
    n = x_BTD.shape[1]
    queries = range(n) if n <= inspection.QUERIES else [(i + 1) * n // 64 - 1 for i in range(64)]
    options = block.window, block.scale, block.softcap, name != "both_ways"
    entropy, first = spread_by_hand(q, k, sinks, ids, queries, *options)
    by_head = [np.nanmean(a, axis=(0, 1)) for a in (entropy, first)]
    expected = {
        "entropy_mean": np.nanmean(entropy), "entropy_min": by_head[0].min(),
        "first_token_mean": np.nanmean(first), "first_token_max": by_head[1].max(),
    }  # fmt: skip
    check_numbers(found, expected)
    assert 0 < found["entropy_min"] < found["entropy_mean"] and 0 < found["first_token_mean"] < found["first_token_max"]


@pytest.mark.parametrize("name", ["relative", "relative_window"])
def test_relative_attention(name):
    """With the terms by distance, which padding inside of a document does not count for."""
    block, x_BTD = VARIANTS[name], draw(2, 12)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)

    def project(params):
        mixer = nnx.merge(graphdef, params)
        _, positions, _ = stand(x_BTD, Tokens(IDS), block.window)
        q, k, _, r, _ = mixer._project(x_BTD, positions, Tokens(IDS), None)
        return q, k, r @ mixer.profiles[...]

    q, k, terms = jax.device_get(jax.jit(project, compiler_options=QUICK)(params))
    entropy, first = spread_by_hand(q, k, None, IDS, range(12), block.window, 1 / block.d_head, None, terms_BTHE=terms)
    check_numbers(found, {
        "entropy_mean": np.nanmean(entropy), "entropy_min": np.nanmean(entropy, axis=(0, 1)).min(),
        "first_token_mean": np.nanmean(first), "first_token_max": np.nanmean(first, axis=(0, 1)).max(),
    })  # fmt: skip


def softplus(a):
    return np.logaddexp(0, a)


def last_state(graphdef, params, x_BTD, ids):
    """Norms of the states behind each row's last document, from one token after the other."""

    def of_row(params, x_TD):
        mixer = nnx.merge(graphdef, params)
        step = lambda cache, x_D: (mixer.extend(x_D[None, None], cache, np.zeros(1, np.int32))[1],) * 2
        return jax.lax.scan(step, mixer.init_cache(1, 1), x_TD)[1]["state"]

    run = jax.jit(of_row, compiler_options=QUICK)
    last = [x[i == i[i > 0][-1]] for x, i in zip(x_BTD, ids, strict=True)]
    return np.array([np.linalg.norm(run(params, longer(x, len(ids[0])))[len(x) - 1]) for x in last])


def longer(x_TD, n_tokens):
    """The document with tokens behind it, so that one program reads all."""
    return np.pad(x_TD, ((0, n_tokens - len(x_TD)), *[(0, 0)] * (x_TD.ndim - 1)))


@pytest.mark.parametrize("name", ["mamba2", "mamba2_no_norm"])
def test_mamba2(name):
    block, x_BTD = VARIANTS[name], draw(2, 12, seed=1)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)
    weights = {key: np.asarray(value[...], np.float64) for key, value in params.items()}
    dt = np.clip(softplus(x_BTD @ weights["in_dt"] + weights["dt_bias"]), *block.dt_limit)[IDS != 0]
    decay, norms = np.exp(-dt * np.exp(weights["A_log"])), last_state(graphdef, params, x_BTD, IDS)
    expected = {
        f"{what}_{end}": getattr(values, end)() for what, values in (("dt", dt), ("decay", decay)) for end in ENDS
    }
    check_numbers(found, expected | {"state_norm_mean": norms.mean(), "state_norm_max": norms.max()})


ENDS = ("min", "mean", "max")


def test_mamba1():
    """One document a row: the convolution and what it selects by hand."""
    block, x_BTD = replace(VARIANTS["mamba1"], inner_norm=None), draw(2, 9, seed=2)
    ids = np.ones((2, 9), np.int32)
    found, graphdef, params = numbers_of(block, x_BTD, ids)
    w = {key: np.asarray(value[...], np.float64) for key, value in params.items()}
    x = np.einsum("btd,dhp->bthp", x_BTD, w["in_xz"][:, 0])
    before = np.pad(x, ((0, 0), (block.d_conv - 1, 0), (0, 0), (0, 0)))
    x = sum(before[:, i : i + 9] * w["conv"][..., i] for i in range(block.d_conv)) + w["conv_bias"]
    x = x / (1 + np.exp(-x))
    rank = w["dt_proj"].shape[0]
    low = np.einsum("bthp,phr->bthr", x, w["x_proj"])[..., :rank]
    dt = softplus(np.einsum("bthr,rhp->bthp", low, w["dt_proj"]) + w["dt_bias"])
    decay, norms = np.exp(-dt[..., None] * np.exp(w["A_log"])), last_state(graphdef, params, x_BTD, ids)
    expected = {
        f"{what}_{end}": getattr(values, end)() for what, values in (("dt", dt), ("decay", decay)) for end in ENDS
    }
    check_numbers(found, expected | {"state_norm_mean": norms.mean(), "state_norm_max": norms.max()})


LINEAR = ("rwkv6", "rglru", "minlstm")
"""Mixers whose states are multiplied by the decay, entry by entry; the others are slow tests."""
MORE = ("mamba3", "mamba3_mimo", "gla", "retnet", "lightning", "simple_gla", "hgrn2", "hgrn2_no_bound")
MORE += ("mingru", "hgrn", "hgrn_no_bound")
SCALE = 1000.0


@pytest.mark.parametrize("name", [*LINEAR, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_decays_and_states_of_recurrences(name):
    """What a token leaves of a state is what it makes of a large one less what it makes of none."""
    block, x_BTD = VARIANTS[name], draw(2, 12, seed=4)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)
    key = "ssm" if name.startswith("mamba3") else "state"

    def of_document(params, x_TD):
        mixer = nnx.merge(graphdef, params)

        def step(carry, x_D):
            cache, length = carry
            after = lambda state: mixer.extend(x_D[None, None], cache | {key: state}, length)[1]
            new = after(cache[key])
            left = (after(jnp.full_like(cache[key], SCALE))[key] - after(jnp.zeros_like(cache[key]))[key]) / SCALE
            return (new, length + 1), (left, new[key])

        return jax.lax.scan(step, (mixer.init_cache(1, 1), jnp.zeros(1, jnp.int32)), x_TD)[1]

    run = jax.jit(of_document, compiler_options=QUICK)
    sizes = {i: np.sum(i == IDS) for i in (1, 2, 3)}
    parts = {i: [np.asarray(a)[:n] for a in run(params, longer(x_BTD[i == IDS], 12))] for i, n in sizes.items()}
    left = np.concatenate([np.asarray(part[0], np.float64) for part in parts.values()])
    norms = [np.linalg.norm(parts[i][1][-1]) for i in (2, 3)]
    expected = {f"decay_{end}": getattr(left, end)() for end in ENDS}
    expected |= {"state_norm_mean": np.mean(norms), "state_norm_max": np.max(norms)}
    check_numbers({name: value for name, value in found.items() if not name.startswith("dt_")}, expected)
    assert ("dt_min" in found) == name.startswith("mamba3") and 0 < found["decay_min"] <= found["decay_max"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta", "delta_reflecting", "kimi"])
def test_delta_rules(name):
    block, x_BTD = VARIANTS.get(name, KimiDelta(n_heads=2, d_key=4, d_head=6, decay_rank=3)), draw(2, 12, seed=5)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)
    w = {key: np.asarray(value[...], np.float64) for key, value in params.items()}
    if name == "kimi":
        raw, A = np.einsum("btr,rhn->bthn", x_BTD @ w["in_decay"], w["decay"]), np.exp(w["A_log"])[:, None]
    else:
        raw, A = x_BTD @ w["in_ba"][:, 1], np.exp(w["A_log"])
    decay = np.exp(-softplus(raw + w["dt_bias"]) * A)[IDS != 0]
    norms = last_state(graphdef, params, x_BTD, IDS)
    expected = {f"decay_{end}": getattr(decay, end)() for end in ENDS}
    check_numbers(found, expected | {"state_norm_mean": norms.mean(), "state_norm_max": norms.max()})


def test_rwkv7():
    block, x_BTD = VARIANTS["rwkv7"], draw(2, 12, seed=6)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)
    w = {key: np.asarray(value[...], np.float64) for key, value in params.items()}
    first = np.pad(IDS[:, 1:] != IDS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    before = np.where(first[..., None], 0, np.roll(x_BTD, 1, axis=1))
    mixed = x_BTD + (before - x_BTD) * w["shares"][1]
    raw = np.einsum("btr,rhn->bthn", np.tanh(mixed @ w["decay_down"]), w["decay_up"]) + w["decay_bias"]
    decay = np.exp(-np.exp(-0.5) / (1 + np.exp(-raw)))[IDS != 0]
    norms = last_state(graphdef, params, x_BTD, IDS)
    expected = {f"decay_{end}": getattr(decay, end)() for end in ENDS}
    check_numbers(found, expected | {"state_norm_mean": norms.mean(), "state_norm_max": norms.max()})


def test_experts():
    found, graphdef, params = numbers_of(VARIANTS["moe"], x_BTD := draw(2, 12), IDS)
    mixer = nnx.merge(graphdef, params)
    stats = jax.device_get(jax.jit(lambda: mixer.mix(x_BTD, Tokens(IDS)).stats, compiler_options=QUICK)())
    names = {"load_max": "max_load", "router_entropy_mean": "entropy", "dropped_sum": "dropped"}
    check_numbers(found, {name: stats[key] for name, key in names.items()})
    assert found["load_max"] > 1 and found["router_entropy_mean"] > 0


def through(model, tokens_BT, ids):
    """{kind: {name: number}} of a model."""
    run = jax.jit(lambda model: inspected(model.config, model.hidden_with_stats(tokens_BT, ids, inspect=True)[1]))
    return jax.device_get(run.lower(model).compile(QUICK)(model))


def by_depth(model, tokens_BT, ids):
    """[{name: number}] of each depth: the residual stream through one sublayer after the other, of a symbol each by one
    program."""

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def run(symbol, sublayer, shared, x_BTD, embedded_BTD):
        tokens = Tokens(ids, embedded_BTD=embedded_BTD, shared=shared, gaps=False, inspect=True)
        output = sublayer(x_BTD, tokens)
        return output.y_BTD, output.stats

    x_BTD = embedded_BTD = np.asarray(model.embedding[...])[tokens_BT]
    found = []
    for symbol, place in zip(model.config.pattern, places(model.config.pattern), strict=True):
        graphdef, state = nnx.split(model.groups[place.group][place.position])
        sublayer = nnx.merge(graphdef, jax.tree.map(lambda a, place=place: np.asarray(a)[place.repeat], state))
        x_BTD, numbers = run(symbol, sublayer, model.shared.get(symbol), x_BTD, embedded_BTD)
        found.append(jax.device_get(numbers))
    return found


MERGE = {"min": np.min, "mean": np.mean, "max": np.max, "sum": np.sum}


@pytest.mark.parametrize("pattern", ["M-M-*M-M-*-", pytest.param("M-M-*M-M-*PSSB", marks=pytest.mark.slow)])
def test_layers_merge_by_kind(pattern):
    """Over nested loops and several groups, blocks in blocks, shared ones, and such as say nothing."""
    blocks = HYBRID | {"P": VARIANTS["parallel"], "S": VARIANTS["shared"], "-": VARIANTS["mlp"]}
    blocks["B"] = Bidirectional(VARIANTS["mamba2"])
    tokens_BT = random_tokens(2, 12)
    model = build(small(pattern, {symbol: blocks[symbol] for symbol in set(pattern)}))
    expected = {}
    for symbol, numbers in zip(pattern, by_depth(model, tokens_BT, IDS), strict=True):
        kind = f"{symbol}.{type(blocks[symbol]).__name__}"
        for name, value in numbers.items():
            expected.setdefault(kind, {}).setdefault(name, []).append(value)
    found = through(model, tokens_BT, IDS)
    assert found.keys() == expected.keys() and len(expected["M.Mamba2"]["dt_min"]) == 4
    if "P" in pattern:
        assert {"mamba.dt_min", "attention.entropy_mean"} < found["P.Parallel"].keys()
        assert {"link.entropy_mean", "state_norm_max"} < found["S.Shared"].keys()
        assert {"ahead.dt_min", "back.dt_min"} < found["B.Bidirectional"].keys()
    for kind, numbers in expected.items():
        check_numbers(found[kind], {name: MERGE[name.rpartition("_")[2]](a) for name, a in numbers.items()})


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"remat": "full"}, {"unroll": 8}], ids=str)
def test_however_the_model_is_run(changes):
    config = small("MMa" * 3, {symbol: HYBRID[symbol] for symbol in "Ma"})
    tokens_BT = random_tokens(2, 12)
    expected = through(build(config), tokens_BT, IDS)
    found = through(build(replace(config, **changes)), tokens_BT, IDS)
    for kind, numbers in expected.items():
        check_numbers(found[kind], numbers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(1, fsdp=2, tensor=2, context=2), MeshConfig(2, context=4), MeshConfig(1, fsdp=4, expert=2)],
    ids=str,
)
def test_on_devices(mesh):
    blocks = {"M": VARIANTS["mamba2"], "m": VARIANTS["mamba1"], "a": VARIANTS["attention"], "E": VARIANTS["moe"]}
    config = replace(small("MmaE", blocks), vocab_size=32, init_std=0.3)
    batch = [random_tokens(8, 12), np.tile(IDS, (4, 1))]

    def run(mesh_config, n_devices):
        mesh = sharding.make_mesh(mesh_config, jax.devices()[:n_devices])
        model = init_sharded(config, mesh, seed=3)
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(mesh))
            step = jax.jit(
                lambda model, tokens, ids: inspected(config, model.hidden_with_stats(tokens, ids, inspect=True)[1])
            )
            return jax.device_get(step.lower(model, *placed).compile(QUICK)(model, *placed))

    found, expected = run(mesh, 8), run(MeshConfig(1), 1)
    assert found.keys() == expected.keys() and len(found) == 4
    for kind, numbers in expected.items():
        check_numbers(found[kind], numbers)


class Loud(FeedForward):
    """Says what does not say how layers merge."""

    def inspect(self, x_BTD, tokens):
        return {"volume": x_BTD.sum()}


@dataclass(frozen=True)
class LoudMLP(MLP):
    """Builds it."""

    def build(self, d_model, make):
        return make.mixer(Loud, self, d_model)


def test_a_name_has_to_say_how_layers_merge():
    model = build(small("XX", {"X": LoudMLP(8)}))
    with pytest.raises(ValueError, match=r"^inspect of X.LoudMLP: 'volume' must end in _sum, _mean, _max, _min\n"):
        through(model, random_tokens(1, 4), None)
