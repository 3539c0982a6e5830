# SPDX-License-Identifier: Apache-2.0
"""Pallas TPU (Mosaic) implementation of `ssd`: argument checks, blocks, layouts and the hand-written gradient.

The kernels stand in tpu_forward.py and tpu_backward.py, the maths of the decays in tpu_common.py. Around the kernels
there are only arrays of [B, T, H] floats and the padding of T to whole chunks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform
from pallas_kernels.mosaic_tpu import F32, LANES
from pallas_kernels.ops.ssd.tpu import backward as tpu_backward
from pallas_kernels.ops.ssd.tpu import forward as tpu_forward
from pallas_kernels.ops.ssd.tpu.common import CHUNK, Blocks, document_rows
from pallas_kernels.ops.ssd.turns import Turns, turn_gradients

STATE_SIZES = (16, 32, 64, 128, 256)
HEAD_WIDTHS = (32, 64, 128)
BLOCK_CHANNELS = 2048  # the most heads x width of one block, if smaller ones exist; at N = 256 half of it:
BLOCK_STATES = 2048 * 128  # the same for heads x width x state (larger programs take the compiler minutes)
MOST_STAGE = 8  # heads whose carried products are held together
MAX_CHANNELS = 8192  # heads x width of one block: more does not fit VMEM


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static choices of one call; see `ssd_tpu`."""

    heads: int
    chunks: int
    stage: int
    states: str
    interpret: bool | object
    turns: Turns | None = None


def legal_heads(n_heads: int, n_groups: int, width: int, state: int) -> list[int]:
    """Heads a block that the TPU's tiles allow, ascending: whole lane tiles of x, B and C; groups, or parts of one."""
    heads_a_group = n_heads // n_groups
    found = []
    for heads in range(1, n_heads + 1):
        groups = max(1, heads // heads_a_group)
        if n_heads % heads or (heads % heads_a_group and heads_a_group % heads):
            continue
        whole_lanes = heads == n_heads or heads * width % LANES == 0
        whole_group_lanes = groups == n_groups or groups * state % LANES == 0
        if whole_lanes and whole_group_lanes:
            found.append(heads)
    return found


def supports(x, dt, A, B, C, *, decay=None, **more) -> str | None:
    """Why the TPU kernel cannot serve this call of `ssd`, or None if it can."""
    del A, more
    if decay is not None and decay.dtype != F32:
        return f"decay has dtype {decay.dtype}, the kernel takes float32"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {x.dtype}, the kernel takes bfloat16 and float32"
    if B.dtype not in (x.dtype, F32) or C.dtype != B.dtype:
        return f"B and C have dtypes {B.dtype} and {C.dtype}, the kernel takes that of x ({x.dtype}) or float32"
    if dt.dtype != F32:
        return f"dt has dtype {dt.dtype}, the kernel takes float32"
    n_heads, width = x.shape[2:]
    n_groups, state = B.shape[2:]
    if width not in HEAD_WIDTHS:
        return f"head width of x ({width}) not one of {HEAD_WIDTHS}"
    if state not in STATE_SIZES:
        return f"state size of B ({state}) not one of {STATE_SIZES}"
    channels = legal_heads(n_heads, n_groups, width, state)[0] * width
    if channels > MAX_CHANNELS:
        why = f"{n_heads} heads have no smaller divisor that fills lanes"
        return f"heads x width of one block ({channels}) above {MAX_CHANNELS}: {why}"
    return None


def ssd_tpu(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    decay=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
    states=None,
    turn=None,
    turns=None,
    heads_per_block=None,
    chunks_per_step=None,
    interpret=False,
):
    """See `pallas_kernels.ssd` for arguments and results; chunks are always 128 tokens, `chunk` is a hint not followed.

    B and C may be float32 beside bfloat16 x: rounded for their products, with gradients that are not.
    turn, turns: for `mamba3`, see `pallas_kernels.ops.ssd.turns`; tokens read nothing of themselves then.
    heads_per_block, chunks_per_step: sizes of the kernels, chosen by shape unless given. interpret: run the kernels in
    Pallas' interpreter, on any platform.
    Raises NotImplementedError, naming argument and limit, where `supports` gives a reason.
    """
    del chunk
    if reason := supports(x, dt, A, B, C, decay=decay):
        raise NotImplementedError(reason)
    stored = str(x.dtype) if states in (None, "recompute") else states
    plan = make_plan(x.shape, B.shape, heads_per_block, chunks_per_step, stored, interpret)
    plan = dataclasses.replace(plan, turns=turns)
    scan = jax.checkpoint(_ssd, static_argnums=(0,)) if states == "recompute" else _ssd
    y, last = scan((plan, return_final_state), x, dt, A, decay, B, C, D, segment_ids, initial_state, turn)
    return (y, last) if return_final_state else y


def make_plan(x_shape, B_shape, heads, chunks, states, interpret) -> Plan:
    """Sizes by shape: limited by channels and states, but a block for each core; two chunks a step where T allows."""
    n_batch, n_tokens, n_heads, width = x_shape
    n_groups, state = B_shape[2:]
    legal = legal_heads(n_heads, n_groups, width, state)
    cores, stage = _device()
    if heads is None:
        most = min(BLOCK_CHANNELS, BLOCK_STATES // state) // width
        if n_batch % cores:
            most = min(most, n_heads // cores)
        heads = max((count for count in legal if count <= most), default=legal[0])
    elif heads not in legal:
        raise ValueError(f"heads_per_block ({heads}) not one of {legal}")
    if chunks is None:
        chunks = 2 if -(-n_tokens // CHUNK) % 2 == 0 else 1
    return Plan(heads, chunks, stage, states, interpret)


def _device() -> tuple[int, int]:
    """Of the chip compiled for: cores that share a kernel's parallel grid; heads of a stage.

    On a matrix unit of 128 x 128 fewer heads spill less and wait as little; one of 256 x 256 needs more in flight.
    """
    chip = platform.tpu_chip()
    if chip is None:
        return 1, MOST_STAGE
    return chip.cores, MOST_STAGE if chip.matrix_unit > LANES else MOST_STAGE // 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(static, x, dt, A, decay, B, C, D, segment_ids, initial_state, turn):
    plan, return_final_state = static
    B, C = B.astype(x.dtype), C.astype(x.dtype)
    results = _run_forward(plan, x, dt, A, decay, B, C, D, segment_ids, initial_state, final=return_final_state)
    return results["y"], results.get("last")


def _prepare(x, dt, A, decay, B, C, D, segment_ids, initial_state, plan: Plan) -> dict:
    """The kernels' inputs by name: tokens padded to whole steps, channels merged, [B, T, H] floats tokens-last."""
    n_batch, n_tokens, n_heads, width = x.shape
    padding = -n_tokens % (plan.chunks * CHUNK)
    pad = lambda array: jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2)) if padding else array
    n_blocks = n_heads // plan.heads
    if segment_ids is not None:
        real = (segment_ids != 0)[..., None]
        dt, decay = (None if array is None else jnp.where(real, array, 0.0) for array in (dt, decay))
    by_head = lambda array: pad(array).transpose(0, 2, 1).reshape(n_batch, n_blocks, plan.heads, -1)
    merge = lambda array: pad(array).reshape(n_batch, n_tokens + padding, -1)
    inputs = {
        "x": merge(x),
        "dt": by_head(dt),
        **({"A": A.astype(F32).reshape(n_blocks, plan.heads, 1)} if decay is None else {"decay": by_head(decay)}),
        "B": merge(B),
        "C": merge(C),
    }
    if D is not None:
        inputs["D"] = D.astype(F32).reshape(n_blocks, -1, 1)
    if segment_ids is not None:
        inputs["documents"] = document_rows(pad(segment_ids))
    if initial_state is not None:
        inputs["initial"] = initial_state.astype(F32).reshape(n_batch, n_heads * width, -1)
    return inputs


def _blocks(plan, x, B, D, segment_ids, initial_state, *, final: bool, exact: bool, wide: bool = False) -> Blocks:
    n_heads, width = x.shape[2:]
    n_groups, state = B.shape[2:]
    return Blocks(
        heads=plan.heads,
        groups=max(1, plan.heads * n_groups // n_heads),
        width=width,
        state=state,
        chunks=plan.chunks,
        exact=exact,
        stage=plan.stage,
        skip="" if D is None else ("head", "channel")[D.ndim - 1],
        documents=segment_ids is not None,
        initial=initial_state is not None,
        final=final,
        alone=0 if plan.turns is None else plan.turns.alone,
        wide=wide,
    )


@functools.partial(jax.jit, static_argnames=("plan", "final", "states"), inline=True)  # traced once for all layers
def _run_forward(plan, x, dt, A, decay, B, C, D, segment_ids, initial_state, *, final, states=None):
    n_batch, n_tokens, n_heads, width = x.shape
    blocks = _blocks(plan, x, B, D, segment_ids, initial_state, final=final, exact=x.dtype == F32)
    inputs = _prepare(x, dt, A, decay, B, C, D, segment_ids, initial_state, plan)
    results = tpu_forward.forward(inputs, blocks, n_groups=B.shape[2], states_dtype=states, interpret=plan.interpret)
    results["y"] = results["y"][:, :n_tokens].reshape(x.shape)
    if final:
        results["last"] = results["last"].reshape(n_batch, n_heads, width, -1)
    return results


def _forward_rule(static, x, dt, A, decay, B, C, D, segment_ids, initial_state, turn):
    plan, final = static
    given, B, C = jnp.zeros(0, B.dtype), B.astype(x.dtype), C.astype(x.dtype)
    arrays = (x, dt, A, decay, B, C, D, segment_ids, initial_state)
    results = _run_forward(plan, *arrays, final=final, states=plan.states)
    left = None if plan.turns is None else results.get("last")
    states = checkpoint_name(results["states"], "ssd_states")
    return (results["y"], results.get("last")), (arrays, states, left, given)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _backward_rule(static, residuals, cotangents):
    plan, final = static
    (x, dt, A, decay, B, C, D, segment_ids, initial_state), states, left, given = residuals
    dy, dlast = cotangents
    n_batch, n_tokens, n_heads, width = x.shape
    wide, keep = given.dtype != B.dtype, plan.turns is not None
    blocks = _blocks(plan, x, B, D, segment_ids, initial_state, final=final, exact=True, wide=wide)
    inputs = _prepare(x, dt, A, decay, B, C, D, segment_ids, None, plan)
    padding = inputs["x"].shape[1] - n_tokens
    inputs["dy"] = jnp.pad(dy, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(inputs["x"].shape)
    inputs["states"] = states
    if final:
        inputs["dlast"] = dlast.reshape(n_batch, n_heads * width, -1)
    grads = tpu_backward.backward(inputs, blocks, n_groups=B.shape[2], keep_states=keep, interpret=plan.interpret)
    by_token = lambda grad: grad.reshape(n_batch, n_heads, -1).transpose(0, 2, 1)[:, :n_tokens]
    dA = None if A is None else grads["dA"].sum((0, 3)).reshape(n_heads).astype(A.dtype)
    ddecay = None if decay is None else by_token(grads["ddecay"])
    dB, dC = (grads[name].sum(1)[:, :n_tokens].reshape(B.shape).astype(given.dtype) for name in ("dB", "dC"))
    dD = None if D is None else grads["dD"].sum((0, -1)).reshape(D.shape).astype(D.dtype)
    dinitial = None
    if initial_state is not None:
        dinitial = grads["dinitial"].reshape(initial_state.shape).astype(initial_state.dtype)
    dturn = None
    if keep:
        by_head = lambda array: array.reshape(*array.shape[:-2], n_heads, width, -1)
        inner = by_head(states)[:, 1:], by_head(grads["dstates"])[:, :-1]
        ends = [None if state is None else (state, grad) for state, grad in ((initial_state, dinitial), (left, dlast))]
        maps, span = ((B, dB), (C, dC)), plan.chunks * CHUNK
        dturn = turn_gradients(plan.turns, maps, inner, *ends, segment_ids, span)
    dx = grads["dx"][:, :n_tokens].reshape(x.shape)
    return dx, by_token(grads["ddt"]), dA, ddecay, dB, dC, dD, None, dinitial, dturn


_ssd.defvjp(_forward_rule, _backward_rule)
