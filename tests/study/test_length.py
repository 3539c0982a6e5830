# SPDX-License-Identifier: Apache-2.0
"""The study of lengths: the words that scale a config, and what is said of losses that are known."""

import math
from dataclasses import replace

import pytest

from hybridlm.cli import main
from hybridlm.config import NTK, Linear, Rope, YaRN
from hybridlm.config.find import load_config
from hybridlm.config.keys import value_at
from hybridlm.config.overrides import override
from hybridlm.errors import ConfigError
from hybridlm.model.init import abstract
from hybridlm.study.length import (
    Bucket,
    Row,
    as_rows,
    compared,
    gate_of,
    gated,
    gates,
    joined,
    read_rows,
    readings,
    ropes,
    sentences,
    summary,
    write_rows,
)
from hybridlm.study.length_page import as_page
from tests.study.folders import TINY, write_run


def bucket(to: int, loss: float, tokens: int = 10) -> Bucket:
    return Bucket(str(to), to // 2, to, tokens, loss)


def row(gate: str, seed: int, losses: dict[int, float], method: str = "yarn", tuned: int = 0) -> Row:
    """Of a model trained at 8 tokens."""
    buckets = tuple(bucket(to, loss) for to, loss in losses.items())
    return Row(f"runs/{gate}{seed}", 7, gate, seed, method, tuned, 8, 32, ("x",), buckets)


ROWS = [
    row("none", 0, {4: 3.0, 8: 2.0, 16: 2.5, 32: 4.0}),
    row("none", 1, {4: 3.0, 8: 2.2, 16: 2.5, 32: 3.2}),
    row("head", 0, {4: 3.0, 8: 2.1, 16: 2.0, 32: 2.6}),
    row("head", 1, {4: 3.0, 8: 2.0, 16: 2.0, 32: 3.5}),
    row("head", 1, {4: 3.0, 8: 2.0, 16: 2.0, 32: 1.9}, "none", 5),
]


def scalings(config, words) -> set:
    changed = override(config, words)
    return {path: value.scaling for path, value in _ropes(changed).items()}


def _ropes(config) -> dict:
    return {path: value_at(config, path) for path in ropes(config)}


@pytest.mark.parametrize("name", ["hybrid_tiny", "hymba:tiny", "samba:tiny", "zamba2:1.2b", "ling3:flash"])
def test_words_scale_every_rotary_embedding(name):
    """Alone, in branches and in shared blocks; the factor is the ratio of lengths."""
    config = load_config(name)
    trained, found = config.data.seq_len, _ropes(load_config(name))
    assert found and all(isinstance(rope, Rope) for rope in found.values())
    for method, expected in (("linear", Linear(16.0)), ("ntk", NTK(16.0)), ("yarn", YaRN(16.0, trained))):
        ((length, words),) = readings(config, method, 16 * trained)
        assert length == 16 * trained and scalings(config, words) == dict.fromkeys(found, expected)
    assert readings(config, "none", 16 * trained) == [(16 * trained, [])]
    each = [(length // trained, scalings(config, words)) for length, words in readings(config, "dynamic", 6 * trained)]
    assert each == [(n, dict.fromkeys(found, NTK(float(n)))) for n in (1, 2, 4, 6)]


def test_words_set_every_gate():
    config = load_config("hybrid_tiny")
    assert gates(config) == ["model.blocks.*.gate"] and gate_of(config) == "elementwise"
    for gate in ("none", "head"):
        changed = override(config, gated(config, gate))
        assert gate_of(changed) == gate and (changed.model.blocks["*"].gate or "none") == gate
    assert gate_of(load_config("mamba2:130m")) == "-" and not gates(load_config("retnet:tiny"))


@pytest.mark.parametrize(
    ("name", "words", "method", "told"),
    [
        ("mamba2:130m", [], "yarn", "has no rotary embedding to scale: give --methods none"),
        ("hybrid_tiny", ["--model.blocks.*.rope=None"], "ntk", "has no rotary embedding to scale"),
        ("hybrid_tiny", ["--model.blocks.*.rope.scaling=Linear"], "ntk", "(Linear(factor=2.0)) is there already"),
    ],
)
def test_what_cannot_be_scaled(name, words, method, told):
    with pytest.raises(ConfigError) as error:
        readings(load_config(name, words), method, 10**6)
    assert told in str(error.value)


def test_what_is_said_of_known_losses():
    lines = summary(ROWS)
    assert [(line.gate, line.method, line.tuned, line.seeds) for line in lines] == [
        ("none", "yarn", 0, [0, 1]), ("head", "yarn", 0, [0, 1]), ("head", "none", 5, [1])
    ]  # fmt: skip
    assert lines[0].losses == pytest.approx({"8": 2.1, "16": 2.5, "32": 3.6})
    assert lines[0].rise == pytest.approx(1.5) and lines[0].deviation == pytest.approx(math.sqrt(0.5))  # of 2.0 and 1.0
    assert lines[1].rise == pytest.approx(1.0) and lines[2].rise == pytest.approx(-0.1) and lines[2].deviation is None
    (found,) = compared(ROWS)
    assert (found["gate"], found["method"]) == ("head", "yarn") and found["less"] == pytest.approx(0.5)
    assert found["by_seed"] == pytest.approx({0: 1.5, 1: -0.5})
    assert sentences(ROWS) == [
        "yarn: with gate head the loss rises 0.5000 nats less than without (less in 1 of 2 seeds)"
    ]
    head, cells = as_rows(ROWS)
    assert head == ["gate", "scaling", "seeds", "8", "16", "32", "rise"]
    assert cells[0] == ["none", "yarn", "2", "2.1000", "2.5000", "3.6000", "+1.5000 ± 0.7071"]
    assert cells[2] == ["head", "none, 5 steps", "1", "2.0000", "2.0000", "1.9000", "-0.1000"]


def test_shorter_readings_give_what_they_reach():
    parts = [[bucket(4, 1.0), bucket(8, 2.0)], [bucket(4, 9.0), bucket(8, 9.0), bucket(16, 3.0)],
             [bucket(8, 9.0), bucket(16, 9.0), bucket(32, 4.0, tokens=0)]]  # fmt: skip
    assert joined(parts) == (bucket(4, 1.0), bucket(8, 2.0), bucket(16, 3.0))


def test_rows_are_kept(tmp_path):
    file = tmp_path / "length.json"
    assert read_rows(file) == []
    write_rows(file, ROWS, ROWS[:4])
    assert read_rows(file) == ROWS
    assert ROWS[0].key == ROWS[0]._replace(gate="head", seed=9, buckets=()).key != ROWS[0]._replace(step=8).key
    assert len({kept.key for kept in ROWS}) == len(ROWS)
    write_rows(file, [row("none", 0, {8: 2.0, 16: math.nan})], [])
    assert "NaN" not in file.read_text() and math.isnan(read_rows(file)[0].buckets[1].loss)
    for content in ("", "[]", '{"rows": [{"run": 1}]}', '{"rows": 3}'):
        file.write_text(content)
        with pytest.raises(ConfigError, match="is no record of this study"):
            read_rows(file)
        assert file.read_text() == content


@pytest.mark.slow
def test_the_page():
    page = as_page(ROWS, "A <study>")
    assert "A &lt;study&gt;" in page and page.count("<svg") == 1 and "trained at 8 tokens, read to 32" in page
    assert "loss, gate none" in page and "loss, YaRN" in page and sentences(ROWS)[0] in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give --config NAME or --run RUN ..., one of them"),
        (["--config=hybrid_tiny", "--run", "a"], "one of them"),
        (["--run=a", "--times=1"], "--times (1) must be between 2 and"),
        (["--run=a", "--methods", "yarm"], "--methods (yarm) must be of none, linear, ntk, dynamic, yarn"),
        (["--run=a", "--methods", "yarn", "yarn"], "--methods (yarn yarn) has one of them twice"),
        (["--run", "a", "a"], "--run (a a) has one of them twice"),
        (["--run=a", "--gates", "none"], "--gates (none) are trained with --config: leave it out"),
        (["--run=a", "--tune-steps=3"], "--tune-steps needs --config"),
        (["--run=a", "--data.packing=split"], "--data.packing: rows are of --times"),
        (["--config=hybrid_tiny", "--gates", "all"], "--gates (all) must be of none, elementwise, head"),
        (["--config=hybrid_tiny", "--run.seed=3"], "--run.seed: each run has one of its own; give --dir and --seeds"),
        (["--config=mamba2:130m", "--gates", "none"], "no attention of"),
        (["--config=mamba2:130m"], "has no rotary embedding to scale: give --methods none"),
        (["--config=hybrid_tiny", "--tune-step=3"], "unknown option --tune-step: did you mean --tune-steps?"),
        (["--run=nowhere"], "nowhere holds no run"),
    ],
)
def test_what_cannot_be_is_one_line(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "length", *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1, said


def test_runs_of_other_models_are_not_taken_together(tmp_path, capsys):
    runs = {"a": [], "b": ["--run.seed=1"], "c": ["--model.blocks.*.gate=head"], "d": ["--run.steps=30"],
            "e": ["--model.d_model=64", "--optim.lr=1"]}  # fmt: skip
    for name, words in runs.items():
        write_run(tmp_path / name, config=override(TINY, words))
    folders = {name: str(tmp_path / name) for name in runs}
    for names, told in (
        ("abce", f"{folders['a']} and {folders['e']} differ in model.d_model, optim.lr: read them apart"),
        ("abcd", f"{folders['a']} and {folders['d']} have the same gate and run.seed: give one of them"),
    ):
        assert main(["study", "length", "--methods", "none", "--run", *(folders[name] for name in names)]) == 2
        assert told in capsys.readouterr().err


OWN = """
from dataclasses import dataclass
from hybridlm.config import MLP, Config, ModelConfig

@dataclass(frozen=True)
class Wide(MLP):
    pass

def config():
    return Config(name="own", model=ModelConfig(vocab_size=264, d_model=32, pattern="W", blocks={"W": Wide(d_ff=32)}))
"""


def test_runs_with_blocks_of_their_own(tmp_path, capsys):
    """They are read once the file is named, as of every command that takes a run; a name would say two things."""
    file, run = tmp_path / "own.py", tmp_path / "run"
    file.write_text(OWN)
    write_run(run, config=load_config(str(file)))
    words = ["study", "length", "--run", str(run), "--methods", "yarn"]
    assert main(words) == 2 and "give the config file that defines it (--config FILE.py)" in capsys.readouterr().err
    assert main([*words, "--config", str(file)]) == 2
    assert "own has no rotary embedding to scale: give --methods none" in capsys.readouterr().err


def test_studies_by_name(capsys):
    assert main(["study", "--help"]) == 0 and "study length --config NAME" in capsys.readouterr().out
    for words in ((), ("lenght",)):
        assert main(["study", *words]) == 2
        assert f"study ({''.join(words)}): name one of " in capsys.readouterr().err


def test_a_config_that_is_scaled_keeps_its_parameters():
    """Nothing that is read with a scaling has another parameter than was trained."""
    config = load_config("hybrid_tiny")
    ((_, words),) = readings(config, "yarn", 4096)
    shapes = [abstract(each.model).shapes for each in (config, override(config, words))]
    assert shapes[0] == shapes[1] and replace(config, model=override(config, words).model) != config
