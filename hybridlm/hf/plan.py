# SPDX-License-Identifier: Apache-2.0
"""From a family's tables and a model to the list of its published tensors and the pieces that each is made of."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from flax import nnx

from hybridlm.hf.axes import Move, Piece, parse, piece
from hybridlm.hf.family import Family
from hybridlm.layers import Shared
from hybridlm.layers.params import ParamInfo, param_info
from hybridlm.model.config import ModelConfig
from hybridlm.model.pattern import places

OUTPUT = "lm_head.weight"
"""Name of the output projection in every family."""


@dataclass(frozen=True)
class Tensor:
    """A published tensor and what it holds."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Parts of parameters, each so many rows (axis 0) of the tensor, first to last."""

    def rows(self) -> Iterator[tuple[slice, Piece]]:
        """Each piece with its rows."""
        start = 0
        for part in self.pieces:
            rows = part.shape[0] if part.shape else 1
            yield slice(start, start + rows), part
            start += rows


@dataclass(frozen=True)
class Plan:
    """Everything that a checkpoint of a model holds."""

    tensors: dict[str, Tensor]
    """By published name."""
    copies: dict[str, str]
    """Names under which a checkpoint may hold a shared tensor again (a Shared block's weights at its later depths, the
    output of a tied model) -> the name in `tensors`."""
    doubled: frozenset[str]
    """Of the copies those that are written: the published implementation does not share them."""
    infos: dict[str, ParamInfo]
    """Of the model's parameters, by dotted path."""
    family: Family

    def canonical(self, name: str) -> str:
        """The name in the tables of a tensor's name in a file."""
        for old, new in self.family.aliases:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        base = self.family.layer.split(".")[0] + "."
        return base + name if name not in self.tensors and base + name in self.tensors else name

    def skipped(self, name: str) -> bool:
        """Whether the tensor holds nothing to load."""
        return any(re.search(pattern, name) for pattern in self.family.skipped)


def make_plan(family: Family, model: nnx.Module, published: ModelConfig) -> Plan:
    """The plan of a model, abstract or not.

    published: the model's config as the family writes it, whose pattern has the family's own symbols. ValueError
    where the tables leave a parameter out.
    """
    flat = nnx.to_flat_state(param_info(model))
    infos = {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}
    tensors: dict[str, Tensor] = {}
    copies: dict[str, str] = {}

    def add(name: str, specs: str | list[str], base: str, repeat: int | None, own: str, values: dict[str, int]):
        """base: prefix of our paths; own: our symbol, for `shared.`; values: what the name's placeholders are."""
        moves = [parse(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
        paths = [_our_path(move, base, own) for move in moves]
        if not all(path in infos for path in paths):
            return
        shapes = [infos[path].shape[1:] if infos[path].stacked else infos[path].shape for path in paths]
        counted = moves[0].counted()
        n = shapes[0][moves[0].right.index(counted)] if counted else 1
        for i in range(n):
            full = name.format(**values, **({counted: i} if counted else {}))
            pieces = tuple(
                piece(move, path, shape, repeat if infos[path].stacked else None, i)
                for move, path, shape in zip(moves, paths, shapes, strict=True)
            )
            rows = sum(part.shape[0] if part.shape else 1 for part in pieces)
            tensors[full] = Tensor(full, (rows, *pieces[0].shape[1:]) if pieces[0].shape else (), pieces)

    for name, specs in family.top.items():
        add(name, specs, "", None, "", {})
    first: dict[str, int] = {}
    uses = 0
    pattern = model.config.pattern
    for depth, (symbol, own, place) in enumerate(zip(published.pattern, pattern, places(pattern), strict=True)):
        layer = depth // family.per_layer
        values = {"layer": layer, "use": uses}
        of_first = values | {"layer": first.setdefault(symbol, layer)}
        for name, specs in family.layers[symbol].items():
            where, tail = (of_first, name.removeprefix("first:")) if name.startswith("first:") else (values, name)
            add(family.layer + tail, specs, f"groups.{place.group}.{place.position}.", place.repeat, own, where)
        uses += isinstance(published.blocks[symbol], Shared)
    for depth, symbol in enumerate(published.pattern):
        again = {"layer": depth // family.per_layer}
        if isinstance(published.blocks[symbol], Shared) and again["layer"] != first[symbol]:
            source = family.layer.format(layer=first[symbol])
            heads = {tail.removeprefix("first:").split(".")[0] for tail in family.layers[symbol] if "first:" in tail}
            for name in tensors:
                if name.startswith(tuple(f"{source}{head}." for head in heads)):
                    copies[family.layer.format(**again) + name.removeprefix(source)] = name
    _check_cover(tensors, infos, family)
    tied = model.config.tie_embeddings
    doubled = set() if tied else set(copies)
    if tied:
        copies[OUTPUT] = next(name for name, tensor in tensors.items() if tensor.pieces[0].path == "embedding")
        doubled |= set() if family.ties else {OUTPUT}
    return Plan(tensors, copies, frozenset(doubled), infos, family)


def _our_path(move: Move, base: str, own: str) -> str:
    return f"shared.{own}.{move.path.removeprefix('shared.')}" if move.path.startswith("shared.") else base + move.path


def _check_cover(tensors: dict[str, Tensor], infos: dict[str, ParamInfo], family: Family) -> None:
    """ValueError unless every number of every parameter is in exactly one tensor."""
    sizes = dict.fromkeys(infos, 0)
    for tensor in tensors.values():
        for part in tensor.pieces:
            sizes[part.path] += math.prod(part.shape)
    wrong = [path for path, info in infos.items() if sizes[path] != math.prod(info.shape)]
    if wrong:
        raise ValueError(f"the tables of {family.model_type} leave out or repeat {', '.join(wrong[:8])}")
