# SPDX-License-Identifier: Apache-2.0
"""A profile names its parts: scopes by symbol and piece in the lowered program, forward and backward."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.model.init import abstract
from tests.model.model_support import VARIANTS, small

BLOCKS = {"M": VARIANTS["mamba2"], "1": VARIANTS["mamba1"], "*": VARIANTS["gated"], "-": VARIANTS["mlp"],
          "E": VARIANTS["moe"], "P": VARIANTS["parallel"], "S": VARIANTS["shared"], "C": VARIANTS["gated_conv"],
          "R": VARIANTS["rglru"], "X": VARIANTS["mlstm"], "s": VARIANTS["slstm"], "4": VARIANTS["rwkv4"],
          "r": VARIANTS["rwkv4_channel"], "c": VARIANTS["convolved"], "D": VARIANTS["depth_moe"]}  # fmt: skip
PIECES = {
    "M.Mamba2": ("norm", "project", "convolve", "scan", "gate_norm", "output"),
    "1.Mamba1": ("norm", "project", "convolve", "select", "scan", "gate", "output"),
    "*.Attention": ("norm", "project", "attend", "output"),
    "-.MLP": ("norm", "mlp_in", "mlp_hidden", "mlp_out"),
    "E.MoE": ("norm", "router", "experts", "shared"),
    "P.Parallel": ("norm", "mamba", "attention"),
    "S.Shared": ("link", "norm", "project", "scan"),
    "C.GatedConv": ("norm", "project", "convolve", "output"),
    "R.RGLRU": ("norm", "project", "convolve", "gates", "scan", "output"),
    "X.MLSTM": ("norm", "project", "memory", "norm_gate", "output"),
    "s.SLSTM": ("norm", "convolve", "gates", "memory", "norm_heads"),
    "4.Rwkv4": ("norm", "shift", "project", "mean", "output"),
    "c.ConvolvedAttention": ("norm", "project", "convolve", "norm_heads", "attend", "output"),
    "D.DepthMoE": ("norm", "router", "experts"),
    "r.Rwkv4Channel": ("norm", "shift", "mlp_in", "mlp_hidden", "mlp_out"),
}


def operations_by_scope(function, *args) -> Counter:
    """How many operations of the lowered program lie in each scope of two names or one, such as M.Mamba2/scan."""
    text = jax.jit(function).lower(*args).as_text(debug_info=True)
    names = dict(re.findall(r'^#(loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
    scopes = Counter()
    for location in re.findall(r" loc\(#(loc\d+)\)$", text, re.MULTILINE):
        parts = [part for part in names.get(location, "").split("/") if not part.startswith(("jit(", "jvp("))]
        scopes.update({"/".join(parts[:n]) for n in (1, 2)})
    return scopes


@pytest.mark.parametrize("pattern", ["M1*-EPS", pytest.param("CRXs4rcD", marks=pytest.mark.slow)])
def test_scopes_by_symbol_and_piece(pattern):
    graphdef, shapes, _ = abstract(small(pattern, BLOCKS))
    tokens_BT = np.zeros((1, 4), np.int32)
    loss = lambda params: nnx.merge(graphdef, params)(tokens_BT).std()
    forward, both = operations_by_scope(loss, shapes), operations_by_scope(jax.grad(loss), shapes)
    for scope in [f"{block}/{piece}" for block, pieces in PIECES.items() if block[0] in pattern for piece in pieces]:
        assert forward[scope] > 0, f"{scope} in the forward"
        assert both[scope] > forward[scope], f"{scope} in the backward"
    for part in ("embedding", "unembedding"):
        assert any(part in scope for scope in forward), part
