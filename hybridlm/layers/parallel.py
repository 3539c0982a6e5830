# SPDX-License-Identifier: Apache-2.0
"""Branches side by side: several mixers on one normed input, their outputs added (Falcon-H1; Zuo et al. 2025), each
normed before it is added (Hymba; Dong et al. 2024), or gating each other (Titans; Behrouz et al. 2024).

Axis letters: B batch, T tokens, D model.
"""

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybridlm.errors import require, within
from hybridlm.fields import check_fields
from hybridlm.layers import cache as caches
from hybridlm.layers.attention import Attention
from hybridlm.layers.block import (
    Block,
    Kept,
    Make,
    Output,
    Statistic,
    Tokens,
    inspect,
    of_parts,
    passes,
    shares,
    split_of_parts,
)
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mixers import AnyMixer
from hybridlm.layers.norm import RMSNorm


@dataclass(frozen=True)
class Branch:
    """One of the mixers of a Parallel block."""

    mixer: AnyMixer = Mamba2()  # noqa: RUF009 (frozen)
    """What the branch computes."""
    in_multiplier: float = 1.0
    """Multiplies the branch's input."""
    out_multiplier: float = 1.0
    """Multiplies the branch's output."""
    norm: bool = False
    """RMS norm of the branch's output, whose weight is the branch's share of each channel."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Parallel:
    """Mixers that read one normed input; the outputs, each times its multiplier, are added, or gate each other."""

    branches: dict[str, Branch] = field(
        default_factory=lambda: {"mamba": Branch(Mamba2()), "attention": Branch(Attention())}
    )
    """The branches by name."""
    merge: Literal["add", "gate"] = "add"
    """gate: the output of the branch whose name comes first in the alphabet, times the sigmoids of the others'."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {}
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        require(len(self.branches) > 0, "branches must have at least one entry")
        for name in self.branches:
            require(name.isidentifier(), f"branches key ({name!r}) must be an identifier")

    def __hash__(self):
        return hash((tuple(self.branches.items()), self.merge))

    def parts(self) -> dict[str, Block]:
        """The mixers by field name."""
        return {f"branches.{name}.mixer": branch.mixer for name, branch in self.branches.items()}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where a branch cannot be built at the model width."""
        for name, mixer in self.parts().items():
            require(not passes(mixer, d_model), f"{name} ({type(mixer).__name__}) hands on to depths: no branch can")
            require(not shares(mixer), f"{name} ({type(mixer).__name__}) shares weights over depths: no branch can")
            with within(f"{name}."):
                mixer.check(d_model)

    def build(self, d_model: int, make: Make) -> "ParallelMixer":
        """The mixer of one sublayer."""
        return make.whole(ParallelMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Those of the branches."""
        return split_of_parts(self, d_model)

    def flops(self, d_model: int, seq_len: int) -> float:
        """Those of the branches."""
        return sum(mixer.flops(d_model, seq_len) for mixer in self.parts().values())

    def resolved(self, d_model: int) -> "Parallel":
        """The branches resolved."""
        branches = self.branches.items()
        resolved = {name: replace(branch, mixer=branch.mixer.resolved(d_model)) for name, branch in branches}
        return replace(self, branches=resolved)


class ParallelMixer(nnx.Module):
    """sum over branches of out_multiplier * mixer(in_multiplier * x), the mixer's output normed where the branch says
    so."""

    def __init__(
        self,
        config: Parallel,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        norm_eps: float = 1e-5,
        layer: tuple = (0, 1),
    ):
        """The options are those of `Make`."""
        make = Make(rngs, init_std, out_std, dtype, norm_eps, layer)
        self.config, self.d_model = config, d_model
        mixers = {name: branch.mixer.build(d_model, make) for name, branch in config.branches.items()}
        self.branches = nnx.Dict(mixers)
        norms = {name: RMSNorm(d_model, make.norm_eps) for name, branch in config.branches.items() if branch.norm}
        self.norms = nnx.Dict(norms) if norms else None

    @property
    def cache_grows(self) -> bool:
        """Some branch's cache grows with the number of tokens."""
        return any(mixer.cache_grows for mixer in self.branches.values())

    __call__ = of_parts

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D], and the statistics of the branches, behind their names."""
        outputs: dict[str, jax.Array] = {}
        stats: dict[str, jax.Array] = {}
        for name, mixer in self.branches.items():
            with jax.named_scope(name):
                outputs[name], of_branch = mixer.mix(self._input(name, x_BTD), tokens)
            stats |= {f"{name}.{key}": value for key, value in of_branch.items()}
        return Output(self._merge(outputs), stats)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What the branches say of themselves, behind their names."""
        found = {name: inspect(mixer, self._input(name, x_BTD), tokens) for name, mixer in self.branches.items()}
        return {f"{name}.{key}": value for name, numbers in found.items() for key, value in numbers.items()}

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, dict]:
        """The branches' caches by name."""
        return {name: caches.make(mixer, batch, max_len, layout) for name, mixer in self.branches.items()}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the caches after them; see `block.Mixer`."""
        outputs, new = {}, {}
        for name, mixer in self.branches.items():
            with jax.named_scope(name):
                u_BTD = self._input(name, x_BTD)
                outputs[name], new[name] = mixer.extend(u_BTD, cache[name], length_B, real_BT, layer, gaps=gaps)
        return self._merge(outputs), new

    def _input(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return scaled(x_BTD, self.config.branches[name].in_multiplier)

    def _merge(self, outputs: dict[str, jax.Array]) -> jax.Array:
        outputs = dict(sorted(outputs.items()))  # as nnx.Dict has them behind every split and merge
        if self.norms is not None:
            outputs = {name: self.norms[name](y) if name in self.norms else y for name, y in outputs.items()}
        parts = [scaled(y_BTD, self.config.branches[name].out_multiplier) for name, y_BTD in outputs.items()]
        if self.config.merge == "add":
            return functools.reduce(operator.add, parts)
        gates = math.prod(jax.nn.sigmoid(y_BTD.astype(jnp.float32)) for y_BTD in parts[1:])
        return (parts[0] * gates).astype(parts[0].dtype)


def scaled(x: jax.Array, multiplier: float) -> jax.Array:
    """`x` times a constant, in its type; no operation where that is one."""
    return x if multiplier == 1 else x * multiplier
