# SPDX-License-Identifier: Apache-2.0
"""generate: greedy equals recomputing, ragged prompts, pieces of prompts, end of text, sampling; and clear errors."""

import jax
import numpy as np
import pytest
from flax import nnx

import hybridlm
from hybridlm.errors import ConfigError
from hybridlm.model import decoding
from hybridlm.model.decoding import Sampling, Writer, piece_size, room_for
from hybridlm.model.generation import generate
from tests.model.model_support import APART, QUICK, VARIANTS, VOCAB, build, random_tokens, small
from tests.tolerances import check_close


@pytest.fixture(scope="module")
def model():
    return build(small("M*w"))


@pytest.fixture(scope="module")
def greedy(model):
    """20 tokens by full forwards, of rows that start with 9 and with 4 tokens."""
    forward = jax.jit(lambda tokens: model(tokens), compiler_options=QUICK)
    tokens, ends = np.zeros((2, 29), np.int32), np.array([9, 4])
    tokens[:, :9] = random_tokens(2, 9)
    for step in range(20):
        logits = np.asarray(forward(tokens))
        tokens[[0, 1], ends + step] = logits[[0, 1], ends + step - 1].argmax(-1)
    return np.stack([tokens[row, end : end + 20] for row, end in enumerate(ends)])


def test_greedy_equals_recomputing(model, greedy):
    prompts = random_tokens(2, 9)
    assert len(np.unique(greedy)) > 4
    np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=20, lengths=[9, 4]), greedy)
    np.testing.assert_array_equal(generate(model, prompts[:1], max_new_tokens=20), greedy[:1])
    lists = [prompts[0].tolist(), prompts[1, :4].tolist()]
    np.testing.assert_array_equal(generate(model, lists, max_new_tokens=20, prefill_chunk=3), greedy)
    assert hybridlm.generate is generate


def test_rows_end_with_eos(model, greedy):
    eos = int(greedy[0, 6])
    end = [int(np.argmax(row == eos)) if eos in row else 19 for row in greedy]
    new = np.asarray(generate(model, random_tokens(2, 9), max_new_tokens=20, lengths=[9, 4], eos_id=eos))
    for row in range(2):
        np.testing.assert_array_equal(new[row, : end[row] + 1], greedy[row, : end[row] + 1])
        assert (new[row, end[row] + 1 :] == eos).all()


def test_rows_end_with_one_of_several(model, greedy):
    ends = [int(greedy[0, 6]), int(greedy[1, 2])]
    new = np.asarray(generate(model, random_tokens(2, 9), max_new_tokens=20, lengths=[9, 4], eos_id=ends))
    for row in range(2):
        end = int(np.argmax(np.isin(greedy[row], ends)))
        np.testing.assert_array_equal(new[row, : end + 1], greedy[row, : end + 1])
        assert (new[row, end + 1 :] == greedy[row, end]).all()


def test_lengths_share_programs(model):
    """Of prompts and of what is written."""
    all_of_them = decoding._read, decoding.writing("cpu"), decoding._empty, decoding._prepared
    programs = lambda: [f._cache_size() for f in all_of_them]
    generate(model, random_tokens(2, 5), max_new_tokens=3)
    before = programs()
    for tokens, new in ((1, 9), (7, 4), (16, 1), (16, 16)):
        generate(model, random_tokens(2, tokens), max_new_tokens=new)
    assert programs() == before
    generate(model, random_tokens(2, 600), max_new_tokens=3, prefill_chunk=16)
    assert np.subtract(programs(), before).tolist() == [1, 1, 1, 0]  # of another room, however many pieces


def test_arrays_bound_to_a_device_share_programs(model):
    """As those of a checkpoint: each program is compiled once, however a conversation goes."""
    graphdef, params = nnx.split(model)
    writer = Writer(nnx.merge(graphdef, jax.device_put(params, jax.devices()[0])), prefill_chunk=16)
    before = decoding._read._cache_size(), decoding.writing("cpu")._cache_size()
    state = writer.read(writer.start(1, 90), random_tokens(1, 40), np.array([40]))
    for done_B in (None, np.zeros(1, bool), None):
        _, state = writer.write(state.copy(), 1, Sampling(), done_B)
        state = writer.read(state, random_tokens(1, 7), np.array([7]))
        _, state = writer.write(state, 2, Sampling())
    assert before == (decoding._read._cache_size() - 1, decoding.writing("cpu")._cache_size() - 1)


def test_sizes():
    rooms = [room_for(n) for n in range(1, 70_000)]
    assert all(n <= room <= max(32, 1.25 * n + 32) for n, room in enumerate(rooms, 1))
    assert len(set(rooms)) < 45 and rooms == sorted(rooms) and room_for(20_000) == 20_480
    assert [piece_size(n) for n in (1, 16, 17, 511, 513, 20_000)] == [16, 16, 32, 512, 1024, 1024]
    assert [piece_size(n, None) for n in (5, 513, 20_000)] == [16, 1024, 20_480]
    assert piece_size(7, 3) == 3


def test_sampling(model):
    prompts, key = np.tile(random_tokens(1, 6), (256, 1)), jax.random.key(0)
    forward = lambda model, tokens: jax.nn.log_softmax(model(tokens)[0, -1])
    log_p = np.asarray(jax.jit(forward, compiler_options=QUICK)(model, prompts[:1]))
    first = np.asarray(generate(model, prompts, 1, temperature=2.0, key=key))[:, 0]
    np.testing.assert_array_equal(first, np.asarray(generate(model, prompts, 1, temperature=2.0, key=key))[:, 0])
    p = np.exp(log_p / 2) / np.exp(log_p / 2).sum()
    counts = np.bincount(first, minlength=VOCAB)
    assert ((counts - 256 * p) ** 2 / (256 * p)).sum() < 70  # chi squared of 28 degrees of freedom: p < 2e-5
    order = np.argsort(-log_p)
    top = np.asarray(generate(model, prompts, 1, temperature=5.0, top_k=3, key=key))[:, 0]
    assert set(top) == set(order[:3])
    nucleus = np.asarray(generate(model, prompts, 1, temperature=2.0, top_p=0.5, key=key))[:, 0]
    n_kept = int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1
    assert set(nucleus) <= set(order[:n_kept])
    assert len(set(nucleus)) > 1


def test_without_a_key(model):
    prompts = random_tokens(2, 6)
    drawn = generate(model, prompts, temperature=0.8)
    assert drawn.shape == (2, 200)
    np.testing.assert_array_equal(drawn, generate(model, prompts, temperature=0.8, key=jax.random.key(0)))
    of_7 = generate(model, prompts, 9, temperature=0.8, seed=7)
    np.testing.assert_array_equal(of_7, generate(model, prompts, 9, temperature=0.8, key=jax.random.key(7)))
    assert (np.asarray(of_7) != np.asarray(drawn)[:, :9]).any()


def test_written_in_parts(model):
    """Tokens by ones and twos, caches that grow, rows ended from outside; what was read stays when it is copied."""
    prompts, lengths, how = random_tokens(2, 9), np.array([9, 4]), Sampling(temperature=0.9, seed=3)
    expected = np.asarray(generate(model, prompts, 40, temperature=0.9, seed=3, lengths=lengths))
    writer = Writer(model, prefill_chunk=4)
    state = start = writer.read(writer.start(2, 1), prompts, lengths)
    state, parts = start.copy(), []
    while sum(part.shape[1] for part in parts) < 40:
        part, state = writer.write(state, 1 + len(parts) % 2, how)
        parts.append(np.asarray(part))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1)[:, :40], expected)
    assert state.room > start.room and state.drawn in (40, 41)
    whole, state = writer.write(start, 40, how, done_B=np.array([False, True]))
    np.testing.assert_array_equal(np.asarray(whole)[0], expected[0, :40])


QUICKLY = ("window", "latent")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICKLY else pytest.mark.slow)
        for name in APART
        if not small("x", {"x": VARIANTS[name]}).sees_ahead
    ],
)
def test_pieces_and_growth_change_nothing(name):
    """What stands behind a ragged prompt and three tokens: read by pieces of 5 into a cache that began with room for
    one, it is that of a full forward of each row."""
    config = small("x-", {"x": VARIANTS[name], "-": VARIANTS["mlp"]})
    model, lengths, n = build(config), np.array([40, 37, 3]), 3
    tokens = random_tokens(3, 43)
    writer = Writer(model, prefill_chunk=5)
    state = writer.read(writer.start(3, 1), tokens[:, :33], np.minimum(lengths, 33))
    state = writer.read(state, tokens[:, 33:40], np.maximum(lengths - 33, 0))
    new, state = writer.write(state, n, Sampling())
    assert state.room >= 43 and state.cache.length_B.tolist() == (lengths + n).tolist()
    for row, length in enumerate(lengths):
        tokens[row, length : length + n] = np.asarray(new)[row]
    full, logits = jax.jit(read_at_once, compiler_options=QUICK)(model, tokens)
    for row, length in enumerate(lengths):  # what stands behind them they do not see
        check_close(state.x_BD[row], full[row, length + n - 1], dtype="float32", what=f"row {row}")
        check = np.asarray(logits[row, length - 1 : length + n - 1]).argmax(-1)
        np.testing.assert_array_equal(check, np.asarray(new)[row])


def read_at_once(model, tokens):
    """(hidden vectors, logits) of a full forward."""
    full = model.hidden(tokens)
    return full, model.logits(full)


def test_bidirectional_models_are_refused():
    model = build(small("x", {"x": VARIANTS["both_ways"]}))
    with pytest.raises(ConfigError, match=r"cannot be decoded token by token: .* is bidirectional"):
        generate(model, random_tokens(1, 3), 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens_BT": np.zeros(3, np.int32)}, ValueError, r"tokens_BT must be \[batch, tokens\].*\(3,\)"),
        ({"tokens_BT": np.zeros((1, 3))}, TypeError, r"tokens_BT \(float64\)"),
        ({"tokens_BT": np.full((1, 3), VOCAB)}, ValueError, rf"holds {VOCAB}, outside of vocab_size \({VOCAB}\)"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens \(0\)"),
        ({"temperature": -1.0}, ValueError, r"temperature \(-1\.0\)"),
        ({"seed": 2**63}, ValueError, r"seed \(9223372036854775808\)"),
        ({"prefill_chunk": 0}, ValueError, r"prefill_chunk \(0\) must be positive"),
        ({"max_new_tokens": 2**31}, ValueError, r"max_new_tokens \(2147483648\) must be at most 2147483644"),
        ({"tokens_BT": [[1, 2], []]}, ValueError, r"tokens_BT\[1\] must be a list of tokens, not empty"),
        ({"tokens_BT": [[1, 2], [0.5]]}, TypeError, r"tokens_BT\[1\] \(float64\)"),
        ({"top_k": 0}, ValueError, r"top_k \(0\)"),
        ({"top_p": 1.5}, ValueError, r"top_p \(1\.5\)"),
        ({"lengths": [4]}, ValueError, r"lengths \(4\.\.4\) must be in 1\.\.3"),
        ({"lengths": [1, 2]}, ValueError, r"lengths \(2,\) must have one entry"),
    ],
)
def test_errors(model, changes, error, message):
    with pytest.raises(error, match=message):
        generate(**{"model": model, "tokens_BT": np.zeros((1, 3), np.int32), "max_new_tokens": 2, **changes})
