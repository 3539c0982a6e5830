# SPDX-License-Identifier: Apache-2.0
"""Small models, packed rows with the documents in them, and losses that compare the two."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm.config import (
    MLP,
    MLSTM,
    RGLRU,
    SLSTM,
    Attention,
    Bidirectional,
    Branch,
    ChannelDecay,
    ChannelMix,
    ConvolvedAttention,
    DepthMoE,
    FixedDecay,
    ForgetDecay,
    GatedConv,
    GatedDeltaNet,
    GatedNorm,
    GatedScan,
    HeadDecay,
    HeadNorm,
    Hyena,
    ImplicitFilter,
    IndexedAttention,
    InnerNorm,
    KimiDelta,
    LatentAttention,
    LinearAttention,
    Llama3,
    Mamba1,
    Mamba2,
    Mamba3,
    MemoryAsContext,
    ModalFilter,
    ModelConfig,
    MoE,
    NgramMemory,
    OutputConv,
    Parallel,
    RelativeAttention,
    Rope,
    Router,
    Rwkv4,
    Rwkv4Channel,
    Rwkv6,
    Rwkv7,
    Shared,
    Titans,
)
from hybridlm.model.model import HybridLM

VOCAB = 29
QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options: without machine-code optimisation, in half the time."""
MAMBA = Mamba2(d_state=4, d_head=4, n_groups=2, chunk=8)
VARIANTS = {
    "mamba2": MAMBA,
    "mamba2_norm_first": replace(
        MAMBA,
        gated_norm=GatedNorm(before_gate=True, n_groups=1),
        proj_bias=True,
        per_channel_D=True,
        d_conv=3,
        activation="gelu",
    ),
    "mamba2_no_norm": replace(MAMBA, n_groups=1, gated_norm=None, conv_bias=False, dt_limit=(0.01, 0.5), d_conv=2),
    "mamba1": Mamba1(d_state=4, inner_norm=InnerNorm(), chunk=8),
    "mamba1_heads": Mamba1(
        d_state=3,
        n_heads=4,
        dt_rank=5,
        proj_bias=True,
        d_conv=3,
        activation="gelu",
        inner_norm=InnerNorm(learned=False),
    ),
    "attention": Attention(n_heads=4, n_kv_heads=2, d_head=6, qkv_bias=True, out_bias=True),
    "gated": Attention(n_heads=4, n_kv_heads=1, d_head=8, gate="elementwise", rope=None, softcap=3.0, scale=0.5),
    "window": Attention(
        n_heads=2, d_head=8, window=3, sinks=True, gate="head", qk_norm=True, rope=Rope(100.0, 0.5, Llama3())
    ),
    "moe": MoE(
        n_experts=6,
        d_ff=6,
        activation="relu2",
        d_latent=8,
        latent_bias=True,
        shared=MLP(8, "relu2"),
        router=Router(3, "sigmoid", renormalise=True, scaling=1.5, selection_bias=True, n_groups=3, top_groups=2),
    ),
    # Their eps keeps the norm of what a query reads next to nothing of from blowing up rounding.
    "gla": LinearAttention(
        n_heads=2, d_key=6, d_head=8, decay=ChannelDecay(rank=4, divisor=2.0), norm=HeadNorm(eps=1e-2), chunk=8,
    ),
    "retnet": LinearAttention(
        n_heads=4, d_key=8, d_head=6, rope=Rope(100.0), norm=HeadNorm(weight=None, eps=1e-2), chunk=8,
    ),
    "lightning": LinearAttention(
        n_heads=2, d_key=6, d_head=6, decay=FixedDecay("lightning"), feature_map="silu", value_activation="silu",
        scale=1.0, norm=HeadNorm(per_head=False, weight="channel"), gate="sigmoid", chunk=8,
    ),
    "simple_gla": LinearAttention(n_heads=2, d_key=4, d_head=8, decay=HeadDecay(2.0), gate=None, chunk=8),
    "hgrn2": LinearAttention(
        n_heads=2, d_key=8, d_head=6, decay=ForgetDecay(), feature_map="silu", norm=HeadNorm(per_head=False), gate=None,
        chunk=8,
    ),
    "hgrn2_no_bound": LinearAttention(n_heads=2, d_key=4, d_head=6, decay=ForgetDecay(False), norm=None, chunk=8),
    "based": LinearAttention(
        n_heads=2, d_key=4, d_head=8, decay=None, feature_map="taylor", normalizer=True, norm=None, gate=None, chunk=8,
    ),
    "linear": LinearAttention(
        n_heads=2, d_key=6, d_head=8, decay=None, feature_map="elu", normalizer=True, norm=None, gate=None, chunk=8,
    ),
    "mamba3": Mamba3(d_state=8, d_head=8, n_groups=2, chunk=8),
    "mamba3_mimo": Mamba3(
        d_state=8, d_head=8, rank=2, rope_fraction=1.0, A_activation="softplus", out_norm=True, chunk=8,
    ),
    "rwkv6": Rwkv6(d_head=8, mix_rank=3, decay_rank=4, chunk=8),
    "rwkv7": Rwkv7(d_head=4, decay_rank=3, rate_rank=4, gate_rank=5, chunk=8),
    "rwkv7_first": Rwkv7(d_head=8, decay_rank=3, rate_rank=4, gate_rank=5, values="first", chunk=8),
    "rwkv7_mixed": Rwkv7(d_head=8, decay_rank=3, rate_rank=4, gate_rank=5, values="mixed", value_rank=3, chunk=8),
    "mingru": GatedScan(d_conv=3),
    "minlstm": GatedScan("minlstm", expand=1.5, positive=False),
    "hgrn": GatedScan("hgrn"),
    "hgrn_no_bound": GatedScan("hgrn", lower_bound=False),
    "channel_mix": ChannelMix(d_ff=20, gate=True),
    "mlp": MLP(d_ff=20, activation="geglu", bias=True),
    "delta": GatedDeltaNet(n_heads=4, n_key_heads=2, d_key=6, d_head=5, chunk=8),
    "delta_reflecting": GatedDeltaNet(n_heads=2, d_key=4, d_head=6, d_conv=3, gate="sigmoid", neg_eigval=True),
    "kimi": KimiDelta(n_heads=2, d_key=6, d_head=4, decay_rank=5, gate_rank=3, chunk=8),
    "kimi_bounded": KimiDelta(
        n_heads=4, d_key=4, d_head=6, decay_rank=None, gate_rank=None, lower_bound=-5.0, d_conv=3, neg_eigval=True,
        norm_eps=1e-2,
    ),
    "latent": LatentAttention(n_heads=4, d_nope=6, d_rope=4, d_value=5, kv_rank=8, head_gate=True),
    "latent_queries": LatentAttention(
        n_heads=2, d_nope=4, d_rope=2, d_value=7, kv_rank=6, q_rank=4, rope=None, scale=0.7, bias=True
    ),
    "norm_of_all": Attention(
        n_heads=4,
        n_kv_heads=2,
        d_head=4,
        qk_norm=True,
        qk_norm_over="all",
        qk_norm_offset=1.0,
        gate="elementwise",
        gate_bias=True,
    ),
    "gated_conv": GatedConv(d_conv=4, d_inner=24, bias=True),
    "rglru": RGLRU(n_heads=4, d_inner=24),
    "mlstm": MLSTM(n_heads=2, d_key=6, d_head=8, bias=True, chunk=8),
    "slstm": SLSTM(n_heads=2),
    "rwkv4": Rwkv4(d_inner=24),
    "rwkv4_channel": Rwkv4Channel(d_ff=24),
    "convolved": ConvolvedAttention(n_heads=4, n_kv_heads=2, d_head=8, d_conv=3, bias=True),
    "convolved_window": ConvolvedAttention(n_heads=2, n_kv_heads=1, d_head=4, d_conv_heads=3, window=4),
    "depth_moe": DepthMoE(n_experts=4, d_ff=8, d_router=6, top_k=2, balance_weight=0.02, z_weight=0.01),
}  # fmt: skip
BRANCHES = {"mamba": Branch(MAMBA, 1.2, 0.7), "attention": Branch(VARIANTS["attention"], 0.9, 1.1)}
VARIANTS["parallel"] = Parallel(BRANCHES)
VARIANTS["recurrences"] = Parallel(
    {name: Branch(VARIANTS[name]) for name in ("gla", "mamba3", "rwkv6", "rwkv7", "mingru", "channel_mix")}
)
VARIANTS["shared"] = Shared(
    VARIANTS["mamba2_norm_first"], Attention(n_heads=2, d_head=6, scale=0.3), MLP(12, "geglu", bias=True),
    mlp_adapter=3, attention_adapter=2,
)  # fmt: skip
MEMORY = Titans(2, d_head=8, d_memory=12, max_rate=0.02)
"""At higher rates rounding grows with every token. Of heads of 4 the answers' norm blows it up: what is left of 4
numbers without their mean is next to nothing for some token."""
VARIANTS |= {
    "moe_sinks": MoE(4, 6, router=Router(2, "sigmoid", renormalise=True, scaling=2.0, selection_bias=True), sinks=2),
    "hyena": Hyena(ImplicitFilter(max_len=24, width=6, n_inner=1, frequency=2.0)),
    "hyena_modal": Hyena(ModalFilter(3, 0.01, 0.5), d_conv=4, conv_bias=False, proj_bias=False),
    "titans": MEMORY,
    "titans_chunks": Titans(2, d_conv=2, momentum=False, store_every=2, refresh_every=4),
    "both_ways": Attention(n_heads=2, d_head=8, direction="bidirectional"),
    "bidirectional": Bidirectional(replace(VARIANTS["mamba1"], proj_bias=True, inner_norm=InnerNorm(eps=1e-2))),
    "bidirectional_apart": Bidirectional(MAMBA, tied="none"),
    "bidirectional_tied": Bidirectional(MAMBA, tied="all"),
    "memory_context": MemoryAsContext(MEMORY, Attention(n_heads=2, d_head=8, window=6)),
    "relative": RelativeAttention(n_heads=4, n_kv_heads=2, d_head=8, n_profiles=3, extent=5, d_conv=3, log_floor=4),
    "relative_window": RelativeAttention(2, 1, 4, n_profiles=2, extent=4, window=4, d_conv=2),
    "output_conv": OutputConv(VARIANTS["mlp"], d_conv=3, scaled=True),
    "indexed": IndexedAttention(
        Attention(n_heads=4, n_kv_heads=2, d_head=6, rope=Rope(100.0, 0.67), gate="elementwise", qk_norm=True),
        n_index_heads=3, d_index=5, budget=4, block=2,
    ),
    "ngrams": NgramMemory(VOCAB, n=2, n_hashes=2, d_embed=8, least_rows=11, multiple=8, eos_id=3, d_conv=2),
    "parallel_normed": Parallel({name: replace(branch, norm=True) for name, branch in BRANCHES.items()}, merge="gate"),
}  # fmt: skip
ALIKE = (
    "mamba2_norm_first", "mamba2_no_norm", "mamba1_heads", "gated", "both_ways", "retnet", "based", "simple_gla",
    "lightning", "hgrn2", "hgrn2_no_bound", "linear", "mamba3_mimo", "rwkv6", "rwkv7_first", "rwkv7_mixed", "minlstm",
    "hgrn", "hgrn_no_bound", "recurrences", "convolved_window", "delta_reflecting", "kimi_bounded", "latent_queries",
    "norm_of_all", "titans_chunks", "hyena_modal", "bidirectional_apart", "bidirectional_tied", "parallel_normed",
    "relative_window", "moe_sinks", "output_conv",
)  # fmt: skip
"""Examples that differ from others in a line, or are made of others: of these their mixers by themselves are held to
documents and pieces, gradients included, and models of them where that line may matter."""
APART = [name for name in VARIANTS if name not in ALIKE]
HYBRID = {
    "M": VARIANTS["mamba2"],
    "m": VARIANTS["mamba2_norm_first"],
    "*": VARIANTS["gated"],
    "a": VARIANTS["attention"],
    "w": VARIANTS["window"],
    "-": VARIANTS["mlp"],
    "1": VARIANTS["mamba1"],
    "E": VARIANTS["moe"],
}


def small(pattern: str = "Mm*-aw", blocks: dict = HYBRID, **changes) -> ModelConfig:
    """A float32 config of width 16."""
    blocks = {symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)}
    return ModelConfig(VOCAB, 16, pattern, blocks, **{"compute_dtype": "float32", **changes})


@functools.lru_cache(maxsize=256)
def _abstract(config: ModelConfig) -> tuple:
    """(graphdef, shapes) of a model."""
    return nnx.split(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))


def drawn(make: Callable[[nnx.Rngs], nnx.Module], seed: int):
    """(graphdef, parameters) of what is made, none at 0 or 1, as NumPy's arrays, which no program that is given them
    takes away.

    What they start with is NumPy's too, the same at each depth, and noise goes to each number: JAX's own draws take XLA
    longer than the gradients of the model."""
    rng = np.random.default_rng(seed)
    normal = lambda key, shape=(), dtype=np.float32: jnp.asarray(rng.normal(size=shape), dtype)
    uniform = lambda key, shape=(), dtype=np.float32: jnp.asarray(rng.uniform(size=shape), dtype)
    graphdefs = []

    def start(key):
        graphdef, params = nnx.split(make(nnx.Rngs(key)))
        graphdefs.append(graphdef)
        return params

    with mock.patch.multiple(jax.random, normal=normal, uniform=uniform):
        params = jax.jit(start, compiler_options=QUICK)(jax.random.key(seed))
    noisy = lambda a: np.asarray(a) + 0.2 * rng.normal(size=a.shape).astype(np.float32)
    return graphdefs[0], jax.tree.map(noisy, params)


@functools.lru_cache(maxsize=256)
def _drawn(config: ModelConfig, seed: int):
    """Parameters of a model."""
    return drawn(lambda rngs: HybridLM(config, rngs=rngs), seed)[1]


def build(config: ModelConfig, seed: int = 0, drawn_for: ModelConfig | None = None) -> HybridLM:
    """A model without a parameter at 0 or 1, so that each one matters. Models of one config have the same parameters,
    which are drawn once: to compile their drawing takes as long as what most tests do with them.

    drawn_for: a config whose parameters are to be had; None: of this one.
    """
    params = _drawn(replace(drawn_for or config, remat="none", compute_dtype="float32"), seed)  # they hang on neither
    return nnx.merge(_abstract(config)[0], jax.tree.map(jnp.array, params))


def named(params) -> dict[str, np.ndarray]:
    """Parameters or gradients by dotted path."""
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Tokens of the small models' vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def log_likelihoods(model, tokens_BT, targets_BT, segment_ids=None) -> jax.Array:
    """Log probability [B, T] of each target."""
    log_p = jax.nn.log_softmax(model(tokens_BT, segment_ids), axis=-1)
    return jnp.take_along_axis(log_p, targets_BT[:, :, None], axis=-1)[:, :, 0]


@dataclass(frozen=True)
class Packed:
    """Rows with documents in them, and the same documents one a row."""

    segment_ids: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    places: list[np.ndarray]
    """Of each document, its tokens' indices in the flattened rows."""

    def alone(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets and mask [documents, T]; rows end in whatever tokens, which a causal model does not see, and
        a bidirectional one takes the mask as segment ids for."""
        shape = (len(self.places), self.tokens.shape[1])
        tokens, targets, mask = random_tokens(*shape, seed=7), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, place in enumerate(self.places):
            tokens[row, : len(place)] = self.tokens.reshape(-1)[place]
            targets[row, : len(place)] = self.targets.reshape(-1)[place]
            mask[row, : len(place)] = True
        return tokens, targets, mask


def packed_rows() -> Packed:
    """Boundaries inside a chunk of 8 and on its edge, one-token documents, ids that come back, padding everywhere."""
    rows = [
        [1] * 5 + [2] * 3 + [3] * 8 + [4, 5] + [6] * 6,
        [7] * 11 + [2] * 4 + [7] * 3 + [0] * 6,
        [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 2, 0, 0, 2, 2, 2, 2, 2, 3, 0, 3, 3, 0],
        [0] * 24,
        [1] * 24,
    ]
    segment_ids = np.array(rows, np.int32)
    places = []
    for b, row in enumerate(rows):
        last = 0
        for t, segment in enumerate(row):
            if segment and segment != last:
                places.append([])
                last = segment
            if segment:
                places[-1].append(b * len(row) + t)
    shape = segment_ids.shape
    return Packed(
        segment_ids, random_tokens(*shape, seed=1), random_tokens(*shape, seed=2), [np.array(p) for p in places]
    )
