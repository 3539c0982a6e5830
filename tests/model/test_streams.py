# SPDX-License-Identifier: Apache-2.0
"""Models of several residual streams, with blocks that read them and the tokens: what one stream is held to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybridlm
from hybridlm.config import ConfigError, MeshConfig, ModelConfig, Streams
from hybridlm.layers import NgramMemory, ngrams, streams
from hybridlm.layers.block import Make, Tokens
from hybridlm.model.flops import forward_flops
from hybridlm.model.init import abstract
from tests.model import properties
from tests.model.model_support import QUICK, VARIANTS, build, random_tokens, small
from tests.tolerances import check_close

MEMORY = replace(VARIANTS["ngrams"], n=3, d_embed=12, n_streams=2)
BLOCKS = {"D": VARIANTS["delta"], "N": MEMORY, "*": VARIANTS["indexed"], "-": VARIANTS["mlp"]}
WORDS = {"streams": Streams(2, 3), "norm_offset": 1.0}
MODEL = small("ND*-", BLOCKS, **WORDS)
SHALLOW = small("*N-", BLOCKS, **WORDS)


def test_pieces_equal_the_full_forward():
    properties.check_cache(SHALLOW)


@pytest.mark.slow
def test_packed_equals_separate():
    properties.check_packed(MODEL)


@pytest.mark.slow
def test_it_generates_what_it_says():
    model, prompt = build(MODEL), random_tokens(2, 7)
    new = hybridlm.generate(model, prompt, max_new_tokens=6)
    longer = np.concatenate([prompt, new], axis=1)
    np.testing.assert_array_equal(np.argmax(model(longer[:, :-1]), axis=-1)[:, 6:], new)


@pytest.mark.slow
def test_one_device_equals_eight():
    mesh = MeshConfig(1, fsdp=2, tensor=2, context=2)
    properties.check_devices(VARIANTS["delta"], mesh, **WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "kernels", "mixer"])
def test_no_remat_policy_changes_anything(policy):
    tokens_BT = random_tokens(2, 9)

    def gradients(remat):
        graphdef, params = nnx.split(build(replace(MODEL, remat=remat)))
        return jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p)(tokens_BT).std()), compiler_options=QUICK)(params)

    properties.check_trees(gradients(policy), gradients("none"))


def test_flops_are_those_of_the_parameters():
    config = small("--", BLOCKS, **WORDS)
    infos = nnx.to_flat_state(nnx.State(abstract(config).info))
    matrices = sum(np.prod(info.shape) for _, info in infos if info.kind == "matrix")
    assert forward_flops(config, 8) == 2.0 * (matrices + 16 * config.vocab_size)


def test_a_reader_by_hand():
    """Float64, written out: a mean of normed streams times gates, what is added times gates."""
    reader = streams.StreamReader(Streams(3, 5), 8, rngs=nnx.Rngs(0), init_std=0.5, eps=1e-6, offset=1.0)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 4, 24)).astype(np.float32), rng.normal(size=(2, 4, 8)).astype(np.float32)
    reader.norm[...] = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    u, gates = (np.asarray(a) for a in jax.jit(lambda reader, x: reader.read(x))(reader, x))
    added = np.asarray(jax.jit(streams.add)(x, y, gates))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    for b, t in np.ndindex(2, 4):
        of = x[b, t].astype(np.float64).reshape(3, 8)
        normed = of / np.sqrt((of**2).mean(-1, keepdims=True) + 1e-6) * (1 + np.float64(reader.norm[...]))
        middle = normed.reshape(-1) @ np.float64(reader.down[...]) / 3
        mix = sigmoid((middle * sigmoid(middle)) @ np.float64(reader.up[...])).reshape(3, 8)
        inject = 2 * sigmoid(normed.reshape(-1) @ np.float64(reader.inject[...]) / 3)
        np.testing.assert_allclose(u[b, t], (mix * normed).mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gates[b, t], inject, rtol=1e-5)
        np.testing.assert_allclose(added[b, t], (of + inject[:, None] * y[b, t]).reshape(-1), rtol=1e-5, atol=1e-6)


# N-grams --------------------------------------------------------------------------------------------------------------


def rows_by_hand(tokens: list[int], n: int, per_order: int, block: NgramMemory) -> np.ndarray:
    """Of one document, in Python's whole numbers, token by token."""
    found = []
    for t, token in enumerate(tokens):
        seen, row, start = [token], [], 0
        for back in range(1, n):
            cut = t < back or any(tokens[t - i] == block.eos_id for i in range(1, back + 1))
            seen.append(block.eos_id if cut else tokens[t - back])
        for order in range(2, n + 1):
            mixed = 0
            for one, factor in zip(seen[:order], block.multipliers, strict=False):
                mixed ^= one * factor
            for size in block.sizes[(order - 2) * per_order : (order - 1) * per_order]:
                row.append(start + mixed % size)
                start += size
        found.append(row)
    return np.array(found)


@pytest.mark.parametrize(("vocab", "least"), [(29, 11), (248_320, 20_000_000), (2**31 - 1, 300_000_000)])
def test_rows_of_ngrams_by_hand(vocab, least):
    """Documents in rows, an end of text inside one, in one piece and in two."""
    block = NgramMemory(vocab, n=4, n_hashes=2, d_embed=12, least_rows=least, multiple=1, index=1, eos_id=3)
    tokens = np.random.default_rng(0).integers(0, min(vocab, 2**31 - 2), (2, 20)).astype(np.int32)
    tokens[0, 5] = tokens[1, 12] = 3
    ids = np.repeat([[1, 2]], (8, 12), axis=1).repeat(2, axis=0).astype(np.int32)
    hashed = jax.jit(lambda tokens, earlier: ngrams.rows(tokens, earlier, 3, block.multipliers, block.sizes))
    found = lambda *given: np.asarray(hashed(*given))
    before = jax.jit(ngrams.before, static_argnums=(3, 4))
    packed = found(tokens, before(tokens, ids, None, 4, False)[0])
    earlier, recent = before(tokens[:, :7], None, None, 4, False)
    pieces = [found(tokens[:, :7], earlier)]
    pieces.append(found(tokens[:, 7:], before(tokens[:, 7:], None, recent, 4, False)[0]))
    for b in range(2):
        documents = [rows_by_hand(tokens[b, part].tolist(), 4, 2, block) for part in (slice(8), slice(8, 20))]
        np.testing.assert_array_equal(packed[b], np.concatenate(documents))
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[b], rows_by_hand(tokens[b].tolist(), 4, 2, block))
    assert packed.max() < block.rows


def test_ngrams_skip_padding():
    """Between real tokens, where a mixer meets it alone."""
    tokens = np.array([[5, 9, 7, 2, 9, 8]], np.int32)
    ids = np.array([[0, 1, 0, 1, 1, 2]], np.int32)
    earlier, recent = jax.jit(ngrams.before, static_argnums=(3, 4))(tokens, ids, None, 3, True)
    real = np.array([1, 3, 4, 5])
    np.testing.assert_array_equal(np.stack(earlier)[:, 0, real], [[0, 10, 3, 0], [0, 0, 10, 0]])
    np.testing.assert_array_equal(recent, [[10, 9]])


def test_a_memory_reads_the_tokens():
    """What a token adds hangs on it and on the ones before it, in its document."""
    mixer = jax.jit(lambda: MEMORY.build(32, Make(nnx.Rngs(0), init_std=0.5, dtype="float32")))()
    x, tokens = np.random.default_rng(0).normal(size=(1, 6, 32)).astype(np.float32), random_tokens(1, 6)
    mix = jax.jit(lambda tokens: mixer.mix(jnp.asarray(x), Tokens(ids_BT=tokens, gaps=False)).y_BTD)
    run = lambda tokens: np.asarray(mix(tokens))
    other = tokens.copy()
    other[0, 2] = (tokens[0, 2] + 7) % 29
    changed = np.abs(run(other) - run(tokens)).max(-1)[0] > 1e-6
    np.testing.assert_array_equal(changed, [False, False, True, True, True, False])  # 3-grams; no tap is nonzero yet
    assert jax.eval_shape(mixer, x).shape == (1, 6, 32)


# What cannot be -------------------------------------------------------------------------------------------------------

ERRORS = (
    ({"streams": None}, r"^model\.blocks\.N\.n_streams \(2\) is not the number of the model's streams \(1\)"),
    ({"streams": Streams(3, 3)}, r"^model\.blocks\.N\.n_streams \(2\) is not .* \(3\)"),
    ({"norm": "layer"}, r"^model\.norm \(layer\) must be 'rms' with model\.streams"),
    ({"norm_after": "-"}, r"^model\.norm_after \(-\) must be '' with model\.streams"),
    ({"residual_multiplier": 0.5}, r"^model\.residual_multiplier \(0\.5\) must be 1\.0 with model\.streams"),
    ({"norm_before": "DN*-"}, r"^model\.blocks\.N \(NgramMemory\): the residual stream as it is has no norm"),
    ({"prefix_tokens": 2}, r"^model\.blocks\.N \(NgramMemory\) reads tokens, of which model\.prefix_tokens are none"),
    ({"blocks": BLOCKS | {"D": VARIANTS["depth_moe"]}}, r"^model\.blocks\.D \(DepthMoE\) has one residual stream"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_what_does_not_go_together_is_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        replace(MODEL, **change)
    assert "\n" not in str(error.value)


def test_blocks_that_are_sublayers_by_themselves_are_no_parts():
    message = r"^model\.blocks\.X\.mixer \(NgramMemory\) is a sublayer by itself"
    with pytest.raises(ConfigError, match=message):
        ModelConfig(29, 16, "X", {"X": replace(VARIANTS["output_conv"], mixer=VARIANTS["ngrams"])})


@pytest.mark.slow
def test_a_memory_alone_is_of_one_stream():
    """In a model of one stream, too: behind it the stream is the embedding and what it adds."""
    model, tokens = build(small("N", {"N": VARIANTS["ngrams"]})), random_tokens(2, 8)
    x_BTD = model.embedding[...][tokens]
    graphdef, state = nnx.split(model.groups[0][0].mixer)
    mixer = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
    y_BTD = mixer.mix(x_BTD, Tokens(ids_BT=jnp.asarray(tokens), gaps=False)).y_BTD
    check_close(model.hidden(tokens), model.norm(x_BTD + y_BTD), dtype="float32", what="hidden")
