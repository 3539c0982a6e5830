# SPDX-License-Identifier: Apache-2.0
"""What a language model is made of: a pattern string and a table that says what each symbol is."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hybridlm.errors import require, within
from hybridlm.fields import check_fields
from hybridlm.layers import MLP, Attention, Block, Mamba2
from hybridlm.layers.block import of_streams, passes, reads_tokens, sees_ahead, shares
from hybridlm.layers.streams import Streams

MOST_SUBLAYERS = 10_000


@dataclass(frozen=True)
class ModelConfig:
    """A language model: a pattern string with one symbol per residual sublayer, and what each symbol is."""

    vocab_size: int = 50_304
    """Rows V of the embedding; at least the tokenizer's vocabulary."""
    d_model: int = 768
    """Model width D."""
    pattern: str = "M-M-*-"
    """One symbol per sublayer, first to last."""
    blocks: dict[str, Block] = field(default_factory=lambda: {"M": Mamba2(), "*": Attention(), "-": MLP()})
    """What each symbol of the pattern is."""
    norm: Literal["rms", "layer"] = "rms"
    """Norms of the residual stream; layer takes the mean off first."""
    norm_eps: float = 1e-5
    """Added to the mean square in these norms."""
    final_norm_eps: float | None = None
    """The same of the last one, behind all sublayers; None: norm_eps."""
    norm_bias: Literal["none", "sublayers", "all"] = "none"
    """Which of these norms have a bias: none, those of sublayers, or all."""
    norm_offset: float = 0.0
    """Added to the weights of these norms: 1 where they are published as what is above 1 (Qwen3-Next, Gemma)."""
    norm_before: str | None = None
    """Symbols whose mixers' inputs are normed; None: all."""
    norm_after: str = ""
    """Symbols whose mixers' outputs are normed before they are added (OLMo)."""
    normed_residual: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Symbols whose sublayers give a norm(x) + b mixer(norm(x)): the normed input goes on, not x; and their a and b
    (MiniMax-01)."""
    streams: Streams | None = None
    """Several residual streams, which sublayers read and add to by gates, in the place of one and of its norms
    (hyper-connections: Qwen4-Exp); None: one."""
    tie_embeddings: bool = True
    """The output projection is the embedding itself."""
    embedding_norm: bool = False
    """A norm of the embedded tokens, before the first sublayer (RWKV)."""
    embedding_multiplier: float = 1.0
    """Multiplies the embedded tokens."""
    channel_scales: bool = False
    """Scales and biases of each channel: of a sublayer's output and of the residual stream before they are added, and
    of the embedded tokens (ZAYA)."""
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
    prefix_tokens: int = 0
    """Learned vectors in front of every document, at which nothing is predicted: Hymba's meta tokens, Titans'
    persistent memory. Rows with segment ids have room for them: the first so many cells of each document."""
    complement: tuple[int, ...] = ()
    """Of each token the one that the other strand of DNA has there; beyond these, itself. Rows are then read from both
    strands by the same weights, and a row's reverse complement gets the reverse complement of its logits (Caduceus).
    Empty: from one."""
    unroll: int | None = None
    """Loops over depth of up to so many repeats are written out: faster steps on GPUs, which then copy nothing in and
    out of stacks, for more to compile. None: in training on a GPU all (`train.layout`), elsewhere none."""
    remat: str = "none"
    """What the backward recomputes: none, full, dots, mixer, kernels, or the comma-separated names of what is kept."""
    remat_span: int = 1
    """Of so many sublayers in a row the backward keeps the first one's input alone, and computes the others' and what
    `remat` keeps again, one such row after the other: for long rows of text. 1: every sublayer's input is kept. Loops
    over depth are written out for it (`unroll`)."""

    def __post_init__(self):
        check_fields(self, "model.")
        for name in ("vocab_size", "d_model", "norm_eps", "final_norm_eps", "init_std", "logit_softcap"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} ({value}) must be positive")
        require(self.unroll is None or self.unroll > 0, f"model.unroll ({self.unroll}) must be positive")
        require(self.remat_span > 0, f"model.remat_span ({self.remat_span}) must be positive")
        for name in ("embedding_multiplier", "logit_multiplier"):
            require(getattr(self, name) != 0, f"model.{name} (0) must not be 0: nothing would depend on the text")
        n = len(self.pattern)
        require(n > 0, "model.pattern ('') must have at least one symbol")
        require(n <= MOST_SUBLAYERS, f"model.pattern has {n} symbols: it must have at most {MOST_SUBLAYERS}")
        require(self.prefix_tokens >= 0, f"model.prefix_tokens ({self.prefix_tokens}) must not be negative")
        self._check_complement()
        for symbol in self.blocks:
            require(len(symbol) == 1, f"model.blocks key ({symbol!r}) must be one character")
        for symbol in self.pattern:
            require(
                symbol in self.blocks,
                f"model.pattern has the symbol {symbol!r}, which is no key of model.blocks ({' '.join(self.blocks)})",
            )
        known = " ".join(self.blocks)
        for name in ("norm_before", "norm_after"):
            for symbol in getattr(self, name) or "":
                said = f"model.{name} has the symbol {symbol!r}, which is no key of model.blocks ({known})"
                require(symbol in self.blocks, said)
        for symbol in self.normed_residual:
            said = f"model.normed_residual has the symbol {symbol!r}, which is no key of model.blocks ({known})"
            require(symbol in self.blocks, said)
            normed = self.norms(symbol)[0]
            require(normed, f"model.normed_residual has the symbol {symbol!r}, which model.norm_before leaves out")
        for symbol in dict.fromkeys(self.pattern):
            with within(f"model.blocks.{symbol}."):
                self.blocks[symbol].check(self.width(symbol))
        self._check_streams()
        widths = {passes(self.blocks[symbol], self.d_model) for symbol in self.pattern} - {0}
        require(len(widths) <= 1, f"model.blocks: what they hand on has several widths {tuple(sorted(widths))}")

    @property
    def stream_width(self) -> int:
        """Width of a token in the residual stream: of all streams together."""
        return self.d_model * (1 if self.streams is None else self.streams.n_streams)

    @property
    def reads_tokens(self) -> bool:
        """Whether blocks of the pattern read the tokens themselves."""
        return any(reads_tokens(self.blocks[symbol]) for symbol in self.pattern)

    def width(self, symbol: str) -> int:
        """Width that a symbol's block is built at."""
        return self.stream_width if of_streams(self.blocks[symbol]) else self.d_model

    def _check_streams(self) -> None:
        """ConfigError for what several streams, or blocks that read the stream or the tokens, cannot be with."""
        for symbol in dict.fromkeys(self.pattern):
            block, name = self.blocks[symbol], f"model.blocks.{symbol}"
            n_streams = 1 if self.streams is None else self.streams.n_streams
            given = getattr(block, "n_streams", n_streams)
            said = f"{name}.n_streams ({given}) is not the number of the model's streams ({n_streams})"
            require(not of_streams(block) or given == n_streams, said)
            said = f"{name} ({type(block).__name__}): the residual stream as it is has no norm: name the symbol neither"
            wrong = symbol in (self.norm_before or "") or symbol in self.norm_after or symbol in self.normed_residual
            require(not (of_streams(block) and wrong), f"{said} in norm_before, norm_after nor normed_residual")
            said = f"{name} ({type(block).__name__}) reads tokens, of which model.prefix_tokens are none"
            require(not (reads_tokens(block) and self.prefix_tokens), f"{said} ({self.prefix_tokens}): it must be 0")
            kind = f"{name} ({type(block).__name__}) has one residual stream: model.streams must be None"
            alone = shares(block) or passes(block, self.d_model) > 0
            require(self.streams is None or not alone, kind)
        if self.streams is None:
            return
        plain: dict[str, Any] = {
            "norm": "rms", "norm_bias": "none", "norm_before": None, "norm_after": "", "normed_residual": {},
            "channel_scales": False, "residual_multiplier": 1.0,
        }  # fmt: skip
        for name, value in plain.items():
            given = getattr(self, name)
            require(given == value, f"model.{name} ({given}) must be {value!r} with model.streams")

    @property
    def passed(self) -> int:
        """Width of what blocks of the pattern hand from depth to depth; 0: nothing."""
        return max(passes(self.blocks[symbol], self.d_model) for symbol in self.pattern)

    def norms(self, symbol: str) -> tuple[bool, bool]:
        """Whether a symbol's sublayers have a norm before the mixer, and whether they have one after it."""
        return self.norm_before is None or symbol in self.norm_before, symbol in self.norm_after

    def _check_complement(self) -> None:
        partners, n = self.complement, len(self.complement)
        require(n <= self.vocab_size, f"model.complement has {n} tokens, model.vocab_size is {self.vocab_size}")
        for i, partner in enumerate(partners):
            require(
                0 <= partner < n and partners[partner] == i,
                f"model.complement: token {i} has the partner {partner}, which has not {i} as its own",
            )
        require(
            not (partners and self.prefix_tokens),
            f"model.prefix_tokens ({self.prefix_tokens}) must be 0 with model.complement: they would end a strand",
        )

    @property
    def sees_ahead(self) -> str:
        """Why a token's logits hang on later tokens of its document, in words; "": they do not."""
        if self.complement:
            return "model.complement reads documents from both ends"
        found = (sees_ahead(self.blocks[symbol], f"model.blocks.{symbol}") for symbol in dict.fromkeys(self.pattern))
        return next(filter(None, found), "")

    def __hash__(self):
        return hash((self.vocab_size, self.d_model, self.pattern, tuple(self.blocks.items())))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that are trained in the place of the parameters, which stay as they are."""

    rank: int = 0
    """Columns R of an adapter, at most the smaller side of its matrix; 0: none, all parameters are trained."""
    alpha: float | None = None
    """The adapters' product is multiplied by alpha / rank; None: alpha is the rank."""
    blocks: tuple[str, ...] = ()
    """Symbols of the pattern whose matrices are adapted; empty: all."""
    matrices: tuple[str, ...] = ("*",)
    """Which of their matrices: patterns of names as mixer.in_zx, or of the last part alone (in_*)."""

    def __post_init__(self):
        check_fields(self, "lora.")
        require(self.rank >= 0, f"lora.rank ({self.rank}) must not be negative; 0 trains all parameters")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha ({self.alpha}) must be positive")
        require(bool(self.matrices), "lora.matrices is empty: leave it out to adapt all, or set lora.rank=0")

    @property
    def on(self) -> bool:
        """Whether there are adapters."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self, pattern: str) -> None:
        """ConfigError for a symbol that the pattern does not have."""
        for symbol in self.blocks:
            known = " ".join(dict.fromkeys(pattern))
            require(symbol in pattern and len(symbol) == 1, f"lora.blocks ({symbol}) is none of the pattern's: {known}")


@dataclass(frozen=True)
class QuantizeConfig:
    """Matrices in eight bits: what training rounds them to, or what a quantised model has them in."""

    weights: Literal["int8", "fp8"] | None = None
    """Matrices are rounded to int8 or fp8 (e4m3), with a scale for each output channel; None: they are not. In training
    steps compute with the rounded ones and their gradient changes those in float32."""
    activations: Literal["int8"] | None = None
    """What is multiplied with them is rounded to int8, with a scale for each token; None: it is not."""
    keep: tuple[str, ...] = ()
    """Matrices that stay as they are: patterns of names as mixer.in_dt, or of the last part alone (in_*)."""
    stored: bool = False
    """The parameters are the rounded ones, as `hybridlm quantize` writes them: they cannot be trained."""
    products: Literal["fp8"] | None = None
    """In training products with matrices are taken in fp8, forward (e4m3) and backward (e5m2), with a scale for each
    array; the matrices stay what they are. None: in model.compute_dtype."""

    def __post_init__(self):
        check_fields(self, "quantize.")
        for name in ("activations", "stored"):
            value = getattr(self, name)
            require(
                not value or self.weights is not None,
                f"quantize.{name} ({value}) needs quantised matrices: set --quantize.weights=int8",
            )
        require(
            self.activations is None or self.weights == "int8",
            f"quantize.activations ({self.activations}) needs quantize.weights=int8, not {self.weights}: integers are "
            "multiplied with integers",
        )
        require(
            self.products is None or self.weights is None,
            f"quantize.products ({self.products}) and quantize.weights ({self.weights}) exclude each other: the first "
            "is how products are taken in training, the second what a model is trained to be rounded to",
        )

    @property
    def on(self) -> bool:
        """Whether any matrix is rounded."""
        return self.weights is not None
