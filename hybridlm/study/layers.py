# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study layers`: what each attention sublayer of a model is worth on a task, and a pattern with fewer.

A sublayer can be as it is (`full`), see the last tokens alone (`window`), or be left out (`none`). All such settings of
a model are one program: in the place of attention stand two of the same weights side by side, over all tokens and in a
window, of which the parameters of one or of both are zero, so that it adds nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.errors import require
from hybridlm.layers import Parallel
from hybridlm.layers.parallel import Branch
from hybridlm.model.config import ModelConfig
from hybridlm.model.init import abstract
from hybridlm.model.model import HybridLM
from hybridlm.model.pattern import groups, places

Setting = Literal["full", "window", "none"]
Settings = dict[int, Setting]
"""Of each attention sublayer, by its index in the pattern."""
Score = Callable[[HybridLM], float]
NEW_SYMBOLS = "wWvVuUtTsSrRqQxXyYzZ"
"""For windowed copies of attention, those that a model does not have."""


def attention_at(model: ModelConfig) -> tuple[int, ...]:
    """Indices in the pattern of the sublayers that are attention over all tokens. ConfigError where there are none."""
    found = tuple(i for i, symbol in enumerate(model.pattern) if _is_whole(model.blocks[symbol]))
    known = ", ".join(f"{symbol} {type(model.blocks[symbol]).__name__}" for symbol in dict.fromkeys(model.pattern))
    require(bool(found), f"model.pattern has no attention over all tokens that could have a window: {known}")
    return found


def _is_whole(block: Any) -> bool:
    """Attention that could have a window and has none; not inside of another block, nor reading ahead."""
    names = {f.name for f in fields(block)} if is_dataclass(block) else set()
    causal = getattr(block, "direction", "left_to_right") == type(block)().direction if "direction" in names else True
    return "window" in names and block.window is None and causal


class Dial(NamedTuple):
    """A model whose attention sublayers can be set; see the module."""

    graphdef: nnx.GraphDef
    params: dict
    model: ModelConfig
    """The model as it is."""
    at: tuple[int, ...]
    """Its attention sublayers."""

    def set(self, settings: Mapping[int, Setting]) -> HybridLM:
        """The model with these settings; sublayers that are not named are full."""
        groups_of = {g: dict(units) for g, units in self.params["groups"].items()}
        rows = places(self.model.pattern)
        for group, position in dict.fromkeys((rows[i].group, rows[i].position) for i in self.at):
            here = {rows[i].repeat: settings.get(i, "full") for i in self.at
                    if (rows[i].group, rows[i].position) == (group, position)}  # fmt: skip
            words = [here[repeat] for repeat in range(len(here))]
            sublayer = dict(groups_of[group][position])
            branches = sublayer["mixer"]["branches"]
            chosen = {name: _times(branch, [word == name for word in words]) for name, branch in branches.items()}
            sublayer["mixer"] = {**sublayer["mixer"], "branches": chosen}
            groups_of[group][position] = sublayer
        return nnx.merge(self.graphdef, self.params | {"groups": groups_of})


def _times(tree, keep: Sequence[bool]):
    """Parameters [repeats, ...] with those of repeats that are not kept as zeros."""
    mask = jnp.array(keep)
    return jax.tree.map(lambda a: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, 0), tree)


def dial(model: HybridLM, window: int) -> Dial:
    """A model with dials at its attention sublayers. window: tokens that a windowed one sees, itself included."""
    require(window >= 1, f"window ({window}) must be at least 1")
    config, at = model.config, attention_at(model.config)
    symbols = {config.pattern[i] for i in at}
    blocks = {symbol: _both(block, window) if symbol in symbols else block for symbol, block in config.blocks.items()}
    both = replace(config, blocks=blocks)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rows = places(config.pattern)
    groups_of = {g: dict(units) for g, units in params["groups"].items()}
    for group, position in dict.fromkeys((rows[i].group, rows[i].position) for i in at):
        sublayer = groups_of[group][position]
        twice = {"branches": {"full": sublayer["mixer"], "window": sublayer["mixer"]}}
        groups_of[group][position] = {**sublayer, "mixer": twice}
    return Dial(abstract(both).graphdef, params | {"groups": groups_of}, config, at)


def _both(block: Any, window: int) -> Parallel:
    return Parallel(branches={"full": Branch(block), "window": Branch(replace(block, window=window))})


@dataclass(frozen=True)
class Worth:
    """What an attention sublayer is worth: the score with it changed, all else as it is."""

    index: int
    """In the pattern."""
    without: float
    """It is left out."""
    windowed: float
    """It sees its window alone."""
    alone: float
    """It is as it was, and all others see their windows alone."""


@dataclass(frozen=True)
class Findings:
    """What a study of a model's layers finds."""

    window: int
    full: float
    """Score of the model as it is."""
    all_windowed: float
    """All attention sublayers see their windows alone."""
    none: float
    """All are left out."""
    worths: tuple[Worth, ...]
    settings: Settings
    """The proposal: as little attention as keeps the score."""
    proposed: float
    """Score of the proposal, with the weights as they are."""


def study_layers(model: HybridLM, score: Score, window: int, keep: float = 0.95) -> Findings:
    """Scores the model with its attention sublayers changed, one by one, and proposes which to keep.

    The proposal is found sublayer by sublayer, the one that is missed least first: it is left out where the score stays
    at or above keep times that of the whole model, else it gets a window where that does, else it stays. Each is tried
    on top of those before.
    """
    require(0 < keep <= 1, f"keep ({keep}) must be above 0 and at most 1")
    turned = dial(model, window)
    of = lambda settings: score(turned.set(settings))
    every = lambda word: {i: word for i in turned.at}
    full = of({})
    windowed = every("window")
    worths = tuple(Worth(i, of({i: "none"}), of({i: "window"}), of({**windowed, i: "full"})) for i in turned.at)
    order = sorted(worths, key=lambda worth: (worth.without, worth.windowed), reverse=True)
    settings: Settings = {}
    reached = full
    for worth in order:
        for word in ("none", "window"):
            tried = of({**settings, worth.index: word})
            if tried >= keep * full:
                settings[worth.index], reached = word, tried
                break
    return Findings(window, full, of(windowed), of(every("none")), worths, settings, reached)


def proposed(model: ModelConfig, settings: Mapping[int, Setting], window: int) -> tuple[ModelConfig, list[int]]:
    """(the model with these settings as a pattern of its own, of each of its sublayers the index in the old pattern).

    Windowed attention gets symbols of its own. ConfigError where nothing is left.
    """
    attention_at(model)
    kept = [i for i in range(len(model.pattern)) if settings.get(i, "full") != "none"]
    require(bool(kept), "nothing of the model would be left: ask it to keep more")
    windowed = list(dict.fromkeys(model.pattern[i] for i in kept if settings.get(i, "full") == "window"))
    names = dict(zip(windowed, (symbol for symbol in NEW_SYMBOLS if symbol not in model.blocks)))
    said = f"model.blocks has every symbol of {NEW_SYMBOLS}: none is left for windowed attention"
    require(len(names) == len(windowed), said)
    symbols = [names[model.pattern[i]] if settings.get(i, "full") == "window" else model.pattern[i] for i in kept]
    of_new = {new: old for old, new in names.items()}
    windows = {new: replace(_block(model, old), window=window) for new, old in of_new.items()}
    blocks = {s: block for s, block in (*model.blocks.items(), *windows.items()) if s in symbols}
    like = lambda listed: "".join(s for s in blocks if of_new.get(s, s) in listed)
    residual = model.normed_residual
    return replace(
        model, pattern="".join(symbols), blocks=blocks,
        norm_before=None if model.norm_before is None else like(model.norm_before), norm_after=like(model.norm_after),
        normed_residual={s: residual[of_new.get(s, s)] for s in blocks if of_new.get(s, s) in residual},
    ), kept  # fmt: skip


def _block(model: ModelConfig, symbol: str) -> Any:
    return model.blocks[symbol]


def carried(params: dict, pattern: str, to: str, kept: Sequence[int]) -> dict:
    """Parameters of a model with a pattern as those of one whose sublayers are some of its, windows aside.

    kept: of each symbol of `to` the index in `pattern`.
    """
    rows, sources = places(pattern), iter(kept)
    made: dict[tuple[int, int], list] = {}
    for place, source in zip(places(to), sources, strict=True):
        at = rows[source]
        of_depth = jax.tree.map(lambda a, n=at.repeat: a[n], params["groups"][at.group][at.position])
        made.setdefault((place.group, place.position), []).append(of_depth)
    stacked = {
        g: {p: jax.tree.map(lambda *a: jnp.stack(a), *made[g, p]) for p in range(len(group.unit))}
        for g, group in enumerate(groups(to))
    }
    shared = {"shared": {s: of for s, of in params["shared"].items() if s in to}} if "shared" in params else {}
    return params | {"groups": stacked} | shared
