# SPDX-License-Identifier: Apache-2.0
"""A profile names its parts: scopes by symbol and piece in the lowered program, forward and backward."""

import re

import jax
import numpy as np
from flax import nnx

from hybridlm.model.init import abstract
from tests.model.model_support import VARIANTS, small

BLOCKS = {"M": VARIANTS["mamba2"], "1": VARIANTS["mamba1"], "*": VARIANTS["gated"], "-": VARIANTS["mlp"],
          "E": VARIANTS["moe"], "P": VARIANTS["parallel"], "S": VARIANTS["shared"]}  # fmt: skip
PIECES = {
    "M.Mamba2": ("norm", "project", "convolve", "scan", "gate_norm", "output"),
    "1.Mamba1": ("norm", "project", "convolve", "select", "scan", "gate", "output"),
    "*.Attention": ("norm", "project", "attend", "output"),
    "-.MLP": ("norm", "mlp_in", "mlp_hidden", "mlp_out"),
    "E.MoE": ("norm", "router", "experts", "shared"),
    "P.Parallel": ("norm", "mamba", "attention"),
    "S.Shared": ("link", "norm", "project", "scan"),
}


def test_scopes_by_symbol_and_piece():
    graphdef, shapes, _ = abstract(small("M1*-EPS", BLOCKS))
    tokens_BT = np.zeros((1, 4), np.int32)
    loss = lambda params: nnx.merge(graphdef, params)(tokens_BT).std()
    text = jax.jit(jax.grad(loss)).lower(shapes).as_text(debug_info=True)
    names = set(re.findall(r'"([^"]*)"', text))
    for part in ("embedding", "unembedding"):
        assert any(part in name for name in names), part
    for block, pieces in PIECES.items():
        of_block = [name for name in names if block in name]
        for piece in pieces:
            found = [name for name in of_block if f"/{piece}" in name or f"({piece}" in name]
            assert any("transpose" in name for name in found), f"{block} {piece} in the backward"
            assert any("transpose" not in name for name in found), f"{block} {piece} in the forward"
