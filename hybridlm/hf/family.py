# SPDX-License-Identifier: Apache-2.0
"""What a published family is: two functions between its config.json and ours, and tables of weight names."""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hybridlm.hf.axes import parse
from hybridlm.hf.keys import Keys
from hybridlm.model.config import ModelConfig

FIRST = "first:"
"""Starts the names of tensors that are at the first depth of a symbol and are shared by the others."""

Table = Mapping[str, str | list[str]]
"""Published name -> spec (see hybridlm.hf.axes), or specs whose rows stand one after the other in the tensor.

`{layer}` in a name is the layer's index. Names are put behind the family's layer prefix; those in `layers` that start
with `first:` behind that of the symbol's first layer, with `{use}` the number of shared depths before this one. Their
paths are those of a Sublayer; `shared.` is what the depths share. An entry is in force where the model has all
parameters that it names.
"""


class Constant(NamedTuple):
    """A tensor that follows from the config."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """Its values."""
    dtype: str = "float32"
    """Their type."""


@dataclass(frozen=True)
class Family:
    """A published family; one file of this package each."""

    model_type: str
    """As in config.json."""
    architecture: str
    """Class of the published implementation, for config.json."""
    read: Callable[[Keys], ModelConfig]
    """config.json as our config; ConfigError for what cannot be honoured."""
    write: Callable[[ModelConfig], dict]
    """Our config as config.json; what it cannot say is found by reading it again."""
    layers: Mapping[str, Table]
    """Weights of a sublayer by its symbol."""
    top: Table
    """Weights outside of layers."""
    layer: str = "model.layers.{layer}."
    """Prefix of a layer's weights."""
    per_layer: int = 1
    """Sublayers of one published layer."""
    more: str = ""
    """Symbols of sublayers beyond these, which stand before those of their layer."""
    ties: bool = True
    """The published implementation ties the output to the embedding where its config says so. Where it does not, a
    tied output is written as a tensor of its own too."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Prefixes that files may have, and what the tables have in their place."""
    recut: tuple[tuple[str, ...], ...] = ()
    """Names, behind the layer's prefix, of tensors whose rows stand one after the other and may be cut elsewhere."""
    extra_layers: bool = False
    """Files may have layers behind the last of the model, which predict further tokens; they are skipped."""
    other_names: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement) as of re.sub: what else a tensor may be called, where the tables have not that name."""
    written_as: str | None = None
    """model_type of the family that models of this one are written as; None: this one. Of models of more than text."""
    of_model: Callable[[ModelConfig, str], "Family"] | None = None
    """The family with the tables of a model, and its pattern in published symbols; None: all models have the same."""
    code: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}
    """Files of code that stand beside the tensors, by name: of a model that no library knows."""
    constants: Callable[[ModelConfig], Mapping[str, Constant]] = lambda config: {}
    """Tensors that follow from the config, in the family's symbols, by name: written, and skipped where files have
    them."""
    skipped: tuple[str, ...] = field(default=(r"rotary_emb\.inv_freq$",))
    """Patterns (re.search) of names of tensors that hold nothing to load."""

    @cached_property
    def shared(self) -> frozenset[str]:
        """Symbols whose depths share weights."""
        return frozenset(s for s, table in self.layers.items() if any(name.startswith(FIRST) for name in table))

    @cached_property
    def embedding(self) -> str:
        """Name of the embedding."""
        return next(name for name, spec in self.top.items() if parse(spec).path == "embedding")

    @cached_property
    def output(self) -> str:
        """Name of the output projection."""
        return next(name for name, spec in self.top.items() if parse(spec).path == "output")

    def canonical(self, name: str, known: Container[str]) -> str:
        """The name in the tables of a tensor's name in a file. known: names that the tables give."""
        for old, new in self.aliases:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        full = f"{self.layer.split('.')[0]}.{name}"  # files of the inner model alone leave the prefix out
        name = full if name not in known and full in known else name
        others = [re.sub(pattern, other, name) for pattern, other in self.other_names]
        return name if name in known else next((other for other in others if other in known), name)

    def skips(self, name: str) -> bool:
        """Whether a tensor holds nothing to load."""
        return any(re.search(pattern, name) for pattern in self.skipped)
