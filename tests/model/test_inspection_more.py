# SPDX-License-Identifier: Apache-2.0
"""What further mixers say of themselves: latent and convolved attention, memories with gates, what depths hand on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.layers.attention import stand
from hybridlm.layers.block import Tokens
from tests.model.model_support import QUICK, VARIANTS, build, random_tokens, small
from tests.model.test_inspection import (
    ENDS,
    IDS,
    check_numbers,
    draw,
    longer,
    numbers_of,
    softplus,
    spread_by_hand,
    through,
)

slow = pytest.mark.slow


def sigmoid(x):
    return np.exp(-softplus(-x))


def float64(params):
    return {key: np.asarray(value[...], np.float64) for key, value in params.items()}


def summary(decay, norms):
    """Numbers of decays and of the norms of states."""
    expected = {f"decay_{end}": getattr(np.asarray(decay, np.float64), end)() for end in ENDS}
    return expected | {"state_norm_mean": np.mean(norms), "state_norm_max": np.max(norms)}


def spread(entropy, first):
    by_head = [np.nanmean(a, axis=(0, 1)) for a in (entropy, first)]
    return {
        "entropy_mean": np.nanmean(entropy), "entropy_min": by_head[0].min(),
        "first_token_mean": np.nanmean(first), "first_token_max": by_head[1].max(),
    }  # fmt: skip


def documents(x_BTD, ids):
    """Of every document its tokens [T, D], and whether it is the last of its row."""
    for x_TD, ids_T in zip(x_BTD, ids, strict=True):
        for document in dict.fromkeys(ids_T[ids_T > 0]):
            yield x_TD[ids_T == document], bool(document == ids_T[ids_T > 0][-1])


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["latent", "convolved_window", *(pytest.param(n, marks=slow) for n in ("latent_queries", "convolved"))]
)
def test_attention(name):
    block, x_BTD = VARIANTS[name], draw(2, 12)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)
    window = getattr(block, "window", None)

    def project(params):
        mixer, tokens = nnx.merge(graphdef, params), Tokens(IDS)
        _, positions, _ = stand(x_BTD, tokens, window)
        if name.startswith("latent"):
            q, latent, _ = mixer._project(x_BTD, positions)
            return q, mixer._expand(latent)[0]
        return mixer._project(x_BTD, positions, tokens, None)[:2]

    q, k = jax.device_get(jax.jit(project, compiler_options=QUICK)(params))
    scale = getattr(block, "scale", None)
    check_numbers(found, spread(*spread_by_hand(q, k, None, IDS, range(12), window, scale, None)))
    assert 0 < found["entropy_min"] < found["entropy_mean"] and 0 < found["first_token_mean"] < found["first_token_max"]


# Memories -----------------------------------------------------------------------------------------------------------


def test_mlstm():
    """The memory by hand, without a scale: C <- sigmoid(f) C + exp(i) k v^T / sqrt(N)."""
    block, x_BTD = replace(VARIANTS["mlstm"], gate_softcap=2.0), draw(2, 12, seed=1)
    found, _, params = numbers_of(block, x_BTD, IDS)
    w, decays, norms = float64(params), [], []
    for x_TD, is_last in documents(x_BTD, IDS):
        k = (np.einsum("td,dhn->thn", x_TD, w["w_qk"][:, 1]) + w["b_qk"][1]) / block.d_key**0.5
        v = np.einsum("td,dhp->thp", x_TD, w["w_vo"][:, 0]) + w["b_vo"][0]
        gates = 2 * np.tanh((np.einsum("td,dgh->gth", x_TD, w["w_gates"]) + w["b_gates"][:, None]) / 2)
        add, keep = np.exp(gates[0]), sigmoid(gates[1])
        memory = np.zeros((block.n_heads, block.d_key, block.d_head))
        for t in range(len(x_TD)):
            memory = keep[t, :, None, None] * memory + add[t, :, None, None] * k[t, :, :, None] * v[t, :, None]
        decays.append(keep)
        norms += [np.linalg.norm(memory)] * is_last
    check_numbers(found, summary(np.concatenate(decays), norms))


def test_slstm():
    """The recurrence by hand, token by token and without a scale; forget gates read the output before."""
    block, x_BTD = VARIANTS["slstm"], draw(2, 12, seed=2)
    found, _, params = numbers_of(block, x_BTD, IDS)
    w, H, decays, norms = float64(params), block.n_heads, [], []
    for x_TD, is_last in documents(x_BTD, IDS):
        x = x_TD.reshape(len(x_TD), H, -1).astype(np.float64)
        before = np.pad(x, ((block.d_conv - 1, 0), (0, 0), (0, 0)))
        u = sum(before[i : i + len(x)] * w["conv"][..., i] for i in range(block.d_conv)) + w["conv_bias"]
        u, y, c, n = u * sigmoid(u), np.zeros_like(x[0]), np.zeros_like(x[0]), np.zeros_like(x[0])
        for t in range(len(x)):
            back = np.einsum("hq,qghp->ghp", y, w["R"]) + w["bias"]
            i, f, z, o = (np.einsum("hq,qhp->hp", (u if g < 2 else x)[t], w["w_in"][:, g]) + back[g] for g in range(4))
            c, n = sigmoid(f) * c + np.exp(i) * np.tanh(z), sigmoid(f) * n + np.exp(i)
            y = sigmoid(o) * c / n
            decays.append(sigmoid(f))
        norms += [np.linalg.norm(c / n)] * is_last
    check_numbers(found, summary(decays, norms))


def test_rwkv4():
    """Decays of the channels, and the weighted mean of the values of each row's last document."""
    block, x_BTD = VARIANTS["rwkv4"], draw(2, 12, seed=3)
    found, _, params = numbers_of(block, x_BTD, IDS)
    w, norms = float64(params), []
    decay_F = np.exp(-np.exp(w["decay"]))
    for x_TD, is_last in documents(x_BTD, IDS):
        before = np.pad(x_TD[:-1], ((1, 0), (0, 0)))
        mixed = [x_TD * share + before * (1 - share) for share in w["share"]]
        k, v = (mixed[i] @ w["w_in"][:, i] for i in range(2))
        weights = decay_F ** np.arange(len(k))[::-1, None] * np.exp(k)
        norms += [np.linalg.norm((weights * v).sum(0) / weights.sum(0))] * is_last
    check_numbers(found, summary(decay_F, norms))


def test_a_row_of_padding_holds_nothing():
    for name in ("slstm", "rwkv4"):
        found, _, _ = numbers_of(VARIANTS[name], draw(2, 12), np.array([[1] * 12, [0] * 12], np.int32))
        check_numbers({"": found["state_norm_mean"]}, {"": found["state_norm_max"] / 2})


def memories_by_hand(graphdef, params, x_BTD):
    """State of a memory behind each row's last document, from one token after the other."""

    def of_row(params, x_TD):
        mixer = nnx.merge(graphdef, params)
        step = lambda cache, x_D: (mixer.extend(x_D[None, None], cache, np.zeros(1, np.int32))[1],) * 2
        return jax.lax.scan(step, mixer.init_cache(1, 1), x_TD)[1]["state"][:, 0]

    run = jax.jit(of_row, compiler_options=QUICK)
    last = [x_TD for x_TD, is_last in documents(x_BTD, IDS) if is_last]
    return [np.asarray(run(params, longer(x_TD, 12)), np.float64)[len(x_TD) - 1] for x_TD in last]


@pytest.mark.parametrize("name", ["titans", pytest.param("titans_chunks", marks=slow)])
def test_titans(name):
    block, x_BTD = VARIANTS[name], draw(2, 12, seed=4)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)
    w = float64(params)
    forget = sigmoid(x_BTD @ w["w_rates"][:, 2] + w["rates"][2])[IDS != 0]
    n_memory = sum(w[part][0].size for part in ("memory_norm", "memory_in", "memory_out"))
    norms = [np.linalg.norm(state[:, :n_memory]) for state in memories_by_hand(graphdef, params, x_BTD)]
    check_numbers(found, summary(1 - forget, norms))


def test_memory_as_context():
    """The memory by itself, and the attention's queries at tokens, not at what is remembered."""
    block, x_BTD = VARIANTS["memory_context"], draw(2, 12, seed=5)
    found, graphdef, params = numbers_of(block, x_BTD, IDS)

    def parts(params):
        mixer, tokens = nnx.merge(graphdef, params), Tokens(IDS)
        r_BTD = mixer.memory.mix(x_BTD, tokens).y_BTD
        both, twice = jnp.stack([r_BTD, x_BTD], axis=2).reshape(2, 24, -1), Tokens(np.repeat(IDS, 2, axis=1))
        q, k = mixer.attention._project(both, stand(both, twice, None)[1], None)[:2]
        return mixer.memory.inspect(x_BTD, tokens), q, k

    memory, q, k = jax.device_get(jax.jit(parts, compiler_options=QUICK)(params))
    options = np.repeat(IDS, 2, axis=1), range(1, 24, 2), block.attention.window, None, None
    expected = spread(*spread_by_hand(q, k, None, *options))
    assert memory.keys() == summary(1.0, [1.0]).keys()
    expected = {f"attention.{name}": value for name, value in expected.items()}
    check_numbers(found, expected | {f"memory.{name}": value for name, value in memory.items()})


# What depths hand on ------------------------------------------------------------------------------------------------


def test_experts_by_depth():
    """Each depth's router has the state that came to it."""
    model, tokens_BT = build(small("DD", {"D": VARIANTS["depth_moe"]}), seed=1), random_tokens(2, 12)

    def run(model):
        x_BTD, state_BTR, stats = model._embed(tokens_BT), jnp.zeros((2, 12, 6)), []
        for depth in range(2):
            graphdef, params = nnx.split(model.groups[0][0])
            sublayer = nnx.merge(graphdef, jax.tree.map(lambda a, depth=depth: a[depth], params))
            (x_BTD, state_BTR), of_depth = sublayer((x_BTD, state_BTR), Tokens(IDS, gaps=False))
            stats.append(of_depth)
        return stats

    stats = jax.device_get(jax.jit(run, compiler_options=QUICK)(model))
    of = lambda key: [depth[key] for depth in stats]
    expected = {
        "load_max": max(of("max_load")), "router_entropy_mean": np.mean(of("entropy")), "dropped_sum": 0.0,
    }  # fmt: skip
    found = through(model, tokens_BT, IDS)["D.DepthMoE"]
    check_numbers(found, expected)
    assert found["load_max"] > 1 and abs(stats[0]["entropy"] - stats[1]["entropy"]) > 1e-4


def test_rwkv7_with_mixed_values():
    """The norm of the state behind one token after the other, with the values that came from the first depth."""
    block, (x_BTD, passed_BTD) = VARIANTS["rwkv7_mixed"], (draw(2, 12, seed=s) for s in (6, 7))
    alone, graphdef, params = numbers_of(block, x_BTD, IDS)
    inspect_on = lambda params: nnx.merge(graphdef, params).inspect_on(x_BTD, passed_BTD, Tokens(IDS))
    found = jax.device_get(jax.jit(inspect_on, compiler_options=QUICK)(params))

    def of_row(params, both_TcD):
        mixer = nnx.merge(graphdef, params)

        def step(cache, both_cD):
            x, passed = both_cD[:, None, None]
            return (mixer.extend_on(x, passed, cache, np.zeros(1, np.int32))[2],) * 2

        return jax.lax.scan(step, mixer.init_cache(1, 1), both_TcD)[1]["state"]

    run, both = jax.jit(of_row, compiler_options=QUICK), np.stack([x_BTD, passed_BTD], axis=2)
    last = [rows for rows, is_last in documents(both, IDS) if is_last]
    norms = [np.linalg.norm(run(params, longer(rows, 12))[len(rows) - 1]) for rows in last]
    decays = {name: value for name, value in alone.items() if name.startswith("decay")}
    check_numbers(found, decays | {"state_norm_mean": np.mean(norms), "state_norm_max": np.max(norms)})
    assert abs(found["state_norm_mean"] - alone["state_norm_mean"]) > 1e-3
