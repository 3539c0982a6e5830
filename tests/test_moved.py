# SPDX-License-Identifier: Apache-2.0
"""Module names of before still import, and give what their names are now."""

import importlib
import sys

import pytest

import hybridlm.moved
import pallas_kernels.moved

MOVED = hybridlm.moved.MOVED | pallas_kernels.moved.MOVED
NAMES = [
    ("hybridlm.checkpoint", "Checkpoints", "hybridlm.train.checkpoint"),
    ("hybridlm.config_io", "load_config", "hybridlm.config.find"),
    ("hybridlm.config_io", "override", "hybridlm.config.overrides"),
    ("hybridlm.config_io", "from_dict", "hybridlm.config.stored"),
    ("hybridlm.config_io", "to_dict", "hybridlm.config.tree"),
    ("hybridlm.flops", "train_flops", "hybridlm.model.flops"),
    ("hybridlm.flops", "ssd_flops", "hybridlm.layers.mamba2"),
    ("hybridlm.generation", "generate", "hybridlm.model.generation"),
    ("hybridlm.hf.published", "published", "hybridlm.config.published"),
    ("hybridlm.loop", "train", "hybridlm.train.loop"),
    ("hybridlm.sample", "load_run", "hybridlm.train.sample"),
    ("hybridlm.step", "make_program", "hybridlm.train.step"),
    ("pallas_kernels.dispatch", "assume_platform", "pallas_kernels.platform"),
    ("pallas_kernels.dispatch", "select", "pallas_kernels.op"),
]


def forget(monkeypatch, module: str) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.parametrize("old", MOVED)
def test_imports_with_a_warning_that_says_where(old, monkeypatch):
    forget(monkeypatch, old)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old][0]}"):
        module = importlib.import_module(old)
    for place in MOVED[old]:
        importlib.import_module(place)
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("old", "name", "new"), NAMES)
def test_names_are_the_same_objects(old, name, new):
    assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)


def test_packages_of_now_are_not_shadowed():
    import hybridlm.model

    assert hybridlm.model.HybridLM is hybridlm.HybridLM
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hybridlm.nothing")
