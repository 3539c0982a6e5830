# SPDX-License-Identifier: Apache-2.0
"""Which class of work an operation of a program belongs to, by the named scopes that it comes from."""

import re

PROJECTIONS, SCAN, CONVOLUTION, ATTENTION, MLP, EXPERTS, NORMS, EMBEDDING, LOSS, OPTIMIZER, OTHER = CLASSES = (
    "projections", "scan", "convolution", "attention", "MLP", "experts", "norms", "embedding", "loss", "optimizer",
    "other",
)  # fmt: skip
SCOPES = {
    PROJECTIONS: ("project", "output", "expand", "gates", "select"),
    SCAN: ("scan", "rule", "memory", "mean", "decay"),
    CONVOLUTION: ("convolve", "convolve_document", "shift"),
    ATTENTION: ("attend", "attention"),
    MLP: ("mlp_in", "mlp_hidden", "mlp_out", "channel_in", "channel_out"),
    EXPERTS: ("router", "experts", "shared", "statistics"),
    NORMS: ("norm", "gate_norm", "norm_heads", "norm_gate", "gate", "add", "link"),
    EMBEDDING: ("embedding",),
    LOSS: ("loss", "unembedding"),
    OPTIMIZER: ("optimizer",),
}
"""Class -> the scopes of layers, model and step that are of it. Norms include gates and the residual stream."""
WRAPPERS = ("gradients", "ahead", "back", "inspect")
"""Scopes that hold others."""
_CLASS = {scope: name for name, scopes in SCOPES.items() for scope in scopes}
_SUBLAYER = re.compile(r"(?:^|/)([^/()]+\.[A-Z]\w*)(?=/|$)")


def class_of(op_name: str) -> str:
    """Of an `op_name` of compiled programs, or a name stack with the primitive behind it: the innermost scope that is
    known, but that of experts before those inside them. What stands between sublayers and in no scope is OTHER."""
    found = [_CLASS[scope] for scope in re.split(r"[/()]", op_name.rpartition("/")[0]) if scope in _CLASS]
    return EXPERTS if EXPERTS in found else found[-1] if found else OTHER


def sublayer_of(op_name: str) -> str:
    """`M.Mamba2/scan`: the sublayer and its piece, or the class of what stands outside of sublayers, or
    the part of the train state or batch that an argument is."""
    if argument := re.match(r"\w+\['(\w+)'\]", op_name):  # of the step: state['params']...
        return argument[1]
    within = list(_SUBLAYER.finditer(op_name))
    if not within:
        return class_of(op_name)
    pieces = [s for s in re.split(r"[/()]", op_name[within[-1].end() :].rpartition("/")[0]) if s in _CLASS]
    return "/".join([within[-1][1], *pieces[-1:]])
