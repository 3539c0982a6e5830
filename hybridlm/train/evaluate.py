# SPDX-License-Identifier: Apache-2.0
"""Validation loss: nats per token, and bits per byte, which compares across tokenizers and with the bigram baseline."""

import math
from collections.abc import Callable, Iterable
from itertools import islice

import jax


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per byte of text."""
    return nats_per_token / math.log(2.0) / bytes_per_token


def evaluate(
    eval_step: Callable, params, batches: Iterable[dict], limit: int, stop: Callable[[], bool]
) -> float | None:
    """Mean nats per token over the first `limit` batches (0: all); None where `stop()` came true on the way.

    eval_step: (params, batch) -> LossSums; the sums of a batch are read while the next one is computed.
    """
    nats = tokens = 0.0
    previous = None
    for batch in islice(batches, limit or None):
        if stop():
            return None
        sums, previous = previous, eval_step(params, batch)
        if sums is not None:
            nats, tokens = nats + float(sums.nats), tokens + float(sums.tokens)
    last = jax.device_get(previous)
    return (nats + float(last.nats)) / max(tokens + float(last.tokens), 1.0)
