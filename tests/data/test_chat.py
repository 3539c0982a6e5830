# SPDX-License-Identifier: Apache-2.0
"""Conversations: what is read, which tokens are trained on wherever they are packed, what is refused."""

import gzip
import itertools
import json

import numpy as np
import pytest

from hybridlm.cli import main
from hybridlm.data import make_loader, open_corpus
from hybridlm.data.config import DataConfig
from hybridlm.data.documents import READ_ONLY
from hybridlm.data.said import answers_share, of_conversations
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.errors import ConfigError
from tests.data.support import check_equal, take
from tests.data.test_data_tokenizer import train_bpe
from tests.data.test_template import CHATML, SPECIAL

pytestmark = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('jinja2')", reason="chat templates need jinja2"
)
WORDS = ["the", "theme", "of", "this", "thesis", "is", "there"]


def talk(number: int, turns: int) -> list[dict]:
    """A conversation with a system prompt and so many answers, all of them different."""
    rng = np.random.default_rng(number)
    say = lambda n: " ".join(rng.choice(WORDS, n))
    messages = [{"role": "system", "content": f"{say(3)} {number}"}]
    for turn in range(turns):
        messages.append({"role": "user", "content": say(int(rng.integers(1, 9)))})
        messages.append({"role": "assistant", "content": f"{number}/{turn}: {say(int(rng.integers(1, 9)))}"})
    return messages


TALKS = [talk(i, 1 + i % 3) for i in range(40)]


def write_records(path, records):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a BPE with a ChatML template."""
    folder = tmp_path_factory.mktemp("chatml")
    train_bpe(folder / "tokenizer.json", SPECIAL, 340)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML})
    )
    return folder


@pytest.fixture
def make(tmp_path, tokenizer):
    def config(**fields) -> DataConfig:
        write_records(tmp_path / "a.jsonl", [{"messages": messages} for messages in TALKS])
        defaults = {
            "path": (f"{tmp_path}/a.jsonl",), "format": "chat", "tokenizer": str(tokenizer), "val_fraction": 0.2,
            "seq_len": 256, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), "packing": "best_fit",
        }  # fmt: skip
        return DataConfig(**(defaults | fields))

    return config


def answers(messages) -> str:
    """What ChatML's assistant writes, with the token that ends its turns."""
    return "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")


def written(messages) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def segments(batches):
    """(tokens with the last target, targets that count) of each document of rows."""
    for batch in batches:
        for tokens, targets, ids in zip(batch["tokens"], batch["targets"], batch["segment_ids"]):
            for i in range(1, ids.max(initial=0) + 1):
                here = ids == i
                yield tokens[here], targets[here]


def epoch_of(config, split="train", **keywords):
    corpus = open_corpus(config)
    loader = make_loader(config, split=split, corpus=corpus, **keywords)
    n = len(loader) if split == "val" else None
    if n is None:
        rows = loader._plan._rows_of(corpus.parts[0].stats["train"]["fingerprint"], config.packing, config.seq_len)
        loader.close()
        return [{name: value[None] for name, value in rows[i].items()} for i in range(len(rows))]
    return take(loader, n)


def spelled(tokenizer, ids) -> str:
    return load_tokenizer(str(tokenizer))._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_alone_are_targets_and_documents_are_whole(make, tokenizer, split):
    config = make()
    found = {}
    for tokens, targets in segments(epoch_of(config, split)):
        text = spelled(tokenizer, tokens)
        found[text] = spelled(tokenizer, targets[targets >= 0])
    expected = {written(messages)[: len(written(messages)) - 1]: answers(messages) for messages in TALKS}
    assert found.items() <= expected.items() and (len(found) > 25 if split == "train" else len(found) > 2)
    held_out = {spelled(tokenizer, tokens) for tokens, _ in segments(epoch_of(config, "val"))}
    assert split == "val" or found.keys() | held_out == expected.keys()


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("room", [0, 2])
def test_the_mask_goes_where_the_tokens_go(make, packing, room):
    """Cut into short rows, each pair of the corpus is there once, with the mask of its target."""
    config = make(packing=packing, seq_len=24, val_fraction=0.0)
    split = open_corpus(config).split("train")
    offsets, ids = np.asarray(split.offsets[:]), split.tokens[:]
    marked, plain = (ids & READ_ONLY) != 0, (ids & (READ_ONLY - 1)).astype(int)
    pairs = sorted(
        (plain[i], -1 if marked[i + 1] else plain[i + 1])
        for start, stop in itertools.pairwise(offsets)
        for i in range(start, stop - 1)
    )
    rows = make_loader(config, batch_size=1, room=room)._plan
    rows = rows._rows_of(next(iter(rows._parts)), packing, 24)
    got = []
    for i in range(len(rows)):
        row = rows[i]
        real = (row["segment_ids"] > 0) & (row["positions"] >= room)
        got += zip(row["tokens"][real].tolist(), row["targets"][real].tolist())
        assert row["tokens"].max() < 340 and (row["targets"][~real] == -1).all()
    assert sorted(got) == pairs
    assert 0.1 < np.mean([target >= 0 for _, target in pairs]) < 0.9


def test_the_plain_format_of_bytes(make):
    """A tokenizer without a template: the answer, what the user's next turn begins with, the end of the document."""
    config = make(tokenizer="byte", val_fraction=0.0, seq_len=1024)
    found = set()
    for tokens, targets in segments(epoch_of(config)):
        assert tokens[0] == 256
        found.add(bytes(np.where(t == 257, 0, t).astype(np.uint8) for t in targets[targets >= 0]))
    said = [[m["content"] for m in messages if m["role"] == "assistant"] for messages in TALKS]
    assert found == {"\n\nUser:".join(f" {text}" for text in texts).encode() + b"\0" for texts in said}


def test_every_way_to_write_them_down(make, tmp_path):
    import pyarrow
    import pyarrow.parquet

    config = make(val_fraction=0.0)
    expected = open_corpus(config)
    records = [{"messages": messages} for messages in TALKS]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = [[{"from": names[m["role"]], "value": m["content"]} for m in messages] for messages in TALKS]
    write_records(tmp_path / "b.jsonl.gz", records)
    write_records(tmp_path / "c.jsonl", [{"id": 3, "conversations": turns} for turns in other])
    write_records(tmp_path / "d.json", [{"dialogue": messages} for messages in TALKS])
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    with pyarrow.CompressedOutputStream(str(tmp_path / "e.jsonl.zst"), "zstd") as stream:
        stream.write(raw)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "f.parquet")
    for name in ("b.jsonl.gz", "c.jsonl", "d.json", "e.jsonl.zst", "f.parquet"):
        key = "dialogue" if name == "d.json" else "text"
        corpus = open_corpus(make(path=(f"{tmp_path}/{name}",), val_fraction=0.0, text_key=key))
        for field in ("tokens", "offsets"):
            a, b = (np.asarray(getattr(c.split("train"), field)[:]) for c in (corpus, expected))
            np.testing.assert_array_equal(a, b, err_msg=f"{name} {field}")


def test_text_beside_conversations_counts_whole(make, tmp_path):
    """In one file, and as a source of a mixture, whose shares and masks are those of its parts."""
    write_records(tmp_path / "both.jsonl", [{"text": "the theme is there"}, {"messages": TALKS[0]}])
    tokenizer = load_tokenizer(str(make().tokenizer))
    whole, chat = segments(epoch_of(make(path=(f"{tmp_path}/both.jsonl",), val_fraction=0.0)))
    if (whole[1] < 0).any():
        whole, chat = chat, whole
    text = tokenizer.encode("the theme is there", bos=True, eos=True)
    np.testing.assert_array_equal(whole[0], text[:-1])
    np.testing.assert_array_equal(whole[1], text[1:])
    assert (chat[1] < 0).any()
    write_records(tmp_path / "text.jsonl", [{"text": " ".join(WORDS) * 4}] * 20)
    mixed = make(path=(f"{tmp_path}/a.jsonl", f"{tmp_path}/text.jsonl"), weights=(1.0, 1.0), batch_size=4, seq_len=64)
    stats = open_corpus(mixed).stats["train"]
    parts = open_corpus(mixed).parts
    n_text = parts[1].stats["train"]["pairs"]
    assert stats["trained"][0] == parts[0].stats["train"]["trained"][0] + n_text
    batch = take(make_loader(mixed), 1)[0]
    full = [(row[ids > 0] >= 0).all() for row, ids in zip(batch["targets"], batch["segment_ids"])]
    assert sum(full) == 2


def test_shards_of_conversations(make, tmp_path, tokenizer, capsys):
    """They hold what the cache holds; other versions of the template are other data."""
    config = make()
    words = [
        "tokenize",
        config.path[0],
        "--format=chat",
        f"--tokenizer={tokenizer}",
        "--val-fraction=0.2",
        "--workers=1",
    ]
    assert main([*words, f"--out={tmp_path}/shards"]) == 0
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["format"] == 2 and manifest["dtype"] == "uint32" and manifest["bigram_bits_per_byte"] is None
    of_shards = make(path=(f"{tmp_path}/shards",))
    check_equal(take(make_loader(of_shards, seed=3), 4), take(make_loader(config, seed=3), 4))
    corpora = open_corpus(config), open_corpus(of_shards)
    assert answers_share(corpora[0]) == answers_share(corpora[1]) > 0
    here, there = (corpus.stats for corpus in corpora)
    for split in ("train", "val"):
        assert here[split]["trained"] == there[split]["trained"]
        assert here[split]["bytes_per_pair"] == pytest.approx(there[split]["bytes_per_pair"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|im_end|>", "</s>")
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    changed = open_corpus(make(tokenizer=str(other)))
    assert changed.folder != open_corpus(config).folder and changed.fingerprint != open_corpus(config).fingerprint
    assert main([*words, "--train-bpe=300", f"--out={tmp_path}/new"]) == 2
    assert "--train-bpe" in capsys.readouterr().err


def test_what_is_left_out_and_cut_is_said(make, tmp_path):
    silent = [{"messages": [{"role": "user", "content": "the"}]}] * 3
    write_records(tmp_path / "b.jsonl", [{"messages": messages} for messages in TALKS] + silent)
    config = make(path=(f"{tmp_path}/b.jsonl",), val_fraction=0.0, seq_len=64)
    corpus = open_corpus(config)
    lengths = np.diff(np.asarray(corpus.split("train").offsets[:]))
    told = of_conversations(corpus, config)
    share = np.mean([target >= 0 for _, targets in segments(epoch_of(config)) for target in targets])
    assert f"answers are trained on: {share:.1%} of the tokens; 3 conversations without an answer are left out" in told
    assert f"{(lengths > 65).sum()} longer than a row (data.seq_len=64) are cut" in told and (lengths > 65).sum() > 0
    assert "best_fit" not in told and "best_fit" in of_conversations(corpus, make(packing="split"))
    write_records(tmp_path / "c.jsonl", silent)
    with pytest.raises(ConfigError, match=r"files hold no conversation with an answer \(3 without\)"):
        open_corpus(make(path=(f"{tmp_path}/c.jsonl",)))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": "hi"}, "messages is str, not a list of turns"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hi"]}, "messages[0] is str, not an object with a role and a content"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "messages[0].role ('bot') is none of system, developer",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].from (None) is none of system"),
        ({"messages": [{"role": "user"}]}, "messages[0] (user) has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content (int) must be a text"),
        ({"other": 1}, 'no field "text" (fields are "other"); set data.text_key'),
        ([1], "is a JSON list, not an object"),
    ],
)
def test_records_that_are_none(make, tmp_path, record, told):
    write_records(tmp_path / "bad.jsonl", [{"messages": TALKS[0]}, record])
    with pytest.raises(ConfigError) as error:
        open_corpus(make(path=(f"{tmp_path}/bad.jsonl",)))
    text = str(error.value)
    assert text.startswith(f"line 2 of {tmp_path}/bad.jsonl") and told in text and "\n" not in text


def test_what_cannot_be_chat(make, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.format=chat needs data\.path"):
        open_corpus(make(path=()))
    with pytest.raises(ConfigError, match=r"data\.format=chat needs a tokenizer of text, not data\.tokenizer=dna"):
        open_corpus(make(tokenizer="dna"))
