# SPDX-License-Identifier: Apache-2.0
"""What stands between this project and versions of JAX."""

import sys
from types import SimpleNamespace

import pytest

from pallas_kernels.compat import ask_ptxas_once


@pytest.fixture
def asked(monkeypatch):
    """What a library of Mosaic's, in the place of the one that is there, was asked; and the library."""
    calls = []
    extension = SimpleNamespace(_get_ptxas_isa_version=lambda: calls.append("version") or 90)
    library = SimpleNamespace(_mosaic_gpu_ext=extension)
    monkeypatch.setitem(sys.modules, "jax._src.lib.mosaic_gpu", library)
    monkeypatch.setattr(sys.modules["jax._src.lib"], "mosaic_gpu", library, raising=False)
    return calls, extension


@pytest.mark.parametrize("pure, times", [("0", 1), ("1", 3)])
def test_the_version_of_ptxas_is_asked_for_once(pure, times, asked, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_PURE_IMPORT", pure)
    calls, extension = asked
    for _ in range(2):
        ask_ptxas_once()
    assert [extension._get_ptxas_isa_version() for _ in range(3)] == [90] * 3
    assert len(calls) == times


def test_a_library_that_cannot_be_asked_is_left_alone(asked, monkeypatch):
    _, extension = asked
    del extension._get_ptxas_isa_version
    ask_ptxas_once()
    assert not vars(extension)
    monkeypatch.setitem(sys.modules, "jax._src.lib.mosaic_gpu", None)  # cannot be imported
    monkeypatch.delattr(sys.modules["jax._src.lib"], "mosaic_gpu")
    ask_ptxas_once()
    assert not hasattr(sys.modules["jax._src.lib"], "mosaic_gpu")
