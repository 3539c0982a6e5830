# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `mamba3`, token by token: the oracle of the others (float64 if the inputs are)."""

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens
from pallas_kernels.ops.mamba3 import parts

STATES = ("initial_angle", "initial_ssm", "initial_k", "initial_v")


def mamba3_reference(
    q_BTRGN,
    k_BTRGN,
    v_BTHP,
    adt_BTH,
    dt_BTH,
    trap_BTH,
    angles_BTHS,
    *,
    q_bias,
    k_bias,
    D,
    z,
    mimo_v,
    rotary_pairs,
    segment_ids=None,
    return_final_state=False,
    chunk=None,
    **more,
):
    """See `pallas_kernels.mamba3`; `chunk` has no meaning here. Without MIMO the rank R is 1, and its weights None."""
    del chunk
    tokens = (q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS, z)
    states = [more.pop(name) for name in STATES]
    dtype = accumulation_dtype(tokens)
    n_heads, n_groups = v_BTHP.shape[2], q_BTRGN.shape[3]
    q_bias_1HRN, k_bias_1HRN, D_1H, mimo_v_1HRP = (
        None if weight is None else weight.astype(dtype)[None] for weight in (q_bias, k_bias, D, mimo_v)
    )

    def turned(array_BRGN, bias_1HRN, angle_BHS):
        array_BHRN = jnp.repeat(array_BRGN, n_heads // n_groups, axis=2).swapaxes(1, 2)
        array_BHRN = array_BHRN if bias_1HRN is None else array_BHRN + bias_1HRN
        return parts.rotate(array_BHRN, angle_BHS[:, :, None], rotary_pairs)

    def step(state, token):
        angle_BHS, ssm_BHPN, k_before_BHRN, v_before_BHRP = state
        q_BRGN, k_BRGN, v_BHP, adt_BH, dt_BH, trap_BH, angles_BHS, z_BHP = token
        angle_BHS = parts.wrapped(angle_BHS + dt_BH[..., None] * jnp.pi * jnp.tanh(angles_BHS))
        q_BHRN, k_BHRN = turned(q_BRGN, q_bias_1HRN, angle_BHS), turned(k_BRGN, k_bias_1HRN, angle_BHS)
        v_BHRP = v_BHP[:, :, None] if mimo_v_1HRP is None else mimo_v_1HRP * v_BHP[:, :, None]
        now_BH = jax.nn.sigmoid(trap_BH) * dt_BH
        lag_BH = (1 - jax.nn.sigmoid(trap_BH)) * dt_BH
        ssm_BHPN = ssm_BHPN + lag_BH[..., None, None] * jnp.einsum("bhrp,bhrn->bhpn", v_before_BHRP, k_before_BHRN)
        ssm_BHPN = jnp.exp(adt_BH)[..., None, None] * ssm_BHPN
        ssm_BHPN = ssm_BHPN + now_BH[..., None, None] * jnp.einsum("bhrp,bhrn->bhpn", v_BHRP, k_BHRN)
        y_BHRP = jnp.einsum("bhpn,bhrn->bhrp", ssm_BHPN, q_BHRN)
        y_BHRP = y_BHRP if D_1H is None else y_BHRP + D_1H[..., None, None] * v_BHRP
        return (angle_BHS, ssm_BHPN, k_BHRN, v_BHRP), parts.output(y_BHRP, z_BHP, **more)

    tokens = tuple(None if array is None else array.astype(dtype) for array in tokens)
    if states[0] is None:
        states = empty_states(*tokens[:3], angles_BTHS)
    y_BTHP, states = scan_tokens(step, tuple(state.astype(dtype) for state in states), tokens, segment_ids)
    y_BTHP = y_BTHP.astype(v_BTHP.dtype)
    return (y_BTHP, *states) if return_final_state else y_BTHP


def accumulation_dtype(tokens):
    return jnp.result_type(*(array for array in tokens if array is not None), jnp.float32)


def empty_states(q_BTRGN, k_BTRGN, v_BTHP, angles_BTHS) -> tuple:
    """Zeros; of the tokens, so that they are sharded like them."""
    dtype = accumulation_dtype((q_BTRGN, k_BTRGN, v_BTHP, angles_BTHS))
    n_heads, n_groups = v_BTHP.shape[2], k_BTRGN.shape[3]
    k_BHRN = jnp.repeat(k_BTRGN[:, 0], n_heads // n_groups, axis=2).swapaxes(1, 2)
    v_BHRP = jnp.broadcast_to(v_BTHP[:, 0, :, None], (*k_BHRN.shape[:3], v_BTHP.shape[-1]))
    ssm_BHPN = v_BHRP[:, :, 0, :, None] * k_BHRN[:, :, 0, None, :]
    return tuple(jnp.zeros_like(array, dtype) for array in (angles_BTHS[:, 0], ssm_BHPN, k_BHRN, v_BHRP))
