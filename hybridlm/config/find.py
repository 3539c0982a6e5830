# SPDX-License-Identifier: Apache-2.0
"""Configs by name and file."""

import ast
import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridlm.config import Config
from hybridlm.config.overrides import override
from hybridlm.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent


def config_folders() -> list[Path]:
    """Where configs are found by name: ./configs, the checkout's, and those inside an installed package."""
    return [Path("configs"), PACKAGE.parent / "configs", PACKAGE / "configs"]


def config_names() -> list[str]:
    """Names of all configs that can be given to --config; those of a file with sizes are `file:size`."""
    names = []
    for stem, sizes in config_families().items():
        names += [f"{stem}:{size}" for size in sizes] or [stem]
    return sorted(names)


def pod_names() -> list[str]:
    """The same for the pods that configs come with settings for: `hybrid_8b:v5p:8x8x16`."""
    return sorted(f"{stem}:{pod}" for stem, text in _config_files().items() for pod in _words(text, "PODS"))


def config_families() -> dict[str, list[str]]:
    """Name of each config -> its sizes, none where it has none."""
    files = {stem: text for stem, text in _config_files().items() if "def config(" in text}
    return {stem: _words(text, "SIZES") if "def config(size" in text else [] for stem, text in sorted(files.items())}


def _config_files() -> dict[str, str]:
    """Name -> text of the file."""
    files: dict[str, Path] = {}
    for folder in reversed(config_folders()):
        files |= {f.stem: f for f in folder.glob("*.py") if f.is_file() and not f.name.startswith("_")}
    return {stem: file.read_text(encoding="utf-8", errors="replace") for stem, file in files.items()}


def load_config(name_or_path: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """The config of a name (`hybrid_tiny`, `mamba2:130m`) or a file (`path/to/file.py`), with leaves replaced.

    overrides: command-line words (`["--model.d_model=512", "--optim.lr", "3e-4"]`, the dashes optional) or a mapping
    from dotted names to values (`{"model.d_model": 512}`). Raises ConfigError, one line, for an unknown name or key, a
    value of the wrong type, and a combination that cannot work.
    """
    return override(read_config(name_or_path), overrides)


def load_to_train(name_or_path: str, overrides: Sequence[str]) -> Config:
    """load_config, and a ConfigError where it leaves out what only the user can say."""
    config = load_config(name_or_path, overrides)
    if config.init.hf == "":
        raise ConfigError("init.hf ('') must be the folder of a published checkpoint: give --init.hf=FOLDER")
    if not config.data.tokenizer:
        where = f"{config.init.hf} has no tokenizer.json" if config.init.hf else "data.tokenizer ('') is empty"
        raise ConfigError(f"{where}: give --data.tokenizer=PATH of one, or byte")
    return config


def read_config(name_or_path: str) -> Config:
    """The config of a name or a file as it stands; behind a `:` one of the file's sizes, or a pod that it is set for.

    A pod of a file with sizes is named by both, SIZE:POD.
    """
    stem, colon, words = name_or_path.partition(":")
    path = Path(stem)
    if path.suffix != ".py":
        files = [f for folder in config_folders() if (f := folder / f"{stem}.py").is_file()]
        if not files:
            near = difflib.get_close_matches(name_or_path, config_names() + pod_names(), n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"no config named {name_or_path!r}: {hint}--help lists all; a file is named as FILE.py")
        path = files[0]
    if not path.is_file():
        raise ConfigError(f"no config file {stem}")
    try:
        module = _module(path)
        if not callable(getattr(module, "config", None)):
            raise ConfigError("it has no function config(), which gives a hybridlm.config.Config")
        sizes, pods = getattr(module, "SIZES", None), getattr(module, "PODS", {})
        pod = pods.get(words)
        size = words.partition(":")[0] if pod else words
        if sizes is not None and size not in sizes:
            raise ConfigError(
                f"size ({size or 'none'}) must be one of {', '.join(sizes)}: {path.stem}:{next(iter(sizes))}"
            )
        if sizes is None and colon and not pods:
            raise ConfigError(f"size ({words}) is given, but this config has no sizes")
        if sizes is None and colon and pod is None:
            raise ConfigError(
                f"pod ({words}) must be one of {', '.join(pods)}; for another one give --config {path.stem} with "
                "--mesh.fsdp, --data.batch_size and --optim.accumulate"
            )
        config = module.config() if sizes is None else module.config(size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever a user's file raises becomes one line that names the file
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: config() returned {type(config).__name__}, not hybridlm.config.Config")
    return config if pod is None else pod.set_in(config)


def _module(path: Path):
    spec: Any = importlib.util.spec_from_file_location(f"_hybridlm_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _words(text: str, name: str) -> list[str]:
    """Keys of a table of a config file, read and not run: nothing is executed but the file that is asked for."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # asking for it says why
        return []
    for statement in statements:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(statement, "value", None)
            parts = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return []
