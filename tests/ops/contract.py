# SPDX-License-Identifier: Apache-2.0
"""What every implementation of every op must hold: one function a property, of a `Subject`. Asks ops by their values;
those that are about JAX stand in transforms.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import oracle
from tests.ops.subject import Subject, compiling_anew, expected_of, layout_of, subjects, tokens_of
from tests.ops.support import QUICK
from tests.ops.transforms import (
    check_checked_shard_map,
    check_checkpoint,
    check_dtypes,
    check_eager,
    check_float64,
    check_forward_mode,
    check_forward_over_reverse,
    check_scan,
    check_shard_map,
    check_traces_in_a_checked_shard_map,
    check_traces_under_checkpoint,
    check_vmap,
    check_x64_flag,
)

__all__ = ["Subject", "compiling_anew", "subjects"]

# The properties. Each raises AssertionError where it does not hold.


def check_oracle(subject: Subject) -> None:
    """Results and gradients are those of the float64 reference: of several documents a row, of padding."""
    inputs = {**subject.inputs(), **layout_of(subject, "scattered")}
    subject.check(subject.run(inputs), expected_of(subject, inputs))


def check_without_ids(subject: Subject) -> None:
    """They are where each row is one document and nobody says so."""
    if subject.op.has_segments:
        subject.check(subject.run(subject.inputs()), expected_of(subject, subject.inputs()))


def check_an_error_is_seen(subject: Subject) -> None:
    """Guards the contract itself: any tensor off by 5% fails it."""
    inputs = {**subject.inputs(), **layout_of(subject, "scattered")}
    actual, expected = subject.run(inputs), expected_of(subject, inputs)
    for name in actual:
        with pytest.raises(AssertionError, match=rf"\.{name}: relative RMS"):
            subject.check({**actual, name: 1.05 * actual[name]}, expected)


def check_packed(subject: Subject) -> None:
    """Two documents of a row give what each gives alone; gradients of what they share are the sum."""
    if not subject.op.has_segments:
        return
    inputs = subject.inputs()
    n_batch, n_tokens = inputs[subject.op.tokens[0]].shape[:2]
    half = n_tokens // 2
    ids = np.repeat([[5, 2]], half, axis=1).repeat(n_batch, axis=0).astype(np.int32)
    weights = subject.weights(inputs)
    packed = subject.run({**inputs, "segment_ids": ids}, weights)
    parts = []
    for number in (0, 1):
        own = slice(number * half, (number + 1) * half)
        alone = tokens_of(subject, {**inputs, "segment_ids": ids}, own)
        kept = [weights[0][:, own]]
        for name, weight in zip(subject.op.states, weights[1:], strict=True):
            alone[name] = inputs[name] * (number == 0)
            kept.append(weight * (number == 1))
        parts.append(subject.run(alone, kept))
    subject.check(packed, _joined(subject, *parts), what=" packed")


def _joined(subject: Subject, first: dict, second: dict) -> dict:
    """Of two parts of all tokens: by token one behind the other, states at their ends, else the sum."""
    by_token = {"out0", *(f"d{name}" for name in subject.op.tokens)}
    joined = {}
    for name in first:
        if name in by_token:
            joined[name] = np.concatenate([first[name], second[name]], axis=1)
        elif name.startswith("out"):
            joined[name] = second[name]
        else:
            joined[name] = first[name] if name[1:] in subject.op.states else first[name] + second[name]
    return joined


def check_states(subject: Subject) -> None:
    """Cut in two and handed over through the state, values and gradients are those of the whole; padding at the cut."""
    if not subject.op.has_states:
        return
    inputs = subject.inputs()
    n_batch, n_tokens = inputs[subject.op.tokens[0]].shape[:2]
    half = n_tokens // 2
    ids = np.ones((n_batch, n_tokens), np.int32)
    ids[0, half - 2 : half + 3] = 0
    ids[1:, : half // 2] = 4
    ids[1:, -half // 2 :] = 3
    inputs["segment_ids"] = ids
    weights = subject.weights(inputs)
    first, second = (tokens_of(subject, inputs, part) for part in (slice(0, half), slice(half, None)))
    left = subject.run(first, [weights[0][:, :half], *weights[1:]])
    states = {name: left[f"out{i}"].astype(inputs[name].dtype) for i, name in enumerate(subject.op.states, 1)}
    later = subject.run({**second, **states}, [weights[0][:, half:], *weights[1:]])
    handed = [later[f"d{name}"].astype(np.float32) for name in subject.op.states]
    earlier = subject.run(first, [weights[0][:, :half], *handed])
    subject.check(subject.run(inputs, weights), _joined(subject, earlier, later), what=" in two calls")


def check_padding(subject: Subject) -> None:
    """Padding anywhere may hold anything: nothing changes; its results and gradients are zero."""
    if not subject.op.has_segments:
        return
    garbage = np.nan if subject.op.padding_may_be_nan else 7.0
    for layout in ("right", "left", "interior", "scattered", "empty"):
        inputs = {**subject.inputs(), **layout_of(subject, layout)}
        padded = inputs["segment_ids"] == 0
        assert padded.any(), layout
        dirty = dict(inputs)
        for name in subject.op.tokens:
            there = padded.reshape(*padded.shape, *(1,) * (inputs[name].ndim - 2))
            dirty[name] = np.where(there, np.asarray(garbage, inputs[name].dtype), inputs[name])
        clean = subject.run(inputs)
        for name, value in subject.run(dirty).items():
            np.testing.assert_array_equal(value, clean[name], err_msg=f"{subject} {layout}: {name}")
        for name in ("out0", *(f"d{name}" for name in subject.op.tokens)):
            assert not clean[name][padded].any(), f"{subject} {layout}: {name}"
        empty = ~(~padded).any(axis=1)
        for i, name in enumerate(subject.op.states, 1):
            np.testing.assert_array_equal(clean[f"out{i}"][empty], np.float64(inputs[name])[empty])


def check_padding_cut_out(subject: Subject) -> None:
    """Padding is as if it were not there: a row with it cut out gives the same, and so do all with it at their ends."""
    if not subject.op.has_segments:
        return
    inputs = {**subject.inputs(), **layout_of(subject, "scattered")}
    whole, weights = subject.run(inputs), subject.weights(inputs)
    by_token = {"out0", *(f"d{name}" for name in subject.op.tokens)}
    order = np.argsort(inputs["segment_ids"] == 0, axis=1, kind="stable")
    moved = lambda a: np.take_along_axis(a, order.reshape(*order.shape, *(1,) * (a.ndim - 2)), axis=1)
    names = (*subject.op.tokens, "segment_ids")
    ends = {name: moved(array) if name in names else array for name, array in inputs.items()}
    at_ends = subject.run(ends, [moved(weights[0]), *weights[1:]])
    expected = {name: moved(value) if name in by_token else value for name, value in whole.items()}
    subject.check(at_ends, expected, what=" padding at the end")
    for row, keep in enumerate(inputs["segment_ids"][:1] != 0):
        own = {n: a[row : row + 1] if n in (*subject.op.rows, "segment_ids") else a for n, a in inputs.items()}
        kept = [weights[0][row : row + 1, keep], *(weight[row : row + 1] for weight in weights[1:])]
        alone = subject.run(tokens_of(subject, own, keep), kept)
        names = [n for n in alone if n.startswith("out") or n[1:] in subject.op.rows]
        cut = {n: whole[n][row : row + 1][:, keep] if n in by_token else whole[n][row : row + 1] for n in names}
        subject.check({n: alone[n] for n in names}, cut, what=f" row {row}")


def check_causal(subject: Subject) -> None:
    """No result up to a token depends on what is behind it: such gradients are exactly zero, the others are not."""
    if not subject.op.tokens:
        return
    inputs = {**subject.inputs(), **layout_of(subject, "one")}
    weights = subject.weights(inputs)
    last = weights[0].shape[1] // 2
    weights[0][:, last + 1 :] = 0
    found = subject.run(inputs, [weights[0], *(0 * weight for weight in weights[1:])])
    for name in subject.op.tokens:
        assert not found[f"d{name}"][:, last + 1 :].any(), f"{subject}: d{name} behind token {last}"
        assert found[f"d{name}"][:, last].any(), f"{subject}: d{name} at token {last}"


def check_one_token(subject: Subject) -> None:
    if not subject.op.tokens:
        return
    inputs = tokens_of(subject, {**subject.inputs(), **layout_of(subject, "one")}, slice(0, 1))
    subject.check(subject.run(inputs), expected_of(subject, inputs), what=" one token")


def check_no_rows(subject: Subject) -> None:
    """A batch of no rows: empty results, zero gradients of what rows share."""
    inputs = {**subject.inputs(), **layout_of(subject, "packed")}
    names = (*subject.op.rows, "segment_ids")
    empty = {name: array[:0] if name in names else array for name, array in inputs.items()}
    empty |= {name: 0 * inputs[name] for name in subject.op.integers if name in inputs and name not in names}
    arrays, fixed = oracle.split(subject.name, empty)

    def both(arrays, fixed):
        out, pull = jax.vjp(lambda arrays: subject.call({**arrays, **fixed}, **subject.settings), arrays)
        return out, pull(tuple(jnp.zeros_like(o) for o in out))[0]

    with subject.device():
        out, grads = jax.jit(both, compiler_options=QUICK)(arrays, fixed)
    assert out[0].size == 0 and out[0].ndim == subject.weights(inputs)[0].ndim
    assert {name: grad.shape for name, grad in grads.items()} == {name: a.shape for name, a in arrays.items()}
    assert not any(np.any(grad) for grad in grads.values())


def check_hints(subject: Subject) -> None:
    """Sizes that are hints change nothing beyond rounding."""
    inputs = {**subject.inputs(), **layout_of(subject, "packed")}
    expected = subject.run(inputs) if subject.op.hints else None
    for name, values in subject.op.hints.items():
        for value in values:
            subject.check(subject.run(inputs, **{name: value}), expected, what=f" {name}={value}")


# What every implementation is held to each time: one compiled program.
FIRST = (check_oracle, check_padding, check_causal)
# What interpreted kernels are held to by default; together they take few compilations.
ESSENTIAL = (
    check_oracle,
    check_without_ids,
    check_an_error_is_seen,
    check_packed,
    check_states,
    check_padding,
    check_causal,
    check_no_rows,
    check_float64,
    check_x64_flag,
    check_traces_in_a_checked_shard_map,
    check_traces_under_checkpoint,
)
REST = (
    check_padding_cut_out,
    check_one_token,
    check_hints,
    check_eager,
    check_checkpoint,
    check_vmap,
    check_scan,
    check_shard_map,
    check_checked_shard_map,
    check_dtypes,
)
# Of implementations in plain JAX alone.
PLAIN = (check_forward_mode, check_forward_over_reverse)
