# SPDX-License-Identifier: Apache-2.0
"""Small corpora on disk, and configurations that read them."""

import json

import pytest

from hybridlm.config import DataConfig

TEXTS = tuple(f"document {i}: " + "äbc \U0001f40d\n" * (i * 7 % 23) for i in range(120))


@pytest.fixture
def texts():
    return TEXTS


@pytest.fixture
def folder(tmp_path):
    """A folder with the texts as JSON lines, in two files."""
    base = tmp_path / "texts"
    base.mkdir()
    for name, part in (("a.jsonl", TEXTS[:50]), ("b.jsonl", TEXTS[50:])):
        (base / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return base


@pytest.fixture
def config(folder, tmp_path):
    """Makes a DataConfig over those files; keywords override."""

    def make(**fields) -> DataConfig:
        defaults = dict(
            path=(f"{folder}/*.jsonl",), val_fraction=0.2, seq_len=64, batch_size=4, cache_dir=str(tmp_path / "cache")
        )
        return DataConfig(**(defaults | fields))

    return make
