# SPDX-License-Identifier: Apache-2.0
"""One file a published family; `common`, `rope` and `tables` hold what several have in common."""

from hybridlm.errors import ConfigError
from hybridlm.hf.families import (
    bailing_hybrid,
    bamba,
    falcon_h1,
    falcon_mamba,
    granitemoehybrid,
    hunyuan_v1_dense,
    inkling,
    jamba,
    kimi_linear,
    lfm2,
    lfm2_moe,
    lfm3,
    llama,
    mamba,
    mamba2,
    minimax,
    nemotron_h,
    olmo_hybrid,
    own,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_next,
    qwen4_exp,
    recurrent_gemma,
    rwkv,
    xlstm,
    zamba,
    zamba2,
    zaya,
)
from hybridlm.hf.family import Family

KNOWN: dict[str, Family] = {
    family.model_type: family
    for module in (
        llama, qwen2, qwen3, mamba, falcon_mamba, mamba2, jamba, bamba, granitemoehybrid, nemotron_h, falcon_h1,
        zamba, zamba2, qwen3_next, qwen3_5, qwen3_5_moe, olmo_hybrid, kimi_linear, bailing_hybrid,
        lfm2, lfm2_moe, hunyuan_v1_dense, lfm3, recurrent_gemma, rwkv, xlstm, minimax, zaya, inkling,
        qwen4_exp, own,
    )
    for family in (module.FAMILY, getattr(module, "SEEING", module.FAMILY))
}  # fmt: skip
"""Every family by its model_type; of those that can express a model the first is written, our own format last."""
FAMILIES = tuple(KNOWN)
"""model_type of every family."""


def family_of(model_type: str) -> Family:
    """The family of a model_type; ConfigError for one that is not known."""
    if not isinstance(model_type, str) or model_type not in KNOWN:
        raise ConfigError(f"model_type ({model_type!r}) is not supported: known are {', '.join(KNOWN)}")
    return KNOWN[model_type]
