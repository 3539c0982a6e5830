# SPDX-License-Identifier: Apache-2.0
"""Batches of a run: read by the process whose devices hold their rows, and put there."""

import jax
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
        slices = [index[0] for index in at.addressable_devices_indices_map((n_rows, config.data.seq_len)).values()]
        rows = (min(s.start or 0 for s in slices), max(s.stop or n_rows for s in slices))
        self.loader: Loader = make_loader(
            config.data, seed=config.run.seed, split=split, batch_size=n_rows, rows=rows, corpus=corpus
        )

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        """The next batch; this process gives the rows that its devices hold."""
        batch = next(self.loader)
        return {
            k: jax.make_array_from_process_local_data(self._at, v, (self._n_rows, v.shape[1])) for k, v in batch.items()
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loader.close()
