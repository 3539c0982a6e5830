# SPDX-License-Identifier: Apache-2.0
"""From a family's tables and a model to the list of its published tensors and the pieces that each is made of."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flax.traverse_util import flatten_dict

from hybridlm.hf.axes import Move, Piece, parse, piece
from hybridlm.hf.family import FIRST, Family
from hybridlm.layers.params import ParamInfo
from hybridlm.model.config import ModelConfig
from hybridlm.model.init import abstract
from hybridlm.model.pattern import places


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
    """Names under which a checkpoint may hold a shared tensor again (a shared block's weights at its later depths, the
    output of a tied model) -> the name in `tensors`."""
    doubled: frozenset[str]
    """Of the copies those that are written: the published implementation does not share them."""
    infos: dict[str, ParamInfo]
    """Of the model's parameters, by dotted path."""
    family: Family
    n_layers: int
    """Published layers of the model."""

    def recut(self) -> Iterator[tuple[str, ...]]:
        """Names of tensors whose rows may be cut elsewhere in a file, in their order."""
        for layer in range(self.n_layers):
            for group in self.family.recut:
                names = tuple(self.family.layer.format(layer=layer) + name for name in group)
                if names[0] in self.tensors:
                    yield names

    def canonical(self, name: str) -> str:
        """The name in the tables of a tensor's name in a file."""
        return self.family.canonical(name, self.tensors)

    def skips(self, name: str) -> bool:
        """Whether a tensor, by its name in the tables, holds nothing to load."""
        layer = re.match(re.escape(self.family.layer).replace(re.escape("{layer}"), r"(\d+)"), name)
        behind = self.family.extra_layers and layer is not None and int(layer[1]) >= self.n_layers
        return behind or self.family.skips(name)

    def is_float32(self, path: str) -> bool:
        """Whether a parameter is float32 in every model: norms, biases, convolutions and recurrence parameters are."""
        return self.infos[path].kind not in ("matrix", "embedding")


@dataclass(frozen=True)
class _Depth:
    """A sublayer: what the placeholders of its names and the paths of its parameters are."""

    symbol: str
    """As the family has it."""
    own: str
    """As the model has it."""
    base: str
    """Of its parameters' paths."""
    repeat: int
    """Its index in stacked parameters."""
    layer: int
    """Index of the published layer."""
    first: int
    """That of the symbol's first layer."""
    use: int
    """Shared depths before it."""


def dotted(path: tuple[str | int, ...]) -> str:
    """A parameter's path in the model, as plans and tables write it."""
    return ".".join(map(str, path))


def make_plan(family: Family, config: ModelConfig, published_pattern: str) -> Plan:
    """The plan of a config's model.

    published_pattern: the config's pattern in the family's own symbols. ValueError where the tables leave a parameter
    out.
    """
    family = family if family.of_model is None else family.of_model(config, published_pattern)
    infos = {dotted(path): info for path, info in flatten_dict(abstract(config).info).items()}
    depths = _depths(family, config.pattern, published_pattern)
    tensors: dict[str, Tensor] = {}
    for name, specs in family.top.items():
        tensors |= _tensors(name, specs, infos, {})
    for depth in depths:
        for name, specs in family.layers[depth.symbol].items():
            layer = depth.first if name.startswith(FIRST) else depth.layer
            full = family.layer + name.removeprefix(FIRST)
            tensors |= _tensors(full, specs, infos, {"layer": layer, "use": depth.use}, depth)
    _check_cover(tensors, infos, family)
    copies = _copies(family, depths, tensors)
    doubled = set() if config.tie_embeddings else set(copies)
    if config.tie_embeddings:
        copies[family.output] = family.embedding
        doubled |= set() if family.ties else {family.output}
    return Plan(tensors, copies, frozenset(doubled), infos, family, depths[-1].layer + 1)


def _depths(family: Family, pattern: str, published_pattern: str) -> list[_Depth]:
    first: dict[str, int] = {}
    depths, uses, counted = [], 0, 0
    for symbol, own, place in zip(published_pattern, pattern, places(pattern), strict=True):
        layer = counted // family.per_layer
        counted += symbol not in family.more
        base = f"groups.{place.group}.{place.position}."
        depths.append(_Depth(symbol, own, base, place.repeat, layer, first.setdefault(symbol, layer), uses))
        uses += symbol in family.shared
    return depths


def _tensors(
    name: str, specs: str | list[str], infos: Mapping[str, ParamInfo], values: dict[str, int], at: _Depth | None = None
) -> dict[str, Tensor]:
    """The tensors of a table's entry, one for each index of the axis that its name counts; {} where the model has not
    all of its parameters. Where the name counts nothing, the rows come again for each index.

    values: of the name's placeholders; at: the sublayer, None outside of layers.
    """
    moves = [parse(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    paths = [_our_path(move.path, at) for move in moves]
    if not all(path in infos for path in paths):
        return {}
    stacked = [infos[path].stacked for path in paths]
    shapes = [infos[path].shape[of_stack:] for path, of_stack in zip(paths, stacked, strict=True)]
    repeats = [at.repeat if at and of_stack else None for of_stack in stacked]
    counted = moves[0].counted()
    n_counted = _n_counted(moves, shapes, infos, at) if counted else None
    indices = range(n_counted or 1)
    apart = counted is not None and f"{{{counted}}}" in name
    made = {}
    for of_tensor in [[i] for i in indices] if apart else [list(indices)]:
        full = name.format(**values, **({counted: of_tensor[0]} if apart else {}))
        parts = [(i, *part) for i in of_tensor for part in zip(moves, paths, shapes, repeats, strict=True)]
        pieces = tuple(piece(move, path, shape, repeat, i, n_counted) for i, move, path, shape, repeat in parts)
        rows = sum(part.shape[0] if part.shape else 1 for part in pieces)
        made[full] = Tensor(full, (rows, *pieces[0].shape[1:]) if pieces[0].shape else (), pieces)
    return made


def _n_counted(moves: list[Move], shapes: list[tuple], infos: Mapping[str, ParamInfo], at: _Depth | None) -> int:
    """Size of the counted axis."""
    for move, shape in zip(moves, shapes, strict=True):
        if move.count_of is not None:
            path, axis = move.count_of
            if not path:
                return axis
            info = infos[_our_path(path, at)]
            return info.shape[axis + info.stacked]
        if (move.counted(),) in move.right:
            return shape[move.right.index((move.counted(),))]
    raise ValueError(f"{moves[0].path}: nothing says how many {moves[0].counted()} there are")


def _our_path(path: str, at: _Depth | None) -> str:
    if at is None:
        return path
    return f"shared.{at.own}.{path.removeprefix('shared.')}" if path.startswith("shared.") else at.base + path


def _copies(family: Family, depths: list[_Depth], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of shared tensors at the later depths of their symbol -> those at its first."""
    copies = {}
    for depth in depths:
        if depth.symbol not in family.shared or depth.layer == depth.first:
            continue
        source, here = (family.layer.format(layer=layer) for layer in (depth.first, depth.layer))
        table = family.layers[depth.symbol]
        heads = {name.removeprefix(FIRST).split(".")[0] for name in table if name.startswith(FIRST)}
        for name in tensors:
            if name.startswith(tuple(f"{source}{head}." for head in heads)):
                copies[here + name.removeprefix(source)] = name
    return copies


def _check_cover(tensors: Mapping[str, Tensor], infos: Mapping[str, ParamInfo], family: Family) -> None:
    """ValueError unless every number of every parameter is in exactly one tensor."""
    sizes = dict.fromkeys(infos, 0)
    for tensor in tensors.values():
        for part in tensor.pieces:
            sizes[part.path] += math.prod(part.shape)
    wrong = [path for path, info in infos.items() if sizes[path] != math.prod(info.shape)]
    if wrong:
        raise ValueError(f"the tables of {family.model_type} leave out or repeat {', '.join(wrong[:8])}")
