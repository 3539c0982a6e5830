# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings against complex rotations, and scaled frequencies against the papers' formulas, one by one."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.config import NTK, ConfigError, Linear, Llama3, Proportional, Rope, YaRN
from hybridlm.layers.rope import dynamic_ntk, frequencies, rotate
from tests.tolerances import check_close


def rotated(x_BTHP, positions_BT, freqs, scale, d) -> np.ndarray:
    """Pair (i, i + d/2) as the complex number x_i + j x_{i + d/2}, times scale * exp(j position freq_i)."""
    x = np.asarray(x_BTHP, np.float64)
    pairs = x[..., : d // 2] + 1j * x[..., d // 2 : d]
    pairs = pairs * scale * np.exp(1j * np.asarray(positions_BT)[:, :, None, None] * np.asarray(freqs, np.float64))
    return np.concatenate([pairs.real, pairs.imag, x[..., d:]], axis=-1)


def yarn_frequency(i: int, d: int, theta: float, yarn: YaRN) -> float:
    """Section 3.2 of the paper: by parts, between the pairs that turn beta_fast and beta_slow times."""
    freq = theta ** (-2 * i / d)

    def pair_with(turns):  # solves original / (2 pi theta^(2 i / d)) = turns for i
        return d / 2 * math.log(yarn.original_max_positions / (2 * math.pi * turns), theta)

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return freq * (1 - ramp) + freq / yarn.factor * ramp


def llama3_frequency(i: int, d: int, theta: float, llama3: Llama3) -> float:
    """By wavelength: short ones kept, long ones divided, a linear blend between."""
    freq = theta ** (-2 * i / d)
    wavelength = 2 * math.pi / freq
    if wavelength < llama3.original_max_positions / llama3.high_freq_factor:
        return freq
    if wavelength > llama3.original_max_positions / llama3.low_freq_factor:
        return freq / llama3.factor
    smooth = llama3.original_max_positions / wavelength - llama3.low_freq_factor
    smooth /= llama3.high_freq_factor - llama3.low_freq_factor
    return (1 - smooth) * freq / llama3.factor + smooth * freq


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_rotation_is_a_complex_product(fraction):
    rng = np.random.default_rng(0)
    x_BTHP = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)
    positions_BT = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    d = int(16 * fraction)
    freqs = [500.0 ** (-2 * i / d) for i in range(d // 2)]
    actual = rotate(jnp.asarray(x_BTHP), jnp.asarray(positions_BT), Rope(500.0, fraction))
    check_close(actual, rotated(x_BTHP, positions_BT, np.float32(freqs), 1.0, d), dtype="float32", what="rotated")


def test_position_zero_and_relative_positions():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    rope = Rope()

    def score(i, j):
        return float((rotate(q, jnp.array([[i]]), rope) * rotate(k, jnp.array([[j]]), rope)).sum())

    np.testing.assert_array_equal(rotate(q, jnp.array([[0]]), rope), q)
    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)


@pytest.mark.parametrize(
    "yarn",
    [YaRN(4.0, 4096), YaRN(16.0, 128, 32.0, 1.0), YaRN(40.0, 4096, 32.0, 1.0, 1.3, False)],
)
def test_yarn(yarn):
    freqs, scale = frequencies(Rope(10_000.0, scaling=yarn), 64)
    expected = [yarn_frequency(i, 64, 10_000.0, yarn) for i in range(32)]
    np.testing.assert_allclose(freqs, expected, rtol=1e-6)
    assert scale == (1.3 if yarn.attention_factor else pytest.approx(0.1 * math.log(yarn.factor) + 1))


def test_yarn_scales_scores():
    yarn = YaRN(4.0, 64)
    x = jnp.ones((1, 1, 1, 8))
    scale = frequencies(Rope(scaling=yarn), 8)[1]
    np.testing.assert_allclose(rotate(x, jnp.array([[0]]), Rope(scaling=yarn)), scale * x, rtol=1e-6)


def test_yarns_temperature_is_of_the_scores():
    """Equation 15: scores are divided by t, sqrt(1 / t) = 0.1 ln(s) + 1, whatever the positions are."""
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(2, 1, 5, 2, 32)).astype(np.float32)
    i, j = (np.sort(rng.integers(0, 4000, (1, 5))).astype(np.int32) for _ in range(2))
    yarn = YaRN(16.0, 256)
    freqs = [yarn_frequency(n, 32, 10_000.0, yarn) for n in range(16)]
    turned = [rotated(x, at, np.float32(freqs), 1.0, 32) for x, at in ((q, i), (k, j))]
    expected = np.einsum("BTHP,BSHP->BHTS", *turned) * (0.1 * math.log(16) + 1) ** 2
    scores = np.einsum("BTHP,BSHP->BHTS", *(rotate(x, at, Rope(scaling=yarn)) for x, at in ((q, i), (k, j))))
    check_close(scores, expected, dtype="float32", what="scores")


def test_position_interpolation_reads_positions_between():
    """Chen et al. 2023, equation 3: f(x, m) becomes f(x, m L / L')."""
    rng = np.random.default_rng(3)
    x_BTHP = rng.normal(size=(1, 9, 2, 16)).astype(np.float32)
    positions_BT = rng.integers(0, 4096, (1, 9)).astype(np.int32)
    freqs = [500.0 ** (-2 * i / 16) for i in range(8)]
    actual = rotate(jnp.asarray(x_BTHP), jnp.asarray(positions_BT), Rope(500.0, scaling=Linear(4.0)))
    expected = rotated(x_BTHP, positions_BT / 4.0, np.float32(freqs), 1.0, 16)
    check_close(actual, expected, dtype="float32", what="rotated")


def test_dynamic_ntk_begins_at_the_trained_length():
    assert dynamic_ntk(5, 256).alpha == dynamic_ntk(256, 256, 3.0).alpha == 1.0
    assert dynamic_ntk(1024, 256) == NTK(4.0) and dynamic_ntk(1024, 256, 2.0) == NTK(7.0)
    plain, _ = frequencies(Rope(500.0), 32)
    longer, _ = frequencies(Rope(500.0, scaling=dynamic_ntk(4096, 256)), 32)
    theta = 500.0 * 16 ** (32 / 30)  # the base of section 3.1
    np.testing.assert_allclose(longer, [theta ** (-2 * i / 32) for i in range(16)], rtol=1e-6)
    assert longer[0] == plain[0] and longer[-1] == pytest.approx(plain[-1] / 16, rel=1e-6)
    for words, told in (
        ((0, 256), "length (0)"),
        ((1, 0), "original_max_positions (0)"),
        ((9, 4, 0.5), "factor (0.5)"),
    ):
        with pytest.raises(ConfigError) as error:
            dynamic_ntk(*words)
        assert told in str(error.value)


@pytest.mark.parametrize("llama3", [Llama3(), Llama3(32.0, 1.0, 4.0, 8192), Llama3(8.0, 1.0, 4.0, 64)])
def test_llama3(llama3):
    freqs, scale = frequencies(Rope(500_000.0, scaling=llama3), 128)
    np.testing.assert_allclose(freqs, [llama3_frequency(i, 128, 500_000.0, llama3) for i in range(64)], rtol=1e-6)
    assert scale == 1.0


def test_odd_rotated_width_is_refused():
    with pytest.raises(ConfigError, match="must be even"):
        frequencies(Rope(fraction=0.5), 6)


def test_ntk_divides_the_slowest_pair_and_leaves_the_fastest():
    plain, _ = frequencies(Rope(500.0, 0.5), 32)
    stretched, scale = frequencies(Rope(500.0, 0.5, NTK(40.0)), 32)
    assert scale == 1.0
    assert stretched[0] == plain[0] == 1.0
    assert stretched[-1] == pytest.approx(plain[-1] / 40.0, rel=1e-6)
    ratios = stretched[1:] / stretched[:-1]  # still a geometric series
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


@pytest.mark.parametrize(("fraction", "turning"), [(0.5, 4), (0.7, 5), (1.0, 8)])
def test_proportional_turns_the_fastest_pairs_of_a_whole_head(fraction, turning):
    rng = np.random.default_rng(0)
    x_BTHP = rng.normal(size=(1, 6, 2, 16)).astype(np.float32)
    positions_BT = np.arange(6, dtype=np.int32)[None]
    freqs = [500.0 ** (-2 * i / 16) / 3 if i < turning else 0.0 for i in range(8)]
    rope = Rope(500.0, fraction, Proportional(3.0))
    actual = rotate(jnp.asarray(x_BTHP), jnp.asarray(positions_BT), rope)
    expected = rotated(x_BTHP, positions_BT, np.float32(freqs), 1.0, 16)
    check_close(actual, expected, dtype="float32", what="rotated")


def test_ntk_needs_a_width_of_more_than_one_pair():
    with pytest.raises(ConfigError, match=r"^rope: d_head \(8\) leaves a rotated width of 2: ntk needs more than 2$"):
        frequencies(Rope(fraction=0.25, scaling=NTK()), 8)
