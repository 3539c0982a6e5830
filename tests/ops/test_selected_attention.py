# SPDX-License-Identifier: Apache-2.0
"""`selected_attention`: its cases against the float64 reference, attention as the case of all blocks, what it
sees, memory, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, selected_attention
from pallas_kernels.ops.selected_attention import cases, xla
from tests.ops.support import QUICK, check_against_oracle
from tests.tolerances import check_close

BY_DEFAULT = ("many", "documents", "cached")
CASES = [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name not in BY_DEFAULT))
         for case in cases.TEST_CASES]  # fmt: skip
NAMES = ("q", "k", "v", "chosen", "blocks")


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    check_against_oracle("selected_attention", cases.make_inputs(case), implementation="xla")


def drawn(**changes):
    """q, k, v, chosen and blocks: 24 tokens in blocks of 4, of which 3 are chosen."""
    made = cases.make_inputs(cases.Case("drawn", **{"batch": 2, "tokens": 24, "heads": 4, "kv_heads": 2, "width": 8,
                                                    "block": 4, "n_chosen": 3} | changes))  # fmt: skip
    return [made[name] for name in NAMES]


compiled = jax.jit(selected_attention, compiler_options=QUICK)


def test_of_all_blocks_it_is_attention():
    q, k, v, _, blocks = drawn()
    everything = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 24, 6))
    expected = jax.jit(attention, compiler_options=QUICK)(q, k, v)
    check_close(compiled(q, k, v, everything, blocks), expected, dtype="float32", what="all blocks")
    assert np.abs(compiled(q, k, v, everything[:, :, 1:], blocks) - expected).max() > 1e-2


def test_one_key_is_its_value():
    """Blocks of one key, one chosen: the result is that key's value; none chosen, or a later one: exactly zero."""
    q, k, v, _, _ = drawn(block=1, heads=2)
    blocks = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    chosen = np.random.default_rng(3).integers(-1, 24, (2, 24, 1)).astype(np.int32)
    found = np.asarray(compiled(q, k, v, chosen, blocks))
    for b, t in np.ndindex(2, 24):
        s = chosen[b, t, 0]
        np.testing.assert_allclose(found[b, t], v[b, s] if 0 <= s <= t else np.zeros_like(v[b, s]), rtol=1e-6)


def test_gradients_reach_what_is_chosen_alone():
    q, k, v, chosen, blocks = drawn(batch=1)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def pull(weight):
        return jax.vjp(lambda k, v: selected_attention(q, k, v, chosen, blocks), k, v)[1](weight)

    for t in range(24):
        weight = np.zeros_like(q)
        weight[:, t] = 1.0
        seen = np.isin(blocks[0], chosen[0, t]) & (np.arange(24) <= t)
        for name, grad in zip("kv", map(np.asarray, pull(weight)), strict=True):
            np.testing.assert_array_equal(np.abs(grad[0]).max((1, 2)) > 0, seen & (name == "v" or seen.sum() > 1))


@pytest.mark.slow
def test_memory_is_of_blocks():
    """Of forward and backward: twice the tokens, a little more than twice the memory; nothing is [T, T]."""

    def temporary(tokens: int) -> int:
        inputs = cases.make_inputs(cases.Case("long", 1, tokens, 2, 1, 8, 64, 4))
        arrays = [jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype) for name in NAMES]

        def loss(q, k, v, chosen, blocks):
            return selected_attention(q, k, v, chosen, blocks).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1 << 13) < 2.3 * temporary(1 << 12)
    assert temporary(1 << 13) < 4 * 2 * (1 << 13) ** 2  # of scores alone


def test_a_key_too_many_is_seen(monkeypatch):
    original = xla._visible
    monkeypatch.setattr(xla, "_visible", lambda *args: original(*args).at[:, -1, 0].set(True))
    with pytest.raises(AssertionError, match="relative RMS"):
        inputs = cases.make_inputs(cases.Case("late", 1, 24, 2, 2, 8, 4, 1))
        check_against_oracle("selected_attention", inputs, implementation="xla")


ERRORS = (
    ({"k": jnp.zeros((2, 24, 3, 8)), "v": jnp.zeros((2, 24, 3, 8))}, ValueError,
     r"heads of q_BTHP \(4\) not divisible by heads of k_BSKP \(3\)"),
    ({"k": jnp.zeros((2, 24, 2, 7))}, ValueError, r"k_BSKP has shape \[2, 24, 2, 7\], expected \[2, any, any, 8\]"),
    ({"v": jnp.zeros((2, 23, 2, 8))}, ValueError, r"v_BSKP has shape \[2, 23, 2, 8\], expected \[2, 24, 2, any\]"),
    ({"q": jnp.zeros((2, 24, 4, 8), int)}, TypeError, "q_BTHP has dtype int"),
    ({"chosen": np.zeros((2, 23, 3), np.int32)}, ValueError, r"chosen_BTC has shape \[2, 23, 3\]"),
    ({"chosen": np.zeros((2, 24, 3), np.float32)}, TypeError, "chosen_BTC has dtype float32, expected an integer type"),
    ({"blocks": np.zeros((2, 25), np.int32)}, ValueError, r"blocks_BS has shape \[2, 25\], expected \[2, 24\]"),
    ({"places": np.zeros((2, 25), np.int32)}, ValueError, r"places has shape \[2, 25\], expected \[2, 24\]"),
    ({"implementation": "gpu"}, NotImplementedError, r"implementation \('gpu'\) of selected_attention"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_argument_value_and_limit(change, error, message):
    given = dict(zip(NAMES, drawn(), strict=True)) | change
    arrays = [given.pop(name) for name in NAMES]
    with pytest.raises(error, match=message) as raised:
        selected_attention(*arrays, **given)
    assert "\n" not in str(raised.value).partition("\n---")[0]
