# SPDX-License-Identifier: Apache-2.0
"""What the backward pass recomputes, by name.

none     nothing: every intermediate is kept.
full     everything in a sublayer but its input.
dots     everything but the results of matrix products without batch dims: the projections are kept.
mixer    everything inside sequence mixers, of which only the input is kept; feed-forward sublayers keep theirs.
kernels  everything but what matrix products, scans and attention give (KERNELS): nothing that is slow to make again.
a,b,...  everything but a sublayer's input and the intermediates with these names, see NAMES.
"""

from collections.abc import Callable

import jax
from flax import nnx

from hybridlm.errors import ConfigError
from hybridlm.layers.mlp import FeedForward
from hybridlm.layers.moe import MoEFeedForward

POLICIES = ("none", "full", "dots", "mixer", "kernels")
NAMES = {
    "sublayer_norm": "normed input of a sublayer",
    "mamba_zx": "Mamba-2: gate and inner input, before the convolution",
    "mamba_BC": "Mamba-2: B and C, before the convolution",
    "mamba_dt": "Mamba-2: step sizes, before bias and softplus",
    "mamba_conv": "Mamba-2: x, B and C after convolution and SiLU",
    "mamba_ssd": "Mamba-2: output of the state space model",
    "ssd_states": "Mamba-2: states within the row from which the backward of the state space model starts",
    "mamba_root": "Mamba-2: inverse root mean squares of the gated norm, one number a token and group",
    "mamba_norm": "Mamba-2: gated and normed input of the output projection",
    "mamba1_xz": "Mamba-1: inner input and gate, before the convolution",
    "mamba1_conv": "Mamba-1: inner input after convolution and activation",
    "mamba1_low": "Mamba-1: low-rank dt, B and C, before norms",
    "mamba1_scan": "Mamba-1: output of the selective scan",
    "mamba1_gated": "Mamba-1: input of the output projection",
    "attention_q": "attention: queries, normed and rotated",
    "attention_k": "attention: keys, normed and rotated",
    "attention_v": "attention: values",
    "attention_gate": "attention: pre-activation of the output gate",
    "attention_out": "attention: input of the output projection",
    "attention_kept": "attention: output before the gate, and log-sum-exp, from which its backward starts",
    "mlp_in": "MLP: result of the first product",
    "mlp_hidden": "MLP: input of the last product",
    "moe_logits": "MoE: router logits",
    "moe_routed": "MoE: output of the routed experts, weighed and added up",
}
"""Intermediates that a custom policy can keep."""

KERNELS = (
    "mamba_zx", "mamba_BC", "mamba_dt", "mamba_ssd", "ssd_states", "mamba_root", "mamba1_xz", "mamba1_low",
    "mamba1_scan", "attention_q", "attention_k", "attention_v", "attention_gate", "attention_out", "attention_kept",
    "mlp_in", "moe_logits", "moe_routed",
)  # fmt: skip
"""What the policy `kernels` keeps."""


def check(remat: str) -> None:
    """ConfigError for what is neither a policy nor a list of known names."""
    if remat in POLICIES:
        return
    for name in remat.split(","):
        if name.strip() not in NAMES:
            known = f"{', '.join(POLICIES)}, or a comma-separated list of {', '.join(NAMES)}"
            raise ConfigError(f"model.remat ({remat!r}): {name.strip()!r} is not known; known are {known}")


def wrap(function: Callable, remat: str, mixer: nnx.Module, *, in_loop: bool) -> Callable:
    """`function`, which runs one sublayer, under the policy. in_loop: the body of a real loop, which XLA cannot merge
    with its recomputation; elsewhere that has to be forbidden."""
    if remat == "none" or (remat == "mixer" and isinstance(mixer, FeedForward | MoEFeedForward)):
        return function
    policies = jax.checkpoint_policies
    if remat in ("full", "mixer"):
        policy = policies.nothing_saveable
    elif remat == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    else:
        names = KERNELS if remat == "kernels" else (name.strip() for name in remat.split(","))
        policy = policies.save_only_these_names(*names)
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_loop)
