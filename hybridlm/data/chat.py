# SPDX-License-Identifier: Apache-2.0
"""Conversations as documents (`data.format=chat`): read from records, written by the tokenizer's chat template.

A record is {"messages": [{"role": ..., "content": ...}, ...]}, or {"conversations": [{"from": ..., "value": ...}, ...]}
as ShareGPT has it; one without either is text, all of which is trained on. Of a conversation what the assistant writes
is trained on, with what ends its turn: other ids are kept with the mark `documents.READ_ONLY`, and so packing, shards
and mixtures carry the mask without knowing of it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridlm import storage
from hybridlm.data.documents import READ_ONLY
from hybridlm.data.formats import Conversation, Document, SourceFile
from hybridlm.data.identity import digest_of
from hybridlm.data.records import explained, lines, not_utf8, parse_record, text_of
from hybridlm.data.template import Template, template_of
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError, within

KEYS = ("messages", "conversations")
"""Fields of a record that hold the turns; `data.text_key` may name another."""
ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool", "function")},
    "human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool",
}  # fmt: skip
"""What the turns of a record are called -> the role that a template is given."""
TYPE = np.dtype("uint32")
"""Of ids with the mark."""


@dataclass(frozen=True)
class Chat:
    """Reads conversations and encodes them."""

    tokenizer: Tokenizer
    template: Template

    @property
    def identity(self) -> str:
        """Changes whenever the ids or the mask of a conversation could."""
        return digest_of(["chat", 1, self.template.source, sorted(self.template.tokens.items())])

    def read(self, file: SourceFile, text_key: str) -> Iterator[Document | Conversation]:
        """The documents of a file of records: JSON lines, or Parquet. ConfigError, one line, with the place in it."""
        suffix = file.path.suffix.lower()
        records = _parquet(file, text_key) if suffix == ".parquet" else _json_lines(file)
        for index, (where, record) in enumerate(records):
            name = f"{file.name}:{index}"
            key = next((key for key in (text_key, *KEYS) if isinstance(record.get(key), list)), None)
            key = key or next((key for key in KEYS if record.get(key) is not None), None)
            if key is None:
                yield Document(name, text_of(record, where, text_key))
                continue
            with within(f"{where}: "):
                yield Conversation(name, self.template.spans(_messages(record[key], key)))

    def encode(self, documents: Sequence[Document | Conversation]) -> tuple[np.ndarray, np.ndarray]:
        """Whole documents: uint32 ids of all of them in a row, marked where they are not trained on, and how many each
        has. Text stands between bos and eos as ever; conversations have what their template writes."""
        ids, lengths = [np.zeros(0, TYPE)], [np.zeros(0, np.int64)]
        for is_chat, group in itertools.groupby(documents, key=lambda d: isinstance(d, Conversation)):
            if is_chat:
                parts = [self._marked(document) for document in group]
                ids += parts
                lengths.append(np.array([len(part) for part in parts], np.int64))
            else:
                plain, of_each = self.tokenizer.encode_batch([document.text for document in group])
                ids.append(plain.astype(TYPE))
                lengths.append(of_each)
        return np.concatenate(ids), np.concatenate(lengths)

    def _marked(self, document: Conversation) -> np.ndarray:
        ids, ours = self.template.encode(self.tokenizer, document.rendered)
        ids = ids.astype(TYPE)
        ids[~ours] |= TYPE.type(READ_ONLY)
        eos, answers = self.tokenizer.eos_id, document.rendered.answers
        if self.template.adds_bos and eos is not None and answers and answers[-1][1] >= len(document.text):
            ids = np.append(ids, TYPE.type(eos))  # the plain format has no other end of the last turn
        return ids


def chat_of(form: str, tokenizer: Tokenizer) -> Chat | None:
    """What reads the records of `data.format`; None for text. ConfigError for a tokenizer without words."""
    if form == "text":
        return None
    if tokenizer.name == "dna":
        raise ConfigError("data.format=chat needs a tokenizer of text, not data.tokenizer=dna")
    return Chat(tokenizer, template_of(tokenizer))


def trained(ids: np.ndarray, lengths: np.ndarray, bytes_of_id: np.ndarray) -> tuple[int, int]:
    """(targets that are trained on, bytes of text that they stand for) of whole documents."""
    ours = ids & TYPE.type(READ_ONLY) == 0
    ours[(np.cumsum(lengths) - lengths)[lengths > 0]] = False  # nothing predicts a document's first token
    return int(ours.sum()), int(bytes_of_id[ids[ours]].sum())


def _json_lines(file: SourceFile) -> Iterator[tuple[str, dict]]:
    for number, raw in lines(file.path):
        if raw.strip():
            where = f"line {number} of {file.path}"
            yield where, parse_record(raw, where, first=number == 1)


def _parquet(file: SourceFile, text_key: str) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with explained(file.path), storage.reading(file.path) as stored, pyarrow.parquet.ParquetFile(stored) as table:
        columns = [name for name in dict.fromkeys((text_key, *KEYS)) if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise ConfigError(not_utf8(f"rows {number + 1}.. of {file.path}", error)) from error
            for row in rows:
                number += 1
                yield f"row {number} of {file.path}", row
        if not columns:
            text_of(dict.fromkeys(table.schema_arrow.names), str(file.path), text_key)


def _messages(turns: Any, key: str) -> list[dict]:
    """The turns of a record as a template takes them; ConfigError, naming the turn, for what is none."""
    if not isinstance(turns, list) or not turns:
        told = "is empty" if turns == [] else f"is {type(turns).__name__}, not a list of turns"
        raise ConfigError(f"{key} {told}")
    found = []
    for number, turn in enumerate(turns):
        at = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise ConfigError(f"{at} is {type(turn).__name__}, not an object with a role and a content")
        spoken = "role" if "role" in turn else "from"
        role = turn.get(spoken)
        if not isinstance(role, str) or role not in ROLES:
            raise ConfigError(f"{at}.{spoken} ({role!r:.40}) is none of {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        if content is None and not any(turn.get(name) for name in ("tool_calls", "function_call")):
            raise ConfigError(f"{at} ({role}) has no content")
        rest = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
        found.append({"role": ROLES[role], "content": "" if content is None else content, **rest})
    return found
