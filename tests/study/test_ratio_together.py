# SPDX-License-Identifier: Apache-2.0
"""Models of one kind trained and scored by one program: as each alone."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from hybridlm.cli.study_member import main as train_folders
from hybridlm.probes import MQAR, score
from hybridlm.study import answers, ratio
from hybridlm.study.answers import TEST_SEED, pack, scored_together
from hybridlm.study.grid import Point, Sizes, points
from hybridlm.study.on_task import Trial, train_on
from hybridlm.study.together import train_together

SIZES = Sizes(d_model=16, mixers=2, mlp_every=2, d_head=8, vocab_size=32, params=12_000)
EASY, TASK = (Trial(MQAR(pairs=n, vocab_size=16, random_filler=False), 4 * n) for n in (1, 2))
RECIPE = replace(
    ratio.RECIPE,
    data=replace(ratio.RECIPE.data, seq_len=16, batch_size=32),
    run=replace(ratio.RECIPE.run, steps=40, log_every=20),
)
STUDY = ratio.Study("mqar", (EASY, TASK), (TASK, Trial(TASK.task, 24), EASY), RECIPE, SIZES, rows=8, batches=4)
GRID = points({"ratio": ("1:1",), "state": (4,), "rate": (1.0, 0.5)})


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return ratio.members(STUDY, GRID, (0, 3), tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def trained(members):
    seeds, rates = [one.seed for one in members], [one.point.rate for one in members]
    assert rates == [1.0, 1.0, 0.5, 0.5]
    return train_together(members[0].config, seeds, rates, STUDY.stages)


def test_members_that_are_alike():
    """Of one kind and state, whatever the seed and rate; the rate is one of both learning rates."""
    grid = points({"ratio": ("0", "1:1"), "rate": (1.0, 0.5)})
    found = ratio.members(STUDY, grid, (0, 1), ratio.Path("x"))
    assert [[one.name for one in kind] for kind in ratio.alike(found)] == [
        [f"{ratio_}{rate},seed={seed}" for rate in ("", ",rate=0.5") for seed in (0, 1)] for ratio_ in ("none", "1-1")
    ]
    half = found[2].config.optim
    assert (half.lr, half.rule.lr) == (RECIPE.optim.lr / 2, RECIPE.optim.rule.lr / 2)


@pytest.mark.slow
def test_models_trained_together_are_as_each_alone(members, trained):
    for i in (0, 3):  # the usual one, and one of another seed at another rate
        alone = train_on(members[i].config, STUDY.stages)
        assert [step for step, _ in alone.losses] == [step for step, _ in trained.losses[i]]
        np.testing.assert_allclose(alone.losses, trained.losses[i], rtol=2e-3)
        ours, theirs = (jax.tree.leaves(one.state["params"]) for one in (trained.of(i), alone))
        worst = max(np.abs(a - b).max() / (np.abs(b).max() + 1e-6) for a, b in zip(ours, theirs))
        assert worst < 0.05, worst  # rounding, which 40 steps of Muon have carried on
    differ = [np.asarray(leaf) for leaf in jax.tree.leaves(trained.state["params"]) if leaf.ndim > 2]
    assert all(not np.allclose(leaf[0], leaf[i]) for leaf in differ for i in (1, 2, 3))
    assert trained.skipped == [0] * 4


@pytest.mark.slow
def test_packed_documents_are_scored_as_each_alone(trained):
    """The counts of `probes.score`, which reads one document a row, for shorter and for longer documents; and more of
    them are right than by chance, so that they can differ."""
    found = scored_together(trained.graphdef, trained.state["params"], STUDY.tests, 8, 4)
    for of, i in zip(found, range(4)):
        for one, (task, length) in zip(of, STUDY.tests):
            rows = max(1, 8 * 8 // max(length, 8))
            alone = score(trained.of(i).model, task, length, rows=rows, batches=4, seed=TEST_SEED)
            assert (one["right"], one["asked"], one["length"]) == (alone.right, alone.asked, length)
            by = {facet: {str(k): list(v) for k, v in counts.items()} for facet, counts in alone.by.items()}
            assert one["by"] == by
    assert found[0][0]["accuracy"] > 1.5 * found[0][0]["chance"]
    assert answers.scored(trained.of(1).model, STUDY.tests, 8, 4) == found[1]


def test_documents_fill_rows():
    tokens_BT, at_BN = np.arange(1, 21).reshape(5, 4), np.array([[0, 2], [1, 3], [2, 3], [0, 1], [0, 3]])
    rows = pack(tokens_BT, at_BN, 9)
    assert rows.tokens_RT.shape == rows.segment_ids_RT.shape == (3, 9) and rows.at_RK.shape == (3, 4)
    flat = np.take_along_axis(rows.tokens_RT, rows.at_RK, axis=1).reshape(-1, 2)[:5]
    np.testing.assert_array_equal(flat, np.take_along_axis(tokens_BT, at_BN, axis=1))
    np.testing.assert_array_equal(rows.segment_ids_RT[:2], [[1, 1, 1, 1, 2, 2, 2, 2, 0]] * 2)


@pytest.mark.slow
def test_a_bundle_is_kept_but_for_what_is_not_finite(members, monkeypatch, capsys):
    """One process writes the results of all; one of them that diverged has none, and is named."""
    for one in members:
        one.folder.mkdir(parents=True)
        (one.folder / ratio.MEMBER).write_text(json.dumps(ratio.asked(STUDY, one)))
    monkeypatch.setattr("hybridlm.cli.study_member.end_with_parent", lambda: None)
    monkeypatch.setattr("hybridlm.cli.start.start", lambda: None)
    monkeypatch.setattr("hybridlm.cli.study_member.start", lambda: None)
    together = ratio.train_together
    monkeypatch.setattr(ratio, "train_together", lambda *given: together(*given)._replace(skipped=[0, 10, 0, 0]))
    assert train_folders(*(str(one.folder) for one in members)) == 1
    told = capsys.readouterr().err
    assert f"lower optim.lr: {members[1].folder}" in told and str(members[0].folder) not in told
    results = [ratio.result(STUDY, one) for one in members]
    assert results[1] is None and all(found["together"] == 4 for found in results[:1] + results[2:])
    assert ratio.result(STUDY, members[0])["asked"]["point"]["rate"] == 1.0
    assert (members[3].folder / "checkpoints").exists()


def test_figures_show_each_kind_at_its_best_rate():
    """By the mean of the seeds, the lowest rate where two are alike; other options stay apart."""
    points_of = {Point("0", rate=0.5): (0.2, 0.4), Point("0", rate=2.0): (0.1, 0.9), Point("0"): (0.5, 0.5)}
    points_of |= {Point("1:1", rate=0.5): (1.0, 1.0), Point("1:1"): (1.0, 1.0), Point("0", state=4): (0.0, 0.1)}
    found = [
        ratio.Kind(point, [0, 1], 1, [1], [1.0], np.array(scores)[:, None], [], [0.1])
        for point, scores in points_of.items()
    ]
    best = {kind.point: kind.accuracies[:, 0].tolist() for kind in ratio.at_best_rate(found)}
    assert best == {Point("0"): [0.5, 0.5], Point("1:1"): [1.0, 1.0], Point("0", state=4): [0.0, 0.1]}


def test_results_without_a_rate_are_of_the_usual_one(tmp_path):
    (one,) = ratio.members(STUDY, [Point("0")], (0,), tmp_path)
    asked = ratio.asked(STUDY, one)
    del asked["point"]["rate"]
    one.folder.mkdir(parents=True)
    (one.folder / ratio.RESULT).write_text(json.dumps({"asked": asked, "scores": []}))
    assert ratio.result(STUDY, one)["scores"] == []
