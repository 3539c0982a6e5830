# SPDX-License-Identifier: Apache-2.0
"""A data format: a reader, and a row of a table. docs/contributing/data-format.md quotes it."""

import csv
from collections.abc import Iterator

import pytest

from hybridlm.config import DataConfig
from hybridlm.data import formats, make_loader, open_corpus
from hybridlm.data.formats import Document, Format, SourceFile
from hybridlm.errors import ConfigError


def read_csv(file: SourceFile, text_key: str) -> Iterator[Document]:
    """A document a row: its column `text_key`."""
    try:
        with open(file.path, encoding="utf-8", newline="") as lines:
            for index, row in enumerate(csv.DictReader(lines)):
                if text_key not in row:
                    raise ConfigError(f'{file.path}: no column "{text_key}"; set data.text_key')
                yield Document(f"{file.name}:{index}", row[text_key] or "")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file.path} is not CSV in UTF-8 ({error})") from error


CSV = Format((".csv",), ".csv", read_csv)


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, CSV))


@pytest.fixture
def file(tmp_path):
    rows = [f'{i},"Page {i}, of many words.\nAnd a second line."' for i in range(50)]
    (tmp_path / "pages.csv").write_text("\n".join(["number,text", *rows]))
    return tmp_path / "pages.csv"


def test_documents_are_read(file):
    documents = list(formats.open_source(str(file)))
    assert documents[7] == Document("pages.csv:7", "Page 7, of many words.\nAnd a second line.")
    assert len(documents) == 50


def test_they_are_trained_on(file, tmp_path):
    config = DataConfig(path=(str(file),), cache_dir=str(tmp_path / "cache"), seq_len=32, batch_size=4)
    with make_loader(config, corpus=open_corpus(config)) as batches:
        batch = next(batches)
    assert batch["tokens"].shape == (4, 32)
    assert b"many words" in b"".join(bytes(row[row < 256].tolist()) for row in batch["tokens"])


def test_a_mistake_is_one_line(file, tmp_path):
    with pytest.raises(ConfigError, match=r'pages.csv: no column "body"; set data.text_key$'):
        list(formats.open_source(str(file), text_key="body"))
    file.write_bytes(b"text\n\xff\n")
    with pytest.raises(ConfigError, match=r"pages.csv is not CSV in UTF-8 \("):
        list(formats.open_source(str(file)))
    (tmp_path / "pages.zip").touch()
    with pytest.raises(ConfigError, match=r"\.fa\.gz or \.csv$"):
        formats.open_source(str(tmp_path / "pages.zip"))
