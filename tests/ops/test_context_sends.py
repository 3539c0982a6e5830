# SPDX-License-Identifier: Apache-2.0
"""What devices send each other where tokens, or rows and heads, are split over them, and who works how long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import assume_platform, context, ssd
from pallas_kernels.ops.attention import cases as attention_cases
from pallas_kernels.ops.attention.context import _Stripes
from pallas_kernels.ops.causal_conv1d import cases as conv_cases
from pallas_kernels.ops.selective_scan import cases as scan_cases
from pallas_kernels.ops.ssd import cases as ssd_cases
from tests.ops.split import EDGES, both, check, collectives, split_over


@pytest.mark.parametrize("op", ["ssd", pytest.param("selective_scan", marks=pytest.mark.slow), "causal_conv1d"])
def test_devices_send_each_other_states_alone(op):
    """Of the tokens split over devices no activation travels, forward or backward."""
    if op == "ssd":
        inputs = ssd_cases.make_inputs(ssd_cases.Case("sent", 1, 1024, 2, 8, 1, 8, "packed", initial=True))
        state = 2 * 8 * 8
    elif op == "selective_scan":
        inputs = scan_cases.make_inputs(scan_cases.Case("sent", 1, 1024, 8, 4, 1, "packed", initial=True))
        state = 8 * 4
    else:
        inputs = conv_cases.make_inputs(conv_cases.Case("sent", 1, 1024, 8, 4, "packed", initial=True))
        state = 3 * 8
    ids = inputs.pop("segment_ids")
    forward, gradient = both(op, split_over(op, 4), implementation="xla")
    found = collectives(forward, inputs, ids)
    assert {name for name, _ in found} == {"collective-permute"}
    assert max(size for _, size in found) == state
    found = collectives(gradient, inputs, ids)
    assert {name for name, _ in found} == {"collective-permute", "all-reduce"}  # the latter of parameters' gradients
    assert max(size for _, size in found) <= 2 * state


@pytest.mark.parametrize("op", ["ssd", "causal_conv1d"])
def test_what_is_sent_need_not_be_sent_again(op):
    """Kept by its name, while all else is computed again, it is exchanged as often as where all is kept."""
    if op == "ssd":
        inputs = ssd_cases.make_inputs(ssd_cases.Case("sent", 1, 64, 2, 8, 1, 8, "packed"))
    else:
        inputs = conv_cases.make_inputs(conv_cases.Case("sent", 1, 64, 8, 4, "packed"))
    ids = inputs.pop("segment_ids")
    forward, _ = both(op, split_over(op, 4), implementation="xla")

    def exchanges(policy) -> int:
        again = jax.checkpoint(forward, policy=policy)
        loss = lambda arrays: sum(jnp.sum(o**2) for o in jax.tree.leaves(again(arrays, ids)))
        return str(jax.make_jaxpr(jax.grad(loss))(inputs)).count("ppermute[")

    policies = jax.checkpoint_policies
    kept = exchanges(policies.save_only_these_names(context.SENT))
    assert kept == exchanges(policies.everything_saveable) < exchanges(policies.nothing_saveable)


@pytest.mark.parametrize("n", [2, 4])
def test_attention_deals_out_its_queries_and_outputs(n):
    """Once, there and back; keys and values are gathered."""
    inputs = attention_cases.make_inputs(attention_cases.Case("sent", 1, 64, 64, 4, 1, 8, layout="packed"))
    ids = inputs.pop("segment_ids")
    forward, _ = both("attention", split_over("attention", n), implementation="xla")
    sizes = [size for kind, size in collectives(forward, inputs, ids) if kind == "all-to-all"]
    share = 64 * 4 * 8 // n
    assert [size for size in sizes if size >= share // n] == [share // n] * 2, sizes


def test_attention_whose_tokens_are_passed_on(monkeypatch):
    """As on GPUs: each device gives each other its tokens, for half of the heads beside the attention of the others."""
    monkeypatch.setattr("pallas_kernels.ops.attention.context.STRIPE", 2)
    inputs = attention_cases.make_inputs(attention_cases.Case("split", 4, 64, 64, 4, 2, 8, gate="head", sinks=True))
    inputs |= {"segment_ids": EDGES}
    with assume_platform("gpu"):
        check("attention", inputs, 4, implementation="xla")
        forward, _ = both("attention", split_over("attention", 4), implementation="xla")
        kinds = [kind for kind, _ in collectives(forward, inputs, inputs.pop("segment_ids"))]
    assert kinds.count("collective-permute") == 3 * (1 + 2 * (3 + 1)) and "all-to-all" not in kinds


@pytest.mark.parametrize("n", [2, 4, 8])
def test_attention_is_equal_work_wherever_documents_begin(n):
    """Stripes are a permutation of the row, and no device has many more visible pairs than the mean."""
    n_tokens = 16_384 * n
    stripes = _Stripes.of(n_tokens // n, n, "context")
    of_device = np.stack([np.asarray(stripes.positions(i)) for i in range(n)])
    np.testing.assert_array_equal(np.sort(of_device, axis=None), np.arange(n_tokens))
    rng = np.random.default_rng(n)
    for documents in (1, 3, 10):
        starts = np.sort(np.concatenate([[0], rng.integers(1, n_tokens, documents - 1)]))
        token = np.arange(n_tokens)
        visible = token - starts[np.searchsorted(starts, token, side="right") - 1] + 1
        work = visible[of_device].sum(1)
        assert work.max() < 1.2 * work.mean()


def test_rows_and_heads_split_over_devices_send_nothing():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    inputs = ssd_cases.make_inputs(ssd_cases.Case("split", 2, 64, 8, 4, 4, 4, "packed", skip="HP", initial=True))
    inputs = {k: v for k, v in inputs.items() if v is not None}
    by_head = P("data", None, "tensor")
    specs = {name: by_head for name in ("x", "dt", "B", "C")}
    specs |= {"A": P("tensor"), "D": P("tensor"), "initial_state": P("data", "tensor"), "segment_ids": P("data")}
    put = {k: jax.device_put(v, jax.sharding.NamedSharding(mesh, specs[k])) for k, v in inputs.items()}
    names = ("x", "dt", "A", "B", "C", "D", "segment_ids", "initial_state")

    def run(x, dt, A, B, C, *, D, segment_ids, initial_state):
        def local(x, dt, A, B, C, D, segment_ids, initial_state):
            return ssd(
                x, dt, A, B, C, D=D, segment_ids=segment_ids, initial_state=initial_state, return_final_state=True
            )

        split = jax.shard_map(
            local, mesh=mesh, in_specs=tuple(specs[k] for k in names), out_specs=(by_head, P("data", "tensor")),
            check_vma=False,
        )  # fmt: skip
        return split(x, dt, A, B, C, D, segment_ids, initial_state)

    ids = put.pop("segment_ids")
    forward, gradient = both("ssd", run)
    assert collectives(forward, put, ids) == []
    found = collectives(gradient, put, ids)
    assert {name for name, _ in found} == {"all-reduce"}  # of dA and dD, over rows
    assert max(size for _, size in found) <= 2 * 4
