# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: frozen dataclasses that check themselves.

A config file is Python: `config()` returns a `Config`. Reading one by name is in `find.py`, command-line overrides in
`overrides.py`, the JSON form stored with every run in `stored.py`, what may change on resume in `resume.py`, whether a
mesh can split it in `mesh.py`. Each part's config stands with the part; here they are put together.
"""

import json
from dataclasses import dataclass, field

from hybridlm.cluster import ClusterConfig
from hybridlm.config.probe import ProbeConfig
from hybridlm.config.run import InitConfig, RunConfig
from hybridlm.config.tree import to_dict
from hybridlm.data.config import DataConfig
from hybridlm.errors import ConfigError, require, within
from hybridlm.fields import check_fields
from hybridlm.layers import (
    MLP,
    MLSTM,
    NTK,
    RGLRU,
    SLSTM,
    Attention,
    Bidirectional,
    Block,
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
    Linear,
    LinearAttention,
    Llama3,
    Mamba1,
    Mamba2,
    Mamba3,
    MemoryAsContext,
    ModalFilter,
    MoE,
    NgramMemory,
    OutputConv,
    Parallel,
    Proportional,
    RelativeAttention,
    Rope,
    Router,
    Rwkv4,
    Rwkv4Channel,
    Rwkv6,
    Rwkv7,
    Shared,
    Streams,
    Titans,
    YaRN,
)  # fmt: skip
from hybridlm.model.config import LoraConfig, ModelConfig, QuantizeConfig
from hybridlm.optim import AdamW, Constant, Cosine, LinearDecay, Masked, Muon, NextToken, OptimConfig, Wsd
from hybridlm.sharding import MeshConfig

__all__ = [
    "AdamW", "Attention", "Bidirectional", "Block", "Branch", "ChannelDecay", "ChannelMix", "ClusterConfig", "Config",
    "ConfigError", "Constant", "ConvolvedAttention", "Cosine", "DataConfig", "DepthMoE", "FixedDecay", "ForgetDecay",
    "GatedConv", "GatedDeltaNet", "GatedNorm", "GatedScan", "HeadDecay", "HeadNorm", "Hyena", "ImplicitFilter",
    "IndexedAttention", "InitConfig", "InnerNorm", "KimiDelta", "LatentAttention", "Linear", "LinearAttention",
    "LinearDecay", "Llama3", "LoraConfig", "MLP", "MLSTM", "Mamba1", "Mamba2", "Mamba3", "Masked", "MemoryAsContext",
    "MeshConfig", "MoE", "ModalFilter", "ModelConfig", "Muon", "NTK", "NextToken", "NgramMemory", "OptimConfig",
    "OutputConv", "Parallel", "ProbeConfig", "Proportional", "QuantizeConfig", "RGLRU", "RelativeAttention", "Rope",
    "Router", "RunConfig", "Rwkv4", "Rwkv4Channel", "Rwkv6", "Rwkv7", "SLSTM", "Shared", "Streams", "Titans", "Wsd",
    "YaRN",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = "unnamed"
    """Name of the experiment and of its folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    init: InitConfig = field(default_factory=InitConfig)
    """Its first parameters."""
    data: DataConfig = field(default_factory=DataConfig)
    """Its text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it learns."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""
    run: RunConfig = field(default_factory=RunConfig)
    """How long, where, and what is written."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Which processes make the run together."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that are trained in the place of the model's parameters."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """What it recalls of its context, measured while it trains."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """Matrices in eight bits."""

    def __post_init__(self):
        check_fields(self)
        self.lora.check(self.model.pattern)
        require(
            not (self.lora.on and self.quantize.weights),
            f"quantize.weights ({self.quantize.weights}) and lora.rank ({self.lora.rank}) exclude each other: train "
            "the adapters, then quantise the run",
        )
        objective, ahead = self.optim.objective, self.model.sees_ahead
        with within("optim.objective."):
            objective.check(self.model.vocab_size)
        require(
            not ahead or objective.reads_ahead,
            f"optim.objective ({type(objective).__name__}) asks for a token that the model sees ({ahead}): set "
            "--optim.objective=Masked",
        )
        require(
            not ahead or not self.run.sample_tokens,
            f"run.sample_tokens ({self.run.sample_tokens}): the model cannot write text ({ahead}): set it to 0",
        )
        tasks, every = " ".join(self.probe.tasks), self.run.eval_every
        asks = ahead or (f"optim.objective {type(objective).__name__}" if objective.reads_ahead else "")
        require(
            not (tasks and asks), f"probe.tasks ({tasks}) ask for the next token, which the model is not for: {asks}"
        )
        require(
            not tasks or self.probe.every is not None or every >= 0,
            f"probe.tasks ({tasks}) come with each evaluation, and run.eval_every ({every}) has none: set probe.every",
        )
        require(
            self.data.batch_size % self.optim.accumulate == 0,
            f"data.batch_size ({self.data.batch_size}) not divisible by optim.accumulate ({self.optim.accumulate})",
        )

    @property
    def run_dir(self) -> str:
        """Folder of the run."""
        return self.run.dir or f"runs/{self.name}"

    def __str__(self):
        return json.dumps(to_dict(self), indent=2)
