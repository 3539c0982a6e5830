# SPDX-License-Identifier: Apache-2.0
"""Every format reads the same documents; bad input is one clear line."""

import dataclasses
import gzip
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridlm.data import formats
from hybridlm.data.formats import embedded_folder, open_source
from hybridlm.errors import ConfigError
from tests.data.support import mutate


def read(path, **keywords):
    return [document.text for document in open_source(str(path), **keywords)]


def write_lines(path, texts, key="text", opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"n": 1, key: text}) + "\n" for text in texts)


def error_of(path, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_formats_read_equal_documents(tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "a.jsonl.gz", texts, opener=gzip.open)
    write_lines(tmp_path / "b.json", texts, key="content")
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        name = tmp_path / f"{'large' if kind == pa.large_string() else 'dictionary'}.parquet"
        pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), name)
    for pattern in ("*.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "large.parquet", "dictionary.parquet"):
        assert tuple(read(tmp_path / pattern)) == texts, pattern
    assert tuple(read(tmp_path / "b.json", text_key="content")) == texts


def test_ids_and_order_do_not_depend_on_the_folder(tmp_path):
    ids = []
    for base in (tmp_path / "one", tmp_path / "elsewhere" / "two"):
        (base / "sub").mkdir(parents=True)
        write_lines(base / "sub" / "z.jsonl", ["x", "y"])
        (base / "sub" / "b.md").write_text("b")
        (base / "a.txt").write_text("a")
        (base / ".hidden.txt").write_text("no")
        ids.append([document.id for document in open_source(str(base))])
    assert ids[0] == ids[1] == ["a.txt", "sub/b.md", "sub/z.jsonl:0", "sub/z.jsonl:1"]
    patterns = [str(base / "**" / "*.jsonl"), str(base / "a.txt"), str(base / "*.txt")]
    assert [d.id for d in open_source(patterns)] == ["a.txt", "sub/z.jsonl:0", "sub/z.jsonl:1"]


def test_relative_patterns_and_odd_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "sub").mkdir()
    assert [d.id for d in open_source("*.txt")] == ["a[1].txt"]
    assert read("a[1].txt") == ["brackets"]
    monkeypatch.chdir(tmp_path / "sub")
    assert [d.id for d in open_source("../*.txt")] == ["a[1].txt"]


def test_text_that_json_can_spell_and_utf8_cannot(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '\ufeff{"text": "half \\ud83d pair"}\n\n  \n{"text": "\\ud83d\\udc0d"}\n', encoding="utf-8"
    )
    assert read(tmp_path / "a.jsonl") == ["half \ufffd pair", "\U0001f40d"]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfx\r\n")
    assert read(tmp_path / "bom.txt") == ["x\r\n"]


def test_embedded_corpus_is_the_standard_library():
    source = open_source(())
    names = [file.name for file in source.files]
    assert names == sorted(names) and "json/decoder.py" in names
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    texts = dict(source)
    assert texts["json/decoder.py"] == (embedded_folder() / "json/decoder.py").read_text(encoding="utf-8")
    assert len(texts) + source.skipped + source.empty == len(names)


def test_lenient_source_counts_what_it_skips(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9\n")
    source = open_source(str(tmp_path))
    source.lenient = True
    assert [d.id for d in source] == ["good.py"] and source.skipped == 1
    assert [d.id for d in source] == ["good.py"] and source.skipped == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n' * 16 + b"{oops}\n", "line 17 of {path} is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2 of {path} is a JSON list, not an object"),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', 'no field "text" (fields are "content", "id"); set data.text_key'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1 of {path}: field "text" is int, not a string'),
        ("a.jsonl", b'{"text": null}\n', 'field "text" is null, not a string'),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 of {path} is not UTF-8 text (byte 0xff at offset 10)"),
        ("a.jsonl.gz", b"plain", "cannot read {path}: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], "{path} is not a whole gzip file"),
        ("a.txt", b"caf\xe9", "{path} is not UTF-8 text (byte 0xe9 at offset 3); convert it to UTF-8"),
        ("a.txt", b"ELF\0\0", "{path} is not text (it holds zero bytes)"),
        ("a.zst", b"x", '{path}: unknown suffix ".zst"; give UTF-8 text'),
        ("a.txt.gz", b"x", '{path}: unknown suffix ".gz"'),
        ("a.parquet", b"x", "{path} is not a readable Parquet file"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert expected.format(path=path) in error_of(path)


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "text": pa.array(["x"])}), path)
    assert 'no field "body" (fields are "n", "text"); set data.text_key' in error_of(path, text_key="body")
    assert 'column "n" is int64, not a string' in error_of(path, text_key="n")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert f'row 2 of {path}: column "text" is null' in error_of(path)


def test_no_match_and_missing_pyarrow(tmp_path, monkeypatch):
    assert error_of(tmp_path / "*.jsonl") == f"data.path ({str(tmp_path / '*.jsonl')!r}): no file matches"
    assert "data.val_path" in error_of(tmp_path / "none.txt", argument="data.val_path")
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "reading .parquet needs pyarrow: pip install pyarrow" in error_of(tmp_path / "a.parquet")


def test_reading_json_lines_and_parquet_is_bounded_in_memory(tmp_path):
    import tracemalloc

    text = "x" * 1000
    write_lines(tmp_path / "big.jsonl", [text] * 20_000)
    pq.write_table(pa.table({"text": [text] * 20_000}), tmp_path / "big.parquet", row_group_size=500)
    for name in ("big.jsonl", "big.parquet"):
        tracemalloc.start()
        arrow_before = pa.total_allocated_bytes()
        arrow_peak = 0
        for _ in open_source(str(tmp_path / name)):
            arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak + arrow_peak < 8e6, f"{name}: {peak} and {arrow_peak} bytes for 20 MB"


def test_a_new_format_is_a_row(tmp_path, monkeypatch):
    def read_upside_down(file, text_key):
        yield formats.Document(file.name, file.path.read_text()[::-1])

    row = formats.Format((".down", ".zip"), ".down", read_upside_down, needs=("no_such_module.reader",))
    (tmp_path / "A.DOWN").write_text("abc")
    (tmp_path / "b.zip").write_text("xyz")
    (tmp_path / "c.docx").write_text("x")
    assert read(tmp_path / "A.DOWN") == ["abc"] and 'unknown suffix ".zip"' in error_of(tmp_path / "b.zip")
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, row))
    assert "reading .down needs no_such_module: pip install no_such_module" in error_of(tmp_path / "A.DOWN")
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS[:-1], dataclasses.replace(row, needs=())))
    assert read(tmp_path / "A.DOWN") == ["cba"] and read(tmp_path / "b.zip") == ["zyx"]
    assert error_of(tmp_path / "c.docx").endswith(".parquet, .fa, .fasta, .fa.gz or .down")


def test_zstandard_reads_alike_and_tells_of_damage(tmp_path, texts):
    write_lines(tmp_path / "a.jsonl", texts)
    raw = (tmp_path / "a.jsonl").read_bytes()
    frames = [bytes(pa.Codec("zstd").compress(part)) for part in (raw[:5000], raw[5000:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    assert tuple(read(tmp_path / "b.jsonl.zst")) == texts
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames)[:-7])
    assert f"{tmp_path / 'c.jsonl.zst'} is not a whole zstandard file" in error_of(tmp_path / "c.jsonl.zst")
    (tmp_path / "d.jsonl.zst").write_bytes(b"plain")
    assert "is not a whole zstandard file" in error_of(tmp_path / "d.jsonl.zst")


@pytest.mark.parametrize("line", ["[" * 200_000, '{"text": ' + "[" * 200_000, '{"a":' * 50_000])
def test_deep_json_is_one_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    assert f"line 2 of {tmp_path / 'a.jsonl'} nests deeper" in error_of(tmp_path / "a.jsonl")


def test_parquet_text_that_is_no_utf8_is_one_line(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    assert f"row 2 of {tmp_path / 'a.parquet'} is not UTF-8 text (byte 0xe9" in error_of(tmp_path / "a.parquet")


def test_mutated_text_files_are_told_or_read(tmp_path, texts):
    rng = np.random.default_rng(0)
    write_lines(tmp_path / "a.jsonl", texts[:30])
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.zst").write_bytes(bytes(pa.Codec("zstd").compress(raw)))
    pq.write_table(pa.table({"text": texts[:30]}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "a.txt").write_text("".join(texts[:30]))
    names = sorted(file.name for file in tmp_path.iterdir())
    told = 0
    for number in range(120):
        name = names[number % len(names)]
        changed = tmp_path / f"changed-{number}" / name
        changed.parent.mkdir()
        changed.write_bytes(mutate((tmp_path / name).read_bytes(), rng))
        try:
            read(changed)
        except ConfigError as error:
            assert "\n" not in str(error) and str(changed) in str(error)
            told += 1
    assert told > 60
