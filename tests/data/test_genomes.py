# SPDX-License-Identifier: Apache-2.0
"""Genomes as text: FASTA, the tokens of nucleotides, either strand; and the room that prefix tokens take in rows."""

import gzip

import numpy as np
import pytest

from hybridlm.config import ConfigError, DataConfig
from hybridlm.data import load_tokenizer, make_loader, open_corpus
from hybridlm.data.fitting import FitRows
from hybridlm.data.formats import Document, open_source
from hybridlm.data.packing import PairRows
from hybridlm.data.strands import either_strand, other_strand
from tests.data.test_data_packing import lay
from tests.genomes import make_genome, reverse_complement, write_fasta

DNA = load_tokenizer("dna")


@pytest.mark.parametrize("name", ["g.fa", "g.fasta", "g.fna", "G.FA", "g.fa.gz", "g.fasta.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_record_is_a_document(tmp_path, name, end):
    records = make_genome(5, 130)
    source = open_source(str(write_fasta(tmp_path / name, records, 50, end)))
    assert list(source) == [Document(f"{name}:{i}", record) for i, record in enumerate(records)]


def test_what_files_have_in_them(tmp_path):
    content = b"\xef\xbb\xbf;comment\n\n>one of two words\nACGT\n  ac gt\n".replace(b"ac gt", b"acgt")
    content += b"\n>empty\n>gapped\nAC-N*\n>last, without an end\nRYK"
    (tmp_path / "x.fa").write_bytes(content)
    source = open_source(str(tmp_path / "x.fa"))
    assert [document.text for document in source] == ["ACGTacgt", "AC-N*", "RYK"]
    assert [document.id for document in source] == ["x.fa:0", "x.fa:2", "x.fa:3"]
    assert source.empty == 1


def test_a_folder_of_genomes_and_its_validation(tmp_path):
    for i in range(3):
        write_fasta(tmp_path / f"species{i}.fa.gz", make_genome(6, 90, seed=i))
    config = DataConfig((str(tmp_path),), tokenizer="dna", val_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    stats = open_corpus(config).stats
    assert stats["train"]["documents"] + stats["val"]["documents"] == 18
    assert stats["train"]["tokens"] == stats["train"]["documents"] * 92
    assert stats["train"]["bytes_per_token"] == pytest.approx(90 / 92)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"ACGT\n>x\nAC\n", "line 1 of {file} stands before the first record (no > line)"),
        (b">x\nAC\nAC9T\n", "line 3 of {file} holds '9', no letter of a sequence"),
        (b">x\nAC\xc3\xa9\n", "line 2 of {file} holds '\\xc3', no letter of a sequence"),
    ],
)
def test_what_is_no_fasta_is_one_line(tmp_path, content, told):
    file = tmp_path / "x.fa"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        list(open_source(str(file)))
    assert str(error.value) == told.format(file=file)


def test_a_cut_file_is_one_line(tmp_path):
    file = write_fasta(tmp_path / "x.fa.gz", make_genome(4, 2000))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"^.*x\.fa\.gz is not a whole gzip file"):
        list(open_source(str(file)))


def test_tokens_are_those_of_hyenadna():
    """Of its published tokenizer: [CLS] [SEP] [BOS] [MASK] [PAD] [RESERVED] [UNK] A C G T N."""
    order = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"]
    for letter in "ACGTN":
        assert DNA.encode(letter).tolist() == DNA.encode(letter.lower()).tolist() == [order.index(letter)]
    assert (DNA.bos_id, DNA.eos_id, DNA.vocab_size) == (order.index("[BOS]"), order.index("[SEP]"), len(order))
    assert set(DNA.encode("RYSWKMBDHVryswkmbdhv").tolist()) == {order.index("N")}
    assert DNA.encode("Uu").tolist() == DNA.encode("TT").tolist()
    assert set(DNA.encode("?- \u00e9").tolist()) == {order.index("[UNK]")}


def test_tokens_round_trip():
    records = make_genome(3, 70)
    ids, lengths = DNA.encode_batch(records)
    for record, of_record in zip(records, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        np.testing.assert_array_equal(of_record, DNA.encode(record, bos=True, eos=True))
        np.testing.assert_array_equal(of_record, np.concatenate(list(DNA.encode_pieces(record, 9))))
        assert DNA.decode(of_record) == record.upper()


def test_the_other_strand_of_tokens_is_that_of_letters():
    for record in make_genome(3, 70):
        partners = np.array(DNA.complement)[DNA.encode(record)][::-1]
        assert DNA.decode(partners) == reverse_complement(record).upper()


def a_row(records: list[str], seq_len: int, room: int = 0) -> dict[str, np.ndarray]:
    """The first packed row of documents."""
    return PairRows(lay([DNA.encode(record, bos=True, eos=True) for record in records]), seq_len, 1, room=room)[0]


def texts(cells: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The tokens of each document in a row, the last target included; that they follow on each other is checked."""
    found = []
    for number in range(1, cells["segment_ids"].max() + 1):
        here = np.flatnonzero((cells["segment_ids"] == number) & (cells["targets"] >= 0))
        tokens, targets = cells["tokens"][here], cells["targets"][here]
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        found.append(np.append(tokens, targets[-1]))
    return found


@pytest.mark.parametrize("room", [0, 3])
def test_chosen_documents_are_turned_round(room):
    """Whole ones, one that a row cuts, and the room in front of each stays as it was."""
    cells = a_row(make_genome(5, 30), 110, room)
    turned = other_strand(cells, lambda number: number != 1)
    for name in ("segment_ids", "positions"):
        np.testing.assert_array_equal(turned[name], cells[name])
    np.testing.assert_array_equal(turned["targets"] < 0, cells["targets"] < 0)
    before, after = texts(cells), texts(turned)
    assert len(before) == len(after) == 4
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (new[0], new[-1] == DNA.eos_id) == (old[0], old[-1] == DNA.eos_id)
        expected = reverse_complement(DNA.decode(old)) if number != 1 else DNA.decode(old)
        assert DNA.decode(new) == expected
    again = other_strand(turned, lambda number: number != 1)
    for name, value in cells.items():
        np.testing.assert_array_equal(again[name], value)


def test_strands_are_a_function_of_seed_step_and_row():
    cells = a_row(make_genome(20, 5), 120)
    kept = [DNA.decode(text) for text in texts(cells)]
    drawn = {}
    for where in [(seed, step, row) for seed in (0, 1) for step in range(4) for row in range(4)]:
        turned = either_strand(cells, *where)
        np.testing.assert_array_equal(turned["tokens"], either_strand(cells, *where)["tokens"])
        drawn[where] = tuple(DNA.decode(text) == old for text, old in zip(texts(turned), kept, strict=True))
    assert len(set(drawn.values())) == len(drawn)
    assert 0.4 < np.mean(list(drawn.values())) < 0.6


def batches(config: DataConfig, **options) -> list[dict]:
    with make_loader(config, seed=3, corpus=open_corpus(config), **options) as loader:
        return [next(loader) for _ in range(3)]


def test_batches_of_either_strand(tmp_path):
    """Whatever part of a batch is read, and from whichever step on."""
    write_fasta(tmp_path / "g.fa", make_genome(12, 40))
    common = {"path": (str(tmp_path / "g.fa"),), "tokenizer": "dna", "seq_len": 64, "batch_size": 4}
    plain = DataConfig(**common, cache_dir=str(tmp_path / "cache"))
    either = DataConfig(**common, cache_dir=str(tmp_path / "cache"), reverse_complement=True)
    read, turned = batches(plain), batches(either)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(read, turned, strict=True))
    for a, b in zip(read, turned, strict=True):
        np.testing.assert_array_equal(a["segment_ids"], b["segment_ids"])
    np.testing.assert_array_equal(batches(either, start_step=2)[0]["tokens"], turned[2]["tokens"])
    np.testing.assert_array_equal(batches(either, rows=[1, 3])[1]["tokens"], turned[1]["tokens"][[1, 3]])
    with pytest.raises(ConfigError, match=r"^data.reverse_complement needs data.tokenizer=dna, not byte"):
        DataConfig(reverse_complement=True)


def test_tokenised_beforehand_gives_the_same_batches(tmp_path, capsys):
    from hybridlm.cli import main

    write_fasta(tmp_path / "g.fa.gz", make_genome(12, 40))
    common = {"tokenizer": "dna", "seq_len": 64, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    words = ["tokenize", str(tmp_path / "g.fa.gz"), "--out", str(tmp_path / "shards"), "--tokenizer", "dna"]
    assert main([*words, "--workers", "1"]) == 0
    assert f"--data.path={tmp_path / 'shards'} --data.tokenizer=dna" in capsys.readouterr().out
    from_text = batches(DataConfig((str(tmp_path / "g.fa.gz"),), **common))
    from_shards = batches(DataConfig((str(tmp_path / "shards"),), **common))
    for a, b in zip(from_text, from_shards, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    with pytest.raises(ConfigError, match=r"with dna and data.tokenizer is byte: set data.tokenizer=dna$"):
        open_corpus(DataConfig((str(tmp_path / "shards"),)))


@pytest.mark.parametrize("rows_of", [PairRows, FitRows])
@pytest.mark.parametrize(("room", "seq_len"), [(1, 16), (3, 16), (5, 8), (7, 8), (4, 100)])
def test_rows_with_room_hold_every_pair_once(rows_of, room, seq_len):
    rng = np.random.default_rng(room)
    lengths = rng.integers(0, 40, 30).tolist()
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(start, start + n) for start, n in zip(starts, lengths, strict=False)]  # all tokens differ
    rows = rows_of(lay(documents), seq_len, seed=2, room=room)
    found = []
    for i in range(len(rows)):
        row = rows[i]
        assert all(len(a) == seq_len and a.dtype == np.int32 for a in row.values())
        n_segments = row["segment_ids"].max()
        real = row["segment_ids"] > 0
        assert (np.diff(row["segment_ids"][real]) >= 0).all() and real[: real.sum()].all()
        for number in range(1, n_segments + 1):
            here = np.flatnonzero(row["segment_ids"] == number)
            np.testing.assert_array_equal(row["positions"][here], np.arange(len(here)))
            assert (row["targets"][here[:room]] == -1).all() and len(here) > room
            tokens, targets = row["tokens"][here[room:]], row["targets"][here[room:]]
            np.testing.assert_array_equal(targets, tokens + 1)
            found += tokens.tolist()
    assert sorted(found) == [token for document in documents for token in document[:-1]]
    assert rows.n_pairs == len(found)


def test_rows_without_place_are_refused():
    for rows_of in (PairRows, FitRows):
        with pytest.raises(ConfigError, match=r"^data.seq_len \(8\) must be above model.prefix_tokens \(8\)"):
            rows_of(lay([np.arange(5)]), 8, 0, room=8)


def test_a_gzip_member_after_another(tmp_path):
    """As bgzip writes them, in which genomes are published."""
    parts = [b">a\nACGT", b"AC\n>b\nGG\n"]
    (tmp_path / "x.fa.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
    assert [document.text for document in open_source(str(tmp_path / "x.fa.gz"))] == ["ACGTAC", "GG"]
