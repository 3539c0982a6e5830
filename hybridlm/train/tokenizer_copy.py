# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a run: its own copy, and its identity in every checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path

from hybridlm.data import load_tokenizer
from hybridlm.data.config import DataConfig
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError, RunError

IDENTITY = "tokenizer"
"""Key of the loop's record that holds the fingerprint of the tokenizer, which changes when the ids of a text could."""
FILES = ("tokenizer.json", "tokenizer_config.json")


def keep_tokenizer(data: DataConfig, run: Path) -> None:
    """Copies the tokenizer's files to `tokenizer/` in the run's folder, unless they are there. RunError: cannot."""
    copy = run / "tokenizer"
    if data.tokenizer == "byte" or (copy / FILES[0]).exists():
        return
    given = Path(data.tokenizer).expanduser()
    source = given / FILES[0] if given.is_dir() else given
    part = run / "tokenizer.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        shutil.copyfile(source, part / FILES[0])
        if source.with_name(FILES[1]).is_file():
            shutil.copyfile(source.with_name(FILES[1]), part / FILES[1])
        shutil.rmtree(copy, ignore_errors=True)  # without a tokenizer.json it was none
        part.replace(copy)
    except OSError as error:
        raise RunError(f"cannot copy the tokenizer {source} to {copy}: {error.strerror}") from error


def kept_tokenizer(data: DataConfig, run: Path, identity: str | None) -> Tokenizer:
    """The tokenizer that a run was trained with: its own copy, or where it has none the file that its config names.

    identity: what a checkpoint says that it is; None: one of before they said so. ConfigError where it is another.
    """
    copy = run / "tokenizer" / FILES[0]
    data = replace(data, tokenizer=str(copy)) if data.tokenizer != "byte" and copy.is_file() else data
    return check_tokenizer(data, identity, run)


def check_tokenizer(data: DataConfig, identity: str | None, run: Path) -> Tokenizer:
    """The tokenizer of a config; ConfigError where it is not the one that the run was trained with."""
    tokenizer = load_tokenizer(data.tokenizer, bos=data.bos_token, eos=data.eos_token)
    if identity is not None and tokenizer.fingerprint != identity:
        raise ConfigError(
            f"data.tokenizer ({data.tokenizer}) is not the tokenizer that the run in {run} was trained with "
            f"({tokenizer.fingerprint} here, {identity} in its checkpoint): give that one"
        )
    return tokenizer
