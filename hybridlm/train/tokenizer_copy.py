# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a run: its own copy, and its identity in every checkpoint."""

from dataclasses import replace
from pathlib import Path

from hybridlm import storage
from hybridlm.data import load_tokenizer
from hybridlm.data.as_files import files_of
from hybridlm.data.config import DataConfig
from hybridlm.data.tokenizer import BESIDE, BUILT_IN, Tokenizer
from hybridlm.errors import ConfigError, RunError

IDENTITY = "tokenizer"
"""Key of the loop's record that holds the fingerprint of the tokenizer, which changes when the ids of a text could."""
FILES = ("tokenizer.json", *BESIDE)


def keep_tokenizer(data: DataConfig, run: Path) -> None:
    """Copies the tokenizer's files, those of its chat template with them, to `tokenizer/` in the run's folder, unless
    they are there. RunError: cannot.

    tokenizer.json comes last: without it, the folder holds no tokenizer.
    """
    copy = run / "tokenizer"
    if data.tokenizer in ("", *BUILT_IN) or storage.exists(copy / FILES[0]):
        return
    given = storage.as_path(data.tokenizer)
    source = given / FILES[0] if given.is_dir() else given
    try:
        storage.make_folder(copy)
        for name in FILES[1:]:
            if storage.exists(source.with_name(name)):
                storage.copy(source.with_name(name), copy / name)
        storage.copy(source, copy / FILES[0])
    except OSError as error:
        raise RunError(f"cannot copy the tokenizer {source} to {copy}: {error.strerror}") from error


def kept_tokenizer(data: DataConfig, run: Path, identity: str | None) -> Tokenizer:
    """The tokenizer that a run was trained with: its own copy, or where it has none the file that its config names.

    identity: what a checkpoint says that it is; None: one of before they said so. ConfigError where it is another.
    """
    copy = run / "tokenizer" / FILES[0]
    data = replace(data, tokenizer=str(copy)) if data.tokenizer not in BUILT_IN and storage.exists(copy) else data
    return check_tokenizer(data, identity, run)


def check_tokenizer(data: DataConfig, identity: str | None, run: Path) -> Tokenizer:
    """The tokenizer of a config; ConfigError where it is not the one that the run was trained with."""
    tokenizer = load_tokenizer(data.tokenizer, bos=data.bos_token, eos=data.eos_token)
    if identity is not None and tokenizer.fingerprint != identity:
        copy = run / "tokenizer"
        others = data.tokenizer not in (str(copy), str(copy / FILES[0])) and storage.exists(copy / FILES[0])
        raise ConfigError(
            f"data.tokenizer ({data.tokenizer}) is not the tokenizer that the run in {run} was trained with "
            f"({tokenizer.fingerprint} here, {identity} in its checkpoint): give {copy if others else 'that one'}"
        )
    return tokenizer


def told_of_other(tokenizer: Tokenizer, published: Path) -> str:
    """What to say where a run does not use the tokenizer of the checkpoint that it goes on from; "" where it does."""
    file = published / FILES[0]
    if not storage.exists(file):
        return f"{published} has no tokenizer.json: whether data.tokenizer {tokenizer.name} is its own is not known"
    theirs = load_tokenizer(str(published))
    ids = lambda one: one.fingerprint.partition("-")[0]  # bos and eos, which documents are put between, may be others
    if ids(theirs) == ids(tokenizer) or storage.read_bytes(file) == files_of(tokenizer).get(FILES[0], "").encode():
        return ""
    return (
        f"data.tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} ids) is not the tokenizer of {published} "
        f"({theirs.vocab_size:,} ids): the parameters learned other tokens"
    )
