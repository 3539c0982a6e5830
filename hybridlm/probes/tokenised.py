# SPDX-License-Identifier: Apache-2.0
"""Tasks in text for any tokenizer: the rows that `Task.batch` gives are of its tokens.

A row is encoded whole, as the trainer encodes a document, behind bos where documents have one: the model reads what
such a text is to it. Tokens that hold a letter of the answer are asked, each given the ones before it. (Encoded in
parts, the text would be cut where the tokenizer cuts nothing: ` 40` would be a space and `40`, which models have rarely
seen.) So the first token of an answer may hold the sign before it.

All rows of a length have the same letters, as many as are sure to fit: the largest size of which some rows that were
drawn for the purpose have at most so many tokens. What a row lacks is padding behind the answer. One that has more
tokens is drawn again.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np

from hybridlm.data.tokenizer import ByteTokenizer, Tokenizer
from hybridlm.errors import require
from hybridlm.probes.bounds import fano
from hybridlm.probes.task import Examples, Task, begin, unscored
from hybridlm.probes.text import Story, TextTask

MEASURED = 8
"""Rows that a size is tried with."""
ROUNDS = 12
"""Sizes that are tried at most."""
SPARE = 200
"""A row that fills all but one token in so many is full."""
TRIES = 50
"""Times that rows are drawn at most; of the rows of a size at least half should fit, nearly all do."""


@dataclass(frozen=True)
class InTokens:
    """A task in text, in the tokens of a tokenizer; lengths are of tokens."""

    task: TextTask
    tokenizer: Tokenizer
    bos: bool
    """Whether rows begin with the tokenizer's bos."""

    is_text: ClassVar[bool] = False

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    @functools.cached_property
    def answers(self) -> np.ndarray:
        """All tokens that stand for letters of which answers are made, or end in them behind a space."""
        decode = self.tokenizer.decode
        spelled = [self.tokenizer.encode(letter).tolist() for letter in self.task.letters]
        letters = {letter for ids in spelled for letter in decode(ids).strip()}  # small ones of some tokenizers
        before = decode(spelled[0])  # a token may be another text at the beginning of one
        said = (decode([*spelled[0], i])[len(before) :].split() for i in range(self.vocab_size))
        return np.array([i for i, words in enumerate(said) if words and set(words[-1]) <= letters], np.int32)

    def check(self, length: int) -> None:
        """ConfigError for a tokenizer that cannot tell answers apart, and where a row cannot hold the task."""
        self._size(length)

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Facets of a token are those of its first letter that is asked."""
        size = self._size(length)
        read: dict[int, tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = {}
        rng = begin(self, seed, step, rows, length)
        for _ in range(TRIES):
            stories = self.task.stories(rng, step, rows, size)
            for row in set(range(rows)) - read.keys():
                found = self._read(stories[row], size)
                if len(found[0]) <= length + 1:
                    read[row] = found
            if len(read) == rows:
                break
        said = f"of {rows} rows of {size} letters only {len(read)} have at most {length + 1} tokens"
        require(len(read) == rows, f"length ({length}): {said}: take another length")
        tokens_BT, targets_BT = np.zeros((rows, length), np.int32), unscored(rows, length)
        facets = {name: np.zeros((rows, length), np.int32) for name in stories[0].facets}
        for row, (ids, at_N, facets_N) in read.items():
            tokens_BT[row, : len(ids) - 1] = ids[:-1]
            targets_BT[row, at_N - 1] = ids[at_N]
            for name, values_N in facets_N.items():
                facets[name][row, at_N - 1] = values_N
        return Examples(tokens_BT, targets_BT, facets)

    def chance(self, length: int) -> float:
        """1 / tokens that may stand in answers."""
        return 1 / len(self.answers)

    def fixed_state(self, length: int, bits: float) -> float:
        """Fano's bound of all answers that may be asked, as many tokens as letters at the most. That rows which do not
        fit are drawn again takes at most a bit from what there is to know, as half of them fit."""
        letters, entropy = self.task.askable(self._size(length) - 1)
        return fano(bits, letters, len(self.answers), max(entropy - 1, 0.0))

    def _size(self, length: int) -> int:
        return _size(self, length)

    def _read(self, story: Story, size: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """(ids of a row, which of them are asked, facets of these)."""
        ids, starts = self.tokenizer.encode_template(story.text(size))
        begins = size - len(story.asked)
        asked = np.flatnonzero(story.asked) + begins
        stops = np.append(starts[1:], size)
        first = np.searchsorted(asked, np.maximum(starts, begins))  # the first asked letter that is not before it
        is_asked = (first < len(asked)) & (asked[np.minimum(first, len(asked) - 1)] < stops)
        at_N = np.flatnonzero(is_asked)
        letter_N = asked[first[at_N]] - begins
        if self.bos and self.tokenizer.bos_id is not None:
            ids, at_N = np.concatenate([[self.tokenizer.bos_id], ids]).astype(np.int32), at_N + 1
        return ids, at_N, {name: np.asarray(values)[letter_N] for name, values in story.facets.items()}


def for_tokenizer(task: Task, tokenizer: Tokenizer, bos: bool) -> Task:
    """The task in a tokenizer's tokens: itself where it is none in text, or the tokens are bytes."""
    if not task.is_text or tokenizer.name == ByteTokenizer.name:
        return task
    return InTokens(cast(TextTask, task), tokenizer, bos)


def inner(task: Task) -> Task:
    """The task of which this one is the rows in tokens, or itself."""
    return task.task if isinstance(task, InTokens) else task


@functools.lru_cache(256)
def _size(task: InTokens, length: int) -> int:
    """Letters of rows of so many tokens, found by the slope between the sizes that were tried."""
    tokenizer, name = task.tokenizer, type(task.task).__name__
    spelled = {tuple(tokenizer.encode(letter).tolist()) for letter in task.task.letters}
    said = f"{name} is text, whose answers data.tokenizer {tokenizer.name} does not tell apart"
    require(len(spelled) == len(task.task.letters), f"{said}: take tasks without a language")

    def tokens(size: int) -> int:
        stories = task.task.stories(np.random.default_rng(0), 0, MEASURED, size)
        return max(len(task._read(story, size)[0]) for story in stories)

    least, fields = task.task.least
    best, room = least + 1, length + 1
    used = tokens(best)
    in_tokens = f"length ({length}) must be at least {used - 1} tokens of {tokenizer.name} for {fields}"
    require(used <= room, f"{in_tokens}: lengthen rows, or make that less")
    letters_a_token = best / used
    for _ in range(ROUNDS):
        more = int((room - used) * letters_a_token)
        if more < 1 or (room - used) * SPARE <= room:
            break
        now = tokens(best + more)
        letters_a_token = 0.98 * more / max(now - used, 1)
        if now <= room:
            best, used = best + more, now
            letters_a_token /= 0.98
    return best
