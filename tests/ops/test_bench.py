# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, counts, checks and says when a check fails; the ops in float64; the tolerance table."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, oracle
from pallas_kernels.ops import OPS
from pallas_kernels.ops.attention.cases import Case as AttentionCase
from pallas_kernels.ops.attention.cases import count_flops, visible_pairs
from pallas_kernels.ops.causal_conv1d import xla
from pallas_kernels.ops.ssd.cases import Case as SsdCase
from tests.tolerances import check_close


def test_times_and_writes_rows(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--case", "one_token", "--impl", "reference", "--seconds", "0.01", "--json", str(path)]
    assert bench.main(["causal_conv1d", *arguments]) == 0
    written = json.loads(path.read_text())
    assert [(row["impl"], row["pass"]) for row in written["rows"]] == [
        ("xla", "fwd"), ("xla", "fwd+bwd"), ("reference", "fwd"), ("reference", "fwd+bwd"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["tflops"] > 0 and row["gbs"] > 0 for row in written["rows"])
    assert written["rows"][0]["ratio_to_xla"] == 1.0
    assert "x xla" in capsys.readouterr().out


def test_check_passes_and_fails(capsys, monkeypatch):
    arguments = ["causal_conv1d", "--check", "--case", "two_tokens", "--dtype", "float32", "--impl"]
    assert bench.main([*arguments, "xla,gpu"]) == 0
    assert "not served" in capsys.readouterr().out
    original = xla._sums
    monkeypatch.setattr(xla, "_sums", lambda *args: 1.001 * original(*args))
    assert bench.main([*arguments, "xla"]) == 1
    assert "FAIL worst out0" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["gla"], ["ssd", "--case", "nothing"], ["ssd", "--impl", "cuda"]])
def test_unknown_names_end_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert repr(arguments[-1]) in capsys.readouterr().err


def test_counts():
    dense = AttentionCase("dense", 2, 8, 8, 4, 2, 16)
    assert visible_pairs(dense) == 2 * 36
    assert count_flops(dense) == 2 * 4 * 32 * 2 * 36
    assert visible_pairs(AttentionCase("window", 1, 8, 8, 1, 1, 4, window=2)) == 15
    assert visible_pairs(AttentionCase("cache", 1, 2, 8, 1, 1, 4, q_offset=5)) == 6 + 7
    assert visible_pairs(AttentionCase("edges", 1, 32, 32, 1, 1, 4, layout="edges")) == 2 * 16 * 17 // 2
    published = SsdCase("b8_t2048", 8, 2048, 64, 64, 1, 128)
    assert 40e9 < OPS["ssd"].cases_module().count_flops(published) < 50e9
    forward, _ = bench.count_bytes("ssd", published, "bfloat16")
    assert 0.27e9 < forward < 0.30e9


def test_tolerances():
    ones = np.ones(1000)
    check_close(ones * (1 + 5e-6), ones, dtype="float32", what="x")
    check_close(jnp.ones(3, jnp.bfloat16), np.full(3, 1.005), dtype=jnp.bfloat16, what="x")
    check_close(ones * 1e-8, ones * 0, dtype="float32", what="zeros")
    for actual, expected, dtype in (
        (ones * (1 + 2e-5), ones, "float32"),
        (ones * 1.05, ones, "bfloat16"),
        (np.where(np.arange(1000) == 7, np.nan, 1.0), ones, "float32"),
        (ones[:-1], ones, "float32"),
        (np.where(np.arange(1000) == 7, 1.001, 1.0), ones, "float32"),
        (ones * 1e-6, ones * 0, "float32"),
    ):
        with pytest.raises(AssertionError, match=r"^x: "):
            check_close(actual, expected, dtype=dtype, what="x")


def test_small_gradients_count_against_the_largest():
    """A gradient that cancels may be off by 1e-5 of a hundredth of the largest, and no more."""
    assert oracle.relative_rms(np.array([1.1e-3]), np.array([1e-3]), floor=0.01) == pytest.approx(0.01)
    assert oracle.relative_rms(np.array([1.05]), np.array([1.0]), floor=0.01) == pytest.approx(0.05)
    assert np.isinf(oracle.relative_rms(np.zeros(2), np.zeros(3)))
