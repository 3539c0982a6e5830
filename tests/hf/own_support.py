# SPDX-License-Identifier: Apache-2.0
"""Models of no published family, for the tests of our own format."""

from dataclasses import replace

import numpy as np

from hybridlm.layers import (
    MLP,
    MLSTM,
    NTK,
    Attention,
    Branch,
    ChannelMix,
    GatedNorm,
    InnerNorm,
    Linear,
    Llama3,
    Mamba1,
    Mamba2,
    MoE,
    Parallel,
    Proportional,
    Rope,
    Router,
    Shared,
    YaRN,
)
from hybridlm.model.config import ModelConfig
from tests.model.model_support import VARIANTS, small

UNKNOWN = ("bidirectional", "bidirectional_apart", "bidirectional_tied", "indexed", "ngrams")
"""Of VARIANTS those that the format has not."""
KNOWN = VARIANTS | {
    "channel_mix_open": ChannelMix(d_ff=20),
    "mlstm_plain": MLSTM(n_heads=2, d_key=6, d_head=8, gate_softcap=None),
    "depth_moe_first": replace(VARIANTS["depth_moe"], first=True, top_k=1),
}
"""What the symbols of ALL can be."""
ALL = {
    "mambas": ("abcd", dict(zip("abcd", ["mamba2_norm_first", "mamba1_heads", "mamba2_no_norm", "mamba1"])), {}),
    "attentions": ("abcd", dict(zip("abcd", ["gated", "window", "norm_of_all", "attention"])), {"norm": "layer"}),
    "deltas": ("ac", dict(zip("ac", ["delta", "kimi"])), {}),
    "reflecting": ("bd", dict(zip("bd", ["delta_reflecting", "kimi_bounded"])), {}),
    "scans": ("abcde", dict(zip("abcde", ["mingru", "minlstm", "hgrn", "rglru", "gated_conv"])), {}),
    "composed": ("SpSqm", dict(zip("Spqm", ["shared", "parallel", "parallel_normed", "mlp"])), {}),
    "latents": ("abcd", dict(zip("abcd", ["latent", "latent_queries", "convolved", "convolved_window"])), {}),
    "decays": ("abcd", dict(zip("abcd", ["gla", "retnet", "lightning", "simple_gla"])), {}),
    "features": ("abcd", dict(zip("abcd", ["hgrn2", "hgrn2_no_bound", "based", "linear"])), {}),
    "mamba3": ("ab", dict(zip("ab", ["mamba3", "mamba3_mimo"])), {}),
    "rwkv7": ("fcmom", dict(zip("fcmo", ["rwkv7_first", "channel_mix", "rwkv7_mixed", "rwkv7"])), {"norm": "layer"}),
    "rwkvs": ("abcd", dict(zip("abcd", ["rwkv6", "channel_mix_open", "rwkv4", "rwkv4_channel"])), {}),
    "lstms": ("abc", dict(zip("abc", ["mlstm", "slstm", "mlstm_plain"])), {}),
    "long": ("ab", dict(zip("ab", ["hyena", "hyena_modal"])), {}),
    "memories": ("abc", dict(zip("abc", ["titans", "titans_chunks", "memory_context"])), {}),
    "relative": ("abcd", dict(zip("abcd", ["relative", "relative_window", "output_conv", "moe_sinks"])), {}),
    "depths": ("EaDaD", dict(zip("EaD", ["depth_moe_first", "window", "depth_moe"])), {}),
    "routed": (
        "EaE-",
        dict(zip("Ea-", ["moe", "window", "mlp"])),
        {
            "norm_bias": "sublayers", "norm_offset": 1.0, "norm_after": "a", "norm_before": "Ea",
            "channel_scales": True, "normed_residual": {"E": (0.5, 1.5)}, "embedding_norm": True,
            "tie_embeddings": False, "logit_softcap": 9.0, "logit_multiplier": 0.5, "embedding_multiplier": 2.0,
            "residual_multiplier": 0.8, "final_norm_eps": 1e-3,
        },
    ),
}  # fmt: skip
"""Pattern, what its symbols are in KNOWN, options of the model: every block of the format, most options."""


def config_of(name: str) -> ModelConfig:
    """A config of ALL."""
    pattern, names, options = ALL[name]
    return small(pattern, {symbol: KNOWN[variant] for symbol, variant in names.items()}, **options)


def random_config(seed: int) -> ModelConfig:
    """Three sublayers with options drawn at random."""
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]
    maybe = lambda: bool(rng.integers(2))
    act = lambda: pick("silu", "gelu", "gelu_tanh", "relu", "relu2")
    feed = lambda: pick("swiglu", "geglu", "geglu_tanh", "reglu", "reglu2", "silu", "gelu", "relu2")
    scaling = lambda: pick(None, Linear(3.0), Llama3(4.0, 1.0, 4.0, 16), YaRN(4.0, 16), NTK(50.0), Proportional(2.0),
                           YaRN(2.0, 8, truncate=False, attention_factor=1.1))  # fmt: skip

    def attention():
        gate = pick(None, "head", "elementwise")
        return Attention(
            4, pick(1, 2, 4), 8, rope=pick(None, Rope(100.0, pick(0.5, 1.0), scaling(), maybe())), qk_norm=maybe(),
            qk_norm_over=pick("head", "all"), qk_norm_offset=pick(0.0, 1.0), qk_norm_rotated=maybe(),
            window=pick(None, 2, 5), scale=pick(None, 0.3), softcap=pick(None, 2.0), sinks=maybe(), gate=gate,
            gate_bias=gate is not None and maybe(), qkv_bias=maybe(), out_bias=maybe(), key_multiplier=pick(1.0, 0.7),
        )  # fmt: skip

    def mamba2():
        groups = pick(1, 2)
        return Mamba2(
            d_state=4, d_head=pick(4, 8), n_groups=groups, d_conv=pick(1, 2, 4), conv_bias=maybe(), activation=act(),
            proj_bias=maybe(), out_bias=pick(None, True), per_channel_D=maybe(), dt_limit=pick((0.0, float("inf")),
            (0.01, 0.4)), gated_norm=pick(None, GatedNorm(maybe(), pick(None, 1, 4), 1e-3)),
            multipliers=pick((1.0,) * 5, (1.1, 0.9, 0.8, 1.2, 0.5)),
        )  # fmt: skip

    def mamba1():
        norm = pick(None, InnerNorm(), InnerNorm(learned=False))
        return Mamba1(3, pick(1.0, 2.0), pick(1, 4), pick(None, 5), pick(1, 4), maybe(), maybe(), act(), norm)

    def moe():
        score = pick("softmax", "softmax_after", "sigmoid")
        groups, shared = pick(1, 2), pick(None, MLP(6, feed()))
        router = Router(2, score, score != "softmax_after" and maybe(), scaling=pick(1.0, 1.7), selection_bias=maybe(),
                        n_groups=groups, top_groups=1, group_top=pick(1, 2))  # fmt: skip
        latent = pick(None, 8)
        return MoE(4, 6, feed(), router, shared, shared is not None and maybe(), latent, latent is not None and maybe())

    mlp = lambda: MLP(12, feed(), maybe(), pick(1.0, 0.6), pick(1.0, 1.3))
    mixer = lambda: pick(attention, mamba2, mamba1)()
    branches = lambda: {"z": Branch(mixer(), 0.9, 1.1, maybe()), "b": Branch(mixer(), norm=maybe())}
    shared = lambda: Shared(mamba2(), Attention(2, 2, 8, window=pick(None, 4)), mlp(), pick(None, 2), pick(None, 3))
    blocks = {
        s: pick(mixer, mixer, mlp, moe, lambda: Parallel(branches(), pick("add", "gate")), shared)() for s in "xyz"
    }
    return small(
        pick("xyz", "xyx", "zxy"), blocks, norm=pick("rms", "layer"), norm_bias=pick("none", "sublayers", "all"),
        norm_after=pick("", "x"), tie_embeddings=maybe(), residual_multiplier=pick(1.0, 0.5),
        logit_softcap=pick(None, 9.0), channel_scales=maybe(),
    )  # fmt: skip
