# SPDX-License-Identifier: Apache-2.0
"""Examples packed into rows are scored as rows of their own; one program serves all tasks of a shape."""

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import MeshConfig
from hybridlm.probes import InContextRegression, Needle, StateTracking, StringCopying, score
from hybridlm.probes.forward import Forward
from hybridlm.probes.packed import AT_ONCE, Packed, Shape
from hybridlm.probes.scoring import Counts
from hybridlm.sharding import make_mesh
from tests.probes.test_scores import make

TASKS = (
    (StringCopying(letters=6), 21, 13),
    (Needle(over="tokens", tokens=32, digits=2), 16, 5),
    (InContextRegression(inputs=2, most_x=1), 14, 7),
    (StateTracking("Z2"), 100, 3),
)


def likeliest(tokens: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """What a made-up model says, of a token, the one before it and the place: right sometimes."""
    before = np.where(positions > 0, np.roll(tokens, 1, axis=1), 7)
    return (tokens + 3 * before + 5 * positions) % vocab_size


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize(("task", "length", "n"), TASKS)
def test_packed_equals_apart(task, length, n, room):
    examples = task.batch(1, 0, n, length)
    packed = Packed(examples, Shape(2, 110), room)
    found, seen = np.full(packed.at_EN.shape, -7), 0
    for cells, asked in packed.batches():
        positions, ids = cells["positions"] - room, cells["segment_ids"]
        for row in range(2):  # documents one behind the other, each from its first cell
            for number in range(1, ids[row].max() + 1):
                at = np.flatnonzero(ids[row] == number)
                assert (np.diff(at) == 1).all() and len(at) == length + room
                assert cells["positions"][row, at].tolist() == list(range(length + room))
        said = likeliest(cells["tokens"], positions, task.vocab_size)
        for one in asked:
            assert one.at_BC.shape == (2, AT_ONCE)
            read = np.take_along_axis(said, one.at_BC, axis=1)
            found[one.example_n, one.answer_n] = read[one.row_n, one.column_n]
            seen += len(one.row_n)
    assert seen == packed.real_EN.sum() and len(packed) == -(-n // (2 * (110 // (length + room))))
    counts = Counts(length)
    counts.add(examples, packed.at_EN, packed.real_EN, found)

    def logits_of(tokens_BT):
        positions = np.broadcast_to(np.arange(length), tokens_BT.shape)
        return np.eye(task.vocab_size)[likeliest(tokens_BT, positions, task.vocab_size)]

    assert counts.score() == score(logits_of, task, length, rows=n, batches=1, seed=1)


@pytest.mark.slow
def test_a_model_on_packed_rows_is_the_model_on_rows():
    """All tasks by one program of the model and one that reads it, and what they say is what `score` says."""
    model, mesh = make("M*-", 120), make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    graphdef, params = nnx.split(model, nnx.Param)
    forward = Forward(graphdef, mesh)
    with jax.set_mesh(mesh):
        for task, length, n in TASKS:
            packed = Packed(task.batch(1, 0, n, length), Shape(2, 110))
            found = forward.score((params,), packed)
            assert found == score(model, task, length, rows=n, batches=1, seed=1)
        assert forward.score((params,), packed, stop=lambda: True) is None
    assert forward._hidden._cache_size() == forward._likeliest._cache_size() == 1
