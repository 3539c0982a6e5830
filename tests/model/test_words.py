# SPDX-License-Identifier: Apache-2.0
"""What is no plain left-to-right model: both strands of DNA, prefix tokens in front of documents, both directions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybridlm
from hybridlm.config import Bidirectional, Config, ConfigError, Masked, MeshConfig, OptimConfig, RunConfig
from hybridlm.layers.block import Tokens, sees_ahead
from hybridlm.model.flops import forward_flops
from hybridlm.model.init import abstract
from tests.model import properties
from tests.model.model_support import HYBRID, QUICK, VARIANTS, VOCAB, build, named, packed_rows, random_tokens, small
from tests.tolerances import check_close

COMPLEMENT = (0, 3, 4, 1, 2, 5, 7, 6)
PARTNER = np.concatenate([COMPLEMENT, np.arange(len(COMPLEMENT), VOCAB)])
STRANDS = small("B*M", HYBRID | {"B": VARIANTS["bidirectional"], "*": VARIANTS["gated"]}, complement=COMPLEMENT)
PREFIX = small("Mw", prefix_tokens=3)
logits = jax.jit(lambda model, *args: model(*args), compiler_options=QUICK)


def test_directions_are_known_by_name():
    assert sees_ahead(VARIANTS["bidirectional"], "model.blocks.B") == "model.blocks.B is bidirectional"
    assert sees_ahead(VARIANTS["both_ways"]) and not sees_ahead(VARIANTS["attention"])
    shared = replace(VARIANTS["shared"], attention=replace(VARIANTS["shared"].attention, direction="bidirectional"))
    assert sees_ahead(shared, "S") == "S.attention is bidirectional"
    assert STRANDS.sees_ahead == "model.complement reads documents from both ends"
    assert small("Mm*-aw1E").sees_ahead == ""


def test_decoding_what_sees_ahead_is_refused_in_one_line():
    for config in (STRANDS, small("MX", HYBRID | {"X": VARIANTS["bidirectional"]})):
        model = nnx.eval_shape(lambda config=config: hybridlm.HybridLM(config, rngs=nnx.Rngs(0)))
        with pytest.raises(ConfigError, match=r"^the model cannot be decoded token by token: model\.\S+ "):
            hybridlm.generate(model, np.array([[1, 2]]), max_new_tokens=2)
    Masked(mask_token=20).check(VOCAB)
    masked = OptimConfig(objective=Masked(mask_token=20))
    Config(model=STRANDS, optim=masked)
    with pytest.raises(ConfigError, match=r"^optim.objective \(NextToken\) asks for a token that the model sees"):
        Config(model=STRANDS)
    with pytest.raises(ConfigError, match=r"^run.sample_tokens \(5\): the model cannot write text \(model.complement"):
        Config(model=STRANDS, optim=masked, run=RunConfig(sample_tokens=5))
    with pytest.raises(ConfigError, match=r"^optim.objective.tokens \(29\) is no token of model.vocab_size \(29\)$"):
        Config(model=STRANDS, optim=OptimConfig(objective=Masked(tokens=(7, 30))))
    with pytest.raises(ConfigError, match=r"^mixer \(Attention\) is bidirectional itself$"):
        Bidirectional(VARIANTS["both_ways"]).check(16)
    with pytest.raises(ConfigError, match=r"^window \(3\) must be None where direction is bidirectional"):
        replace(VARIANTS["window"], direction="bidirectional")


def test_complements_that_are_none_are_refused():
    for complement, told in (
        ((1, 2, 0), r"token 0 has the partner 1, which has not 0 as its own"),
        ((0, 5), r"token 1 has the partner 5, which has not 1 as its own"),
        (tuple(range(VOCAB + 1)), r"has 30 tokens, model.vocab_size is 29"),
    ):
        with pytest.raises(ConfigError, match=f"^model.complement:? {told}$"):
            small("M", complement=complement)
    with pytest.raises(ConfigError, match=r"^model.prefix_tokens \(2\) must be 0 with model.complement"):
        small("M", complement=COMPLEMENT, prefix_tokens=2)


def test_the_reverse_complement_of_rows_is_that_of_their_logits():
    """Of packed rows with padding in front, behind and inside: of whole rows and so of every document in them."""
    model, packed = build(STRANDS), packed_rows()
    y = np.asarray(logits(model, packed.tokens, packed.segment_ids))
    other = logits(model, PARTNER[packed.tokens][:, ::-1], packed.segment_ids[:, ::-1])
    real = packed.segment_ids != 0
    check_close(np.asarray(other)[:, ::-1][..., PARTNER][real], y[real], dtype="float32", what="logits")
    assert np.abs(np.asarray(other)[real] - y[real]).max() > 0.1


def test_strands_equal_the_published_formula():
    """RCPS as published: a stream of 2 D channels; each block reads its halves, the second one reversed in tokens and
    channels; the logits are those of the first half and, for the partners, of the second one."""
    config = small("Bm", HYBRID | {"B": VARIANTS["bidirectional"]}, complement=COMPLEMENT)
    model, tokens_BT = build(config), random_tokens(2, 9)
    flip = lambda x: jnp.flip(x, axis=(-2, -1))

    def published(model):
        table = model.embedding[...]
        other = jnp.flip(table[jnp.asarray(PARTNER[tokens_BT][:, ::-1])], axis=(-2, -1))
        x = jnp.concatenate([table[tokens_BT], other], axis=-1)
        for place in range(2):
            graphdef, state = nnx.split(model.groups[place][0] if len(model.groups) > 1 else model.groups[0][place])
            sublayer = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
            step = lambda x, sublayer=sublayer: sublayer(x, Tokens(gaps=False)).y_BTD
            first, second = jnp.split(x, 2, axis=-1)
            x = jnp.concatenate([step(first), flip(step(flip(second)))], axis=-1)
        first, second = jnp.split(x, 2, axis=-1)
        first, second = model.norm(first), jnp.flip(flip(model.norm(flip(second))), axis=-1)
        return first @ table.T + second @ table[PARTNER].T

    expected = jax.jit(published, compiler_options=QUICK)(model)
    check_close(logits(model, tokens_BT), expected, dtype="float32", what="logits")


def test_strands_cost_twice_and_have_no_parameters():
    one = replace(STRANDS, complement=())
    assert forward_flops(STRANDS, 8) == 2 * forward_flops(one, 8)
    assert abstract(STRANDS).info == abstract(one).info


@pytest.mark.slow
def test_strands_pack():
    properties.check_packed(STRANDS)


@pytest.mark.slow
@pytest.mark.parametrize("words", [{"prefix_tokens": 2}, {"complement": COMPLEMENT}])
def test_one_device_equals_eight(words):
    properties.check_devices(VARIANTS["mamba1"], MeshConfig(1, fsdp=2, tensor=2, context=2), **words)


def with_room(n: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, slice]], list[np.ndarray]]:
    """Rows with n cells in front of each document and noise in them: tokens, ids, places of the documents, these."""
    rng, rows, places, documents = np.random.default_rng(5), [[4, 1, 6], [9, 2]], [], []
    tokens, ids = rng.integers(0, VOCAB, (2, 3 * n + 13)), np.zeros((2, 3 * n + 13), np.int32)
    for row, lengths in enumerate(rows):
        start = 2 * row  # the second row begins with padding
        for number, length in enumerate(lengths, start=1):
            ids[row, start : start + n + length] = number
            place = slice(start + n, start + n + length)
            places.append((row, place))
            documents.append(tokens[row, place])
            start += n + length
    return tokens.astype(np.int32), ids, places, documents


def test_prefix_tokens_stand_in_front_of_every_document():
    """In packed rows, whatever tokens stand in their place; put there by the model in rows of one document; once in a
    cache."""
    model = build(PREFIX)
    tokens, ids, places, documents = with_room(3)
    packed = np.asarray(logits(model, tokens, ids))
    noise = np.where(np.isin(np.arange(ids.size).reshape(ids.shape), _indices(ids, places)), tokens, 7)
    np.testing.assert_array_equal(np.asarray(logits(model, noise, ids))[ids > 0], packed[ids > 0])
    alone = np.zeros((len(documents), 9), np.int32)
    for row, document in enumerate(documents):
        alone[row, : len(document)] = document
    expected = np.asarray(logits(model, alone))
    for row, ((at, place), document) in enumerate(zip(places, documents, strict=True)):
        check_close(packed[at, place], expected[row, : len(document)], dtype="float32", what=f"document {row}")
    assert np.abs(np.asarray(logits(build(replace(PREFIX, prefix_tokens=0)), alone)) - expected).max() > 0.1
    shifted = logits(model, alone, None, np.tile(np.arange(9, dtype=np.int32), (len(documents), 1)))
    check_close(shifted, expected, dtype="float32", what="positions of tokens")


def _indices(ids: np.ndarray, places: list) -> np.ndarray:
    """Flat indices of the documents' own tokens."""
    width = ids.shape[1]
    return np.concatenate([row * width + np.arange(place.start, place.stop) for row, place in places])


def test_a_cache_holds_prefix_tokens_once():
    properties.check_cache(PREFIX)
    model = build(PREFIX)
    np.testing.assert_array_equal(model.init_cache(2, 5).length_B, [3, 3])
    growing = abstract(small("*", prefix_tokens=3)).model()
    assert jax.eval_shape(lambda model: model.init_cache(2, 5), growing).limit == 8
    prompt = np.array([[1, 2, 3]])
    new = hybridlm.generate(model, prompt, max_new_tokens=4)
    longer = np.concatenate([prompt, new], axis=1)
    np.testing.assert_array_equal(np.argmax(logits(model, longer[:, :-1]), axis=-1)[:, 2:], new)


@pytest.mark.slow
def test_gradients_of_prefix_tokens_are_those_of_documents_one_by_one():
    graphdef, params = nnx.split(build(PREFIX))
    tokens, ids, places, documents = with_room(3)
    own = np.zeros(ids.shape, bool).reshape(-1)
    own[_indices(ids, places)] = True
    alone, mask = np.zeros((len(documents), 9), np.int32), np.zeros((len(documents), 9), bool)
    for row, document in enumerate(documents):
        alone[row, : len(document)], mask[row, : len(document)] = document, True

    def together(params):
        return jnp.where(own.reshape(ids.shape)[..., None], jnp.tanh(nnx.merge(graphdef, params)(tokens, ids)), 0).sum()

    def apart(params):
        return jnp.where(mask[..., None], jnp.tanh(nnx.merge(graphdef, params)(alone)), 0).sum()

    grads, expected = (jax.jit(jax.grad(f), compiler_options=QUICK)(params) for f in (together, apart))
    properties.check_trees(grads, expected)
    assert np.abs(named(grads)["prefix"]).min() > 0


def test_the_words_cost_others_nothing():
    """A model without them has the parameters that it had, and one with prefix tokens one more."""
    plain, prefixed = (abstract(small("M*", prefix_tokens=n)).shapes for n in (0, 3))
    assert prefixed.pop("prefix").shape == (3, 16)
    assert jax.tree.map(lambda a: a.shape, plain) == jax.tree.map(lambda a: a.shape, prefixed)
