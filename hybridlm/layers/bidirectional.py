# SPDX-License-Identifier: Apache-2.0
"""A mixer in both directions: BiMamba of Caduceus (Schiff et al. 2024, arXiv:2403.03234, section 3.1), of any mixer.

Axis letters: B batch, T tokens, D model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybridlm.layers.block import (
    Block,
    Kept,
    Make,
    Output,
    Statistic,
    Tokens,
    check_parts,
    inspect,
    of_parts,
    refuse_cache,
    split_of_parts,
)
from hybridlm.layers.mamba1 import Mamba1
from hybridlm.layers.mixers import AnyMixer


@dataclass(frozen=True)
class Bidirectional:
    """mixer(x) + reversed(mixer'(reversed(x))): each document is read from its start and from its end."""

    mixer: AnyMixer = Mamba1()  # noqa: RUF009 (frozen)
    """What reads the document, once in each direction."""
    tied: Literal["projections", "all", "none"] = "projections"
    """What both directions have in common: the matrices from and to the model width (Caduceus), all, or nothing."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {}
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True
    direction = "bidirectional"

    def parts(self) -> dict[str, Block]:
        """The mixer by its field name."""
        return {"mixer": self.mixer}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where the mixer cannot be built at the model width, or reads both directions itself."""
        check_parts(self, d_model, ahead="is bidirectional itself")

    def build(self, d_model: int, make: Make) -> "BidirectionalMixer":
        """The mixer of one sublayer."""
        return make.whole(BidirectionalMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Those of the mixer."""
        return split_of_parts(self, d_model)

    def flops(self, d_model: int, seq_len: int) -> float:
        """The mixer's, twice."""
        return 2 * self.mixer.flops(d_model, seq_len)

    def resolved(self, d_model: int) -> "Bidirectional":
        """The mixer resolved."""
        return replace(self, mixer=self.mixer.resolved(d_model))


class BidirectionalMixer(nnx.Module):
    """The mixer of one direction, and of the other one what it has of its own, under the same names."""

    cache_grows = False
    __call__ = of_parts
    init_cache = extend = staticmethod(refuse_cache)

    def __init__(
        self,
        config: Bidirectional,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        norm_eps: float = 1e-5,
        layer: tuple = (0, 1),
    ):
        """The options are those of `Make`; the mixer of the other direction is drawn after this one."""
        make = Make(rngs, init_std, out_std, dtype, norm_eps, layer)
        self.config, self.d_model = config, d_model
        self.ahead = config.mixer.build(d_model, make)
        if config.tied == "all":
            self.back = None
        else:
            back = dict(nnx.to_flat_state(nnx.state(config.mixer.build(d_model, make))))
            self.back = _nested({path: a for path, a in back.items() if config.tied == "none" or not _tied(path, back)})

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D], and the statistics of both directions, behind their names."""
        with jax.named_scope("ahead"):
            y_BTD, stats = self.ahead.mix(x_BTD, tokens)
        with jax.named_scope("back"):
            z_BTD, of_back = self._backward().mix(_reversed(x_BTD), _turned(tokens))
        stats = {f"ahead.{name}": a for name, a in stats.items()} | {f"back.{name}": a for name, a in of_back.items()}
        return Output(y_BTD + _reversed(z_BTD), stats)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What both directions say of themselves, behind their names."""
        ahead, back = inspect(self.ahead, x_BTD, tokens), inspect(self._backward(), _reversed(x_BTD), _turned(tokens))
        return {f"ahead.{name}": a for name, a in ahead.items()} | {f"back.{name}": a for name, a in back.items()}

    def _backward(self):
        """The mixer of the other direction."""
        graphdef, state = nnx.split(self.ahead)
        return nnx.merge(graphdef, state if self.back is None else nnx.merge_state(state, nnx.state(self.back)))


def _reversed(x: Any) -> Any:
    """Rows from their ends: documents in turn, each from its end."""
    return None if x is None else jnp.flip(x, axis=1)


def _turned(tokens: Tokens) -> Tokens:
    """What is known of rows from their ends."""
    return Tokens(_reversed(tokens.segment_ids), None, _reversed(tokens.embedded_BTD), gaps=tokens.gaps)


def _tied(path: tuple, own: dict) -> bool:
    """Whether a parameter is a matrix from or to the model width, or the bias that is named after one."""
    *module, name = path
    of = own.get((*module, str(name).removesuffix("_bias")), own[path]).get_metadata()
    return of["kind"] == "matrix" and "d_model" in of["axes"]


def _nested(leaves: dict[tuple, nnx.Param]) -> nnx.Dict:
    """Parameters by their paths, as modules inside one another."""
    made: dict = {}
    for path, leaf in leaves.items():
        *module, name = path
        inside = made
        for part in module:
            inside = inside.setdefault(part, {})
        inside[name] = leaf
    as_module: Any = lambda tree: nnx.Dict({k: as_module(v) if isinstance(v, dict) else v for k, v in tree.items()})
    return as_module(made)
