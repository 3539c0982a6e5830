# SPDX-License-Identifier: Apache-2.0
"""Code blocks of README.md and docs, and the small arrays that Python blocks may use without making them."""

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
LANGUAGES = ("python", "sh", "text", "yaml")
"""`python` runs, `sh` is parsed by the programs that it calls, `text` is output, formulas and excerpts, `yaml` is a
manifest, whose fields tests/pods/test_guides.py checks."""


@dataclass(frozen=True)
class Block:
    """A code block: its language ("" where none is given), the line of its first line of code, that code."""

    language: str
    line: int
    code: str


def pages() -> dict[str, Path]:
    """Path from the root, of README.md and every page of docs."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {file.relative_to(ROOT).as_posix(): file for file in files}


def find_blocks(text: str) -> list[Block]:
    """Fenced blocks, and indented ones with no language; text indented inside a list item is no block."""
    blocks, lines, in_list, blank = [], text.splitlines(), False, True
    at = 0
    while at < len(lines):
        line = lines[at]
        indent = len(line) - len(line.lstrip())
        if fence := re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line):
            end = at + 1
            while end < len(lines) and not re.match(rf"\s*{fence[1]}\s*$", lines[end]):
                end += 1
            code = [body[indent:] if not body[:indent].strip() else body for body in lines[at + 1 : end]]
            blocks.append(Block(fence[2], at + 2, "\n".join(code)))
            at, blank = end + 1, False
            continue
        if blank and line.strip() and indent >= (8 if in_list else 4):
            end = at
            while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) >= indent):
                end += 1
            blocks.append(Block("", at + 1, "\n".join(body[indent:] for body in lines[at:end]).rstrip()))
            at, blank = end, True
            continue
        if re.match(r"\s*([-*+]|\d+[.)])\s", line):
            in_list = True
        elif line.strip() and indent == 0:
            in_list = False
        blank = not line.strip()
        at += 1
    return blocks


SIZES = {"B": 2, "T": 16, "S": 16, "D": 16, "H": 4, "K": 2, "P": 8, "G": 2, "N": 8, "E": 4, "V": 256, "W": 4, "R": 2}
"""Of the legend's axes, see hybridlm.shapes; T divides by 8 devices."""


def array(name: str) -> jax.Array | None:
    """A small array of what its name says, `x_BTHP`; None where the name has no axis letters at its end."""
    stem, _, letters = name.rpartition("_")
    if not stem or not letters or not set(letters) <= set(SIZES):
        return None
    shape = tuple(SIZES[letter] for letter in letters)
    rng = np.random.default_rng(len(name))
    if stem in ("ids", "segment_ids"):
        return jnp.asarray(np.broadcast_to(1 + (np.arange(shape[-1]) >= 5), shape), jnp.int32)
    if stem in ("tokens", "targets"):
        return jnp.asarray(rng.integers(0, SIZES["V"], shape), jnp.int32)
    if stem == "positions":
        return jnp.asarray(np.broadcast_to(np.arange(shape[-1]), shape), jnp.int32)
    values = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"dt": jax.nn.softplus, "A": lambda a: -jnp.exp(a)}.get(stem, lambda a: a)(values)


def run_python(page: str, block: Block, namespace: dict) -> None:
    """Runs a block in the page's namespace; arrays named by the legend are there before it, if nothing made them.

    Tracebacks name the page and its line.
    """
    tree = ast.parse("\n" * (block.line - 1) + block.code, page)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in namespace and (value := array(node.id)) is not None:
            namespace[node.id] = value
    exec(compile(tree, page, "exec"), namespace)


def project() -> dict:
    """pyproject.toml's [project]."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
