# SPDX-License-Identifier: Apache-2.0
"""Optimizer and schedule as values, and the words of earlier versions: the same config from either, everywhere."""

import dataclasses
import json
import re

import pytest

from hybridlm import ConfigError, load_config
from hybridlm.config import AdamW, Config, Constant, Cosine, LinearDecay, Muon, OptimConfig, Wsd
from hybridlm.config.help import help_text
from hybridlm.config.overrides import override
from hybridlm.config.stored import differences, from_dict
from hybridlm.config.tree import to_dict

pytestmark = pytest.mark.quick

PAIRS = [
    ({}, {}),
    ({"name": "adamw", "betas": (0.8, 0.9), "eps": 1e-6}, {"rule": AdamW((0.8, 0.9), 1e-6)}),
    ({"name": "muon"}, {"rule": Muon()}),
    (
        {"name": "muon", "muon_lr": 0.03, "muon_momentum": 0.9, "betas": (0.8, 0.9), "eps": 1e-6},
        {"rule": Muon(0.03, 0.9, (0.8, 0.9), 1e-6)},
    ),
    ({"schedule": "cosine", "final_lr_ratio": 0.02}, {"schedule": Cosine(0.02)}),
    ({"schedule": "linear", "final_lr_ratio": 0.0}, {"schedule": LinearDecay(0.0)}),
    ({"schedule": "wsd", "decay_fraction": 0.3, "final_lr_ratio": 0.02}, {"schedule": Wsd(0.3, 0.02)}),
    ({"schedule": "constant"}, {"schedule": Constant()}),
    ({"muon_lr": 0.05, "muon_momentum": 0.8, "decay_fraction": 0.4}, {}),  # what they are for is not chosen
    ({"schedule": "constant", "final_lr_ratio": 0.3}, {"schedule": Constant()}),
]
STORED = {
    "type": "OptimConfig", "name": "muon", "lr": 0.003, "muon_lr": 0.02, "betas": [0.9, 0.95], "eps": 1e-08,
    "muon_momentum": 0.95, "weight_decay": 0.1, "clip_norm": 1.0, "schedule": "wsd", "warmup_steps": 20,
    "decay_fraction": 0.2, "final_lr_ratio": 0.02, "accumulate": 1, "z_loss": 0.0, "max_skipped": 10,
}  # fmt: skip
"""What earlier versions wrote for hybrid_tiny."""


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_old_and_new_words_give_equal_configs(old, new):
    a, b = OptimConfig(lr=1e-3, **old), OptimConfig(lr=1e-3, **new)
    assert a == b and hash(a) == hash(b)
    in_words = [word for name, value in old.items() for word in _words(f"optim.{name}", value)]
    base = Config(optim=OptimConfig(lr=1e-3))
    assert override(base, in_words).optim == b
    assert override(base, {f"optim.{name}": value for name, value in old.items()}).optim == b
    assert from_dict(json.loads(json.dumps({"type": "OptimConfig", "lr": 1e-3} | old)), OptimConfig) == b
    assert from_dict(json.loads(json.dumps(to_dict(a))), OptimConfig) == b


def _words(key, value):
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{key}", *map(str, values)]


def test_a_stored_run_of_before_is_the_same_run_now():
    config = load_config("hybrid_tiny", ["--optim.rule.grouped=False"])
    stored = from_dict(json.loads(json.dumps(to_dict(config) | {"optim": STORED})))
    assert stored == config and differences(stored, config) == {}
    changed = differences(stored, override(config, {"optim.rule.lr": 0.1, "optim.schedule.decay_fraction": 0.5}))
    assert changed == {"optim.rule.lr": (0.02, 0.1), "optim.schedule.decay_fraction": (0.2, 0.5)}


def test_new_words_on_the_command_line():
    words = [
        "--optim.rule.lr=0.03", "--optim.rule=Muon", "--optim.schedule=Wsd", "--optim.schedule.decay_fraction=0.3",
        "--optim.schedule.final-lr-ratio=0",
    ]  # fmt: skip
    expected = OptimConfig(rule=Muon(0.03), schedule=Wsd(0.3, 0.0))
    assert override(Config(), words).optim == expected
    mixed = ["--optim.name=muon", "--optim.schedule=wsd", "--optim.rule.lr=0.03", "--optim.decay_fraction=0.3"]
    assert override(Config(), [*mixed, "--optim.schedule.final_lr_ratio=0"]).optim == expected


def test_a_choice_by_name_keeps_what_was_said_before():
    """As the one flat list of numbers did, in whatever order and however far apart they are said."""
    said = OptimConfig(muon_lr=0.05, decay_fraction=0.4, final_lr_ratio=0.02, betas=(0.8, 0.9))
    said = dataclasses.replace(said, lr=1.0)
    expected = OptimConfig(lr=1.0, rule=Muon(0.05, betas=(0.8, 0.9)), schedule=Wsd(0.4, 0.02))
    assert dataclasses.replace(said, name="muon", schedule="wsd") == expected
    in_steps = override(override(Config(optim=said), {"optim.schedule": "constant"}), {"optim.z_loss": 0.0})
    assert override(in_steps, ["--optim.rule=Muon", "--optim.schedule=Wsd"]).optim == expected
    fresh = dataclasses.replace(said, rule=Muon(), schedule=Cosine())
    assert dataclasses.replace(fresh, name="adamw", schedule="linear") == OptimConfig(lr=1.0, schedule=LinearDecay())


def test_old_words_can_be_read():
    optim = load_config("hybrid_tiny").optim
    read = {name: getattr(optim, name) for name in STORED if name not in ("type", "schedule", "betas")}
    assert read == {name: STORED[name] for name in read} and optim.betas == (0.9, 0.95)
    assert OptimConfig(muon_lr=0.7, schedule="constant").muon_lr == 0.7
    assert OptimConfig(schedule="constant").decay_fraction == 0.2
    with pytest.raises(AttributeError, match="OptimConfig has no field 'momentum'"):
        _ = optim.momentum


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.muon_lrr=1"], "unknown key --optim.muon_lrr: did you mean --optim.muon_lr?"),
        (["--muon_lr=1"], "unknown key --muon_lr: did you mean --optim.muon_lr?"),
        (["--optim.shedule=wsd"], "unknown key --optim.shedule: did you mean --optim.schedule?"),
        (
            ["--optim.rule=Muon", "--optim.rule.lrr=1"],
            "unknown key --optim.rule.lrr: did you mean --optim.rule.lr?",
        ),
        (["--optim.schedule.final_ratio=1"], "did you mean --optim.schedule.final_lr_ratio?"),
        (["--optim.rule.lr=1"], "unknown key --optim.rule.lr: did you mean --optim.rule"),
        (["--optim.name=sgd"], "optim.name ('sgd') must be one of adamw, muon"),
        (["--optim.rule=Sgd"], "optim.rule ('Sgd') must be one of AdamW, Muon"),
        (["--optim.schedule=x"], "optim.schedule ('x') must be one of Cosine, LinearDecay, Wsd, Constant"),
        (["--optim.name"], "--optim.name needs a value: one of adamw, muon"),
        (["--optim.muon_lr=abc"], "--optim.muon_lr: 'abc' is not a number"),
        (["--optim.muon_lr=-1"], "optim.muon_lr (-1.0) must be positive"),
        (["--optim.name=muon", "--optim.rule.lr=-1"], "optim.rule.lr (-1.0) must be positive"),
        (["--optim.betas", "0.9", "1"], "optim.betas ((0.9, 1.0)) must be in [0, 1)"),
        (["--optim.eps=0"], "optim.eps (0.0) must be positive"),
        (["--optim.decay_fraction=2"], "optim.decay_fraction (2.0) must be in [0, 1]"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(ConfigError) as error:
        load_config("hybrid_125m", words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("OptimConfig(name='sgd')", "optim.name ('sgd') must be one of adamw, muon"),
        ("OptimConfig(schedule='x')", "optim.schedule ('x') must be one of Cosine, LinearDecay, Wsd, Constant"),
        ("OptimConfig(rule=Muon)", "must be one of AdamW(), Muon()"),
        ("OptimConfig(schedule=3)", "optim.schedule (3) must be one of Cosine(), LinearDecay(), Wsd(), Constant()"),
        ("OptimConfig('muon')", "OptimConfig takes its values by name"),
        ("ModelConfig(compute_dtype='float16')", "model.compute_dtype ('float16') must be one of bfloat16, float32"),
        (
            "ModelConfig(pattern='E', blocks={'E': MoE(router=Router(score='sum'))})",
            "score ('sum') must be one of softmax, softmax_after, sigmoid",
        ),
        (
            "ModelConfig(pattern='*', blocks={'*': Attention(gate='both')})",
            "gate ('both') must be one of elementwise, head or None",
        ),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, call, said):
    file = tmp_path / "mine.py"
    part = "model" if call.startswith("Model") else "optim"
    file.write_text(f"from hybridlm.config import *\ndef config(): return Config({part}={call})\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(file))
    assert said in str(error.value) and str(error.value).startswith(f"{file}: ")


def test_help_shows_the_new_words_alone():
    text = help_text(load_config("hybrid_tiny"), "train.py")
    assert "--optim.rule.lr " in text and re.search(r"--optim\.rule \(now Muon\)\s+one of AdamW, Muon\n", text)
    assert not any(word in text for word in ("--optim.muon_lr", "--optim.name", "--optim.numbers"))
