# SPDX-License-Identifier: Apache-2.0
"""A program whose kernels other processes lower is the program, byte for byte, whatever becomes of them."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from hybridlm.train import kernels_apart
from hybridlm.train.kernels_ahead import calls
from hybridlm.train.kernels_apart import lower_apart, processes
from pallas_kernels import causal_conv1d
from pallas_kernels.platform import assume_platform

pytestmark = pytest.mark.newer


@pytest.fixture(scope="module")
def traced():
    """A program that calls two kernels of `causal_conv1d`."""
    x, w = jnp.ones((1, 128, 128), jnp.bfloat16), jnp.ones((128, 4), jnp.bfloat16)
    conv = lambda x, w: causal_conv1d(x, w, implementation="gpu").sum()
    with assume_platform("gpu", capability="9.0"):
        return jax.jit(jax.value_and_grad(conv)).trace(x, w)


@pytest.fixture
def lower(traced):
    """Lowers it anew."""

    def lower_():
        jax.clear_caches()
        with assume_platform("gpu", capability="9.0"):
            return traced.lower(lowering_platforms=("cuda",))

    return lower_


@pytest.fixture(scope="module")
def whole(traced):
    with assume_platform("gpu", capability="9.0"):
        return _said(traced.lower(lowering_platforms=("cuda",)))


@pytest.fixture
def places(monkeypatch):
    """Of each kernel that this process takes, whether it lowers it itself."""
    by_itself, take = [], kernels_apart._Parts.take

    def take_(self, lower, name, outputs):
        by_itself.append(False)

        def lower_():
            by_itself[-1] = True
            return lower()

        return take(self, lower_, name, outputs)

    monkeypatch.setattr(kernels_apart._Parts, "take", take_)
    return by_itself


def _said(lowered) -> list[str]:
    """Of each call of a kernel its text, less the number that JAX gives it as one more that this process lowers."""
    from jax._src.interpreters import mlir
    from jax.experimental.mosaic.gpu import dialect

    texts = []
    for words in calls(lowered):
        with mlir.make_ir_context() as context, mlir.ir.Location.unknown():
            context.allow_unregistered_dialects = True
            dialect.register_dialect(context)
            module = mlir.ir.Module.parse(words["module"])
            name, _, number = module.operation.attributes[kernels_apart.NUMBERED].value.rpartition("_")
            assert name and number.isdigit()
            del module.operation.attributes[kernels_apart.NUMBERED]
            texts.append(module.operation.get_asm(enable_debug_info=True))
    return texts


@pytest.mark.parametrize("count", [1, 3])
def test_it_is_the_same_and_this_process_lowers_no_kernel(lower, whole, places, count):
    threads = threading.active_count()
    assert _said(lower_apart(lower, count)) == whole
    assert places == [False] * len(whole) and len(whole) == 2
    _until(lambda: threading.active_count() == threads)
    with pytest.raises(ChildProcessError):  # all have ended, and none is left to be waited for
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("what", ["raises", "is killed", "sends another"])
def test_what_a_process_does_not_bring_is_lowered_here(lower, whole, places, monkeypatch, what):
    send = kernels_apart._send

    def fail(writer, mine, count, next_place, lower, name, outputs):
        if next_place[0] == mine == 1:
            if what == "raises":
                raise ValueError("no memory")
            if what == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            name = "another"
        return send(writer, mine, count, next_place, lower, name, outputs)

    monkeypatch.setattr(kernels_apart, "_send", fail)
    assert _said(lower_apart(lower, 2)) == whole
    assert places == [False, True]


def test_a_process_that_hangs_is_waited_for_so_long_and_ended(lower, whole, places, monkeypatch):
    monkeypatch.setattr(kernels_apart, "_send", lambda *_: time.sleep(60))
    monkeypatch.setattr(kernels_apart, "LATEST", 2.0)
    began = time.monotonic()
    assert _said(lower_apart(lower, 2)) == whole
    assert places == [True, True] and time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        _until(lambda: os.waitpid(-1, os.WNOHANG) and False)


def test_none_is_forked_where_it_cannot_be(lower, whole, monkeypatch):
    def no_fork():
        raise BlockingIOError("too many processes")

    monkeypatch.setattr(kernels_apart, "_fork", no_fork)
    assert _said(lower_apart(lower, 2)) == whole  # no more processes
    monkeypatch.setattr(kernels_apart, "_fork", lambda: pytest.fail("forked"))
    assert _said(lower_apart(lower, 0)) == whole
    monkeypatch.setattr(kernels_apart, "POINT", "lower_by_another_name")
    assert _said(lower_apart(lower, 2)) == whole


def test_what_lowering_raises_is_raised(monkeypatch):
    def fail():
        raise ValueError("no such layout")

    with pytest.raises(ValueError, match="no such layout"):
        lower_apart(fail, 2)


def test_processes_are_as_many_as_there_are_other_cores(monkeypatch):
    for cores, count in ((2, 0), (4, 3), (16, 15), (128, 20)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert processes() == count
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes() == 0


def _until(done) -> None:
    deadline = time.monotonic() + 30
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
