# SPDX-License-Identifier: Apache-2.0
"""Tokens that are hidden from the model: which, what stands in their place, and where the loss is taken."""

import jax
import numpy as np
import pytest

from hybridlm.config import ConfigError, Masked
from hybridlm.train.metrics import on_host
from tests.train.conftest import first_state, make_batch, small_program

PLAIN = ("--model.pattern=*-",)
WORDS = (*PLAIN, "--optim.objective=Masked", "--optim.objective.tokens", "4", "60", "--optim.objective.mask_token=63")
MASKED = Masked(tokens=(4, 60), mask_token=63)


def rows(shape=(64, 512), seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens of which some are none of MASKED's and some have no target."""
    rng = np.random.default_rng(seed)
    tokens, targets = (rng.integers(0, 64, shape).astype(np.int32) for _ in range(2))
    return {"tokens": tokens, "targets": np.where(rng.integers(0, 5, shape) == 0, -1, targets)}


def hidden(batch, seed: int = 0) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, MASKED.prepare(batch, lambda: jax.random.key(seed)))


def test_shares_are_those_of_bert():
    batch = rows()
    after = hidden(batch)
    may = (batch["targets"] >= 0) & (batch["tokens"] >= 4) & (batch["tokens"] < 60)
    chosen = after["targets"] >= 0
    assert not chosen[~may].any()
    np.testing.assert_array_equal(after["targets"][chosen], batch["tokens"][chosen])
    np.testing.assert_array_equal(after["tokens"][~chosen], batch["tokens"][~chosen])
    seen, was = after["tokens"][chosen], batch["tokens"][chosen]
    n = len(seen)
    for share, expected, of in (
        (n, 0.15, may.sum()),
        ((seen == 63).sum(), 0.8, n),
        ((seen == was).sum(), 0.1 + 0.1 / 56, n),
        (((seen != 63) & (seen != was)).sum(), 0.1 * 55 / 56, n),
    ):
        assert abs(share / of - expected) < 4 * np.sqrt(expected * (1 - expected) / of)  # standard deviations
    other = seen[(seen != 63) & (seen != was)]
    assert other.min() == 4 and other.max() == 59


def test_they_are_a_function_of_the_key():
    batch = rows((8, 64))
    np.testing.assert_array_equal(hidden(batch, 1)["tokens"], hidden(batch, 1)["tokens"])
    assert (hidden(batch, 1)["targets"] != hidden(batch, 2)["targets"]).any()


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"rate": 0.0}, "rate (0.0) must be in (0, 1]"),
        ({"masked": 0.8, "random": 0.3}, "masked (0.8) and random (0.3) must add up to at most 1"),
        ({"tokens": (9, 9)}, "tokens (9 9) must be a first id and the one behind the last"),
        ({"mask_token": 8}, "mask_token (8) must be an id, and none of tokens (7 12)"),
    ],
)
def test_what_cannot_be_is_one_line(numbers, told):
    with pytest.raises(ConfigError) as error:
        Masked(**numbers)
    assert str(error.value) == told


def steps(words: tuple[str, ...], prepare=None, mesh_sizes=(1, 1, 1)) -> tuple[list[float], dict]:
    """Losses of two steps on made-up rows, and the parameters; prepare: (batch, state) -> batch, before the program."""
    config, mesh, program = small_program(words, mesh_sizes)
    losses = []
    with jax.set_mesh(mesh):
        state = first_state(config, program)
        for seed in range(2):
            batch = make_batch(config, seed)
            batch = batch if prepare is None else prepare(batch, state)
            state, metrics = program.train_step(state, jax.device_put(batch, program.batch_sharding))
            losses.append(on_host(metrics)["loss"].value())
    return losses, jax.device_get(state["params"])


def by_hand(batch, state):
    """The rows that a step sees, from the seed and the number of the step alone."""
    key = jax.random.fold_in(jax.random.split(jax.random.key(0))[1], int(state["step"]))
    return jax.tree.map(np.asarray, MASKED.prepare(batch, lambda: key))


def test_a_step_hides_by_seed_and_step_and_takes_the_loss_there_alone():
    """In microbatches as in one batch: what is hidden does not hang on how rows are dealt out."""
    losses, params = steps((*WORDS, "--optim.accumulate=2"))
    expected, expected_params = steps(PLAIN, by_hand)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max() + 1e-7)


@pytest.mark.slow
def test_eight_devices_hide_the_same():
    np.testing.assert_allclose(steps(WORDS, mesh_sizes=(2, 2, 2))[0], steps(WORDS)[0], rtol=1e-5)


def test_an_evaluation_hides_by_the_text():
    config, mesh, program = small_program((*WORDS, "--optim.accumulate=2"))
    batches = [make_batch(config, seed) for seed in (0, 1, 0)]
    with jax.set_mesh(mesh):
        params = first_state(config, program)["params"]
        found = [on_host(program.eval_step(params, batch))["loss"] for batch in batches]
    assert found[0] == found[2] != found[1]
    assert 0 < found[0].weight < 0.3 * (batches[0]["targets"] >= 0).sum()
