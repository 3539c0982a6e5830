# SPDX-License-Identifier: Apache-2.0
"""What a run's folder says of its model, for the model card of an export, and the tokenizer that goes with it."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.data.as_files import files_of
from hybridlm.data.held_out import NAMED
from hybridlm.data.tokenizer import BUILT_IN
from hybridlm.errors import ConfigError
from hybridlm.hf.card import About
from hybridlm.train.metrics_log import read_metrics
from hybridlm.train.tokenizer_copy import FILES, IDENTITY, kept_tokenizer

ABSOLUTE = re.compile(r"^(/|~|\w+://)")
"""Paths that say where on a machine, or in which bucket, something lies."""


def about_run(run: Path, config: Config, step: int, record: dict, like: Path | None) -> About:
    """What a run's folder says of its checkpoint of a step.

    record: of the loop, in the checkpoint. like: the published folder whose tokenizer is carried along; the run's own
    goes in its place where the two differ.
    """
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] <= step]
    starts = [r for r in records if r["kind"] == "start"]
    start = starts[-1] if starts else {}
    command, versions = start.get("command"), start.get("versions")
    found = {
        "training": _training(config, step, records),
        "command": _without_places(command) if isinstance(command, str) else None,
        "versions": {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
    }
    folder = run / "tokenizer"
    kept = storage.exists(folder / FILES[0])
    if like is not None and not _of_its_own(folder if kept else None, config, like):
        return About(**found)
    try:
        tokenizer = kept_tokenizer(config.data, run, record.get(IDENTITY))
    except ConfigError:  # of a file that is gone: the model is written without one
        return About(**found)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    same = like is not None and kept and not _differ(folder / FILES[0], like / FILES[0])
    ids = {} if same else {name: i for name, i in ids.items() if i is not None}
    return About(**found, tokenizer=folder if kept else None, files={} if kept else files_of(tokenizer), ids=ids)


def _of_its_own(kept: Path | None, config: Config, like: Path) -> bool:
    """Whether a run's tokenizer, or its chat template, is another one than the published folder's. kept: its copy."""
    if kept is None:
        return config.data.tokenizer in BUILT_IN and storage.exists(like / FILES[0])
    return any(storage.exists(kept / name) and _differ(kept / name, like / name) for name in FILES)


def _training(config: Config, step: int, records: list[dict]) -> dict[str, Any]:
    """Lines of the card."""
    data, optim = config.data, config.optim
    lines = {"data": ", ".join(map(_name, data.path)) or "Python's standard library"} if step else {}
    if config.init.hf or config.init.run:
        lines["started from"] = _name(config.init.hf or config.init.run)
    if not step:
        return lines
    start = next((r for r in reversed(records) if r["kind"] == "start"), {})
    share = start.get("answers_share")
    if data.format == "chat" or isinstance(share, float):  # shards and mixtures hold conversations whatever the format
        told = f", {share:.1%} of the tokens" if isinstance(share, float) else ""
        lines["conversations"] = f"answers alone were trained on{told}"
    if config.lora.on:
        lines["adapters"] = f"of rank {config.lora.rank}, merged; all other parameters are those that it started from"
    if config.quantize.on:
        lines["rounding"] = f"matrices were trained to be rounded to {config.quantize.weights}"
    last = lambda kind, name: next((r[name] for r in reversed(records) if r["kind"] == kind and name in r), None)
    tokens = last("train", "tokens")
    lines |= {
        "steps": f"{step:,}",
        "tokens": f"{step * data.batch_size * data.seq_len if tokens is None else tokens:,}",
        "rows": f"{data.batch_size} of {data.seq_len} tokens a step",
        "optimizer": f"{type(optim.rule).__name__}, lr {optim.lr:g}, schedule {type(optim.schedule).__name__}",
    }
    for kind, word in (("val", "validation"), ("train", "training")):
        values = {"loss": last(kind, "loss"), "bits per byte": last(kind, "bits_per_byte")}
        lines |= {f"{word} {name}": f"{v:.4f}" for name, v in values.items() if isinstance(v, int | float)}
    return lines


def _without_places(command: str) -> str:
    """A command in which absolute paths are their last names: what others see of it."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    return shlex.join(_without_place(word) for word in words)


def _without_place(word: str) -> str:
    """One word, perhaps --name=value."""
    name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if named := NAMED.fullmatch(value):  # a held-out set
        name, equals, value = f"{name}{equals}{named[1]}", "=", named[2]
    return f"{name}{equals}{_name(value) if ABSOLUTE.match(value) else value}"


def _name(path: str) -> str:
    """The last name of a path; of a pattern that of its folder, too."""
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", "~")]
    return "/".join(parts[-2:] if parts and any(c in parts[-1] for c in "*?[") else parts[-1:])


def _differ(a: Path, b: Path) -> bool:
    """Whether two files hold other bytes, or the second is not there."""
    contents: Iterable[bytes] = (storage.read_bytes(file) if storage.exists(file) else b"" for file in (a, b))
    first, second = contents
    return first != second
