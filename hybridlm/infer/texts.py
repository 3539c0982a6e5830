# SPDX-License-Identifier: Apache-2.0
"""Texts that go on from prompts, several at once, given out as they are written."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridlm.data.stream import TextStream
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import require
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.model.decoding import CHUNK, Sampling, Writer
from hybridlm.model.generation import check_counts, check_room, sampling
from hybridlm.model.model import HybridLM


@dataclass(frozen=True)
class Options:
    """How texts are written; `hybridlm.generate` has the words."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    """A text ends in front of the first of them."""
    prefill_chunk: int | None = CHUNK
    cache: CacheTypes = AS_COMPUTED
    """How the cache is stored."""

    def sampling(self, eos_ids: Sequence[int]) -> Sampling:
        """How tokens are chosen, up to one of `eos_ids`; ValueError for numbers out of range."""
        check_counts(self.max_new_tokens, self.prefill_chunk)
        return sampling(self.temperature, self.top_k, self.top_p, eos_ids, self.seed)


@dataclass(frozen=True)
class Piece:
    """Text of a row that is sure now."""

    row: int
    """Number of the prompt."""
    text: str


@dataclass(frozen=True)
class Done:
    """A row's text has ended."""

    row: int
    text: str
    """All of it, without the prompt."""
    reason: str
    """"eos": the end of a document; "stop": a stop string, which is no part of it; "length": max_new_tokens."""
    prompt_tokens: int
    new_tokens: int


@dataclass
class Speed:
    """What writing took; seconds of the first tokens include what is compiled then."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_seconds: float | None = None
    """From the start to the first token."""
    later_tokens: int = 0
    later_seconds: float = 0.0
    """Of the tokens behind the first of each batch."""
    _started: float = field(default_factory=time.perf_counter)
    _last: float = 0.0

    def begin(self) -> None:
        """A batch is read from here on."""
        self._last = 0.0

    def wrote(self, tokens: int) -> None:
        """A step has given so many tokens."""
        now = time.perf_counter()
        if self.first_seconds is None:
            self.first_seconds = now - self._started
        if self._last:
            self.later_tokens += tokens
            self.later_seconds += now - self._last
        self._last = now
        self.new_tokens += tokens

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens} tokens read", f"{self.new_tokens} written"]
        if self.first_seconds is not None:
            parts.append(f"the first after {self.first_seconds:.2f} s")
        if self.later_seconds > 0:
            parts.append(f"the others at {self.later_tokens / self.later_seconds:.1f} tokens/s")
        return ", ".join(parts)


def write(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: Options = Options(),
    *,
    batch: int = 8,
    block: int = 1,
    speed: Speed | None = None,
) -> Iterator[Piece | Done]:
    """Pieces of the texts behind the prompts, as they come, and of each prompt a Done behind its pieces.

    batch: prompts that are gone on with at once; their tokens come by turns. block: tokens that are written before the
    host looks. speed: is told what it took. A text ends with the end of the document or as `options` say. Without
    drawing (temperature 0), each is what it would be alone. ConfigError before anything is computed for a prompt
    without a token, for tokens that the model does not have, for a bidirectional model and where memory cannot hold it
    all.
    """
    speed = Speed() if speed is None else speed
    rows = [encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    require(bool(rows), "there is no prompt")
    require(batch > 0 and block > 0, f"batch ({batch}) and block ({block}) must be positive")
    check_tokens(model, tokenizer, rows)
    batch = min(batch, len(rows))
    longest = max(map(len, rows))
    check_room(model, batch, longest, options.max_new_tokens, types=options.cache)
    how = options.sampling(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    speed.prompt_tokens += sum(map(len, rows))
    writer = Writer(model, options.prefill_chunk, options.cache)
    for first in range(0, len(rows), batch):
        yield from _batch(writer, tokenizer, rows[first : first + batch], first, batch, options, how, block, speed)


def encode(tokenizer: Tokenizer, prompt: str, i: int | None = None) -> np.ndarray:
    """int32 tokens of a prompt, the document's first in front. ConfigError where there is none; i: its number."""
    tokens = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    which = "prompt" if not i else f"prompt {i + 1}"
    require(len(tokens) > 0, f"{which} ({prompt!r}) has no token and the tokenizer no start token: give --prompt")
    return tokens


def check_tokens(model: HybridLM, tokenizer: Tokenizer, rows: Sequence[np.ndarray]) -> None:
    """ConfigError where the tokenizer gave tokens that the model does not have, or the model cannot write."""
    ahead, vocab_size = model.config.sees_ahead, model.config.vocab_size
    require(not ahead, f"the model cannot be decoded token by token: {ahead}")
    highest = max(int(row.max(initial=0)) for row in rows)
    require(
        highest < vocab_size,
        f"the tokenizer {tokenizer.name} gives token {highest}, beyond the model's vocab_size ({vocab_size}): it is "
        "another model's",
    )


def _batch(writer, tokenizer, rows, first, batch, options, how, block, speed) -> Iterator[Piece | Done]:
    """Rows `first`, `first + 1`, ...; a batch that is not full is filled up with rows that are done."""
    lengths_B = np.array([*map(len, rows), *[1] * (batch - len(rows))])
    tokens_BT = np.zeros((batch, lengths_B.max()), np.int32)
    for row, tokens in enumerate(rows):
        tokens_BT[row, : len(tokens)] = tokens
    speed.begin()
    state = writer.read(writer.start(batch, tokens_BT.shape[1] + options.max_new_tokens), tokens_BT, lengths_B)
    streams = [TextStream(tokenizer, options.stop, how.eos_ids) for _ in rows]
    going = set(range(len(rows)))
    done_B = np.arange(batch) >= len(rows)
    left = options.max_new_tokens
    while going and left > 0:
        n = min(block, left)
        new_BN, state = writer.write(state, n, how, done_B)
        new_BN, left = np.asarray(new_BN), left - n
        before = sum(len(stream.ids) for stream in streams)
        pieces = [(row, streams[row].push(new_BN[row].tolist())) for row in sorted(going)]
        speed.wrote(sum(len(stream.ids) for stream in streams) - before)
        for row, text in pieces:
            if streams[row].reason is None and left == 0:
                text += streams[row].end()
            if text:
                yield Piece(first + row, text)
            if (reason := streams[row].reason) is not None:
                going.remove(row)
                done_B = done_B | (np.arange(batch) == row)
                yield Done(first + row, streams[row].text, reason, len(rows[row]), len(streams[row].ids))
