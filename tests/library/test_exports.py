# SPDX-License-Identifier: Apache-2.0
"""What the packages export: as docs/library.md lists it, as type checkers see it, made and called alone."""

import ast
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybridlm
import hybridlm.hf
import hybridlm.layers
import pallas_kernels
from hybridlm.layers import BLOCKS, Shared
from hybridlm.layers.block import Make
from pallas_kernels.ops import NAMES
from tests.model.model_support import VARIANTS

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs/library.md").read_text()
EXAMPLES = {type(block): block for block in reversed(VARIANTS.values())}
"""The first example of each block."""


def listed(text: str) -> set[str]:
    return set(re.findall(r"`([A-Za-z_]\w*)`", text))


@pytest.mark.parametrize("package", [hybridlm, pallas_kernels], ids=lambda package: package.__name__)
def test_the_page_lists_what_a_package_exports(package):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{package.__name__}` |"))
    assert listed(row) - {package.__name__} == set(package.__all__)


def test_the_page_lists_what_layers_exports():
    section = PAGE.partition("## Layers")[2].partition("\n## ")[0]
    prose = re.sub(r"(?s)```.*?```", "", section)
    not_exported = {"rngs", "init_std", "out_std", "dtype"}
    assert listed(prose) - not_exported == set(hybridlm.layers.__all__)


@pytest.mark.parametrize("package", [hybridlm, hybridlm.hf, hybridlm.layers, pallas_kernels], ids=lambda p: p.__name__)
def test_exported_names_are_there(package):
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    assert set(package.__all__) <= set(dir(package))
    assert (Path(inspect.getfile(package)).parent / "py.typed").exists() or package.__name__.startswith("hybridlm.")


@pytest.mark.parametrize("package", [hybridlm, hybridlm.hf], ids=lambda package: package.__name__)
def test_type_checkers_see_what_is_exported(package):
    """Names that are imported when first used stand in a second list, for type checkers, from the same modules."""
    tree = ast.parse(Path(inspect.getfile(package)).read_text())
    guarded = [
        node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    imports = [node for branch in guarded for node in branch.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert seen == package._EXPORTS


def test_the_stub_has_the_signatures_of_the_ops():
    """pallas_kernels/__init__.pyi: names, order, kinds and defaults of arguments, in every overload."""
    tree = ast.parse((ROOT / "pallas_kernels/__init__.pyi").read_text())
    found: dict[str, list] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node.args)
    assert set(found) == set(NAMES)
    for name, overloads in found.items():
        parameters = inspect.signature(getattr(pallas_kernels, name)).parameters.values()
        asks = any(p.name == "return_final_state" for p in parameters)
        assert len(overloads) == (3 if asks else 1), name
        for args in overloads:
            positional = [a.arg for a in args.args]
            keywords = [a.arg for a in args.kwonlyargs] + ([args.kwarg.arg] if args.kwarg else [])
            assert positional == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD], name
            assert keywords == [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)], name
            defaults = dict(zip(positional[len(positional) - len(args.defaults) :], args.defaults, strict=True))
            defaults |= {k: d for k, d in zip(keywords, args.kw_defaults, strict=False) if d is not None}
            for p in parameters:
                if p.name != "return_final_state":
                    assert (p.name in defaults) == (p.default is not p.empty), (name, p.name)
                    assert p.default is p.empty or ast.literal_eval(defaults[p.name]) == p.default, (name, p.name)


def test_every_block_has_an_example():
    assert set(EXAMPLES) == set(BLOCKS)


@pytest.mark.parametrize("kind", [block for block in BLOCKS if block is not Shared], ids=lambda kind: kind.__name__)
def test_mixers_are_made_alone(kind):
    """Of the class that is exported, with the block, the width and `rngs`; called on an array of either library."""
    block, x_BTD, ids_BT = EXAMPLES[kind], np.ones((2, 6, 16), np.float32), np.ones((2, 6), np.int32)
    built = nnx.eval_shape(lambda: block.build(16, Make(nnx.Rngs(0))))
    assert type(built).__name__ in hybridlm.layers.__all__
    assert f"| `{kind.__name__}` | `{type(built).__name__}` |" in PAGE
    made = nnx.eval_shape(lambda: getattr(hybridlm.layers, type(built).__name__)(block, 16, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(made) == nnx.graphdef(built)
    result = jax.eval_shape(lambda mixer: mixer(x_BTD, segment_ids=ids_BT), made)
    y_BTD = result[0] if isinstance(result, tuple) else result
    assert (y_BTD.shape, y_BTD.dtype) == ((2, 6, 16), jnp.bfloat16)


@pytest.mark.parametrize("name", ["SharedTransformer", "SharedLink"])
def test_parts_of_shared_blocks_are_made_alone(name):
    make = lambda: getattr(hybridlm.layers, name)(EXAMPLES[Shared], 16, rngs=nnx.Rngs(0))
    assert jax.tree.leaves(nnx.state(nnx.eval_shape(make)))
