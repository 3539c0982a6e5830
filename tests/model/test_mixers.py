# SPDX-License-Identifier: Apache-2.0
"""Every block of BLOCKS, held to the same properties; a block without an example in VARIANTS fails."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import pallas_kernels
from hybridlm.config import (
    MLSTM,
    Attention,
    Bidirectional,
    ConvolvedAttention,
    DepthMoE,
    GatedDeltaNet,
    Hyena,
    IndexedAttention,
    KimiDelta,
    LatentAttention,
    LinearAttention,
    Mamba1,
    Mamba2,
    Mamba3,
    MemoryAsContext,
    MeshConfig,
    MoE,
    RelativeAttention,
    Rwkv6,
    Rwkv7,
    Shared,
    Titans,
)
from hybridlm.layers import BLOCKS, indexed_attention, mamba3, rwkv7
from hybridlm.layers.attention import mean_visible
from hybridlm.layers.block import free_fields, sees_ahead, walk
from hybridlm.layers.gated_delta_net import delta_flops
from hybridlm.layers.hyena import fft_flops
from hybridlm.layers.linear_attention import scan_flops
from hybridlm.layers.mamba2 import ssd_flops
from hybridlm.layers.titans import memory_flops
from hybridlm.model.init import abstract
from tests.model import properties
from tests.model.model_support import APART, QUICK, VARIANTS, build, random_tokens, small
from tests.model.model_support import HYBRID as HYBRID_BLOCKS
from tests.tolerances import check_close

BY_FAMILY = (
    "gated_conv", "rglru", "mlstm", "rwkv4", "rwkv4_channel", "convolved", "depth_moe", "kimi", "latent", "relative",
    "output_conv", "indexed", "ngrams",
)  # fmt: skip
"""What golden checkpoints hold, by default, to documents in rows, pieces and devices: those tests of them are slow."""
LARGE = ("hyena", "titans", "bidirectional", "memory_context")
"""What takes longest to compile: of their programs the mixer's alone runs by the minute."""
FIRST = (
    "mamba2", "mamba1", "window", "mlp", "moe", "parallel", "recurrences", "shared", "delta", "slstm", *BY_FAMILY,
    *LARGE,
)  # fmt: skip
"""One example of each class, of some side by side: what is compiled by the minute runs for these alone, for the others
in the slow tests."""


def some(names, of=tuple(VARIANTS)) -> list:
    """The examples, those that are not among the names for the slow tests; there several side by side, of which each
    stands alone too, are left out."""
    of = [name for name in of if name in names or name != "recurrences"]
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in of]


ALONE = (*(name for name in FIRST if name != "recurrences"), *VARIANTS["recurrences"].branches)
"""One example of each class, none side by side."""
OF_STREAMS = ("indexed", "ngrams")
"""What a model of several streams holds to pieces and padding by default, see test_streams.py."""
OF_MODELS = ("parallel", "shared")
"""What is made of others, which models with them hold to pieces and padding by default."""
EVERY = [name for name in APART if name not in (*OF_STREAMS, *OF_MODELS)]
SPLIT_ANEW = ("mamba2_norm_first", "mamba3_mimo", "rwkv7_mixed", "norm_of_all", "latent_queries", "moe_sinks")
"""Examples of ALIKE whose line is computed over axes that devices split."""
HYBRID = small("Mm*-aw")
T = 11


def test_every_block_has_examples():
    assert {type(block) for block in VARIANTS.values()} == set(BLOCKS)
    assert {type(block) for name in FIRST for _, block in walk(VARIANTS[name])} == set(BLOCKS)


def seen(name: str) -> np.ndarray:
    """Which tokens a token's output depends on behind two sublayers."""
    everything_before = np.tril(np.ones((T, T), bool))
    if name == "ngrams":  # the convolution's taps are 2 tokens apart, its state is all that tokens tell each other
        return np.isin(np.subtract.outer(np.arange(T), np.arange(T)), (0, 2, 4))
    if not VARIANTS[name].MIXES_TOKENS:
        return np.eye(T, dtype=bool)
    if sees_ahead(VARIANTS[name]):
        return np.ones((T, T), bool)
    of_two = {"window": 5, "gated_conv": 7, "rwkv4_channel": 3, "channel_mix": 3}  # layers of self and 2, 3 or 1 before
    of_two |= {"relative_window": 9, "output_conv": 5}  # 3 before, whose keys and values see 1 more; 2 before
    behind = of_two.get(name, T)
    return everything_before & ~np.tril(np.ones((T, T), bool), -behind)


@pytest.mark.parametrize("name", some(("window", "mlp", "moe"), ("mamba2", "mamba1", "window", "mlp", "moe")))
def test_causal_through_gradients(name):
    properties.check_causal(properties.model_of(VARIANTS[name]), seen(name))


@pytest.mark.parametrize("name", some(("bidirectional", "both_ways"), (*ALONE, "both_ways")))
def test_documents_do_not_touch_through_gradients(name):
    """What a token's output hangs on in a row of one document and in one of three: in its document, and on no token of
    another one; of a bidirectional block, on all of its document."""
    block = VARIANTS[name]
    rounding = 1e-7 if isinstance(block, Hyena) else 0.0
    block = replace(block, budget=2 * T) if isinstance(block, IndexedAttention) else block  # else not all is chosen
    rows = [1] * 11, [1] * 4 + [2] * 1 + [7] * 6
    properties.check_causal(properties.model_of(block), seen(name), *rows, rounding=rounding)


def test_hybrid_is_causal_through_gradients():
    properties.check_causal(HYBRID, np.tril(np.ones((T, T), bool)))


@pytest.mark.parametrize("name", some(("moe", "shared"), APART))
def test_packed_equals_separate(name):
    properties.check_packed(properties.model_of(VARIANTS[name]))


def test_packed_hybrid_equals_separate():
    properties.check_packed(HYBRID)


@pytest.mark.parametrize("name", some(EVERY, APART))
def test_padding_anywhere_in_a_mixer_alone(name):
    properties.check_padding(VARIANTS[name])


@pytest.mark.parametrize("name", some(("mamba1", "moe", "delta", "slstm"), APART))
def test_pieces_equal_the_full_forward(name):
    properties.check_cache(properties.model_of(VARIANTS[name]))


@pytest.mark.parametrize("name", some([name for name in EVERY if name not in BY_FAMILY], APART))
def test_pieces_with_padding_in_a_mixer_alone(name):
    properties.check_cache_alone(VARIANTS[name])


def test_free_fields_are_named_by_their_way():
    assert free_fields(VARIANTS["mamba1"]) == {"chunk"}
    assert free_fields(VARIANTS["parallel"]) == {"branches.mamba.mixer.chunk"}
    assert free_fields(VARIANTS["shared"]) == {"mixer.chunk"}
    assert free_fields(VARIANTS["moe"]) == set()


@pytest.mark.parametrize("name", some(("delta",), [name for name in APART if free_fields(VARIANTS[name])]))
def test_free_fields_change_nothing(name):
    properties.check_free(VARIANTS[name])


@pytest.mark.parametrize("name", ("mamba1", "moe"))
def test_remat_changes_nothing(name):
    """Of examples that other tests of this folder have in no model."""
    properties.check_remat(VARIANTS[name], "kernels")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_no_remat_policy_changes_anything(name):
    """One example of each class: what policies keep hangs on no option."""
    properties.check_remat(VARIANTS[name], "kernels", "full", "mixer")


@pytest.mark.parametrize("name", some(("moe",), (*APART, *SPLIT_ANEW)))
def test_one_device_equals_eight(name):
    """Rows, parameters, heads and tokens split; of experts, experts instead of tokens."""
    experts = any(isinstance(block, MoE | DepthMoE) for _, block in walk(VARIANTS[name]))
    mesh = MeshConfig(1, fsdp=2, tensor=2, expert=2) if experts else MeshConfig(1, fsdp=2, tensor=2, context=2)
    properties.check_devices(VARIANTS[name], mesh)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mesh_divides_what_split_names(name):
    properties.check_split(VARIANTS[name])


@pytest.mark.parametrize("name", some(("mamba1", "moe")))
def test_bfloat16_is_near(name):
    properties.check_bfloat16(VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_config(name):
    properties.check_config(VARIANTS[name])
    properties.check_json(VARIANTS[name])


def of_ops(block, seq_len: int) -> float:
    """FLOPs of a block's ops, counted apart from its parameters."""
    if isinstance(block, Attention):
        seen = seq_len if sees_ahead(block) else mean_visible(seq_len, block.window)
        return 4.0 * block.n_heads * block.d_head * seen
    if isinstance(block, Hyena):
        return properties.D * fft_flops(seq_len)
    if isinstance(block, Titans):
        return block.n_heads * memory_flops(*block.sizes(properties.D))
    if isinstance(block, Mamba2):
        return ssd_flops(block.heads(properties.D), block.d_head, block.n_groups, block.d_state, seq_len)
    if isinstance(block, LatentAttention):
        return 2.0 * block.n_heads * (block.d_nope + block.d_rope + block.d_value) * mean_visible(seq_len, None)
    if isinstance(block, GatedDeltaNet | KimiDelta):
        return delta_flops(block.n_heads, block.d_head, block.d_key, seq_len)
    if isinstance(block, MLSTM):
        return ssd_flops(block.n_heads, block.d_head, block.n_heads, block.d_key, seq_len)
    if isinstance(block, LinearAttention):
        n_features = 1 + block.d_key + block.d_key**2 if block.feature_map == "taylor" else block.d_key
        return scan_flops(block.n_heads, block.d_key, block.d_head, seq_len, n_features)
    if isinstance(block, Mamba3):
        return mamba3.scan_flops(block.heads(properties.D), block.d_head, block.d_state, block.rank or 1, seq_len)
    if isinstance(block, Rwkv6):
        return scan_flops(block.heads(properties.D), block.d_head, block.d_head, seq_len)
    if isinstance(block, Rwkv7):
        return rwkv7.scan_flops(block.heads(properties.D), block.d_head, seq_len)
    if isinstance(block, RelativeAttention):
        of_profiles = 2.0 * (block.n_heads - 1) * block.n_profiles * block.extent  # one head's are their parameters'
        return of_profiles + 4.0 * block.n_heads * block.d_head * mean_visible(seq_len, block.window)
    if isinstance(block, IndexedAttention):
        of, whole = block.attention, indexed_attention.mean_whole(seq_len, block.block)
        attended = 4.0 * of.n_heads * of.d_head * indexed_attention.mean_seen(seq_len, block.budget, block.block)
        return attended + 2.0 * block.n_index_heads * block.d_index * whole
    if isinstance(block, ConvolvedAttention):
        return 4.0 * block.n_heads * block.d_head * mean_visible(seq_len, block.window)
    return 0.0


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_are_those_of_the_parameters_and_ops(name):
    block = VARIANTS[name]

    def by_hand(block, n_tokens=8):
        ops = sum(of_ops(part, n_tokens) for _, part in walk(block))
        share = {}
        if isinstance(block, MoE | DepthMoE):
            top_k = block.router.top_k if isinstance(block, MoE) else block.top_k
            share = dict.fromkeys(("mixer.w_in", "mixer.w_out"), top_k / block.n_experts)
        return properties.flops_by_hand(block, ops, share)

    if isinstance(block, Bidirectional):
        expected = 2 * by_hand(block.mixer)
    elif isinstance(block, IndexedAttention):
        expected = properties.flops_by_hand(block, of_ops(block, 8))
    elif isinstance(block, MemoryAsContext):
        expected = by_hand(block.memory) + 2 * by_hand(block.attention, 16)
    else:
        expected = by_hand(block)
    assert block.flops(properties.D, 8) == pytest.approx(expected, rel=1e-12)


def test_fft_flops_by_hand():
    """Rows of 8: two real transforms of 16, 2.5 * 16 * 4 each, and 8 products of 6, for 8 tokens."""
    assert fft_flops(8) == (2 * 2.5 * 16 * 4 + 8 * 6) / 8


def test_ops_by_hand():
    assert mean_visible(4, None) == (1 + 2 + 3 + 4) / 4
    assert mean_visible(4, 2) == (1 + 2 + 2 + 2) / 4
    assert mean_visible(4, 100) == mean_visible(4, None)
    assert indexed_attention.mean_whole(5, 2) == (0 + 1 + 1 + 2 + 2) / 5
    assert indexed_attention.mean_seen(5, 2, 2) == (1 + 2 + (2 + 1) + 2 + (2 + 1)) / 5
    mean_seen = (32 + 1) / 2  # one chunk of 32 tokens, its causal half
    inverse = sum(i * i for i in range(1, 33)) / 32  # by rows, of a system of 32 equations
    seen_twice = 2 * 2 * mean_seen * 16  # keys and queries with keys
    of_values = 2 * mean_seen * (16 + 2 * 8) + 3 * 2 * 16 * 8
    assert delta_flops(3, 8, 16, 32) == pytest.approx(3 * (seen_twice + inverse + of_values), rel=0.05)
    assert ssd_flops(4, 8, 2, 16, 32) == 2 * mean_seen * (2 * 16 + 4 * 8) + 2 * 2 * 4 * 8 * 16
    assert scan_flops(4, 16, 8, 32) == ssd_flops(4, 8, 4, 16, 32)  # as SSD with a group a head
    assert mamba3.scan_flops(4, 8, 16, 1, 32) == scan_flops(4, 16, 8, 32)
    assert mamba3.scan_flops(4, 8, 16, 3, 32) == 2 * mean_seen * 4 * 9 * (16 + 8) + 3 * 2 * 2 * 4 * 8 * 16
    assert rwkv7.scan_flops(4, 8, 32) == 2 * mean_seen * 4 * 8 * 8 + 4 * 2 * 4 * 8 * 8
    assert scan_flops(4, 2, 8, 32, 7) == 2 * mean_seen * 4 * (2 + 8) + 2 * 2 * 4 * 8 * 7


def test_two_ways_to_say_the_same_are_equal_resolved():
    assert Mamba2(d_head=8).resolved(16) == Mamba2(d_head=8, n_heads=4, expand=9.0, out_bias=False).resolved(16)
    assert Mamba1().resolved(32) == Mamba1(dt_rank=2).resolved(32) != Mamba1(dt_rank=3).resolved(32)
    assert Attention(4).resolved(32) == Attention(4, 4, scale=64**-0.5, qk_norm_eps=1.0).resolved(32)
    assert Shared(Mamba2(d_head=8)).resolved(16) == Shared(Mamba2(d_head=8, n_heads=4)).resolved(16)


def test_convolutions_decide_nothing_at_run_time_inside_a_model(monkeypatch):
    """The model has moved padding away, in the forward as with a cache: a device need not wait to be told so."""
    gaps, convolve = [], pallas_kernels.causal_conv1d

    def record(*args, **options):
        gaps.append(options["gaps"])
        return convolve(*args, **options)

    monkeypatch.setattr(pallas_kernels, "causal_conv1d", record)
    model = abstract(small("Mm1P", HYBRID_BLOCKS | {"P": VARIANTS["parallel"]})).model()
    tokens_BT, ids_BT = np.zeros((2, 8), np.int32), np.array([[1, 1, 0, 1, 1, 2, 0, 2]] * 2, np.int32)
    jax.eval_shape(lambda model: model(tokens_BT, ids_BT), model)
    jax.eval_shape(lambda model: model.extend(tokens_BT, model.init_cache(2, 8), ids_BT), model)
    assert len(gaps) == 2 * (2 + 2 + 1 + 2)
    assert not any(gaps)


def test_no_segment_ids_are_all_ones():
    model, tokens_BT = build(HYBRID), random_tokens(2, 13)
    run = jax.jit(lambda model, tokens, ids: model(tokens, ids), compiler_options=QUICK)
    check_close(
        run(model, tokens_BT, np.ones((2, 13), np.int32)), run(model, tokens_BT, None), dtype="float32", what="logits"
    )


def test_positions_given_are_those_that_rotate():
    """Rotary attention sees differences of positions only: shifted positions change nothing, spread ones do."""
    model, tokens_BT = build(properties.model_of(VARIANTS["attention"])), random_tokens(2, 9)
    run = jax.jit(lambda positions: model(tokens_BT, None, positions), compiler_options=QUICK)
    index_BT = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    expected = run(index_BT)
    check_close(run(index_BT + 40), expected, dtype="float32", what="logits")
    assert np.abs(run(3 * index_BT) - expected).max() > 1e-3
