# SPDX-License-Identifier: Apache-2.0
"""tests/golden: tiny random checkpoints of published implementations (transformers 5.23) with their outputs."""

import itertools
import json
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm.hf import from_hf
from hybridlm.hf.families import family_of
from hybridlm.hf.plan import Plan, make_plan
from tests.model.model_support import QUICK

FOLDER = Path(__file__).parent.parent / "golden"
GOLDEN = sorted(file.parent.name for file in FOLDER.glob("*/golden.npz"))
ATOL = 2e-4
"""Largest difference of a logit, at highest matrix precision."""


@cache
def golden(name: str) -> tuple[nnx.Module, dict[str, np.ndarray], dict]:
    """The model of a golden checkpoint, its golden arrays, meta.json."""
    arrays = dict(np.load(FOLDER / name / "golden.npz"))
    return from_hf(FOLDER / name), arrays, json.loads((FOLDER / name / "meta.json").read_text())


def tokens(name: str) -> np.ndarray:
    """The golden tokens [2, 17]."""
    return golden(name)[1]["input_ids"].astype(np.int32)


def plan_of(name: str) -> Plan:
    """The plan of a golden checkpoint's model."""
    config = golden(name)[0].config
    model_type = json.loads((FOLDER / name / "config.json").read_text())["model_type"]
    return make_plan(family_of(model_type), config, config.pattern)


@cache
def packed_logits(name: str) -> np.ndarray:
    """Logits [3, 17, V] of the golden tokens, one document a row, and of the first row again as two documents."""
    model, arrays, _ = golden(name)
    rows = tokens(name)[[0, 1, 0]]
    ids = np.ones(rows.shape, np.int32)
    ids[2, int(arrays["packed_split"]) :] = 2
    return np.asarray(forward(model, rows, ids))


@cache
def loss_and_gradients(name: str):
    """Compiled: parameters, in NumPy -> the loss of the golden tokens, and its gradients."""
    graphdef = nnx.graphdef(golden(name)[0])
    inputs = tokens(name)

    def loss(params):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(inputs[:, :-1]))
        return -jnp.take_along_axis(log_p, inputs[:, 1:, None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)


forward = jax.jit(lambda model, tokens, ids=None: model(tokens, ids), compiler_options=QUICK)
extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache), compiler_options=QUICK)


def norms_by_name(plan: Plan, grads) -> dict[str, float]:
    """L2 norm of the gradient of each published tensor."""
    flat = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}
    return {
        name: float(np.linalg.norm([np.linalg.norm(flat[part.path][part.index]) for part in tensor.pieces]))
        for name, tensor in plan.tensors.items()
    }


MEMORY = (
    (r"\.forget_gate\.", "."),
    (r"model\.embed_tokens\.", "model.word_embeddings."),
    (r"\.self_attn\.o_proj\.", ".self_attn.dense."),
    (r"\.self_attn\.", ".attention."),
    (r"\.e_score_correction_bias$", ".expert_bias"),
    (r"\.mlp\.(experts|gate)\.", r".block_sparse_moe.\1."),
)
"""Parts of names of parameters in memory -> what files have, where they have no such name."""
EXPERTS = {
    "experts.gate_up_proj": r"(experts\.gate_up_proj|(experts\.\d+\.(gate_proj|up_proj|w1|w3)|input_linear)\.weight)",
    "experts.up_proj": r"experts\.\d+\.up_proj\.weight",
    "experts.down_proj": r"(experts\.down_proj|(experts\.\d+\.(down_proj|w2)|output_linear)\.weight)",
    "conv1d.weight": r"([qkv]_)?conv1d\.weight",
    "ngram_embedding.weight": r"ngram_embedding\.shard_\d+\.weight",
    "router.weight": r"router(\.layer)?\.weight",
}
"""Ends of names as the published implementation holds parameters in memory -> as its files have them."""


def other_names(plan: Plan, name: str) -> list[str]:
    """What a parameter in memory may be called in files."""
    names = itertools.accumulate(MEMORY, lambda name, part: re.sub(*part, name), initial=name)
    return [plan.canonical(other) for other in names]


def in_files(plan: Plan, name: str) -> str:
    """What a parameter in memory is called in files; its own name where files have it in another form."""
    return next((other for other in other_names(plan, name) if other in plan.tensors), name)


def published_norm(plan: Plan, norms: dict[str, float], name: str) -> float:
    """Norm of a parameter of the published implementation, which holds all experts in one; files may have one each."""
    end = next((end for end in EXPERTS if name.endswith(f".{end}")), "")
    for known in other_names(plan, name):
        pattern = re.escape(known.removesuffix(end)) + EXPERTS.get(end, "")
        found = [norm for key, norm in norms.items() if re.fullmatch(pattern, key)]
        if found:
            return float(np.linalg.norm(found))
    raise KeyError(name)
