# SPDX-License-Identifier: Apache-2.0
"""Branches side by side: several mixers on one normed input, their outputs added (Falcon-H1; Zuo et al. 2025).

Axis letters: B batch, T tokens, D model.
"""

from dataclasses import dataclass, field

import jax
from flax import nnx

from hybridlm.errors import ConfigError, require
from hybridlm.layers.attention import Attention
from hybridlm.layers.blocks import Simple, make_mixer
from hybridlm.layers.mamba2 import Mamba2


@dataclass(frozen=True)
class Branch:
    """One of the mixers of a Parallel block."""

    mixer: Simple = Mamba2()  # noqa: RUF009 (frozen)
    """What the branch computes."""
    in_multiplier: float = 1.0
    """Multiplies the branch's input."""
    out_multiplier: float = 1.0
    """Multiplies the branch's output."""


@dataclass(frozen=True)
class Parallel:
    """Mixers that read one normed input; the outputs, each times its multiplier, are added."""

    branches: dict[str, Branch] = field(
        default_factory=lambda: {"mamba": Branch(Mamba2()), "attention": Branch(Attention())}
    )
    """The branches by name."""

    def __post_init__(self):
        require(len(self.branches) > 0, "branches must have at least one entry")
        for name in self.branches:
            require(name.isidentifier(), f"branches key ({name!r}) must be an identifier")

    def __hash__(self):
        return hash(tuple(self.branches.items()))

    def parts(self) -> dict[str, Simple]:
        """The mixers by field name."""
        return {f"branches.{name}.mixer": branch.mixer for name, branch in self.branches.items()}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where a branch cannot be built at the model width."""
        for name, mixer in self.parts().items():
            try:
                mixer.check(d_model)
            except ConfigError as error:
                raise ConfigError(f"{name}.{error}") from None


class ParallelMixer(nnx.Module):
    """sum over branches of out_multiplier * mixer(in_multiplier * x)."""

    def __init__(self, config: Parallel, d_model: int, **options):
        """options: those of every mixer: rngs, init_std, out_std, dtype."""
        self.config = config
        self.branches = nnx.Dict(
            {name: make_mixer(branch.mixer, d_model, **options) for name, branch in config.branches.items()}
        )

    @property
    def keeps_all(self) -> bool:
        """Some branch's cache grows with the number of tokens."""
        return any(mixer.keeps_all for mixer in self.branches.values())

    def __call__(self, x_BTD: jax.Array, segment_ids=None, positions=None):
        """[B, T, D] -> [B, T, D], or that and the statistics of the branches that have some."""
        outputs, stats = {}, {}
        for name, mixer in self.branches.items():
            y = mixer(self._input(name, x_BTD), segment_ids, positions)
            outputs[name], of_branch = y if isinstance(y, tuple) else (y, {})
            stats |= {f"{name}.{key}": value for key, value in of_branch.items()}
        y_BTD = self._merge(outputs)
        return (y_BTD, stats) if stats else y_BTD

    def init_cache(self, batch: int, max_len: int) -> dict[str, dict]:
        """The branches' caches by name."""
        return {name: mixer.init_cache(batch, max_len) for name, mixer in self.branches.items()}

    def extend(self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the caches after them; arguments as of every mixer."""
        outputs, new = {}, {}
        for name, mixer in self.branches.items():
            outputs[name], new[name] = mixer.extend(self._input(name, x_BTD), cache[name], length_B, real_BT, layer)
        return self._merge(outputs), new

    def _input(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return scaled(x_BTD, self.config.branches[name].in_multiplier)

    def _merge(self, outputs: dict[str, jax.Array]) -> jax.Array:
        return sum(scaled(y_BTD, self.config.branches[name].out_multiplier) for name, y_BTD in outputs.items())


def scaled(x: jax.Array, multiplier: float) -> jax.Array:
    """`x` times a constant, in its type; no operation where that is one."""
    return x if multiplier == 1 else x * multiplier
