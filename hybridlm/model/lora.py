# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of a model's matrices (Hu et al. 2021, "LoRA"): W + alpha / rank * A B, where W stays as it is.

An adapter belongs to a matrix as it is stored, whatever layer multiplies with it: A has the matrix's contracted axes
and R in the place of the others, B has R in the place of the contracted ones; both keep the axes of stacked depths and
of fused matrices, and so are split over devices as the matrix is. Adapters are nested dicts like the parameters, with
{"lora_a": A, "lora_b": B} where an adapted matrix stands and nothing where another one does.

Axis letter: R rank.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from string import ascii_letters
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.errors import require
from hybridlm.layers.params import ParamInfo
from hybridlm.model.config import LoraConfig, ModelConfig
from hybridlm.model.init import abstract, stacked
from hybridlm.model.pattern import groups, spots

A, B = "lora_a", "lora_b"
LOW = "lora"
"""Key, beside those of the parameters, of the adapters that gradients are taken of."""


class Spec(NamedTuple):
    """How an adapter goes with its matrix."""

    a: ParamInfo
    b: ParamInfo
    letters: tuple[str, str, str]
    """Of the axes of the matrix, of A and of B, for einsums; without that of stacked depths."""


Flat = dict[tuple, Any]
"""The leaves of a nested dict by their paths."""


def adapters(config: ModelConfig, lora: LoraConfig) -> dict[tuple, Spec]:
    """The adapters of a model by the paths of their matrices among its parameters.

    Raises ConfigError where lora names no matrix, or its rank is above the smaller side of every one.
    """
    return _adapters(config, lora, abstract(config).info)


def of_program(config: ModelConfig, lora: LoraConfig) -> dict[tuple, Spec]:
    """The same of the stacked model."""
    return _adapters(config, lora, stacked(config).info)


def _adapters(config: ModelConfig, lora: LoraConfig, info: dict) -> dict[tuple, Spec]:
    lora.check(config.pattern)
    symbols = lora.blocks or tuple(dict.fromkeys(config.pattern))
    matrices = {
        path: leaf for path, leaf in flat(info).items() if leaf.kind == "matrix" and _symbol(config, path) in symbols
    }
    named = {path: leaf for path, leaf in matrices.items() if fits(path, lora.matrices)}
    names = sorted({name_of(path) for path in matrices})
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    require(
        bool(named),
        f"lora.matrices ({' '.join(lora.matrices)}) fit no matrix of lora.blocks ({' '.join(symbols)}), "
        f"which have {shown or 'none'}",
    )
    widest = max(_sides(leaf) for leaf in named.values())
    require(lora.rank <= widest, f"lora.rank ({lora.rank}) is above the smaller side of every matrix: at most {widest}")
    return {path: _spec(leaf, lora.rank) for path, leaf in named.items()}


def _symbol(config: ModelConfig, path: tuple) -> str:
    """The pattern's symbol that a parameter belongs to; "" for none."""
    if path[0] == "shared":
        return path[1]
    if path[0] != "groups":
        return ""
    if isinstance(path[2], int):
        return groups(config.pattern)[path[1]].unit[path[2]]
    return spots(config.pattern, config.unroll or 1)[path[1]].symbol


def name_of(path: tuple) -> str:
    """What a matrix is called: `mixer.in_zx`, `shared.attention.qkv`."""
    behind = path[2:] if path[0] == "shared" else tuple(part for part in path[1:] if isinstance(part, str))
    return ".".join(map(str, ("shared", *behind) if path[0] == "shared" else behind))


def fits(path: tuple, patterns: tuple[str, ...]) -> bool:
    name = name_of(path)
    return any(fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[2], p) for p in patterns)


def _split(info: ParamInfo) -> tuple[list[int], list[int]]:
    """(contracted axes, the others but fused ones), without the stacked one."""
    free = [axis for axis in range(len(info.axes)) if axis not in info.fused_axes]
    return free[: info.n_in], free[info.n_in :]


def _sides(info: ParamInfo) -> int:
    """The smaller side of a matrix."""
    shape = info.shape[1:] if info.stacked else info.shape
    return min(math.prod(shape[axis] for axis in axes) for axes in _split(info))


def _spec(info: ParamInfo, rank: int) -> Spec:
    ins, outs = _split(info)
    letters, R = ascii_letters[: len(info.axes)], "Z"
    rank = min(rank, _sides(info))
    shape, front = (info.shape[1:], info.shape[:1]) if info.stacked else (info.shape, ())
    axes_a = [axis for axis in range(len(info.axes)) if axis not in outs]
    places_b = [axis for axis in range(len(info.axes)) if axis not in ins[1:]]  # R where the first contracted one is
    of_b = [None if axis == ins[0] else axis for axis in places_b]

    def made(axes: list[int | None], n_in: int) -> ParamInfo:
        return replace(
            info, n_in=n_in, axes=tuple(None if axis is None else info.axes[axis] for axis in axes),
            fused_axes=tuple(i for i, axis in enumerate(axes) if axis in info.fused_axes),
            shape=(*front, *(rank if axis is None else shape[axis] for axis in axes)),
        )  # fmt: skip

    of_A, of_B = ("".join(R if axis is None else letters[axis] for axis in axes) for axes in ([*axes_a, None], of_b))
    return Spec(made([*axes_a, None], len(ins)), made(of_b, 1), (letters, of_A, of_B))


def nested(specs: dict[tuple, Spec]) -> dict:
    """ParamInfo of the adapters, a tree like them."""
    return unflat({(*path, name): leaf for path, spec in specs.items() for name, leaf in ((A, spec.a), (B, spec.b))})


def draw(specs: dict[tuple, Spec], key: jax.Array) -> dict:
    """New adapters: A of variance one over the contracted size, B zero, so that the model is what it was."""
    drawn: Flat = {}
    for number, path in enumerate(sorted(specs, key=str)):
        a, b, _ = specs[path]
        shape = a.shape[1:] if a.stacked else a.shape
        n = math.prod(shape[axis] for axis in range(len(a.axes) - 1) if axis not in a.fused_axes)
        drawn[*path, A] = jax.random.normal(jax.random.fold_in(key, number), a.shape, jnp.float32) / math.sqrt(n)
        drawn[*path, B] = jnp.zeros(b.shape, jnp.float32)
    return unflat(drawn)


def merge(params: dict, low: dict, specs: dict[tuple, Spec], scale: float) -> dict:
    """Parameters with the adapters in them, in float32; a tree that has some of the parameters will do."""
    params, low = flat(params), flat(low)
    for path, spec in specs.items():
        if path in params and (*path, A) in low:
            params[path] = params[path] + scale * product(low[*path, A], low[*path, B], spec)
    return unflat(params)


def product(a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    """A B in the axes of the matrix, float32."""
    w, of_a, of_b = spec.letters
    return jnp.einsum(f"...{of_a},...{of_b}->...{w}", a, b, precision="highest")


def pull(dw: dict, low: dict, specs: dict[tuple, Spec], scale: float) -> dict:
    """Gradients of adapters from those of the merged matrices."""
    dw, low, found = flat(dw), flat(low), {}
    for path, spec in specs.items():
        w, of_a, of_b = spec.letters
        g = dw[path].astype(jnp.float32)
        found[*path, A] = scale * jnp.einsum(f"...{w},...{of_b}->...{of_a}", g, low[*path, B], precision="highest")
        found[*path, B] = scale * jnp.einsum(f"...{of_a},...{w}->...{of_b}", low[*path, A], g, precision="highest")
    return unflat(found)


def flat(tree: dict) -> Flat:
    """The leaves by their paths."""

    def walk(node, path: tuple) -> Iterator[tuple[tuple, Any]]:
        for name, child in node.items():
            if isinstance(child, dict):
                yield from walk(child, (*path, name))
            else:
                yield (*path, name), child

    return dict(walk(tree, ()))


def unflat(leaves: Flat) -> dict:
    """The inverse of `flat`."""
    tree: dict = {}
    for (*above, name), leaf in leaves.items():
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree
