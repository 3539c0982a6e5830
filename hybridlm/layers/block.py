# SPDX-License-Identifier: Apache-2.0
"""The contract of a block, all that the rest of the project asks of what a pattern symbol stands for.

A block is a frozen dataclass; `build` makes its mixer, an `nnx.Module`. Write both in a file of `hybridlm/layers`, name
the block in `layers.mixers.AnyMixer`, and it trains, resumes, shards, counts its FLOPs, decodes through its cache and
takes part in the property suite. Without that last step it does so too in a config file of one's own; only the command
line and stored configs know blocks by name. `tests/model/test_a_new_block.py` is a complete example.

Axis letters: B batch, T tokens, D model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybridlm.errors import ConfigError, require, within
from pallas_kernels.checks import AnyArray, check_float, check_segment_ids, check_shape

LEFT_TO_RIGHT: Literal["left_to_right"] = "left_to_right"
"""The direction of a block that says nothing of it."""
Direction = Literal["left_to_right", "bidirectional"]
"""Whether a token sees the tokens before it in its document, or all of them."""


class Kept(NamedTuple):
    """An intermediate that a remat policy can keep: a `checkpoint_name` of the mixer."""

    what: str
    """What it is, in a few words."""
    kernels: bool = False
    """Kept by the policy `kernels`: slow to make again."""


_KEPT: ContextVar[frozenset[str] | None] = ContextVar("kept", default=None)


def is_kept(name: str) -> bool:
    """Whether the backward finds an intermediate, a `checkpoint_name`, as the forward has left it: see `keeping`."""
    names = _KEPT.get()
    return names is None or name in names


@contextmanager
def keeping(names: frozenset[str] | None) -> Iterator[None]:
    """Within, a sublayer is traced of whose intermediates those with these names are kept, None: all. It changes what
    the others are made of again, not what they are."""
    token = _KEPT.set(names)
    try:
        yield
    finally:
        _KEPT.reset(token)


class Statistic(NamedTuple):
    """A number that a mixer reports of each batch, a float32 scalar."""

    name: str
    """Its name in the records of metrics."""
    layers: Literal["sum", "mean", "max"] = "mean"
    """How the layers of a model merge."""
    batches: Literal["sum", "mean"] = "mean"
    """How batches merge; means are weighed by tokens."""
    loss: bool = False
    """Added to the training loss."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """What a mixer knows of the tokens beside their vectors; a pytree."""

    segment_ids: jax.Array | None = None
    """int32 [B, T]: a change of id between real tokens starts a document, 0 is padding; None: one document a row."""
    positions: jax.Array | None = None
    """int32 [B, T], for rotations; None: the index within the document."""
    embedded_BTD: jax.Array | None = None
    """The model's embedded tokens; None outside a model."""
    shared: Any = None
    """What the depths of the block's symbol share, as `build_shared` made it; None for other blocks."""
    gaps: bool = field(default=True, metadata={"static": True})
    """False promises that padding stands behind all tokens of a row, or in front of all, and that no id comes back:
    nothing has to be decided at run time, and the distance of two tokens in the row is that in their document."""
    inspect: bool = field(default=False, metadata={"static": True})
    """Mixers are asked what they say of themselves."""
    ids_BT: jax.Array | None = None
    """int32 [B, T], the tokens themselves; None outside a model, and in one without a block that reads them."""


class Output(NamedTuple):
    """What a mixer gives."""

    y_BTD: jax.Array
    """[B, T, D] in the mixer's type."""
    stats: Mapping[str, jax.Array] = {}
    """By the keys of the block's STATISTICS; of a part of the block, behind its name and a dot."""


@dataclass(frozen=True)
class Make:
    """What every mixer is made with."""

    rngs: nnx.Rngs
    """Where its random numbers come from."""
    init_std: float = 0.02
    """Standard deviation of its matrices."""
    out_std: float | None = None
    """That of the last ones, whose results are added to the residual stream; None: init_std."""
    dtype: DTypeLike = "bfloat16"
    """Type of activations and of matrices at use; parameters are float32."""
    norm_eps: float = 1e-5
    """Added to the mean square in norms of the residual stream."""
    layer: tuple[Any, int] = (0, 1)
    """How many sublayers that mix tokens stand before it (perhaps traced), and how many the model has: for parameters
    that start as others with depth."""

    def mixer(self, kind: type, block: Any, d_model: int, **more: Any) -> Any:
        """`kind(block, d_model, ...)` with these options as the keywords that constructors of mixers have."""
        return kind(
            block, d_model, rngs=self.rngs, init_std=self.init_std, out_std=self.out_std, dtype=self.dtype, **more
        )

    def whole(self, kind: type, block: Any, d_model: int) -> Any:
        """The same of a mixer that makes others, which may need all of the options."""
        return self.mixer(kind, block, d_model, norm_eps=self.norm_eps, layer=self.layer)


class Mixer(Protocol):
    """The module that a block configures. `__call__ = on_arrays` makes it callable on plain arrays."""

    @property
    def cache_grows(self) -> bool:
        """Whether the cache grows with the number of tokens; a plain value where it does not depend on the config."""

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """The mixer of the normed residual stream, in parallel over tokens. Padding changes nothing for real tokens,
        wherever it stands; what comes out at padding does not matter, but is finite."""

    def init_cache(self, batch: int, max_len: int) -> Any:
        """The memory before the first token: a pytree of arrays [B, ...], states in float32, all of them zero where no
        more is said. One that takes a `layers.cache.Layout` as `layout`, too, makes them by it: stored smaller where
        that is asked for, and split over a mesh by heads and channels, not by rows alone."""

    def extend(
        self, x_BTD: jax.Array, cache: Any, length_B: jax.Array, real_BT: jax.Array | None = None, layer=None, *,
        gaps: bool = True,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """[B, T, D] for the next T tokens, as `mix` gives them where they stand behind those in the cache, and the
        cache after them.

        length_B: int32, tokens already in the cache. real_BT: bool, False for padding, which leaves the cache as it is;
        None: all real. layer: index of the entries in stacked caches [L, B, ...], see `layers.cache`; None: not
        stacked. gaps: False promises that padding stands on the right.
        """

    # Where it says something of itself (`run.inspect_every`), a mixer has one more, which is called with what `mix` is
    # called with:
    #
    # def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
    #     """Float32 scalars: {"dt_min": ..., "dt_mean": ..., "dt_max": ...}; padding does not count."""
    #
    # The end of a name (_min, _mean, _max, _sum) says how layers merge. `layers.inspection` has what several say.


class Block(Protocol):
    """A frozen dataclass: what a mixer is. Its sizes are checked when it is made, its fit to a model by `check`.

    A block that hands something from each of its depths to the next, past the sublayers between them, has
    `passes(d_model)`: the width R of it, 0 for nothing. Its mixer has `pass_on(x_BTD, passed_BTR, tokens)`, which gives
    (Output, passed_BTR): zeros come to the first depth, and `mix` is that of a first depth. Where it does not take
    every token by itself, it has `extend_on(x_BTD, passed_BTR, cache, length_B, real_BT, layer, *, gaps)`, too, which
    gives (y_BTD, passed_BTR, the new cache). Where it says of itself what hangs on what
    came to it, it has `inspect_on(x_BTD, passed_BTR, tokens)`.

    A block in which tokens see later ones of their document says `direction = "bidirectional"`; its mixer needs no
    cache. One whose cache grows by anything but keys and values says so in `GROWS`, {name of the array: what it holds}.

    A block that reads the tokens themselves says `READS_TOKENS = True`: `mix` finds them in its Tokens, and its mixer's
    `extend` takes them as `ids_BT`. One that reads the residual stream as it is, not normed, and all streams of it
    where the model has several, says `OF_STREAMS = True`: it is built at the width of them together, and what it gives
    is added to them. Neither can be part of another.

    A block that holds others has `parts()`, which gives them by their dotted field names. One whose depths share
    weights has `build_shared(d_model, make)`, the module that they share, and `build_link(d_model, make)`, a `Link` of
    each depth.
    """

    FREE: ClassVar[frozenset[str]]
    """Fields that change no result beyond rounding: a run may be resumed with others."""
    KEPT: ClassVar[Mapping[str, Kept]]
    """The mixer's intermediates with a `checkpoint_name`, by that name."""
    STATISTICS: ClassVar[Mapping[str, Statistic]]
    """What the mixer reports, by its key in `Output.stats`."""

    @property
    def MIXES_TOKENS(self) -> bool:
        """False where every token is by itself, as in an MLP; the remat policy `mixer` recomputes the others alone."""

    def check(self, d_model: int) -> None:
        """ConfigError, naming the field, its value and the limit, where the mixer cannot be built at this width."""

    def build(self, d_model: int, make: Make) -> Mixer:
        """The mixer of one sublayer."""

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """(dotted field name, size, logical axis) of what a mesh has to divide; see `sharding.RULES`."""

    def flops(self, d_model: int, seq_len: int) -> float:
        """Forward FLOPs per token of a row of seq_len: two for each multiply-add of matrix products and convolutions,
        nothing else."""

    def resolved(self, d_model: int) -> "Block":
        """The same block with derived sizes filled in and unused fields at one value: two ways to say it are equal."""


class Link(Protocol):
    """What a depth adds to its mixer's input, before the norm, from what the depths of its symbol share."""

    @property
    def cache_grows(self) -> bool:
        """Whether the cache grows with the number of tokens."""

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        """[B, T, D], of the residual stream, `tokens.shared` and `tokens.embedded_BTD`."""

    def init_cache(self, batch: int, max_len: int) -> Any:
        """As of a mixer."""

    def extend(
        self, x_BTD: jax.Array, cache: Any, length_B: jax.Array, real_BT: jax.Array | None, layer, tokens: Tokens
    ) -> tuple[jax.Array, Any]:
        """As of a mixer; tokens: as in `__call__`."""


def on_arrays(
    mixer: Any,
    x_BTD: AnyArray,
    segment_ids: AnyArray | None = None,
    positions: AnyArray | None = None,
    added: Any = None,
) -> jax.Array:
    """[B, T, D] -> [B, T, D] in `dtype`: `__call__` of every mixer; (that, statistics) of one that has some, which
    says so to type checkers by `reporting` or `of_parts` in the place of this.

    x_BTD: floating point, an array of JAX or NumPy. segment_ids: int32 [B, T]; a change of id between real tokens
    starts a document, 0 is padding, anywhere; None: one document a row. positions: int32 [B, T], for rotations; None:
    the index within the document. added: see the mixers whose `mix` takes it.
    Raises ValueError for a wrong shape and TypeError for a wrong type or no array, naming the argument.
    """
    return of_parts(mixer, x_BTD, segment_ids, positions, added)


def reporting(
    mixer: Any,
    x_BTD: AnyArray,
    segment_ids: AnyArray | None = None,
    positions: AnyArray | None = None,
    added: Any = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """`on_arrays` of a mixer that always has statistics."""
    return of_parts(mixer, x_BTD, segment_ids, positions, added)


def of_parts(
    mixer: Any,
    x_BTD: Any,
    segment_ids: AnyArray | None = None,
    positions: AnyArray | None = None,
    added: Any = None,
) -> Any:
    """`on_arrays` of a mixer that has statistics where one of its parts has some."""
    check_shape("x_BTD", x_BTD, (None, None, getattr(mixer, "d_model", None)), "batch, tokens, d_model of the mixer")
    check_float("x_BTD", x_BTD)
    ids, places = (
        None if array is None else check_segment_ids(name, array, x_BTD.shape[:2], "batch, tokens of x_BTD")
        for name, array in (("segment_ids", segment_ids), ("positions", positions))
    )
    more = {} if added is None else {"added": added}
    y_BTD, stats = mixer.mix(jnp.asarray(x_BTD), Tokens(ids, places), **more)
    return (y_BTD, stats) if stats else y_BTD


def inspect(
    module: nnx.Module, x_BTD: jax.Array, tokens: Tokens, passed_BTR: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What a mixer or link says of itself; nothing where it has no `inspect`. passed_BTR: of a mixer to which a depth
    before hands something on."""
    if passed_BTR is not None and hasattr(module, "inspect_on"):
        return module.inspect_on(x_BTD, passed_BTR, tokens)
    return module.inspect(x_BTD, tokens) if hasattr(module, "inspect") else {}


def parts(block: Block) -> dict[str, Block]:
    """The blocks inside, by dotted field name; {} for a block that holds none."""
    return block.parts() if hasattr(block, "parts") else {}


def sees_ahead(block: Block, name: str = "") -> str:
    """The dotted name of the block, or of one inside it, in which tokens see later ones of their document; "": none."""
    seen = [path for path, inside in walk(block, name) if getattr(inside, "direction", LEFT_TO_RIGHT) != LEFT_TO_RIGHT]
    return f"{seen[0]} is bidirectional" if seen else ""


def refuse_cache(*_, **__) -> NoReturn:
    """`init_cache` and `extend` of a mixer that reads documents in both directions."""
    raise ConfigError("a bidirectional mixer has no cache: what it gives for a token hangs on those that are to come")


def shares(block: Block) -> bool:
    """Whether the depths of the block's symbol share weights."""
    return hasattr(block, "build_shared")


def reads_tokens(block: Block) -> bool:
    """Whether the block reads the tokens themselves."""
    return getattr(block, "READS_TOKENS", False)


def of_streams(block: Block) -> bool:
    """Whether the block reads the residual stream as it is."""
    return getattr(block, "OF_STREAMS", False)


def passes(block: Block, d_model: int) -> int:
    """Width of what the block hands from depth to depth; 0: nothing."""
    return block.passes(d_model) if hasattr(block, "passes") else 0


def check_parts(block: Block, d_model: int, ahead: str = "must read from left to right") -> None:
    """Raises ConfigError where a block inside shares weights over depths, hands on to depths, is a sublayer by itself,
    reads both directions (by the words `ahead`) or cannot be built at the model width."""
    for name, part in parts(block).items():
        kind = f"{name} ({type(part).__name__})"
        require(not shares(part), f"{kind} shares weights over depths: it cannot be")
        require(not passes(part, d_model), f"{kind} hands on to depths: it cannot be")
        require(not reads_tokens(part) and not of_streams(part), f"{kind} is a sublayer by itself: it cannot be")
        require(not sees_ahead(part), f"{kind} {ahead}")
        with within(f"{name}."):
            part.check(d_model)


def walk(block: Block, name: str = "") -> Iterator[tuple[str, Block]]:
    """The block and those inside, each with its dotted name: `name` for the first."""
    yield name, block
    for part, inside in parts(block).items():
        yield from walk(inside, f"{name}.{part}" if name else part)


def grown(block: Block) -> dict[str, str]:
    """What arrays of the cache hold that grow and are no keys and values, by name, of the blocks inside too."""
    return {name: what for _, inside in walk(block) for name, what in getattr(inside, "GROWS", {}).items()}


def free_fields(block: Block) -> set[str]:
    """Dotted names of all FREE fields, of the blocks inside too: {"branches.mamba.mixer.chunk"}."""
    return {f"{name}.{free}" if name else free for name, inside in walk(block) for free in inside.FREE}


def split_of_parts(block: Block, d_model: int) -> list[tuple[str, int, str]]:
    """`split` of the blocks inside."""
    inside = parts(block).items()
    return [(f"{name}.{size}", n, axis) for name, part in inside for size, n, axis in part.split(d_model)]
