# SPDX-License-Identifier: Apache-2.0
"""Every implementation of every op is held to its contract: see contract.py. An op takes part by being in OPS."""

import jax
import pytest

from pallas_kernels.op import KERNELS
from pallas_kernels.ops import OPS
from tests.ops import contract
from tests.ops.interpreter import LIMITS, needs_gpu_interpreter

PLAIN = [subject for subject in contract.subjects() if not subject.is_kernel]
BORROWED = ("gated_delta_product", "linear_attention", "mamba3")  # ops that run on another's kernels
LARGE = ("gated_delta_rule", "selective_scan")  # whose kernels take long to compile for the interpreter
EACH_TIME = {name for name, op in OPS.items() if op.implementations.keys() & {*KERNELS}} - {*BORROWED, *LARGE} | {
    "selective_scan"
}
"""Ops whose plain implementations are held to everything each time: beside most of them kernels stand."""


TRACED = (contract.check_no_rows, contract.check_float64, contract.check_x64_flag,
          contract.check_traces_in_a_checked_shard_map, contract.check_traces_under_checkpoint)  # fmt: skip


OF_THE_KERNEL = (contract.check_hints, contract.check_eager, contract.check_checkpoint, contract.check_scan,
                 contract.check_shard_map)  # fmt: skip
"""What of a borrowed kernel is shown for the op whose it is."""


def is_slow(subject, check) -> bool:
    """Of kernels: what asks for many compilations, or is shown for the op whose kernels they are."""
    if check is contract.check_without_ids:  # own tests of the other kernels are of such rows
        return subject.name != "selective_scan"
    rarely = subject.name in (*BORROWED, *LARGE) and check not in (contract.check_oracle, *TRACED)
    return check in contract.REST or rarely


def on_kernels(platform: str):
    """Every kernel of a platform with every property that its interpreter can show."""
    return pytest.mark.parametrize(
        ("subject", "check"),
        [
            pytest.param(subject, check, marks=[pytest.mark.slow] * is_slow(subject, check),
                         id=f"{subject}-{check.__name__}")
            for subject in contract.subjects()
            for check in (*contract.ESSENTIAL, *contract.REST)
            if subject.implementation == platform and not (subject.name in BORROWED and check in OF_THE_KERNEL)
            and not LIMITS.keys() & {(platform, check.__name__), (platform, check.__name__, subject.name)}
        ],
    )  # fmt: skip


def by_default(subject, check=None) -> bool:
    """Of the other ops what one program of xla shows: test_golden.py and test_recurrences.py run it without ids,
    test_context.py hands states on. Of all what JAX makes of xla; shard_maps that check find more than those that do
    not, vmap more than scan; op by op, what is decided at run time alone differs, and docs run the others so."""
    if subject.implementation == "reference":
        return subject.name in EACH_TIME and check not in contract.REST
    rarely = [contract.check_shard_map, contract.check_scan]
    rarely += [contract.check_eager] * (subject.name != "causal_conv1d")
    return check in contract.FIRST or (subject.name in EACH_TIME and check not in rarely)


@pytest.mark.parametrize(
    ("subject", "check"),
    [
        pytest.param(subject, check, marks=[pytest.mark.slow] * (not by_default(subject, check)),
                     id=f"{subject}-{check.__name__}")
        for subject in PLAIN
        for check in (*contract.ESSENTIAL, *contract.REST, *contract.PLAIN)
    ],
)  # fmt: skip
def test_plain(subject, check):
    check(subject)


@on_kernels("tpu")
def test_tpu_kernels_interpreted(subject, check):
    check(subject)


@needs_gpu_interpreter
@on_kernels("gpu")
def test_gpu_kernels_interpreted(subject, check):
    check(subject)


@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(subject, marks=[pytest.mark.slow] * (subject.implementation != "xla" or not by_default(subject)),
                     id=str(subject))
        for subject in PLAIN
    ],
)  # fmt: skip
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


def test_limits_name_properties_and_ops():
    names = {check.__name__ for check in (*contract.ESSENTIAL, *contract.REST)}
    assert all(platform in KERNELS and name in names and {*op} <= OPS.keys() for platform, name, *op in LIMITS)
