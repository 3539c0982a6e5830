# SPDX-License-Identifier: Apache-2.0
"""Batches of packed rows: batch n is a function of (seed, the list of the run's data, n) alone.

Grain's `MapDataset` shuffles the rows of each source anew each epoch, repeats and batches them, and reads ahead in
threads or worker processes. Every stage is random access, so the whole state is the number of the next batch and the
list of what batches are made of (`hybridlm.data.history`): it holds no trace of hosts, workers or devices, and a run
resumes exactly on another number of any of them. Grain's own packers are not used for that reason: they fill rows from
a sequential iterator, their state is that of the shard each host or worker reads, and with another number of shards
other rows come out.

Validation is one pass in an order that no seed changes; rows of padding fill the last batch, so that all hosts take the
same number of steps.
"""

import multiprocessing.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hybridlm.data.config import DataConfig
from hybridlm.data.corpus import Corpus, open_corpus
from hybridlm.data.guard import Guarded
from hybridlm.data.plan import TrainPlan, ValPlan
from hybridlm.errors import ConfigError, DataError

MAX_THREADS = 4
EXIT_PRIORITY = 100

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
    room: int = 0,
) -> "Loader":
    """Iterator over batches: dicts of `tokens`, `targets`, `segment_ids`, `positions`, int32 [rows read, seq_len].

    Args:
      config: where the text is and how it is cut; `batch_size` and `seq_len` override its fields.
      seed: permutes documents and rows of the training split; has no effect on validation.
      split: "train", endless unless `config.epochs` ends all sources, or "val", one pass.
      start_step: number of the first batch.
      rows: which rows of the global batch to read: a tuple (low, high) or a slice for [low, high); a list, range or
        array for rows one by one, ascending; None reads all.
      corpus: an open corpus, to save opening it again.
      room: cells in front of each document of a row, for the prefix tokens of a model.

    Raises:
      ConfigError: the split holds nothing to predict.
      ValueError: `rows` are not within the batch, or not ascending.
    """
    corpus = corpus or open_corpus(config)
    batch_size, seq_len = batch_size or config.batch_size, seq_len or config.seq_len
    rows = _check_rows(rows, batch_size)
    plan = (TrainPlan if split == "train" else ValPlan)(config, corpus, seed, batch_size, seq_len, rows, room)
    workers = config.workers if split == "train" else 0  # a pass over validation is shorter than starting processes
    return Loader(plan, step=start_step, workers=workers, prefetch=config.prefetch)


class Plan(Protocol):
    """What the batches of a split are."""

    fill: float
    """Share of the tokens of its rows that are not padding."""

    def __len__(self) -> int:
        """Batches of a pass; sys.maxsize: without end."""

    def dataset(self, step: int) -> tuple[Any, int, int]:
        """(grain.MapDataset of batches, the one of them that belongs to a step, the first step that another dataset
        serves)."""

    def state(self) -> dict:
        """What a checkpoint keeps beside the step: JSON, the same on every host."""

    def set_state(self, state: Mapping[str, Any], step: int) -> str:
        """Goes on from a checkpoint's state; what is not as it was then, in words, or ""."""

    def skip(self, step: int, n: int) -> None:
        """Leaves out n batches from a step on."""

    def tokens_before(self, step: int) -> int:
        """Tokens, padding included, of all batches before a step."""

    def at_end(self, step: int) -> str:
        """What to say where there is no batch for a step; "" for the end of a pass."""


class Loader:
    """Iterator over batches whose state is the number of the next one, and what batches are made of.

    Use it as a context manager or call `close()`; an iterator left open does not keep the interpreter from ending. An
    exception in `next()`, KeyboardInterrupt included, leaves the step unchanged and the loader usable: where a worker
    died, the next call starts others. DataError where the data ends or cannot be read.
    """

    def __init__(self, plan: Plan, *, step: int = 0, workers: int = 0, prefetch: int = 4):
        """`make_loader` makes the plan."""
        self._plan, self._workers, self._prefetch = plan, workers, prefetch
        self._open_iterators = []  # at most one
        self._until = sys.maxsize
        self._closed = False
        self.changed = ""
        """What a new entry changed when the newest state was set, in words."""
        # at the interpreter's exit too, before what grain needs to stop its processes is taken down
        multiprocessing.util.Finalize(self, _close_all, args=(self._open_iterators,), exitpriority=EXIT_PRIORITY)
        self.reset(step)

    @property
    def step(self) -> int:
        """Number of the batch that `next()` gives."""
        return self._step

    @property
    def fill(self) -> float:
        """Share of the tokens of the rows that are not padding."""
        return self._plan.fill

    def tokens_before(self, step: int) -> int:
        """Tokens, padding included, of all batches before a step, whatever sizes they were of."""
        return self._plan.tokens_before(step)

    def __len__(self) -> int:
        """Batches of a pass over validation; training has no end."""
        return len(self._plan)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the loader is closed")
        try:
            batch = next(self._iterator())
            self._step += 1
        except StopIteration:
            if told := self._plan.at_end(self._step):
                raise DataError(told) from None
            raise
        except DataError as error:  # Grain adds lines of its own
            _close_all(self._open_iterators)
            raise DataError(str(error).splitlines()[0]) from error
        except BaseException:  # an interrupted grain iterator has lost a batch: start it again at this step
            _close_all(self._open_iterators)
            raise
        # workers hand over shared memory, which must not outlive the loader
        return {name: np.array(value) for name, value in batch.items()} if self._workers else batch

    def get_state(self) -> dict:
        """What a checkpoint keeps: JSON, the same on every host."""
        return {"step": self._step, **self._plan.state()}

    def set_state(self, state: Mapping[str, Any], *, strict: bool = True) -> str:
        """Goes on from a checkpoint's state, exactly; returns what has changed since, in words, or "".

        Other data, mixture, packing, batch or row size are a new entry of the list from this step on.

        Raises:
          ConfigError: the state is none, or of another seed or split, so that a continuation does not exist;
            `strict=False` takes over its step alone.
        """
        step = state.get("step") if isinstance(state, Mapping) else None
        if type(step) is not int or not 0 <= step < 2**62:
            raise ConfigError(f"the checkpoint's record of the data has no step ({step!r})")
        self.changed = self._plan.set_state(state, step) if strict else ""
        self.reset(step)
        return self.changed

    def skip(self, n: int) -> None:
        """Leaves out the next n batches: the one that would have followed them comes next, at this step. The state
        tells of it."""
        if n < 0:
            raise ValueError(f"n ({n}) must not be negative")
        if n:
            self._plan.skip(self._step, n)
            self.reset(self._step)

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

    def _iterator(self):
        if self._open_iterators and self._step >= self._until:
            _close_all(self._open_iterators)
        if not self._open_iterators:
            dataset, first, self._until = self._plan.dataset(self._step)
            self._open_iterators.append(self._open(dataset, first))
        return self._open_iterators[0]

    def _open(self, dataset, first: int):
        import grain

        ahead = self._prefetch
        options = grain.ReadOptions(num_threads=min(ahead, MAX_THREADS), prefetch_buffer_size=ahead)
        dataset = dataset.slice(slice(first, None)).to_iter_dataset(options)
        if not self._workers:
            return iter(dataset)
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads flags when it starts processes; ours come from elsewhere
            flags.FLAGS.mark_as_parsed()
        share = -(-ahead // self._workers)
        spread = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=share)
        return Guarded(iter(dataset.mp_prefetch(spread)))


def _close_all(iterators: list) -> None:
    while iterators:
        iterators.pop().close()


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
