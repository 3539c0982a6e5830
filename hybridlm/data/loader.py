# SPDX-License-Identifier: Apache-2.0
"""Batches of packed rows: batch n is a function of (seed, data, n) alone.

Grain's `MapDataset` shuffles the rows anew each epoch, repeats and batches them, and reads ahead in threads or worker
processes. Every stage is random access, so the whole state is the number of the next batch: it holds no trace of hosts,
workers or devices, and a run resumes exactly on another number of any of them. Grain's own packers are not used for
that reason: they fill rows from a sequential iterator, their state is that of the shard each host or worker reads, and
with another number of shards other rows come out.

Validation is one pass in an order that no seed changes; rows of padding fill the last batch, so that all hosts take the
same number of steps.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Sequence

import numpy as np

from hybridlm.data.config import DataConfig
from hybridlm.data.corpus import Corpus, open_corpus
from hybridlm.data.packing import PairRows, empty_row, permutation_keys
from hybridlm.errors import ConfigError

VALIDATION_SEED = 0
MAX_THREADS = 4
Batch = dict[str, np.ndarray]


def host_rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """The rows [low, high) of a global batch that process `process_index` of `process_count` reads."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index ({process_index}) not in 0..{process_count - 1}")
    if batch_size % process_count:
        raise ConfigError(f"data.batch_size ({batch_size}) not divisible by the number of hosts ({process_count})")
    share = batch_size // process_count
    return process_index * share, (process_index + 1) * share


def make_loader(
    config: DataConfig,
    *,
    seed: int = 0,
    split: str = "train",
    start_step: int = 0,
    rows: tuple[int, int] | slice | Sequence[int] | np.ndarray | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    corpus: Corpus | None = None,
) -> "Loader":
    """Iterator over batches: dicts of `tokens`, `targets`, `segment_ids`, `positions`, int32 [rows read, seq_len].

    Args:
      config: where the text is and how it is cut; `batch_size` and `seq_len` override its fields.
      seed: permutes documents and rows of the training split; has no effect on validation.
      split: "train", endless, or "val", one pass.
      start_step: number of the first batch.
      rows: which rows of the global batch to read: a tuple (low, high) or a slice for [low, high); a list, range or
        array for rows one by one, ascending; None reads all.
      corpus: an open corpus, to save opening it again.

    Raises:
      ConfigError: the split holds nothing to predict.
      ValueError: `rows` are not within the batch, or not ascending.
    """
    corpus = corpus or open_corpus(config)
    batch_size, seq_len = batch_size or config.batch_size, seq_len or config.seq_len
    rows = _check_rows(rows, batch_size)
    seed = seed if split == "train" else VALIDATION_SEED
    packed = PairRows(corpus.split(split), seq_len, seed)
    if len(packed) == 0:
        raise ConfigError(_nothing(split, corpus, config))
    identity = {
        "split": split,
        "seed": seed,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "fingerprint": corpus.stats[split]["fingerprint"],
    }
    batches = _batches(packed, seed, split == "train", batch_size, rows)
    workers = config.workers if split == "train" else 0  # a pass over validation is shorter than starting processes
    return Loader(batches, identity, step=start_step, workers=workers, prefetch=config.prefetch)


class Loader:
    """Iterator over batches whose state is the number of the next one.

    Use it as a context manager or call `close()`; an iterator left open does not keep the interpreter from ending. An
    exception in `next()`, KeyboardInterrupt included, leaves the step unchanged and the loader usable.
    """

    def __init__(self, batches, identity: dict, *, step: int = 0, workers: int = 0, prefetch: int = 4):
        """`batches` is a grain.MapDataset; make_loader builds it."""
        self._batches, self._identity = batches, identity
        self._workers, self._prefetch = workers, prefetch
        self._open_iterators = []  # at most one
        self._closed = False
        # at the interpreter's exit too, while what grain needs to stop its processes still exists
        weakref.finalize(self, _close_all, self._open_iterators)
        self.reset(step)

    @property
    def step(self) -> int:
        """Number of the batch that `next()` gives."""
        return self._step

    def __len__(self) -> int:
        """Batches of a pass over validation; training has no end."""
        return len(self._batches)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the loader is closed")
        if not self._open_iterators:
            self._open_iterators.append(self._open())
        try:
            batch = next(self._open_iterators[0])
            self._step += 1
        except BaseException:  # an interrupted grain iterator has lost a batch: start it again at this step
            _close_all(self._open_iterators)
            raise
        # workers hand over shared memory, which must not outlive the loader
        return {name: np.array(value) for name, value in batch.items()} if self._workers else batch

    def get_state(self) -> dict:
        """What a checkpoint keeps: JSON, the same on every host."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict, *, strict: bool = True) -> None:
        """Goes on from a checkpoint's state, exactly.

        Raises:
          ConfigError: the state is of other data, another seed, batch or row size, so that an exact continuation does
            not exist; `strict=False` takes over its step alone.
        """
        changed = [name for name, value in self._identity.items() if state.get(name) != value]
        if strict and changed:
            shown = ", ".join(f"{name} {state.get(name)!r} -> {self._identity[name]!r}" for name in changed)
            raise ConfigError(
                f"data changed since the checkpoint ({shown}): restore the former data or start a new run"
            )
        self.reset(int(state["step"]))

    def reset(self, step: int = 0) -> None:
        """Goes to a step; before each pass over validation, to 0."""
        if step < 0:
            raise ValueError(f"step ({step}) must not be negative")
        _close_all(self._open_iterators)
        self._step = step

    def close(self) -> None:
        """Stops threads and processes; may be called twice."""
        self._closed = True
        _close_all(self._open_iterators)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self):
        import grain

        ahead = self._prefetch
        options = grain.ReadOptions(num_threads=min(ahead, MAX_THREADS), prefetch_buffer_size=ahead)
        dataset = self._batches.slice(slice(self._step, None)).to_iter_dataset(options)
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain reads flags when it starts processes; ours come from elsewhere
                flags.FLAGS.mark_as_parsed()
            share = -(-ahead // self._workers)
            spread = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=share)
            dataset = dataset.mp_prefetch(spread, worker_init_fn=_start_worker)
        return iter(dataset)


def _close_all(iterators: list) -> None:
    while iterators:
        iterators.pop().close()


def _batches(packed: PairRows, seed: int, train: bool, batch_size: int, rows: np.ndarray):
    import grain

    if train:
        row_seed = int(permutation_keys(np.arange(1), seed)[0] >> np.uint64(32))  # grain adds the epoch to it
        ordered = grain.MapDataset.source(packed).shuffle(seed=row_seed).repeat()
    else:
        ordered = _PaddedRows(packed, batch_size)
    return grain.MapDataset.source(_HostRows(ordered, batch_size, rows)).batch(len(rows))


class _HostRows:
    """The rows of each batch that a host reads, batch after batch."""

    def __init__(self, rows, batch_size: int, read: np.ndarray):
        """rows: of all batches, one after the other. read: numbers within a batch."""
        self.rows, self.batch_size, self.read = rows, batch_size, read

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * len(self.read)

    def __getitem__(self, index: int) -> Batch:
        batch, row = divmod(index, len(self.read))
        return self.rows[batch * self.batch_size + int(self.read[row])]


class _PaddedRows:
    """Rows followed by as many rows of padding as fill the last batch."""

    def __init__(self, rows: PairRows, batch_size: int):
        self.rows = rows
        self.length = -(-len(rows) // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return self.rows[index] if index < len(self.rows) else empty_row(self.rows.seq_len)


def _check_rows(rows, batch_size: int) -> np.ndarray:
    """The rows to read, ascending."""
    if rows is None:
        return np.arange(batch_size)
    if isinstance(rows, slice):
        if rows.step not in (None, 1):
            raise ValueError(f"rows ({rows}) must be contiguous")
        rows = (rows.start or 0, batch_size if rows.stop is None else rows.stop)
    if isinstance(rows, tuple):
        low, high = rows
        if not 0 <= low < high <= batch_size:
            raise ValueError(f"rows ({low}, {high}) must be a range within the batch of {batch_size}")
        return np.arange(low, high)
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows ({rows.dtype} {list(rows.shape)}) must be a list of whole numbers")
    if rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) < 1).any():
        raise ValueError(f"rows ({rows[0]}..{rows[-1]}) must ascend, none twice, within the batch of {batch_size}")
    return rows


def _nothing(split: str, corpus: Corpus, config: DataConfig) -> str:
    counts = {name: corpus.stats[name]["documents"] for name in ("train", "val")}
    total = sum(counts.values())
    if counts[split]:
        return f"the {counts[split]} documents of the {split} split are too short to predict a token: give more text"
    if split == "val" and not config.val_path:
        return (
            f"data.val_fraction ({config.val_fraction}) holds out none of the {total} documents: raise it, set"
            " data.val_path, or turn evaluation off with run.eval_every=-1"
        )
    if split == "val":
        return "data.val_path holds no text: set it to files with text, or turn evaluation off with run.eval_every=-1"
    return (
        f"data.val_fraction ({config.val_fraction}) holds out all {total} documents, none is left to train on: lower it"
    )


def _start_worker(index: int, count: int) -> None:
    """In a worker process: leave Ctrl-C to the parent, and end when the parent does, however it ends."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
