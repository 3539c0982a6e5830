# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: frozen dataclasses that check themselves.

A config file is Python: `config()` returns a `Config`. Reading one by name, command-line overrides and the JSON form
stored with every run are in `config_io.py`.
"""

import json
from dataclasses import dataclass, field
from typing import Literal

from hybridlm.errors import ConfigError, require
from hybridlm.layers.attention import Attention
from hybridlm.layers.mamba1 import InnerNorm, Mamba1
from hybridlm.layers.mamba2 import GatedNorm, Mamba2
from hybridlm.layers.mlp import MLP
from hybridlm.layers.moe import MoE, Router
from hybridlm.layers.parallel import Branch, Parallel
from hybridlm.layers.rope import Linear, Llama3, Rope, YaRN
from hybridlm.layers.shared import Shared

__all__ = [
    "Attention", "Block", "Branch", "Config", "ConfigError", "DataConfig", "GatedNorm", "InitConfig", "InnerNorm",
    "Linear", "Llama3", "Mamba1", "Mamba2", "MeshConfig", "MLP", "ModelConfig", "MoE", "OptimConfig", "Parallel",
    "Rope", "Router", "RunConfig", "Shared", "YaRN",
]  # fmt: skip

Block = Mamba1 | Mamba2 | Attention | MLP | MoE | Parallel | Shared
"""What a pattern symbol can stand for."""


@dataclass(frozen=True)
class ModelConfig:
    """A language model: a pattern string with one symbol per pre-norm residual sublayer, and what each symbol is."""

    vocab_size: int = 50_304
    """Rows V of the embedding; at least the tokenizer's vocabulary."""
    d_model: int = 768
    """Model width D."""
    pattern: str = "M-M-*-"
    """One symbol per sublayer, first to last."""
    blocks: dict[str, Block] = field(default_factory=lambda: {"M": Mamba2(), "*": Attention(), "-": MLP()})
    """What each symbol of the pattern is."""
    norm_eps: float = 1e-5
    """Added to the mean square in the RMS norms of the residual stream."""
    tie_embeddings: bool = True
    """The output projection is the embedding itself."""
    embedding_multiplier: float = 1.0
    """Multiplies the embedded tokens."""
    residual_multiplier: float = 1.0
    """Multiplies every sublayer's output before it is added."""
    logit_multiplier: float = 1.0
    """Multiplies the logits."""
    logit_softcap: float | None = None
    """Logits become logit_softcap * tanh(logits / logit_softcap)."""
    init_std: float = 0.02
    """Standard deviation of embeddings and matrices; a sublayer's last one is divided by sqrt(number of sublayers)."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and of matrices at use; parameters are float32."""
    remat: str = "none"
    """What the backward recomputes: none, full, dots, mixer, kernels, or the comma-separated names of what is kept."""

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "norm_eps", "init_std", "logit_softcap"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} ({value}) must be positive")
        require(len(self.pattern) > 0, "model.pattern ('') must have at least one symbol")
        for symbol in self.blocks:
            require(len(symbol) == 1, f"model.blocks key ({symbol!r}) must be one character")
        for symbol in self.pattern:
            require(
                symbol in self.blocks,
                f"model.pattern has the symbol {symbol!r}, which is no key of model.blocks ({' '.join(self.blocks)})",
            )
        for symbol in dict.fromkeys(self.pattern):
            try:
                self.blocks[symbol].check(self.d_model)
            except ConfigError as error:
                raise ConfigError(f"model.blocks.{symbol}.{error}") from None

    def __hash__(self):
        return hash((self.vocab_size, self.d_model, self.pattern, tuple(self.blocks.items())))


@dataclass(frozen=True)
class DataConfig:
    """Text, its tokens, and the rows that they are packed into."""

    path: tuple[str, ...] = ()
    """Glob patterns of .txt, .jsonl or .parquet files; empty: the embedded corpus (Python's standard library)."""
    val_path: tuple[str, ...] = ()
    """Glob patterns of validation files; empty: a share of the training files, chosen by a hash of their names."""
    val_fraction: float = 0.02
    """Share of the documents held out where val_path is empty."""
    text_key: str = "text"
    """Field of a .jsonl line or column of a .parquet file that holds the text."""
    tokenizer: str = "byte"
    """byte, or the path of a tokenizer.json."""
    bos_token: str | None = None
    """Token put before each document; None: found among the tokenizer's special tokens."""
    eos_token: str | None = None
    """Token put after each document; None: found among the tokenizer's special tokens."""
    seq_len: int = 4096
    """Tokens T of a row."""
    batch_size: int = 16
    """Rows B of an optimizer step, over all devices and accumulated microbatches."""
    cache_dir: str = "~/.cache/hybridlm"
    """Folder of tokenised corpora."""
    workers: int = 0
    """Grain worker processes; 0: threads of this process. Batches do not depend on it."""
    prefetch: int = 4
    """Batches read ahead."""

    def __post_init__(self):
        require(self.seq_len > 0, f"data.seq_len ({self.seq_len}) must be positive")
        require(self.batch_size > 0, f"data.batch_size ({self.batch_size}) must be positive")
        require(0 <= self.val_fraction < 1, f"data.val_fraction ({self.val_fraction}) must be in [0, 1)")
        require(self.workers >= 0, f"data.workers ({self.workers}) must not be negative")
        require(self.prefetch >= 1, f"data.prefetch ({self.prefetch}) must be at least 1")


@dataclass(frozen=True)
class OptimConfig:
    """Loss, gradients, optimizer and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all; muon for matrices, with AdamW for the rest."""
    lr: float = 3e-4
    """Peak learning rate."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices under muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decays of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; recurrence parameters, norms, biases and embeddings have none."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: never."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warmup: cosine or linear to the end, warmup-stable-decay, or constant."""
    warmup_steps: int = 100
    """Steps of linear warmup from zero."""
    decay_fraction: float = 0.2
    """Share of the run that wsd spends in its linear decay."""
    final_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak."""
    accumulate: int = 1
    """Microbatches whose gradients are summed for one step; divides data.batch_size."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition (Chowdhery et al. 2022, PaLM, section 5)."""
    max_skipped: int = 10
    """Non-finite steps in a row, each skipped, after which the run ends with an error."""

    def __post_init__(self):
        for name in ("lr", "muon_lr", "eps", "clip_norm"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optim.{name} ({value}) must be positive")
        for name in ("weight_decay", "warmup_steps", "z_loss"):
            require(getattr(self, name) >= 0, f"optim.{name} ({getattr(self, name)}) must not be negative")
        for name in ("accumulate", "max_skipped"):
            require(getattr(self, name) >= 1, f"optim.{name} ({getattr(self, name)}) must be at least 1")
        for name, values in (("betas", self.betas), ("muon_momentum", (self.muon_momentum,))):
            require(all(0 <= v < 1 for v in values), f"optim.{name} ({getattr(self, name)}) must be in [0, 1)")
        for name in ("decay_fraction", "final_lr_ratio"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name} ({getattr(self, name)}) must be in [0, 1]")


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; one of the axes may be -1: all devices that the others leave."""

    data: int = -1
    """Replicas of the parameters; rows are split over them."""
    fsdp: int = 1
    """Ways to shard parameters and optimizer state; rows are split over them too."""
    tensor: int = 1
    """Ways to shard heads, feed-forward width and vocabulary."""
    context: int = 1
    """Ways to split the tokens of a row; divides data.seq_len."""
    expert: int = 1
    """Ways to shard the experts of MoE blocks; rows are split over them too, other parameters are not."""

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "context", "expert")}
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name} ({size}) must be at least 1, or -1 for all that is left")
        require(list(sizes.values()).count(-1) <= 1, f"mesh ({sizes}): only one axis can be -1")


@dataclass(frozen=True)
class RunConfig:
    """The run itself: its length, folder, and what it writes when."""

    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Seed of parameters and of the order of rows."""
    dir: str = ""
    """Folder of the run; empty: runs/NAME."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 500
    """Steps between evaluations; 0: only after the last step; -1: never."""
    eval_batches: int = 0
    """Validation batches an evaluation reads; 0: all."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints kept, newest first."""
    sample_prompt: str = ""
    """Start of the text written at the end of the run."""
    sample_tokens: int = 0
    """Length of that text, tokens; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a jax.profiler trace; None: none."""

    def __post_init__(self):
        for name in ("steps", "log_every", "keep"):
            require(getattr(self, name) >= 1, f"run.{name} ({getattr(self, name)}) must be at least 1")
        for name in ("eval_batches", "save_every", "sample_tokens", "seed"):
            require(getattr(self, name) >= 0, f"run.{name} ({getattr(self, name)}) must not be negative")
        require(self.eval_every >= -1, f"run.eval_every ({self.eval_every}) must be -1, 0 or positive")


@dataclass(frozen=True)
class InitConfig:
    """Where the first parameters come from."""

    hf: str | None = None
    """Folder of a published checkpoint, which gives the model, too; None: drawn from run.seed; empty: to be given."""


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

    def __post_init__(self):
        require(
            self.data.batch_size % self.optim.accumulate == 0,
            f"data.batch_size ({self.data.batch_size}) not divisible by optim.accumulate ({self.optim.accumulate})",
        )

    @property
    def run_dir(self) -> str:
        """Folder of the run."""
        return self.run.dir or f"runs/{self.name}"

    def __str__(self):
        from hybridlm.config_io import to_dict

        return json.dumps(to_dict(self), indent=2)
