# SPDX-License-Identifier: Apache-2.0
"""How mamba3 becomes a call of ssd, whose kernels test_ssd_gpu.py is about; with XLA in their place, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.op import select
from pallas_kernels.ops.mamba3 import OP, by_ssd, cases, parts
from pallas_kernels.ops.ssd.api import ssd
from pallas_kernels.ops.ssd.turns import SPAN, Turns, turn_gradients
from pallas_kernels.platform import assume_platform
from pallas_kernels.segments import document_numbers
from tests.ops.interpreter import interpreted, needs_gpu_interpreter
from tests.ops.support import QUICK, check_against_oracle, served_by
from tests.tolerances import check_close


@pytest.mark.parametrize(
    "name",
    [pytest.param(case.name, marks=[pytest.mark.slow] * (case.name != "mimo_norm")) for case in cases.TEST_CASES],
)
def test_it_is_a_call_of_ssd(name, monkeypatch):
    """Outputs, states and gradients, in float32."""
    case = cases.CASES[name]
    monkeypatch.setattr(by_ssd, "call", by_xla)
    with served_by(by_ssd.mamba3_gpu, only="mamba3"):
        check_against_oracle("mamba3", cases.make_inputs(case), **cases.make_settings(case))


def by_xla(op, implementation, args, options, offered):
    """What mamba3 asks of ssd's kernels: maps turned, and nothing read of one's own token."""
    assert op.name == "ssd" and implementation == "gpu"
    (x, dt, A, B, C), turn, turns = args, offered["turn"], offered["turns"]
    segment_ids = options["segment_ids"]
    B, C = (parts.rotate(array, turn, "adjacent" if turns.step == 2 else "half") for array in (B, C))
    y, state = ssd(x, dt, A, B, C, implementation="xla", **options)
    if segment_ids is not None:
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0)
    B, C, weighed = (a.reshape(a.shape[0], -1, turns.alone, *a.shape[2:]) for a in (B, C, dt[..., None] * x))
    reads = jnp.tril(jnp.ones((turns.alone, turns.alone)))[None, None, None]
    own = jnp.einsum("bthrs,btshp->btrhp", jnp.einsum("btrhn,btshn->bthrs", C, B) * reads, weighed)
    return y - own.reshape(y.shape), state


@pytest.mark.newer
def test_supports_names_argument_and_limit():
    inputs = cases.make_inputs(cases.CASES["mimo"], "bfloat16")
    given = {name: array for name, array in inputs.items() if array is not None}
    args = [given.pop(name) for name in OP.positional]
    check = functools.partial(by_ssd.supports_gpu, **given)
    with assume_platform("gpu", capability="9.0"):
        assert check(*args) is None
        wide = jax.ShapeDtypeStruct((*args[1].shape[:-1], 512), jnp.bfloat16)
        assert "state size" in check(args[0], wide, *args[2:])
        single = jax.ShapeDtypeStruct(args[2].shape, jnp.float32)
        assert "float32" in check(*args[:2], single, *args[3:])
        three = jax.ShapeDtypeStruct((*args[0].shape[:2], 3, *args[0].shape[3:]), jnp.bfloat16)
        assert "ranks of q_BTGN (3) not a divisor of 64" in check(three, *args[1:])


@pytest.mark.newer
@pytest.mark.parametrize(
    ("case", "dtype", "choice"),
    [("mixed", "bfloat16", "gpu"), ("mimo_norm", "bfloat16", "gpu"), ("mixed", "float32", "xla")],
)
def test_auto_takes_what_is_proven_on_the_card(case, dtype, choice):
    inputs = {name: array for name, array in cases.make_inputs(cases.CASES[case], dtype).items() if array is not None}
    args = tuple(inputs.pop(name) for name in OP.positional)
    with assume_platform("gpu", capability="9.0"):
        assert select(OP, "auto", args, inputs) is OP.implementations[choice]


@pytest.mark.slow
@needs_gpu_interpreter
def test_ranks_interpreted():
    """Four tokens of ssd that read nothing of each other, several spans and documents, a norm."""
    case = cases.Case("ranks", 1, 50, 1, 64, 1, 64, 8, rank=4, norm=True, pairs="half", layout="packed", chunk=None)
    with interpreted("mamba3", "gpu"):
        inputs, settings = cases.make_inputs(case, "bfloat16"), cases.make_settings(case)
        check_against_oracle("mamba3", inputs, dtype="bfloat16", implementation="gpu", **settings)


@pytest.mark.parametrize(
    ("layout", "pairs"), [pytest.param("dense", "adjacent", marks=pytest.mark.slow), ("scattered", "half")]
)
def test_errors_of_turns_do_not_add_up(layout, pairs):
    """Beside autodiff: exact, and at the start of each span exact whatever gradients of B and C are off by."""
    n_tokens, n_state, count = 2 * SPAN + 40, 8, 3
    draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    ids = make_segment_ids(layout, 1, n_tokens, seed=1)
    number = np.zeros(n_tokens, int) if ids is None else np.asarray(document_numbers(jnp.asarray(ids)))[0]
    real = np.ones((n_tokens, 1), np.float32) if ids is None else (ids[0] != 0)[:, None]
    x, weight, dt, steps = (draw((n_tokens, 2, *rest)) for rest in ((4,), (4,), (), ()))
    B, C, start, end_grad = draw((n_tokens, n_state)), draw((n_tokens, n_state)), *draw((2, 2, 4, n_state))
    weight, dt, sums = weight * real[..., None], np.abs(dt) * real, np.cumsum(-0.03 * np.abs(steps) * real, axis=0)
    weights = np.exp(sums[:, None] - sums) * dt * (np.tri(n_tokens) * (number[:, None] == number))[..., None]

    def state(B, at):
        """Behind `at` tokens."""
        own, first = (np.arange(n_tokens) < at) & (number == number[at - 1]), number[at - 1] == number[0]
        decays = own[:, None] * np.exp(sums[at - 1] - sums) * dt
        return jnp.einsum("jh,jhp,jn->hpn", decays, x, B) + (first * np.exp(sums[at - 1]))[:, None, None] * start

    def gradient(at):
        """Of what stands behind them, by that state."""
        own, last = (np.arange(n_tokens) >= at) & (number == number[at - 1]), number[at - 1] == number[-1]
        decays = own[:, None] * np.exp(sums - sums[at - 1])
        through = last * np.exp(sums[-1] - sums[at - 1])
        return jnp.einsum("ih,ihp,in->hpn", decays, weight, C) + through[:, None, None] * end_grad

    def loss(B, C, start):
        y = jnp.einsum("ijh,in,jn,jhp->ihp", weights, C, B, x)
        y += jnp.einsum("ih,in,hpn->ihp", np.exp(sums) * (number == number[0])[:, None], C, start)
        return jnp.vdot(y, weight) + jnp.vdot(state(B, n_tokens), end_grad)

    behind = np.tri(n_tokens, dtype=np.float32) * (number[:, None] == number)
    turned = lambda turns: loss(*(parts.rotate(array, behind @ turns, pairs) for array in (B, C)), start)
    expected = jax.jit(jax.grad(turned), compiler_options=QUICK)(np.zeros((n_tokens, count), np.float32))
    d_b, d_c, d_start = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=QUICK)(B, C, start)
    spans = (SPAN, 2 * SPAN)
    assert ids is None or any(number[at] == number[at - 1] > 0 for at in spans)  # of a later one a document goes on

    @functools.partial(jax.jit, compiler_options=QUICK)
    def states(B):
        inner = [jnp.stack(arrays)[None] for arrays in ([state(B, at) for at in spans], [gradient(at) for at in spans])]
        return inner, [(start[None], d_start[None]), (state(B, n_tokens)[None], end_grad[None])]

    inner, ends = states(B)
    turns = Turns(count, 0, *((1, 2) if pairs == "adjacent" else (n_state // 2, 1)), alone=1)

    def found(noise):
        maps = ((array, grad + noise * draw(grad.shape)) for array, grad in ((B, d_b), (C, d_c)))
        maps = [tuple(np.asarray(array)[None, :, None] for array in pair) for pair in maps]
        return behind.T @ gradients(maps, inner, ends)[0, :, 0]

    gradients = jax.jit(
        lambda maps, inner, ends: turn_gradients(turns, maps, inner, *ends, ids), compiler_options=QUICK
    )

    check_close(found(0), expected, dtype="float32", what="turns")
    scale, error = np.sqrt(np.mean(expected**2)), np.abs(found(10.0) - expected)
    assert error.max() > 0.1 * scale > 1e3 * error[::SPAN].max()
