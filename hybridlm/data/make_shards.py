# SPDX-License-Identifier: Apache-2.0
"""Text into a folder of tokenised shards, on all cores, with what is done kept when it is interrupted.

Files are taken in the order in which training reads text, in units of neighbouring files that a process each tokenises.
A unit closes a shard of each split whenever that of the training split is full, and then records how many documents it
has read: an interrupted run goes on from there. Shards in the order of their names hold the documents in the order of
the text, so that training on them gives the batches that training on the text gives.
"""

import collections
import contextlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from hybridlm import storage
from hybridlm.data.bigram import BigramCounter, cross_entropy_bits
from hybridlm.data.chat import Chat, chat_of
from hybridlm.data.formats import Conversation, Document, Source, SourceFile, in_validation
from hybridlm.data.guard import guarded
from hybridlm.data.identity import content_hashes, digest_of
from hybridlm.data.shard_writer import ShardWriter
from hybridlm.data.shards import CHAT_FORMAT, FORMAT, MANIFEST, index_name, read_manifest, write_manifest
from hybridlm.data.tokenise import BATCH_CHARACTERS, BATCH_DOCUMENTS, SPLITS, Counts, counts, encode, token_type
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError, RunError

WORK = ".work"
UNIT_BYTES = 256 << 20
RECORD_TOKENS = 1 << 14
"""Few enough to read for a short document, and few records enough in a shard."""
AHEAD = 2
"""Batches that are read while one is tokenised."""
POLL_SECONDS = 0.2


class Job(NamedTuple):
    """What a process needs to tokenise units."""

    folder: Path
    tokenizer: str
    ends: tuple[str | None, str | None]
    """bos and eos as the user named them."""
    text_key: str
    val_fraction: float
    shard_tokens: int
    lenient: bool
    format: str = "text"
    """As data.format."""


class Unit(NamedTuple):
    """Neighbouring files."""

    number: int
    files: tuple[SourceFile, ...]
    split: str | None
    """Of all their documents; None: by the hash of each."""


def units_of(train: Source, held_out: Source | None) -> list[Unit]:
    """The units of both sources, in order."""
    units: list[Unit] = []
    for source, split in ((train, None if held_out is None else "train"), (held_out, "val")):
        group, size = [], 0
        for file in source.files if source else ():
            group.append(file)
            size += storage.size(file.path)
            if size >= UNIT_BYTES:
                units.append(Unit(len(units), tuple(group), split))
                group, size = [], 0
        if group:
            units.append(Unit(len(units), tuple(group), split))
    return units


def make_shards(
    job: Job, train: Source, held_out: Source | None, tokenizer: Tokenizer, workers: int, tell: Callable[[int], None]
) -> dict:
    """Tokenises what is not done yet and returns the manifest, which is written last.

    tell: called with the characters of text done so far. Raises ConfigError for text that cannot be read, RunError
    where shards cannot be written or a process died; what is done stays.
    """
    units = units_of(train, held_out)
    with _stopping(_start(job, units, workers)) as (pool, done):
        running: set[Future] = {pool.submit(_tokenise_unit, unit) for unit in units}
        while running:
            finished, running = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            tell(sum(done))
            for future in finished:
                try:
                    future.result()
                except BrokenProcessPool as error:
                    raise RunError(
                        "a process was killed (out of memory?): start again to go on, with fewer --workers"
                    ) from error
    records = [_read_record(job.folder, unit) for unit in units]
    return _manifest(job, records, tokenizer, train, held_out)


def check_plan(folder: Path, plan: dict, overwrite: bool) -> Literal["new", "begun", "complete"]:
    """Makes the folder, or sees that what is in it was begun by the same plan; how far that is.

    Raises ConfigError where it was begun by another one, or holds something else.
    """
    file = folder / WORK / "plan.json"
    if (folder / MANIFEST).exists() and not overwrite:
        if read_manifest(folder)["plan"] == digest_of(plan):
            return "complete"
        raise ConfigError(f"{folder} holds shards of other text or settings: choose another folder, or --overwrite")
    begun = _read_json(file)
    if begun is not None and begun != plan and any(folder.glob("*.array_record")) and not overwrite:
        differing = ", ".join(key for key in plan if begun.get(key) != plan[key]) or "format"
        raise ConfigError(
            f"{folder} was begun with other settings ({differing}): give the same, another folder, or --overwrite"
        )
    if begun is None and folder.is_dir() and any(f.name != WORK for f in folder.iterdir()) and not overwrite:
        raise ConfigError(f"{folder} has files but no shards: choose a new folder")
    if begun == plan:
        return "begun"
    _remove_shards(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_json(file, plan)
    return "new"


def _remove_shards(folder: Path) -> None:
    """What this module writes, and nothing else."""
    for pattern in ("*.array_record", "*.index", "*.part", MANIFEST):
        for file in folder.glob(pattern):
            file.unlink()
    shutil.rmtree(folder / WORK, ignore_errors=True)


# Processes ----------------------------------------------------------------------------------------------------------

_job: Job
_tokenizer: Tokenizer
_chat: Chat | None
_done: Sequence[int]
_given_up = threading.Event()


def _prepare(job: Job, done: Sequence[int]) -> None:
    """What a process keeps for all its units."""
    global _job, _tokenizer, _chat, _done
    _job, _done = job, done
    _given_up.clear()
    _tokenizer = load_tokenizer(job.tokenizer, bos=job.ends[0], eos=job.ends[1])
    _chat = chat_of(job.format, _tokenizer)


def _start(job: Job, units: Sequence[Unit], workers: int):
    """(pool, bytes done by each unit); a single process is a thread of this one."""
    workers = min(workers, len(units))
    if workers <= 1:
        done = [0] * len(units)
        _prepare(job, done)
        return ThreadPoolExecutor(1), done
    context = multiprocessing.get_context("spawn")
    done = context.Array("q", len(units))
    # the tokenizers library has threads of its own: so many that all processes together take each core once
    os.environ.setdefault("RAYON_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
    return ProcessPoolExecutor(workers, context, _prepare, (job, done)), done


@contextlib.contextmanager
def _stopping(started) -> Iterator:
    """The pool, whose processes end at once where the work is given up."""
    pool, done = started
    with guarded():
        try:
            yield pool, done
        except BaseException:
            _given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.kill()
            raise
    pool.shutdown()


def _tokenise_unit(unit: Unit) -> None:
    """Tokenises what is left of a unit; its record tells what is done."""
    record = _sound_record(_job.folder, unit)
    if record["done"]:
        _done[unit.number] = sum(storage.size(file.path) for file in unit.files)
        return
    writer = _UnitWriter(_job, unit, record, _tokenizer, _chat)
    source = Source(unit.files, _job.text_key, lenient=_job.lenient, records=_chat and _chat.read)
    try:
        for number, document in enumerate(source):
            if _given_up.is_set():
                return
            _done[unit.number] += len(document.text)
            if number >= record["read"]:
                split = unit.split or ("val" if in_validation(document.id, _job.val_fraction) else "train")
                writer.add(split, document)
        writer.close_shards()
        record |= {"done": True, "skipped": source.skipped, "empty": source.empty, "unanswered": source.unanswered}
        _write_json(_record_file(_job.folder, unit), record)
    finally:
        writer.stop()


class _UnitWriter:
    """Batches of a unit's documents, tokenised and written in a thread while the next ones are read."""

    def __init__(self, job: Job, unit: Unit, record: dict, tokenizer: Tokenizer, chat: Chat | None):
        self._job, self._unit, self._record, self._tokenizer, self._chat = job, unit, record, tokenizer, chat
        self._pending: dict[str, list[Document | Conversation]] = {name: [] for name in SPLITS}
        self._characters = dict.fromkeys(SPLITS, 0)
        self._read = record["read"]
        self._shards: dict[str, ShardWriter] = {}
        self._counts = {name: Counts(self._chat) for name in SPLITS}
        self._is_full = False
        self._thread = ThreadPoolExecutor(1)
        self._writing: collections.deque[Future] = collections.deque()

    def add(self, split: str, document: Document | Conversation) -> None:
        """The next document."""
        size = len(document.text)
        if self._pending[split] and self._characters[split] + size > BATCH_CHARACTERS:
            self._flush(split)
        self._pending[split].append(document)
        self._characters[split] += size
        self._read += 1
        if self._characters[split] >= BATCH_CHARACTERS or len(self._pending[split]) >= BATCH_DOCUMENTS:
            self._flush(split)
            if self._is_full:
                self.close_shards()

    def close_shards(self) -> None:
        """Writes all that is pending, ends the shards and records them, with the documents read up to here."""
        for split in SPLITS:
            self._flush(split)
        while self._writing:
            self._writing.popleft().result()
        if self._shards:
            number = len(self._record["parts"])
            part = {split: shard.close() | self._counts[split].stats() for split, shard in self._shards.items()}
            bigrams = np.stack([self._counts[split].bigrams.counts for split in SPLITS])
            np.save(_bigrams_file(self._job.folder, self._unit, number), bigrams)
            self._record["parts"].append(part)
        self._record["read"] = self._read
        _write_json(_record_file(self._job.folder, self._unit), self._record)
        self._is_full = False
        self._shards, self._counts = {}, {name: Counts(self._chat) for name in SPLITS}

    def stop(self) -> None:
        """Ends the thread; shards that are not closed go."""
        self._thread.shutdown(cancel_futures=True)
        for shard in self._shards.values():
            shard.abandon()

    def _flush(self, split: str) -> None:
        documents, self._pending[split], self._characters[split] = self._pending[split], [], 0
        if documents:
            self._writing.append(self._thread.submit(self._write, split, documents))
        while len(self._writing) > AHEAD:  # by their number, not as they come: shards end at the same place each time
            self._is_full |= self._writing.popleft().result() >= self._job.shard_tokens

    def _write(self, split: str, documents: list[Document | Conversation]) -> int:
        """Tokens of the shard of the training split then."""
        if split not in self._shards:
            name = f"{split}-{self._unit.number:05}-{len(self._record['parts']):03}"
            dtype = token_type(self._tokenizer, self._chat)
            self._shards[split] = ShardWriter(self._job.folder, name, dtype, RECORD_TOKENS)
        for tokens, lengths in encode(documents, self._tokenizer, self._chat):
            self._shards[split].add(tokens, lengths)
            self._counts[split].add_ids(tokens, lengths)
        self._counts[split].add_texts(documents)
        return self._shards["train"].tokens if "train" in self._shards else 0


# Records ------------------------------------------------------------------------------------------------------------


def _record_file(folder: Path, unit: Unit) -> Path:
    return folder / WORK / f"{unit.number:05}.json"


def _bigrams_file(folder: Path, unit: Unit, part: int) -> Path:
    return folder / WORK / f"{unit.number:05}-{part:03}.npy"


def _read_record(folder: Path, unit: Unit) -> dict:
    record = _read_json(_record_file(folder, unit))
    if record is None:
        raise RunError(f"{_record_file(folder, unit)} vanished: start again")
    return record | {"unit": unit}


def _sound_record(folder: Path, unit: Unit) -> dict:
    """What was done of a unit, as far as its shards are as they were written; what comes after that is removed."""
    record = _read_json(_record_file(folder, unit))
    parts = record["parts"] if record else []
    for number, part in enumerate(parts):
        for about in part.values():
            files = [folder / about["file"], folder / index_name(about)]
            if not all(file.is_file() for file in files) or content_hashes(files) != [
                about["hash"],
                about["index_hash"],
            ]:
                return _afresh(folder, unit)
        if not _bigrams_file(folder, unit, number).is_file():
            return _afresh(folder, unit)
    return record or _afresh(folder, unit)


def _afresh(folder: Path, unit: Unit) -> dict:
    for split in SPLITS:
        for file in folder.glob(f"{split}-{unit.number:05}-*"):
            file.unlink()
    return {"read": 0, "done": False, "parts": []}


def _manifest(job: Job, records: list[dict], tokenizer: Tokenizer, train: Source, held_out: Source | None) -> dict:
    splits, bigrams = {}, {name: BigramCounter() for name in SPLITS}
    chat = chat_of(job.format, tokenizer)
    dtype = token_type(tokenizer, chat).name
    for record in records:
        for number in range(len(record["parts"])):
            stored = np.load(_bigrams_file(job.folder, record["unit"], number))
            for counter, of_part in zip(bigrams.values(), stored):
                counter.counts += of_part
    keys = ("file", "documents", "records", "tokens", "size", "hash", "index_hash")
    for split in SPLITS:
        parts = [part[split] for record in records for part in record["parts"] if split in part]
        shards = [{key: part[key] for key in keys} for part in parts]
        n_documents, n_tokens, n_pairs = (sum(part[key] for part in parts) for key in ("documents", "tokens", "pairs"))
        trained = chat and [sum(part["trained"][i] for part in parts) for i in range(2)]
        splits[split] = {
            **counts(n_documents, bigrams[split].n_bytes, n_tokens, n_pairs, trained),
            "fingerprint": digest_of([FORMAT, RECORD_TOKENS, dtype, [part["index_hash"] for part in parts]]),
            "shards": shards,
        }
    if not sum(splits[split]["documents"] for split in SPLITS):
        raise ConfigError(f"the {len(train.files)} files hold no {'conversation with an answer' if chat else 'text'}")
    made_with = {key: getattr(tokenizer, key) for key in ("name", "fingerprint", "vocab_size", "bos_id", "eos_id")}
    manifest = {
        "format": CHAT_FORMAT if chat else FORMAT,
        "tokenizer": made_with,
        "dtype": dtype,
        "record_tokens": RECORD_TOKENS,
        "text_key": job.text_key,
        "val_fraction": None if held_out else job.val_fraction,
        "splits": splits,
        "bigram_bits_per_byte": None if chat else cross_entropy_bits(*bigrams.values()),
        "skipped_files": sum(record["skipped"] for record in records),
        "empty_documents": sum(record["empty"] for record in records),
        "plan": digest_of(_read_json(job.folder / WORK / "plan.json")),
        "made": time.strftime("%Y-%m-%d"),
    }
    if chat:
        unanswered = sum(record["unanswered"] for record in records)
        manifest |= {"chat": chat.identity, "unanswered_documents": unanswered}
    write_manifest(job.folder, manifest)
    shutil.rmtree(job.folder / WORK, ignore_errors=True)
    return manifest


def _read_json(file: Path):
    """None where the file is missing or damaged."""
    try:
        stored = json.loads(storage.read_bytes(file))
        return stored["value"] if stored["check"] == digest_of(stored["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_json(file: Path, value) -> None:
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(json.dumps({"value": value, "check": digest_of(value)}), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error
