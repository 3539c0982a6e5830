# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: README.md, what the model is, how to load it, how it was trained."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.errors import cut
from hybridlm.hf.family import Family
from hybridlm.hf.inside import has_file
from hybridlm.model.config import ModelConfig

CARD = "README.md"
OURS = "<!-- model card written by hybridlm -->"
"""A line of every card; one without it is somebody's own, and stays."""
LICENSE = re.compile(r"^license:\s*['\"]?([a-zA-Z0-9][a-zA-Z0-9.-]{0,60})['\"]?\s*$", re.MULTILINE)
SHOWN = 400
"""Characters of a value."""
LONGEST = 1 << 20
"""Bytes of a card that are looked at."""


@dataclass(frozen=True)
class About:
    """What is known of a model beside its config, for its export."""

    training: Mapping[str, Any] = field(default_factory=dict)
    """Lines of the card: what, and how much of it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages, and what they were of."""
    command: str | None = None
    """What was typed to train it."""
    license: str | None = None
    """An identifier, as of the Hub; None: not known."""
    tokenizer: Path | None = None
    """Folder of a tokenizer that is written, in the place of one that comes with the checkpoint."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files of a tokenizer that is none on the disk, by name."""
    ids: Mapping[str, int] = field(default_factory=dict)
    """bos_token_id and eos_token_id of config.json."""


def is_kept(file: Path) -> bool:
    """Whether there is a card that is not ours."""
    return storage.exists(file) and OURS not in _text(file)


def license_of(folder: Path) -> str | None:
    """The license that a published folder's card names at its top, None where it names none."""
    text = _text(folder / CARD) if has_file(folder, CARD) else ""
    top = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = LICENSE.search(top)
    return None if found is None else found[1].lower()


def model_card(
    name: str, config: ModelConfig, family: Family, n_params: int, dtype: str, about: About, *,
    license: str | None, tokenizer: bool,
) -> str:  # fmt: skip
    """README.md of an export. name: of its folder; tokenizer: whether it has one."""
    own = bool(family.code(config))
    top = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    top |= {} if license is None else {"license": license}
    top["tags"] = ["hybridlm", *(["custom_code"] if own else [family.model_type])]
    blocks = {symbol: _said(config.blocks[symbol]) for symbol in dict.fromkeys(config.pattern)}
    model = {
        "parameters": f"{n_params:,}", "stored as": dtype, "width": config.d_model, "vocabulary": config.vocab_size,
        "sublayers": len(config.pattern), "pattern": _code(config.pattern),
        **{f"`{symbol}`" if symbol != "`" else "backtick": said for symbol, said in blocks.items()},
    }  # fmt: skip
    trust = ", trust_remote_code=True" if own else ""
    load = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if tokenizer else ''}", "",
        f"model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})",
    ]  # fmt: skip
    if tokenizer:
        load += [
            f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})",
            'inputs = tokenizer("The ", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    back = ["import hybridlm", "", "model = hybridlm.from_hf(FOLDER)  # in JAX, to train on"]
    own_code = "Its code, in plain PyTorch, is in this folder; it runs on the reader's side with `trust_remote_code`."
    parts = [
        "---", *(f"{key}: {json.dumps(value)}" for key, value in top.items()), "---", OURS, "", f"# {_plain(name)}", "",
        f"A hybrid language model, trained with hybridlm, in the format `{family.model_type}`.",
        *([own_code] if own else []), "", *_table(model), "", "## How to load it", "", *_fenced(load, "python"), "",
        *_fenced(back, "python"),
    ]  # fmt: skip
    if about.training:
        parts += ["", "## How it was trained", "", *_table(about.training)]
    if about.command:
        parts += ["", *_fenced(about.command.splitlines(), "sh")]
    if about.versions:
        parts += ["", "With " + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in about.versions.items()) + "."]
    return "\n".join(parts) + "\n"


def _said(block: Any) -> str:
    """A block in a table's cell: its class and the fields that are not as they start."""
    return _code(cut(repr_of(block), SHOWN), cell=True)


def repr_of(block: Any) -> str:
    """`Class(field=value, ...)` with the fields that differ from their defaults."""
    kind = type(block)
    shown = []
    for name, spec in kind.__dataclass_fields__.items():
        value = getattr(block, name)
        if value != spec.default:
            shown.append(f"{name}={repr_of(value) if hasattr(value, '__dataclass_fields__') else repr(value)}")
    return f"{kind.__name__}({', '.join(shown)})"


def _table(values: Mapping[str, Any]) -> list[str]:
    """Lines of a table of two columns; values are text, and nothing in them is markup but code spans of ours."""
    rows = [f"| {key} | {value if str(value).startswith('`') else _plain(value)} |" for key, value in values.items()]
    return ["| | |", "| --- | --- |", *rows]


def _plain(value: Any) -> str:
    """A value as text of one line, in which nothing is markup."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~$!&])", r"\\\1", cut(text, SHOWN))


def _code(text: str, cell: bool = True) -> str:
    """A code span: its fence is longer than any run of backticks inside."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if text[:1] == "`" or text[-1:] == "`" else ""
    text = text.replace("|", "\\|") if cell else text
    return f"{fence}{room}{text}{room}{fence}"


def _fenced(lines: list[str], language: str) -> list[str]:
    """A block of code, whose fence no line of it closes."""
    fence = "`" * (max([2, *(len(run) for line in lines for run in re.findall("`+", line))]) + 1)
    return [f"{fence}{language}", *lines, fence]


def _text(file: Path) -> str:
    """The start of a file, "" where it cannot be read."""
    try:
        return storage.read_range(file, 0, LONGEST).decode("utf-8", "replace")
    except OSError:
        return ""
