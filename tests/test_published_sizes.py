# SPDX-License-Identifier: Apache-2.0
"""Configs of published sizes: as many parameters as the published checkpoint has, counted without making any."""

import json
from pathlib import Path

import jax
import pytest

from hybridlm.config.find import config_names, load_config
from hybridlm.config.stored import from_dict
from hybridlm.config.tree import to_dict
from hybridlm.hf.config_json import find_family, write_values
from hybridlm.hf.plan import make_plan
from hybridlm.model.init import abstract
from hybridlm.model.pattern import groups
from tests.hf.hf_support import in_files

PUBLISHED = {
    "bamba:9b": 9_780_235_392,
    "falcon_h1:0.5b": 521_411_104,
    "falcon_h1:1.5b": 1_554_863_488,
    "falcon_h1:1.5b-deep": 1_554_874_768,
    "falcon_h1:3b": 3_149_392_384,
    "falcon_h1:7b": 7_585_654_880,
    "falcon_h1:34b": 33_642_516_224,
    "falcon_mamba:7b": 7_272_665_088,
    "granite4_h:micro": 3_191_396_096,
    "granite4_h:tiny": 6_939_037_248,
    "granite4_h:small": 32_207_337_984,
    "hunyuan:0.5b": 539_010_048,
    "hunyuan:1.8b": 1_791_080_448,
    "hunyuan:4b": 4_221_757_440,
    "hunyuan:7b": 7_504_568_320,
    "inkling:small": 263_655_199_274,
    "inkling:large": 947_025_564_226,
    "jamba:52b": 51_570_323_328,
    "jamba:398b": 398_555_145_696,
    "kimi_linear:48b-a3b": 49_122_681_728,
    "ling3:flash": 124_414_211_552,
    "mamba:130m": 129_135_360,
    "mamba:370m": 371_516_416,
    "mamba:790m": 793_204_224,
    "mamba:1.4b": 1_372_178_432,
    "mamba:2.8b": 2_768_345_600,
    "mamba2:130m": 128_989_632,
    "mamba2:370m": 368_346_624,
    "mamba2:780m": 780_161_280,
    "mamba2:1.3b": 1_343_757_312,
    "mamba2:2.7b": 2_702_599_680,
    "minimax:456b": 456_089_659_776,
    "nemotron_h:8b": 8_100_852_736,
    "nemotron_h:47b": 46_791_554_816,
    "nemotron_h:56b": 56_324_350_464,
    "nemotron_h:mamba2-hybrid-8b": 8_654_517_248,
    "nemotron_h:3-nano-30b-a3b": 31_577_940_288,
    "olmo_hybrid:7b": 7_430_870_688,
    "qwen3_5:0.8b": 752_393_024,
    "qwen3_5:2b": 1_881_825_088,
    "qwen3_5:4b": 4_205_751_296,
    "qwen3_5:9b": 8_953_803_264,
    "qwen3_5:27b": 26_895_998_464,
    "qwen3_5_moe:35b-a3b": 34_660_610_688,
    "qwen3_5_moe:122b-a10b": 122_111_526_912,
    "qwen3_5_moe:397b-a17b": 396_346_350_336,
    "qwen3_next:80b-a3b": 79_674_391_296,
    "qwen4_exp:flash-next": 176_943_899_520,
    "zamba:7b": 7_232_490_496,
    "zamba2:1.2b": 1_215_064_704,
    "zamba2:2.7b": 2_662_214_560,
    "zamba2:7b": 7_356_749_648,
    "lfm2:350m": 354_483_968,
    "lfm2:700m": 742_489_344,
    "lfm2:1.2b": 1_170_340_608,
    "lfm2:2.6b": 2_569_272_320,
    "lfm2:8b-a1b": 8_339_930_560,
    "lfm3:1.7b": 1_728_801_536,
    "recurrent_gemma:2b": 2_682_862_080,
    "recurrent_gemma:9b": 8_579_977_216,
    "rwkv4:169m": 169_342_464,
    "rwkv4:430m": 430_397_440,
    "rwkv4:1.5b": 1_515_106_304,
    "rwkv4:3b": 2_984_627_200,
    "rwkv4:7b": 7_392_649_216,
    "rwkv4:14b": 14_148_597_760,
    "xlstm:7b": 6_865_424_896,
    "zaya1:8b": 8_840_489_464,
}
"""Parameters of the published implementation at the published config.json."""
CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = [
    name
    for name in config_names()
    if ":" in name and "import published" in (CONFIGS / f"{name.partition(':')[0]}.py").read_text()
]
"""Those that are made of a published config.json, not composed here after a paper."""


FIRST = {name.partition(":")[0]: name for name in sorted(NAMES, key=PUBLISHED.get, reverse=True)}
"""Of each family its smallest size."""
of_each = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST.values() else pytest.mark.slow) for n in NAMES]
)
"""The others, by the same code from other numbers of a config.json, are slow."""


def test_every_published_size_is_there():
    assert set(NAMES) == set(PUBLISHED)


@of_each
def test_parameter_count(name):
    parameters = jax.tree.leaves(abstract(load_config(name).model).shapes)
    assert sum(p.size for p in parameters) == PUBLISHED[name]
    assert {p.dtype.name for p in parameters} == {"float32"}


@pytest.mark.parametrize("name", NAMES)
def test_compiles_few_sublayers(name):
    pattern = load_config(name).model.pattern
    assert sum(len(group.unit) for group in groups(pattern)) <= max(24, len(pattern) // 4)


@pytest.mark.parametrize("name", NAMES)
def test_round_trips(name):
    config = load_config(name)
    assert config.name == name.replace(":", "_")
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
    assert load_config(name, {"optim.lr": 1e-5}).model == config.model


@pytest.mark.parametrize("name", sorted({name.split(":")[0] for name in NAMES}))
def test_docstring_has_the_figures(name):
    text = (Path(__file__).parents[1] / "configs" / f"{name}.py").read_text()
    assert all(line in text for line in (f"Command: python train.py --config {name}:", "Hardware: ", "Expected: "))
    assert all(f"{count:,}" in text for size, count in PUBLISHED.items() if size.startswith(f"{name}:"))


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FIRST.values() and PUBLISHED[n] < 1e11 else pytest.mark.slow) for n in NAMES],
)
def test_the_published_implementation_has_the_same_tensors(name):
    import torch
    import transformers

    model = load_config(name).model
    family = find_family(model)
    if family.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model_type}")
    values, published = write_values(family, model)
    options = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family.model_type, **options)
        )
    theirs.tie_weights()
    tensors = dict(theirs.named_parameters())
    kept = ("e_score_correction_bias", "expert_bias", "slope_rate", "balancing_biases")
    tensors |= {name: buffer for name, buffer in theirs.named_buffers() if name.endswith(kept)}
    assert sum(tensor.numel() for tensor in tensors.values()) == PUBLISHED[name]
    plan = make_plan(family, model, published.pattern)
    shapes = {in_files(plan, name): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert _no_experts(shapes) == _no_experts({name: tensor.shape for name, tensor in plan.tensors.items()})


def _no_experts(shapes):
    """Without mixtures of experts, convolutions of queries, keys and values, and tables of n-grams, whose tensors the
    implementation keeps in another form than files do."""
    others = (".experts.", "_moe.", "conv1d.", ".ngram_embedding.")
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in others)}
