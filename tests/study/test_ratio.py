# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study ratio`: the grid and its sizes, rows of tasks, what is kept and found again, figures, the command."""

import json
import math
import shlex
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.cli import main, side_by_side, study_member, study_ratio
from hybridlm.errors import ConfigError
from hybridlm.layers import BLOCKS
from hybridlm.layers.block import Make
from hybridlm.model.config import ModelConfig
from hybridlm.model.flops import forward_flops
from hybridlm.model.init import abstract
from hybridlm.probes import MQAR, UNSCORED
from hybridlm.study import grid, ratio
from hybridlm.study.answers import TEST_SEED
from hybridlm.study.figures import Line, Panel, draw
from hybridlm.study.grid import Point, Sizes, count, model_of, placed, points, share
from hybridlm.study.mixers import LEAST, MIXERS, fitted
from hybridlm.study.on_task import Trial, rows_of
from hybridlm.study.ratio_page import as_text, figure, labels, lines
from pallas_kernels.platform import assume_platform

SMALL = Sizes(d_model=32, mixers=4, mlp_every=2, d_head=16, vocab_size=264, params=60_000)
EASY, TASK = Trial(MQAR(pairs=2, vocab_size=16), 8), Trial(MQAR(pairs=4, vocab_size=16), 16)
LONGER = Trial(TASK.task, 24)
RECIPE = replace(ratio.RECIPE, data=replace(ratio.RECIPE.data, seq_len=24))
STUDY = ratio.Study("mqar", (EASY, TASK), (TASK, LONGER, EASY), RECIPE, SMALL, rows=4, batches=1)


def test_ratios_are_shares_of_the_mixers():
    for text, part in {
        "0": 0,
        "1:15": 1 / 16,
        "1:7": 1 / 8,
        "1:3": 1 / 4,
        "1:1": 1 / 2,
        "all": 1,
        "3:1": 3 / 4,
    }.items():
        assert share(text) == part
        assert Point(text).attention(16) == 16 * part
    for text in ("", "1", "1:", "-1:2", "a:b", "0:0", "none", "1:1:1"):
        with pytest.raises(ConfigError, match="must be 0, all or ATTENTION:OTHERS"):
            Point(text)
    with pytest.raises(ConfigError, match=r"ratio \(1:7\) does not divide 4 mixers"):
        Point("1:7").attention(4)


@pytest.mark.parametrize("n", [1, 3, 4, 16])
def test_placements(n):
    """As many as asked, all different, in order; even ones are equally far apart, the others next to each other."""
    for placement in ("even", "first", "middle", "last"):
        for k in range(n + 1):
            at = placed(k, n, placement)
            assert len(set(at)) == len(at) == k and at == sorted(at) and all(0 <= i < n for i in at)
            gaps = set(np.diff(at))
            assert placement == "even" or gaps <= {1}
            assert placement != "even" or k == 0 or n % k or gaps <= {n // k}
    assert placed(1, 16, "even") == [8] and placed(2, 16, "even") == [4, 12]
    assert placed(2, 16, "first") == [0, 1] and placed(2, 16, "middle") == [7, 8] and placed(2, 16, "last") == [14, 15]


def test_the_default_grid():
    """Six ratios, with and without a gate where there is attention: 11 kinds, 22 models of two seeds."""
    found = points({"ratio": grid.RATIOS, "gate": (False, True)})
    assert len(found) == 11 and len(set(found)) == 11
    assert [p.name for p in found if not p.gate] == ["none", "1:15", "1:7", "1:3", "1:1", "all"]
    more = points({"ratio": ("0", "1:1", "all"), "placement": ("even", "last"), "state": (16, 64), "mixer": ("GLA",)})
    assert len(more) == 2 + 4 + 1  # none: a state each; all: neither placed nor mixed with anything
    assert len({p.file for p in more}) == 7 and not set("".join(p.file for p in more)) & set(":/ *")
    with pytest.raises(ConfigError, match="at most 2000"):
        points({"state": tuple(range(1, 2002))})


@pytest.mark.parametrize(
    "point", [Point("0"), Point("1:1", gate=True), Point("all"), Point("1:3", arrangement="parallel")]
)
def test_all_models_have_one_size(point):
    """Counted by kind of sublayer as of the whole model; feed-forwards take what mixers leave."""
    model = model_of(point, SMALL)
    n = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model).shapes))
    assert count(model) == n and abs(n - SMALL.params) <= 3 * SMALL.d_model  # half a unit of both feed-forwards
    mixers = model.pattern.removeprefix("C").replace("-", "")
    assert len(mixers) == 4 and mixers.count("*") == point.attention(4) and model.pattern[3] == model.pattern[6] == "-"


def test_the_default_models_have_one_size():
    sizes, counts = Sizes(), {}
    for point in points({"ratio": grid.RATIOS, "gate": (False, True)}):
        model = model_of(point, sizes)
        counts[point] = count(model)
        assert [s for s in model.pattern if s not in "C-"].count("*") == point.attention(16)
    assert max(counts.values()) / min(counts.values()) < 1.01
    with pytest.raises(ConfigError, match=r"^1:7: params \(1000\) must be at least \d+, those of its mixers"):
        model_of(Point(), replace(sizes, params=1000))


@pytest.mark.parametrize(
    "rows, seq_len, platform, given, parts",
    [(8, 256, "cpu", 1, 8), (8, 256, "gpu", 1, 1), (8, 256, "cpu", 2, 2), (16, 128, "cpu", 1, 8), (6, 128, "cpu", 1, 3),
     (5, 128, "cpu", 1, 1), (4, 24, "cpu", 1, 1), (3, 4096, "cpu", 1, 3)],
)  # fmt: skip
def test_rows_of_a_step_are_taken_in_parts(rows, seq_len, platform, given, parts):
    """On a CPU, as many as divide the rows and keep 256 tokens each; never where words say how many."""
    data, optim = replace(RECIPE.data, batch_size=rows, seq_len=seq_len), replace(RECIPE.optim, accumulate=given)
    asked = replace(RECIPE, data=data, optim=optim)
    with assume_platform(platform):
        done = ratio.in_parts(asked)
    assert done == replace(asked, optim=replace(optim, accumulate=parts))


def test_what_all_models_share():
    usual = model_of(Point("1:1"), SMALL)
    assert usual.pattern[0] == "C" and usual.blocks["C"].d_conv == 3 and usual.blocks["*"].rope is None
    other = model_of(Point("1:1"), replace(SMALL, conv=0, positions="rope", qk_norm=True))
    assert "C" not in other.blocks and other.blocks["*"].rope is not None and other.blocks["*"].qk_norm


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_have_the_sizes_asked(name):
    """Each can be built at the width; what has a state of heads has N x P numbers in each of D / P heads."""
    block = MIXERS[name](64, 32, 16)
    ModelConfig(d_model=64, pattern="M", blocks={"M": block})
    state = {(f, getattr(block, f)) for f in ("d_state", "d_key") if getattr(block, f, None) is not None}
    assert {value for _, value in state} <= {16}
    assert not hasattr(block, "d_head") or block.d_head == 32


@pytest.mark.parametrize("name", ["Mamba3", "GatedDeltaNet", "RGLRU"])
def test_states_of_equal_bytes(name):
    """As near to what is asked as its sizes allow and never above, counted from the cache that it makes; windows of
    convolutions aside. What is twice as much is another mixer."""

    def bytes_there(block):
        mixer = nnx.eval_shape(lambda: block.build(32, Make(nnx.Rngs(0), dtype="float32")))
        cache = nnx.eval_shape(lambda: mixer.init_cache(1, 1))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for key, leaf in cache.items() if "conv" not in key)

    block = fitted(name, 32, 16, 2000)
    assert LEAST * 2000 <= bytes_there(block) <= 2000 < bytes_there(fitted(name, 32, 16, 3000))
    sizes = replace(SMALL, params=300_000)
    assert model_of(Point("1:1", mixer=name, state_bytes=2000), sizes).blocks["M"] == block


def test_states_by_bytes_are_no_others_beside():
    """What else says how large a state is says nothing then, nor do bytes where nothing but attention is left."""
    found = points({"ratio": ("0", "all"), "state": (16, 64), "state_bytes": (1024, 4096)})
    assert [point.name for point in found] == ["none state_bytes=1024", "none state_bytes=4096", "all"]
    assert labels([point for point in found if point.ratio == "0"]) == ["bytes of state 1024", "bytes of state 4096"]


def test_every_recurrent_mixer_is_there():
    """By the contract alone: what mixes tokens, is no attention and no part of another, has a name here."""
    there = {type(build(64, 32, 16)) for build in MIXERS.values()}
    mixing = {kind for kind in BLOCKS if kind.MIXES_TOKENS and not hasattr(kind, "parts")}
    left = {kind.__name__ for kind in mixing - there}
    attention = {"Attention", "ConvolvedAttention", "LatentAttention", "RelativeAttention"}
    assert left == attention | {"ChannelMix", "Rwkv4Channel", "NgramMemory"}


def test_rows_of_tasks():
    """Stages in turn, as many documents in a row as fit, answers alone as targets; training never sees rows of a
    test."""
    batches = list(rows_of((EASY, TASK), 7, 3, 24, steps=5))
    assert len(batches) == 5 and {v.dtype for batch in batches for v in batch.values()} == {np.dtype(np.int32)}
    for step, batch in enumerate(batches):
        task, length = EASY if step < 3 else TASK
        n = 24 // length
        expected = task.batch(7, step, 3 * n, length)
        for i in range(3 * n):
            at = (i // n, slice(i % n * length, (i % n + 1) * length))
            np.testing.assert_array_equal(batch["tokens"][at], expected.tokens_BT[i])
            np.testing.assert_array_equal(batch["targets"][at], expected.targets_BT[i])
            assert (batch["segment_ids"][at] == i % n + 1).all()
            assert (batch["positions"][at] == np.arange(length)).all()
        rest = slice(n * length, None)
        assert UNSCORED < 0 and (batch["targets"][:, rest] < 0).all() and not batch["segment_ids"][:, rest].any()
    unlike = TASK.task.batch(TEST_SEED, 3, 3, 16).tokens_BT
    assert not np.array_equal(batches[3]["tokens"][:, :16], unlike)


def made_up(folder, study=STUDY, kinds=("0", "1:3", "1:1", "all"), gate=(False, True), seeds=(0, 1)):
    """Results of models that nobody trained: accuracy is the share of attention, and a bit more with the seed."""
    written, costs = [], {}
    for member in ratio.members(study, points({"ratio": kinds, "gate": gate}), seeds, folder):
        base = share(member.point.ratio) * 0.9 + 0.02 * member.seed
        if member.point not in costs:
            costs[member.point] = ratio.measures(member.config, study.tests)
        scores = [{"length": n, "accuracy": base + 0.01 * i, "right": 1, "asked": 2, "chance": 0.01 * (1 + i), "by": {}}
                  for i, (_, n) in enumerate(study.tests)]  # fmt: skip
        found = {
            "asked": ratio.asked(study, member), "scores": scores, "losses": [[10, 2.0 - base], [20, 1.0 - base]],
            "seconds": 60.0, "device": "cpu", "versions": {"jax": "1"}, **costs[member.point],
        }  # fmt: skip
        member.folder.mkdir(parents=True)
        (member.folder / ratio.RESULT).write_text(json.dumps(found))
        written.append(found)
    return written


def test_results_are_found_again_and_others_are_refused(tmp_path):
    made_up(tmp_path, kinds=("0",), gate=(False,))
    (one, two) = ratio.members(STUDY, [Point("0")], (0, 1), tmp_path)
    assert ratio.result(STUDY, two)["asked"]["seed"] == 1
    assert ratio.trials_of("mqar", ratio.asked(STUDY, one)["stages"]) == [EASY, TASK]
    assert ratio.result(STUDY, *ratio.members(STUDY, [Point("0")], (5,), tmp_path)) is None
    for changed, what in (
        (replace(STUDY, stages=(TASK,)), "stages"),
        (replace(STUDY, tests=(TASK,)), "test"),
        (replace(STUDY, sizes=replace(SMALL, params=70_000)), "config"),
    ):
        (member, *_) = ratio.members(changed, [Point("0")], (0,), tmp_path)
        with pytest.raises(ConfigError, match=f"another {what}: choose another --dir"):
            ratio.result(changed, member)
    (one.folder / ratio.RESULT).write_text('{"asked"')
    with pytest.raises(ConfigError, match=r"cannot be read .* remove it, and the model is trained again"):
        ratio.result(STUDY, one)


def test_what_does_not_fit_is_said_before_a_model_is_trained(tmp_path):
    def told(stages, tests=(TASK,)):
        with pytest.raises(ConfigError) as error:
            ratio.members(replace(STUDY, stages=stages, tests=tests), [Point("1:1")], (0,), tmp_path)
        return str(error.value)

    many, wide = MQAR(pairs=7, vocab_size=16), MQAR(pairs=2, vocab_size=512)
    assert told((Trial(many, 24),)).startswith("1:1: length (24) must be at least 28 for pairs (7)")
    assert told((TASK,), (Trial(many, 16),)).startswith("1:1: length (16) must be at least 28")
    assert told((Trial(wide, 16),)).startswith("1:1: MQAR needs a vocabulary of 512 tokens, the model has 264")
    assert told((Trial(TASK.task, 25),)) == "1:1: length (25) of a document must be at most data.seq_len (24)"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("grid"))


def test_numbers_of_a_grid(results):
    found = ratio.kinds(results)
    assert [kind.share for kind in found] == [0, 1 / 4, 1 / 4, 1 / 2, 1 / 2, 1, 1]
    half = next(kind for kind in found if kind.point == Point("1:1"))
    assert half.seeds == [0, 1] and half.spread() == pytest.approx((0.46, 0.45, 0.47))
    assert half.spread(1) == pytest.approx((0.47, 0.46, 0.48))
    assert ratio.recovered(half, found) == pytest.approx((0.46 - 0.01) / (0.91 - 0.01))
    assert ratio.recovered(half, [half]) is None
    # two of four mixers keep 2 heads of 16, as keys and values, of 16 tokens in float32; the others a state
    model = model_of(Point("1:1"), SMALL)
    caches = [abstract(model).model().init_cache for _ in (0,)]
    wanted = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: caches[0](1, 16))))
    assert half.cache_bytes[0] == wanted and half.flops_per_token[1] == forward_flops(model, 24)
    assert half.cache_bytes[1] - half.cache_bytes[0] == 8 * 2 * 2 * 32 * 4
    numbers = ratio.as_json(STUDY, found, results)
    assert json.loads(json.dumps(numbers))["kinds"][3]["accuracies"] == half.accuracies.tolist()
    assert numbers["training"]["tokens"] == RECIPE.run.steps * RECIPE.data.batch_size * 24
    assert [trial["length"] for trial in numbers["tests"]] == [16, 24, 8]


def test_lines_go_from_no_attention_to_nothing_else(results):
    found = ratio.kinds(results)
    grouped = lines(found)
    assert labels(list(grouped)) == ["no gate", "gate"]
    for key, kinds in grouped.items():
        assert [kind.share for kind in kinds] == [0, 1 / 4, 1 / 2, 1]
        assert all(kind.point.gate == key.gate for kind in kinds[1:])
    drawn = figure(STUDY, found)
    share_axis = drawn.axes[0]
    (x, y), bars = share_axis.get_lines()[0].get_data(), share_axis.collections[0].get_segments()
    np.testing.assert_allclose(x, [0, 0.25, 0.5, 1])
    np.testing.assert_allclose(y, [0.01, 0.235, 0.46, 0.91])
    np.testing.assert_allclose([(bar[0][1], bar[1][1]) for bar in bars], [(v - 0.01, v + 0.01) for v in y])
    said = as_text(STUDY, found)
    assert said.count("chance") == 3 and "1:1 gate" in said
    assert ratio.labels(STUDY.tests) == ["pairs=4, 16 tokens", "pairs=4, 24 tokens", "pairs=2, 8 tokens"]
    assert ratio.labels((TASK,)) == ["16 tokens"]


def test_figures_by_stage_and_beyond_what_was_learned(results):
    """A line of each kind of model over the documents of the stages, and one over longer documents of the last task."""
    found = ratio.kinds(results)
    axes = {place.get_xlabel(): place for place in figure(STUDY, found).axes}
    for label, lengths, tests in (
        ("tokens of a document, as it was learned", [8, 16], [2, 0]),
        ("tokens of a document of the last task", [16, 24], [0, 1]),
    ):
        drawn = axes[label].get_lines()
        by_name = {line.get_label(): line for line in drawn if not line.get_label().startswith("_")}
        for kind in found:
            x, y = by_name[kind.point.name].get_data()
            np.testing.assert_allclose(x, lengths)
            np.testing.assert_allclose(y, [kind.spread(at)[0] for at in tests])
    alone = figure(replace(STUDY, stages=(TASK,), tests=(TASK,)), found)
    assert len(alone.axes) == len(axes) - 2


def test_bars_of_what_cannot_be_drawn_are_left_out():
    line = Line([0.0, 1.0, 2.0], [1.0, np.nan, 3.0], "a", between=([0.5, 0.0, 2.0], [1.5, 1.0, 3.5]))
    axes = draw([Panel("x", "y", [line])]).axes[0]
    assert len(axes.collections[0].get_segments()) == 2
    axes = draw([Panel("x", "y", [line], log=True)]).axes[0]
    np.testing.assert_allclose(axes.collections[0].get_segments()[0][:, 1], [2.0, 3.5])


WORDS = shlex.split(
    "--task mqar --ratios 0 1:1 --gate off --depth 4 --mlp-every 2 --d-model 32 --d-head 16 --params 60000 "
    "--mqar.vocab_size=16 --stages pairs=2@8 pairs=4@16 --data.seq_len=16"
)


def test_the_command_trains_what_is_left_and_draws(tmp_path, capsys, monkeypatch):
    trained = []

    def train(study, todo, places, n):
        trained.extend(member.name for bundle in todo for member in bundle)
        made_up(tmp_path, study, ("0",) if len(todo) == 4 else ("1:1",), (False,))
        return 0

    monkeypatch.setattr(study_ratio, "_train", train)
    write = study_ratio._write
    monkeypatch.setattr(study_ratio, "_write", lambda *given: None)  # drawn once is enough
    words = ["study", "ratio", *WORDS, "--dir", str(tmp_path)]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 models in" in said and "4 to train" in said and not trained and "M*-M*-" in said
    assert main(words) == 0
    assert trained == ["none,seed=0", "1-1,seed=0", "none,seed=1", "1-1,seed=1"]  # second ones find the programs
    capsys.readouterr()
    monkeypatch.setattr(study_ratio, "_write", write)
    assert main(words) == 0 and trained[4:] == ["1-1,seed=0", "1-1,seed=1"]
    assert "2 done, 2 to train" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "ratio.json").read_text())
    assert [kind["name"] for kind in numbers["kinds"]] == ["none", "1:1"]
    assert numbers["command"].startswith("hybridlm study ratio --task mqar --ratios 0 1:1")
    page = (tmp_path / "ratio.html").read_text()
    assert (
        "<svg" in page
        and "--stages pairs=2@8" in page
        and "then pairs=4, 16 tokens" in page
        and "4 models took 4 minutes" in page
    )
    assert (tmp_path / "ratio.png").exists()
    monkeypatch.setattr(study_ratio, "_write", lambda *given: None)
    assert main(words) == 0 and len(trained) == 6
    capsys.readouterr()
    assert main([*words, "--optim.lr=0.5"]) == 2
    assert "holds a model with another config: choose another --dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "study (): name one of ratio, layers"),
        (["ratios"], "study (ratios): name one of"),
        (["ratio", "--ratios", "1:0:1"], "must be 0, all or ATTENTION:OTHERS"),
        (["ratio", "--ratios", "1:1", "1:1"], "--ratios (1:1) is there twice"),
        (["ratio", "--mixers", "mamba9"], "mixer (mamba9) must be one of Mamba2,"),
        (["ratio", "--placement", "top"], "placement ('top') must be one of even, first, middle, last"),
        (["ratio", "--state", "4", "--state-bytes", "4096"], "--state-bytes: not allowed with argument --state"),
        (
            ["ratio", "--state-bytes", "4096", "--mixers", "Rwkv7"],
            "state_bytes (4096): Rwkv7 of width 64, heads of 32, has states of 8,192 bytes",
        ),
        (["ratio", "--state-bytes", "4096", "--mixers", "Hyena"], "has no recurrent state"),
        (["ratio", "--state-bytes", "0"], "state_bytes (0) must be positive"),
        (["ratio", "--seeds", "0"], "--seeds (0) must be between 1 and 100"),
        (["ratio", "--task", "mqr"], "no task of that name"),
        (["ratio", "--task", "repeated_bigrams"], "no task of that name"),
        (["ratio", "--model.d_model=3"], "--model.d_model is no option of study ratio"),
        (["ratio", "--run.dir=x"], "--run.dir is no option of study ratio"),
        (["ratio", "--mqar.pair=3"], "did you mean pairs?"),
        (["ratio", "--d-head", "48"], "d_model (64) not divisible by d_head (48)"),
        (["ratio", "--depth", "10"], "mixers (10) not divisible by mlp_every (4)"),
        (["ratio", "--stages", "pairs=8"], "--stages (pairs=8) must be FIELD=VALUE,...@LENGTH"),
        (["ratio", "--stages", "pair=8@32"], "did you mean pairs?"),
        (["ratio", "--stages", "pairs=8@512"], "length (512) of a document must be at most data.seq_len (256)"),
        (["ratio", "--conv", "-1"], "conv (-1) must be at least 0"),
        (["ratio", "--positions", "alibi"], "--positions"),
        (["layers", "--run", "nowhere"], "--task"),
        (["layers", "--run", "nowhere", "--task", "mqar", "--keep", "0"], "--keep (0.0) must be above 0"),
        (["layers", "--run", "nowhere", "--task", "mqar", "--text"], "give --distill FOLDER"),
        (["layers", "--run", "nowhere", "--task", "mqar", "--mqar.pairs=4"], "nowhere"),
    ],
)
def test_wrong_words_are_one_line(words, told, capsys):
    assert main(["study", *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1, said


def test_processes_at_once(monkeypatch):
    nothing = lambda pattern: []
    monkeypatch.setattr(side_by_side.glob, "glob", nothing)
    monkeypatch.setattr(side_by_side, "cores", lambda: 6)
    assert side_by_side.at_once({}) == 6 and side_by_side.at_once({"CUDA_VISIBLE_DEVICES": "3,5"}) == 2
    assert side_by_side.at_once({"CUDA_VISIBLE_DEVICES": "3,5", "JAX_PLATFORMS": "cpu"}) == 6
    monkeypatch.setattr(side_by_side.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    assert side_by_side.at_once({}) == 1


def test_a_model_ends_with_its_study(tmp_path, monkeypatch):
    """One whose study was killed gets the signal that ends it."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    monkeypatch.setenv(side_by_side.PARENT, str(2**22 + 1))  # no process has that number
    try:
        assert study_member.main(str(tmp_path)) == 1  # nothing is asked there
        deadline = time.monotonic() + 30
        while not received and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


@pytest.mark.slow
def test_a_grid_from_start_to_page(tmp_path, capfd):
    """Two kinds of models of one seed, as processes: attention solves what a state of one number a head does not; what
    is kept is a run that other commands read; a second start trains nothing."""
    words = ["study", "ratio", *WORDS, "--dir", str(tmp_path), "--seeds", "1", "--state", "1", "--parallel", "1"]
    words += ["--data.batch_size=64", "--run.steps=150", "--run.log_every=50"]
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "[2/2] 1-1,state=1,seed=0" in said and said.count("accuracy 0.") + said.count("accuracy 1.") == 2
    numbers = {kind["ratio"]: kind for kind in json.loads((tmp_path / "ratio.json").read_text())["kinds"]}
    assert numbers["1:1"]["accuracies"][0][0] > numbers["0"]["accuracies"][0][0] + 0.2
    run = tmp_path / "models" / "1-1,state=1,seed=0"
    task = "--mqar.pairs=4 --mqar.vocab_size=16 --mqar.random_filler=False"  # as the study's
    words_of_probe = f"--tasks mqar {task} --lengths 16 --rows 64 --batches 4 --json"
    assert main(["probe", "--run", str(run), *words_of_probe.split()]) == 0
    one = json.loads(capfd.readouterr().out)["tasks"]["mqar"]["scores"][0]
    assert one["accuracy"] == pytest.approx(numbers["1:1"]["accuracies"][0][0])  # the same rows
    assert main(words) == 0 and "0 to train" in capfd.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0 and "complete" in capfd.readouterr().out
