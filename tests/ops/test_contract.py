# SPDX-License-Identifier: Apache-2.0
"""Every implementation of every op is held to its contract: see contract.py. An op takes part by being in OPS."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.compat import why_too_old
from pallas_kernels.op import KERNELS
from pallas_kernels.ops import OPS
from tests.ops import contract

ROOT = Path(__file__).parents[2]
PLAIN = [subject for subject in contract.subjects() if not subject.is_kernel]
TPU = [subject for subject in contract.subjects() if subject.implementation == "tpu"]
GPU = [subject for subject in contract.subjects() if subject.implementation == "gpu"]


def name_of(value) -> str:
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize("check", (*contract.ESSENTIAL, *contract.REST, *contract.PLAIN), ids=name_of)
@pytest.mark.parametrize("subject", PLAIN, ids=str)
def test_plain(subject, check):
    check(subject)


@pytest.mark.parametrize("check", [
    *contract.ESSENTIAL, *(pytest.param(check, marks=pytest.mark.slow) for check in contract.REST)
], ids=name_of)  # fmt: skip
@pytest.mark.parametrize("subject", TPU, ids=str)
def test_tpu_kernels_interpreted(subject, check):
    check(subject)


@pytest.mark.parametrize("checks", [
    pytest.param(contract.ESSENTIAL, id="essential"), pytest.param(contract.REST, id="rest", marks=pytest.mark.slow)
])  # fmt: skip
@pytest.mark.parametrize("subject", GPU, ids=str)
def test_gpu_kernels_interpreted(subject, checks):
    """In a process of its own, with enough threads for those of a kernel that wait for each other."""
    if reason := why_too_old((0, 11)):
        pytest.skip(f"the interpreter of this JAX lacks parts: {reason}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_NUM_CPU_DEVICES": "2", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-m", "tests.ops.contract", subject.name, subject.implementation]
    command += [check.__name__ for check in checks]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert result.stdout.count(": holds\n") == len(checks)


@pytest.mark.parametrize("subject", PLAIN, ids=str)
def test_an_implementation_that_errs_is_seen(subject):
    """Results off by 5%, gradients with them, fail the oracle's check."""
    off = lambda result: jax.tree.map(lambda array: array * 1.05, result)
    with pytest.raises(AssertionError, match="relative RMS"):
        contract.check_oracle(contract.Subject(subject.name, subject.implementation, off))


def test_all_take_part():
    """Every op has a reference and an xla implementation, and a small case for each implementation."""
    for name, op in OPS.items():
        assert {"reference", "xla"} <= set(op.implementations), name
        assert set(op.cases_module().CONTRACT) == set(op.implementations), name
    assert {subject.implementation for subject in contract.subjects()} == {"reference", "xla", *KERNELS}
