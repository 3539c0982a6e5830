# SPDX-License-Identifier: Apache-2.0
"""Batches of a run: each process reads the rows that its own devices hold, in whatever order the mesh has them."""

import jax
import numpy as np
from jax.sharding import Sharding

from hybridlm.config import Config
from hybridlm.data import make_loader
from hybridlm.data.corpus import Corpus
from hybridlm.data.loader import Loader


class Batches:
    """Batches of a split on the devices, one after the other; a context manager."""

    def __init__(self, config: Config, corpus: Corpus, split: str, n_rows: int, at: Sharding):
        """n_rows: of a batch over all processes. at: sharding of its [B, T] arrays."""
        self._n_rows, self._at = n_rows, at
        indices = at.addressable_devices_indices_map((n_rows, config.data.seq_len)).values()
        self._rows = held_rows(indices, n_rows)
        self.loader: Loader = make_loader(
            config.data, seed=config.run.seed, split=split, batch_size=n_rows, rows=self._rows, corpus=corpus,
            room=config.model.prefix_tokens,
        )  # fmt: skip

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        """The next batch."""
        return self.put(next(self.loader))

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch of the loader on the devices: this process gives the rows that its devices hold."""
        return {name: self._put(value) for name, value in batch.items()}

    def _put(self, read: np.ndarray) -> jax.Array:
        """A global array [B, T] of the rows that were read here, and of those of the other processes."""

        def held(index: tuple[slice, ...]) -> np.ndarray:
            return read[local_rows(index, self._rows, self._n_rows), *index[1:]]

        return jax.make_array_from_callback((self._n_rows, *read.shape[1:]), self._at, held)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loader.close()


def held_rows(indices, n_rows: int) -> np.ndarray:
    """The distinct rows, ascending, of devices whose shares of a batch of n_rows rows are at these indices.

    On a torus the devices of a host are no neighbours in the mesh: theirs need not be one range.
    """
    return np.unique(np.concatenate([np.arange(*index[0].indices(n_rows)) for index in indices]))


def local_rows(index: tuple[slice, ...], read: np.ndarray, n_rows: int) -> slice:
    """Where among the rows that were read, ascending, those of a device at this index of a batch are."""
    low, high, _ = index[0].indices(n_rows)
    first = int(np.searchsorted(read, low))
    return slice(first, first + high - low)
