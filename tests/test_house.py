# SPDX-License-Identifier: Apache-2.0
"""The layout that docs/contributing.md describes, held by reading the source: nothing is imported, nothing is run.

Imports inside of functions and under `TYPE_CHECKING` count like all others, and so do modules that are named by a
string (`"hybridlm.train.loop"`, `"pallas_kernels.ops.ssd.xla:ssd_xla"`), which is how modules are loaded late.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hybridlm", "pallas_kernels")

BESIDE_SHARDING = {"errors", "fields", "lazy", "shapes"}
LOW = BESIDE_SHARDING | {"sharding", "passing", "exchange"}
MIDDLE = LOW | {"layers", "model", "hf", "data", "optim"}
ABOVE_TRAIN = {"eval", "probes", "plan", "infer", "study"}
MAY_IMPORT = {
    "errors": set(),
    "fields": {"errors"},
    "lazy": set(),
    "shapes": set(),
    "sharding": BESIDE_SHARDING,
    "passing": set(),
    "exchange": BESIDE_SHARDING | {"passing", "sharding"},
    "storage": BESIDE_SHARDING,
    "cluster": BESIDE_SHARDING,
    "page": set(),
    "layers": LOW,
    "model": LOW | {"layers"},
    "hf": LOW | {"layers", "model", "storage"},
    "data": BESIDE_SHARDING | {"storage"},
    "optim": BESIDE_SHARDING,
    "config": MIDDLE | {"storage", "cluster"},
    "train": MIDDLE | {"config", "storage", "cluster"},
    **{wing: MIDDLE | {"config", "storage", "cluster", "train", "page"} for wing in ABOVE_TRAIN - {"study"}},
    "study": MIDDLE | {"config", "storage", "cluster", "train", "page"} | (ABOVE_TRAIN - {"study"}),
    "cli": MIDDLE | {"config", "storage", "cluster", "train", "page"} | ABOVE_TRAIN,
}
"""Wing of hybridlm -> the other wings that it may import; pallas_kernels may be imported by all."""

FRONT = {"hybridlm", "hybridlm.__main__", "hybridlm.moved"}
"""What stands before the wings and names them all."""

LINES = {"hybridlm": 400, "pallas_kernels": 800}
FUNCTION_LINES, CALL_LINES, PAGE_LINES = 80, 40, 200


# Reading ------------------------------------------------------------------------------------------------------------


@cache
def sources() -> dict[str, Path]:
    """Module name -> file, of both packages."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


@cache
def by_kind(module: str) -> dict[type, list[ast.AST]]:
    """Nodes of the tree by their class: a tree is walked once."""
    found = {}
    for node in ast.walk(tree(module)):
        found.setdefault(type(node), []).append(node)
    return found


def nodes(module: str, *kinds):
    return (node for kind in kinds for node in by_kind(module).get(kind, ()))


def at(module: str, node: ast.AST) -> str:
    return f"{sources()[module].relative_to(ROOT)}:{node.lineno}"


def strings(module: str):
    """String constants but for docstrings and the names of loggers."""
    skipped = {id(node.value) for node in nodes(module, ast.Expr)}
    for node in nodes(module, ast.Call):
        if getattr(node.func, "attr", "") == "getLogger":
            skipped |= {id(argument) for argument in node.args}
    return (n for n in nodes(module, ast.Constant) if isinstance(n.value, str) and id(n) not in skipped)


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the two packages that a module's text names: by import, anywhere in the file, or as a string."""
    found = set()
    for node in nodes(module, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            package = module if sources()[module].name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            found.add(inner if inner in sources() else base)
    found |= {node.value.partition(":")[0] for node in strings(module) if "." in node.value}
    return frozenset(found & sources().keys()) - {module}


def wing(module: str) -> str:
    """`layers` of hybridlm.layers.mlp."""
    return module.split(".")[1] if "." in module else ""


def in_circles() -> list[list[str]]:
    """Strongly connected groups of more than one module (Tarjan 1972)."""
    index, low, stack, groups = {}, {}, [], []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in imports(module):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = []
            while not group or group[-1] != module:
                group.append(stack.pop())
            groups.append(sorted(group))

    for module in sources():
        if module not in index:
            visit(module)
    return [group for group in groups if len(group) > 1]


def _members(node: ast.ClassDef) -> set[str]:
    """Names that a class body defines or assigns."""
    found = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    for item in node.body:
        for target in getattr(item, "targets", ()):
            found |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def block_classes() -> set[str]:
    """Blocks and their mixers: the classes of `layers` with the methods that the contract asks of them."""
    return {
        node.name
        for module in sources()
        if wing(module) == "layers" and module != "hybridlm.layers.block"
        for node in nodes(module, ast.ClassDef)
        if {"build", "mix"} & _members(node)
    }


@cache
def ops() -> set[str]:
    """Names of the ops: the folders of pallas_kernels/ops."""
    return {folder.name for folder in (ROOT / "pallas_kernels" / "ops").iterdir() if (folder / "__init__.py").exists()}


# Imports ------------------------------------------------------------------------------------------------------------


def test_no_import_circle():
    assert in_circles() == []


def test_wings_import_downwards():
    wrong = []
    for module in sources():
        if module.split(".")[0] != "hybridlm" or module in FRONT:
            continue
        here = wing(module)
        assert here in MAY_IMPORT, f"{module}: a wing that MAY_IMPORT does not know"
        for other in imports(module):
            if other.startswith("hybridlm.") and wing(other) != here and wing(other) not in MAY_IMPORT[here]:
                wrong.append(f"{module} -> {other}")
    assert wrong == []


def test_kernels_know_nothing_of_models():
    assert [m for m in sources() if m.startswith("pallas_kernels") and any("hybridlm" in i for i in imports(m))] == []


# Blocks and ops -----------------------------------------------------------------------------------------------------


def test_blocks_answer_for_themselves():
    """No question for the class of a block or mixer but where they live, and in families, which translate them."""
    classes, wrong = block_classes(), []
    assert {"Mamba2", "Mamba2Mixer", "AttentionMixer", "MoE"} <= classes
    for module in sources():
        if wing(module) == "layers" or module.startswith(("pallas_kernels", "hybridlm.hf.families")):
            continue
        for node in nodes(module, ast.Call, ast.Compare, ast.MatchClass):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") not in ("isinstance", "issubclass"):
                continue
            asked = node.args[1:] if isinstance(node, ast.Call) else [node]
            if isinstance(node, ast.Compare) and not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
                continue
            named = {n.id if isinstance(n, ast.Name) else n.attr for a in asked for n in ast.walk(a)
                     if isinstance(n, ast.Name | ast.Attribute)}  # fmt: skip
            if named & classes:
                wrong.append(f"{at(module, node)} asks for {', '.join(sorted(named & classes))}")
    assert wrong == []


def test_an_op_is_named_in_its_folder():
    """Elsewhere an op is a value, not a word: a new one must not need a row in somebody's table."""
    wrong = []
    for module in sources():
        if module in (*(f"pallas_kernels.{name}" for name in ("ops", "bench", "published", "oracle")), *PACKAGES):
            continue
        if module.startswith("hybridlm.hf."):
            continue  # published words, some of them the same
        for node in strings(module):
            name = node.value
            if name in ops() and not module.startswith(f"pallas_kernels.ops.{name}"):
                if not module.startswith("pallas_kernels") and name == "attention":
                    continue  # also a word for a part of a model
                wrong.append(f"{at(module, node)} {name!r}")
    assert wrong == []


def test_one_door():
    """Implementations are reached through the op's own folder alone."""
    wrong = []
    for module in sources():
        for other in imports(module):
            parts = other.split(".")
            if parts[:2] != ["pallas_kernels", "ops"] or len(parts) < 4:
                continue
            if module.startswith(".".join(parts[:3])) or module == "pallas_kernels":
                continue
            if parts[3] in ("reference", "xla", "gpu", "tpu"):
                wrong.append(f"{module} -> {other}")
    assert wrong == []


def _names(module: str):
    """(attribute or called name, node) of everything a module reads by name."""
    for node in nodes(module, ast.Attribute, ast.Name):
        yield (node.attr if isinstance(node, ast.Attribute) else node.id), node


def test_one_reader_of_the_platform():
    facts = {"default_backend", "device_kind", "compute_capability", "get_tpu_info", "is_tpu_device", "core_count"}
    wrong = []
    for module in sources():
        if module == "pallas_kernels.platform":
            continue
        wrong += [f"{at(module, node)} {name}" for name, node in _names(module) if name in facts]
        for node in nodes(module, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "platform" for side in sides):
                wrong.append(f"{at(module, node)} compares .platform")
    assert wrong == []


def test_one_reader_of_versions():
    """What depends on a version stands in compat.py; a version may be printed anywhere."""
    wrong = []
    for module in sources():
        if module == "pallas_kernels.compat":
            continue
        wrong += [f"{at(module, n)} {name}" for name, n in _names(module) if name == "__version_info__"]
        for node in nodes(module, ast.Compare):
            if any(isinstance(n, ast.Attribute) and n.attr == "__version__" for n in ast.walk(node)):
                wrong.append(f"{at(module, node)} compares a version")
        for node in nodes(module, ast.Call):
            root = node.args[0] if getattr(node.func, "id", "") == "hasattr" and node.args else None
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ("jax", "jnp", "pl", "pltpu", "plgpu", "nnx", "optax"):
                wrong.append(f"{at(module, node)} hasattr of {root.id}")
    assert wrong == []


# Sizes --------------------------------------------------------------------------------------------------------------


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def test_files_fit_a_screen_or_ten():
    counts = {m: len(file.read_text(encoding="utf-8").splitlines()) for m, file in sources().items()}
    assert {m: n for m, n in counts.items() if n > LINES[m.split(".")[0]]} == {}


def test_functions_are_short():
    limit = lambda name: CALL_LINES if name == "__call__" else FUNCTION_LINES
    wrong = [
        f"{at(module, node)} {node.name}: {length(node)} lines"
        for module in sources()
        for node in nodes(module, ast.FunctionDef, ast.AsyncFunctionDef)
        if length(node) > limit(node.name)
    ]
    assert wrong == []


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page):
    """Short, and figures are quoted from docs/results/: at most one a page, with the link."""
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= PAGE_LINES
    if "results" in page.relative_to(ROOT).parts:
        return
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    figure = r"\d[\d.,]*\s?(?:k\s)?(?:ms|us|tokens/s|TFLOP/s|GB/s|TB/s|% MFU|% of the roof)\b"
    quoted = re.findall(figure, prose)
    assert len(quoted) <= 1, f"figures belong under docs/results/: {quoted}"
    assert not quoted or "results/" in prose, f"{quoted[0]} without a link to its page under docs/results/"


def test_test_files_have_names_of_their_own():
    """Where their folder is no package: pytest imports two of one name as one, and runs one of them."""
    alone = [file.name for file in (ROOT / "tests").rglob("test_*.py") if not (file.parent / "__init__.py").exists()]
    assert [name for name in alone if alone.count(name) > 1] == []
