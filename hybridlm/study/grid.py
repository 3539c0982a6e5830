# SPDX-License-Identifier: Apache-2.0
"""The grid of `hybridlm study ratio`: tiny models that differ in their share of attention, and in what else is asked.

All of a grid have the same width, depth and number of parameters: what the mixers leave of these is the width of the
feed-forwards.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import jax

from hybridlm.errors import require, within
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import MLP, Attention, GatedConv, Parallel
from hybridlm.layers.block import Block
from hybridlm.layers.parallel import Branch
from hybridlm.layers.rope import Rope
from hybridlm.model.config import ModelConfig
from hybridlm.model.init import abstract
from hybridlm.study.mixers import MIXERS, fitted

Placement = Literal["even", "first", "middle", "last"]
Arrangement = Literal["sequential", "parallel"]
Positions = Literal["none", "rope"]
POSITIONS = get_args(Positions)
RATIOS = ("0", "1:15", "1:7", "1:3", "1:1", "all")
"""Attention to other mixers: none of it, 1 to 15, ..., nothing else."""
MOST = 2000
"""Models of a grid."""


@dataclass(frozen=True)
class Sizes:
    """What all models of a grid share."""

    d_model: int = 64
    """Width D."""
    mixers: int = 16
    """Sequence mixers of the stack, attention among them."""
    mlp_every: int = 4
    """A feed-forward stands behind each so many mixers."""
    d_head: int = 32
    """Width P of a head, of attention and of other mixers."""
    vocab_size: int = 264
    """Tokens V of the models, at least those of the task; 264 has room for the byte tokenizer."""
    params: int = 400_000
    """Parameters of every model, as nearly as the feed-forwards' width allows."""
    conv: int = 3
    """Tokens that a gated convolution in front of all mixers sees, so that none has to learn what stands beside what
    by itself (as in Zoology and Based); 0: there is none."""
    positions: Positions = "none"
    """Attention has a rotary embedding, or none: order is what the other mixers and the convolution know."""
    qk_norm: bool = False
    """Queries and keys of attention are normed: their scores cannot grow, and to look something up is learned later."""

    def __post_init__(self):
        check_fields(self)
        check_positive(self, tuple(f.name for f in fields(self) if f.type is int and f.name != "conv"))
        require(self.conv >= 0, f"conv ({self.conv}) must be at least 0")
        said = f"d_model ({self.d_model}) not divisible by d_head ({self.d_head}): heads of attention fill it"
        require(self.d_model % self.d_head == 0, said)
        said = f"mixers ({self.mixers}) not divisible by mlp_every ({self.mlp_every})"
        require(self.mixers % self.mlp_every == 0, said)


@dataclass(frozen=True)
class Point:
    """One kind of model in a grid; seeds aside."""

    ratio: str = "1:7"
    """Attention to others, `1:7`; 0: no attention; all: nothing but attention."""
    gate: bool = False
    """Attention has a sigmoid output gate."""
    placement: Placement = "even"
    """Where in the stack attention stands; `even`: each in the middle of its share of the depth."""
    arrangement: Arrangement = "sequential"
    """Attention in the place of the other mixer, or in parallel to it in one sublayer."""
    state: int = 64
    """Size N of the state of a head, as of Mamba-2; of mixers without such a size it says nothing."""
    mixer: str = "Mamba2"
    """What stands where attention does not: a name of MIXERS."""
    rate: float = 1.0
    """Factor of the learning rates."""
    state_bytes: int | None = None
    """Bytes of the state of one such mixer, which then has the sizes that give it, and not `state`; None: by that."""

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("state", "rate", "state_bytes"))
        share(self.ratio)
        require(self.mixer in MIXERS, f"mixer ({self.mixer}) must be one of {', '.join(MIXERS)}")

    def attention(self, mixers: int) -> int:
        """Sublayers with attention, of so many mixers; ConfigError where the ratio does not divide them."""
        count = share(self.ratio) * mixers
        said = f"ratio ({self.ratio}) does not divide {mixers} mixers: give --mixers a multiple of its parts"
        require(abs(count - round(count)) < 1e-9, said)
        return round(count)

    def plain(self) -> "Point":
        """The same model by the options that say something of it: those of attention say nothing where there is none,
        and those of the other mixer where nothing but attention is left."""
        base = Point()
        here = share(self.ratio)
        point = replace(self, ratio={0.0: "0", 1.0: "all"}.get(here, self.ratio))
        if self.state_bytes is not None:
            point = replace(point, state=base.state)
        if here == 0:
            point = replace(point, gate=base.gate, placement=base.placement, arrangement=base.arrangement)
        if here == 1:
            point = replace(point, placement=base.placement)
            if self.arrangement == "sequential":
                point = replace(point, state=base.state, mixer=base.mixer, state_bytes=base.state_bytes)
        return point

    @property
    def name(self) -> str:
        """`1:7 gate`, with what is not as usual behind it."""
        usual = Point()
        words = [{"0": "none", "all": "all"}.get(self.ratio, self.ratio), *(["gate"] if self.gate else [])]
        for f in fields(self)[2:]:
            if getattr(self, f.name) != getattr(usual, f.name):
                value = getattr(self, f.name)
                words.append(f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}")
        return " ".join(words)

    @property
    def file(self) -> str:
        """The name as one of a file."""
        return self.name.replace(":", "-").replace(" ", ",")


def share(ratio: str) -> float:
    """The share of attention among the mixers, from 0 to 1: of `1:7` an eighth."""
    if ratio in ("0", "all"):
        return float(ratio == "all")
    attention, colon, others = ratio.partition(":")
    parts = [int(part) if part.isascii() and part.isdecimal() else -1 for part in (attention, others)]
    fits = bool(colon) and min(parts) >= 0 and 0 < sum(parts) <= 1000
    require(fits, f"ratio ({ratio}) must be 0, all or ATTENTION:OTHERS, as 1:7")
    return parts[0] / sum(parts)


def points(axes: dict[str, Sequence]) -> list[Point]:
    """The product of the axes' values, each kind of model once."""
    names = [f.name for f in fields(Point)]
    known = {name: axes.get(name, (getattr(Point(), name),)) for name in names}
    n = math.prod(map(len, known.values()))
    require(n <= MOST, f"the grid has {n} kinds of models: at most {MOST}")
    product = (Point(**dict(zip(names, values))) for values in itertools.product(*known.values()))
    return list(dict.fromkeys(point.plain() for point in product))


def placed(count: int, mixers: int, placement: str) -> list[int]:
    """Indices of the `count` mixers, of so many, that have attention."""
    first = {"first": 0, "middle": (mixers - count) // 2, "last": mixers - count}
    if placement in first:
        return list(range(first[placement], first[placement] + count))
    return [(2 * i + 1) * mixers // (2 * count) for i in range(count)]


def model_of(point: Point, sizes: Sizes) -> ModelConfig:
    """The model: with feed-forwards as wide as brings it nearest to `sizes.params`.

    ConfigError where its mixers alone have more, naming what to change.
    """
    with within(f"{point.name}: "):
        one = _model(point, sizes, 1)
        least, more = count(one), count(_model(point, sizes, 2))
        d_ff = 1 + round((sizes.params - least) / (more - least))
        require(d_ff >= 1, f"params ({sizes.params}) must be at least {least}, those of its mixers: give --params")
        return _model(point, sizes, d_ff)


def count(model: ModelConfig) -> int:
    """Parameters of a model whose depths share nothing: each kind of sublayer is looked at once."""
    base = 0
    total = 0
    for symbol in dict.fromkeys(model.pattern):
        once, twice = (_counted(_alone(model, symbol, n)) for n in (1, 2))
        base = 2 * once - twice
        total += model.pattern.count(symbol) * (twice - once)
    return base + total


def _alone(model: ModelConfig, symbol: str, n: int) -> ModelConfig:
    """A model of nothing but n sublayers of a symbol."""
    return replace(model, pattern=symbol * n, blocks={symbol: model.blocks[symbol]})


def _model(point: Point, sizes: Sizes, d_ff: int) -> ModelConfig:
    at = set(placed(point.attention(sizes.mixers), sizes.mixers, point.placement))
    symbols = ["*" if i in at else "M" for i in range(sizes.mixers)]
    n = sizes.mlp_every
    pattern = "".join("".join(symbols[i : i + n]) + "-" for i in range(0, sizes.mixers, n))
    pattern = ("C" if sizes.conv else "") + pattern
    heads, gate = sizes.d_model // sizes.d_head, "elementwise" if point.gate else None
    rope = Rope() if sizes.positions == "rope" else None
    attention = Attention(n_heads=heads, d_head=sizes.d_head, rope=rope, qk_norm=sizes.qk_norm, gate=gate)
    mixer = mixer_of(point, sizes)
    both = Parallel(branches={"mixer": Branch(mixer), "attention": Branch(attention)})
    here = attention if point.arrangement == "sequential" else both
    blocks = {"C": GatedConv(d_conv=max(sizes.conv, 1)), "M": mixer, "*": here, "-": MLP(d_ff=d_ff)}
    used = {symbol: block for symbol, block in blocks.items() if symbol in pattern}
    std = sizes.d_model**-0.5  # what is usual is that of wide models, under which narrow ones take long to begin
    return ModelConfig(
        vocab_size=sizes.vocab_size, d_model=sizes.d_model, pattern=pattern, blocks=used, compute_dtype="float32",
        init_std=std,
    )  # fmt: skip


def mixer_of(point: Point, sizes: Sizes) -> Block:
    """What stands where attention does not."""
    if point.state_bytes is not None:
        return fitted(point.mixer, sizes.d_model, sizes.d_head, point.state_bytes)
    return MIXERS[point.mixer](sizes.d_model, sizes.d_head, point.state)


@functools.cache
def _counted(model: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model).shapes))
