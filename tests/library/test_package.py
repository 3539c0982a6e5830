# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed and imported: wheel, metadata, version, what an import leaves in the process."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import hybridlm
from hybridlm.cli import main, train_main

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT = """
import json, logging, os, signal, sys, warnings
import jax
def state():
    return {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "environment": {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        "finders": [getattr(f, "__module__", type(f).__module__) for f in sys.meta_path],
        "path": sys.path, "config": repr(sorted(jax.config.values.items())),
        "filters": repr(warnings.filters), "handlers": repr(logging.getLogger().handlers),
        "level": logging.getLogger().level, "signals": [repr(signal.getsignal(s)) for s in (2, 15)],
        "unraisable": sys.unraisablehook is sys.__unraisablehook__, "excepthook": sys.excepthook is sys.__excepthook__,
    }
before = state()
import hybridlm, hybridlm.config, hybridlm.layers, hybridlm.model.generation, pallas_kernels
after = state()
from jax._src import xla_bridge
print(json.dumps([{k: (before[k], after[k]) for k in before if before[k] != after[k]},
                  xla_bridge.backends_are_initialized()]))
"""


def changed_by_importing(**environment: str) -> dict:
    """What of the process's state an import changes; it never starts a device."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PALLAS_KERNELS_PURE_IMPORT")} | environment
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    changed, started = json.loads(done.stdout.splitlines()[-1])
    if "finders" in changed:
        before, after = ([name for name in found if not name.startswith("absl.")] for found in changed.pop("finders"))
        changed |= {"finders": (before, after)} if before != after else {}
    assert not started
    return changed


def test_importing_does_what_is_documented_and_no_more():
    changed = changed_by_importing()
    before, after = changed.pop("finders")
    assert after == [*before, "pallas_kernels.moved", "pallas_kernels.moved"]
    if flags := changed.pop("XLA_FLAGS", None):  # jaxlib 0.10
        assert flags == [None, "--xla_cpu_experimental_ynn_fusion_type="]
    assert changed == {}


def test_a_pure_import_changes_nothing():
    assert changed_by_importing(PALLAS_KERNELS_PURE_IMPORT="1") == {}


def test_a_function_is_no_module_and_says_what_is():
    with pytest.raises(
        ModuleNotFoundError, match=r"^pallas_kernels\.ssd is a function; its package is pallas_kernels\.ops\.ssd$"
    ):
        __import__("pallas_kernels.ssd.api")


@pytest.mark.parametrize("command", [main, train_main])
def test_version(command, capsys):
    assert command(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"hybridlm {hybridlm.__version__} (Python 3.") and "JAX 0." in out and out.count("\n") == 1
    assert main(["train", "--version"]) == 0
    assert capsys.readouterr().out == out


def test_licence_and_metadata():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence and len(licence) > 11_000
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert all(PROJECT[key] for key in ("authors", "classifiers", "description", "keywords", "readme"))
    assert "Typing :: Typed" in PROJECT["classifiers"]


@pytest.mark.skipif(find_spec("hatchling") is None, reason="needs hatchling: pip install -e '.[dev]'")
def test_the_wheel_holds_licence_metadata_and_types(tmp_path):
    build = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = set(wheel.namelist())
        at = f"hybridlm-{hybridlm.__version__}.dist-info"
        metadata = wheel.read(f"{at}/METADATA").decode()
        licence = wheel.read(f"{at}/licenses/LICENSE").decode()
    assert licence == (ROOT / "LICENSE").read_text()
    assert {"hybridlm/py.typed", "pallas_kernels/py.typed", "pallas_kernels/__init__.pyi"} <= names
    assert "hybridlm/configs/hybrid_tiny.py" in names
    for line in ("License-Expression: Apache-2.0", "License-File: LICENSE", "Classifier: Typing :: Typed",
                 f"Summary: {PROJECT['description']}", "Author: The hybridlm contributors"):  # fmt: skip
        assert line in metadata.splitlines(), line
