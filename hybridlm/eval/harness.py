# SPDX-License-Identifier: Apache-2.0
"""A model of this project as lm-evaluation-harness asks for one: `lm_eval.api.model.LM`.

The harness gives texts; how they become tokens is its own `TemplateLM`'s, as for its model of transformers: context and
continuation are encoded together and cut where the context alone ends, its trailing spaces being the continuation's.
Each context is read once, in pieces, into the model's cache, from which each of its continuations is scored; a prompt
is read once, too, however many rounds of writing go on from it.

Axis letters: B rows, T tokens of contexts, N new tokens.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from hybridlm.data.template import template_of
from hybridlm.errors import require
from hybridlm.eval.subject import Subject
from hybridlm.model.decoding import State, Writer, piece_size
from hybridlm.model.generation import sampling
from hybridlm.model.scoring import score

MAX_GEN_TOKENS = 256
"""Tokens that are written where a task does not say how many; the harness's own number."""
FIRST_WRITTEN = 32
"""Tokens that are written before stop sequences are looked for; each time after it twice as many."""

Likelihood = tuple[float, bool]
"""(log-likelihood of a continuation in nats, whether each of its tokens is the likeliest)."""


class HarnessModel(TemplateLM):
    """A subject for `lm_eval.simple_evaluate(HarnessModel(subject), ...)`; tasks are scored in batches of the subject's
    config on its mesh. Contexts beyond data.seq_len lose their first tokens, texts of rolling tasks are read in windows
    of it, both as the harness does. ConfigError for a model that sees ahead, and in several processes.

    chat: texts are conversations by the tokenizer's template (`simple_evaluate(..., apply_chat_template=True)`), where
    special tokens are read as such and an answer ends as the template ends one. ConfigError where there is none.
    """

    def __init__(self, subject: Subject, chat: bool = False):
        super().__init__()
        require(
            jax.process_count() == 1,
            f"tasks are of one process, and this is one of {jax.process_count()}: start it in one, on all its devices",
        )
        config, tokenizer = subject.config, subject.tokenizer
        ahead = config.model.sees_ahead
        require(
            not ahead, f"tasks ask for the likelihood of a text, token by token, and this model sees ahead: {ahead}"
        )
        objective = config.optim.objective
        require(
            not objective.reads_ahead,
            f"tasks ask for the next token, and this model was trained for others (optim.objective "
            f"{type(objective).__name__}): give --data.val_path for its loss on text",
        )
        ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
        require(bool(ends), f"data.tokenizer {tokenizer.name} has no bos and no eos token: set --data.bos_token")
        self.subject, self._prefix, self._eot = subject, ends[0], ends[-1]
        self._template = template_of(tokenizer) if chat else None
        require(
            self._template is None or bool(self._template.source),
            f"--apply-chat-template: the tokenizer {tokenizer.name} comes with no chat template",
        )
        with jax.set_mesh(subject.mesh):
            self._writer = Writer(subject.model)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once: data.seq_len, that is what it was trained on."""
        return self.subject.config.data.seq_len

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are written where a task does not say how many."""
        return MAX_GEN_TOKENS

    @property
    def batch_size(self) -> int:
        """Rows at a time, over all devices."""
        return self.subject.config.data.batch_size

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text: bos, else eos."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests tells tokenizers apart by."""
        chat = "" if self._template is None else "-chat"
        return f"{self.subject.tokenizer.fingerprint}{chat}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that conversations are written by, for the harness's record."""
        return None if self._template is None else self._template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, with the head of the assistant's next turn, or else up to the end of what the last
        message says, which is then gone on with."""
        assert self._template is not None, "HarnessModel(subject, chat=True) has the template"
        text = self._template.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        require(last in text, f"the chat template of {self._template.name} does not write what a message says")
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The ids of a text, behind bos where the subject's texts begin with it, or as `add_special_tokens` says; of a
        conversation as its template writes it."""
        if self._template is not None:
            return self.subject.tokenizer.encode_template(string)[0].tolist()
        bos = self.subject.bos if add_special_tokens is None else add_special_tokens
        return self.subject.tokenizer.encode(string, bos=bos).tolist()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, nats, in the harness's windows: each token is predicted once."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for window in map(utils.make_disjoint_window, cut):
                windows.append((None, *window))
                owner.append(number)
        totals = np.zeros(len(requests))
        for number, (nats, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += nats
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs
    ) -> list[Likelihood]:
        """Of each (texts, context, continuation) the continuation's log-likelihood; one context is read once."""
        asked: dict[tuple, dict[tuple, list[int]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            n = len(continuation)
            require(
                0 < n <= self.max_length,
                f"a continuation of {n} tokens: the model reads 1 to {self.max_length} at once (--length)",
            )
            read = tuple((context + continuation)[-(self.max_length + 1) : -n])
            asked.setdefault(read, {}).setdefault(tuple(continuation), []).append(number)
        results: list = [None] * len(requests)
        with jax.set_mesh(self.subject.mesh):
            for contexts in _batches(sorted(asked, key=lambda c: (-len(c), c)), self.batch_size):
                self._score(contexts, [asked[context] for context in contexts], results)
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _score(self, contexts: Sequence[tuple], wanted: Sequence[Mapping[tuple, list[int]]], results: list) -> None:
        """Reads contexts and scores what is wanted after each into the results, a continuation of each at a time."""
        turns = [list(of_context) for of_context in wanted]
        longest = max(len(continuation) for of_context in turns for continuation in of_context)
        state = self._read(contexts, longest)
        for turn in range(max(map(len, turns))):
            here = [of_context[turn] if turn < len(of_context) else () for of_context in turns]
            scored = score(self._writer, state, *self._rows(here, 0))
            for row, (continuation, of_context) in enumerate(zip(here, wanted, strict=True)):
                for number in of_context[continuation] if continuation else ():
                    results[number] = float(scored.nats[row]), bool(scored.likeliest[row])

    def _read(self, rows: Sequence[Sequence[int]], more: int) -> State:
        """What was read of rows, with room for so many tokens behind them. The room is rounded up, that few programs
        are compiled."""
        tokens_BT, lengths_B = self._rows(rows, 1)
        room = piece_size(tokens_BT.shape[1], None) + piece_size(more, None)
        return self._writer.read(self._writer.start(self.batch_size, room), tokens_BT, lengths_B)

    def _rows(self, rows: Sequence[Sequence[int]], least: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [B, T], their numbers int32 [B]) of batch_size rows; those of nobody have `least` tokens."""
        tokens = np.zeros((self.batch_size, max(map(len, rows))), np.int32)
        lengths = np.full(self.batch_size, least, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)], lengths[number] = row, len(row)
        return tokens, lengths

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop sequence, the end of the text or max_gen_toks."""
        texts: list = [None] * len(requests)
        for options, numbers in _alike(requests):
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            stops = handle_stop_sequences(options.pop("until", None), eos=None)
            n_new = options.pop("max_gen_toks")
            room = self.max_length - n_new
            require(room > 0, f"max_gen_toks ({n_new}) of a task leaves no room for its context: raise --length")
            prompts = {number: self.tok_encode(requests[number].args[0])[-room:] for number in numbers}
            prompts = {number: prompt or [self.prefix_token_id] for number, prompt in prompts.items()}
            order = sorted(numbers, key=lambda number: (-len(prompts[number]), prompts[number]))
            for batch in _batches(order, self.batch_size):
                written = self._write([prompts[number] for number in batch], n_new, stops, options)
                for number, text in zip(batch, written, strict=True):
                    texts[number] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _write(self, prompts: Sequence[list[int]], n_new: int, stops: list[str], options: Mapping) -> list[str]:
        """Texts after some prompts, which are read once: rounds of writing go on from what was written before."""
        chosen = {name: options[name] for name in ("temperature", "top_k", "top_p") if options.get(name) is not None}
        tokenizer = self.subject.tokenizer
        ends, turn_ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,), ()
        if self._template is not None:
            ends, turn_ends = self._template.stops(tokenizer)
        decode, stops, how = tokenizer.decode, [*stops, *turn_ends], sampling(eos_id=ends, **chosen)
        written: list[list[int]] = [[] for _ in prompts]
        going, done, n = set(range(len(prompts))), 0, FIRST_WRITTEN
        with jax.set_mesh(self.subject.mesh):
            state = self._read(prompts, n_new)
            while going and done < n_new:
                n = min(n, n_new - done)
                ended_B = ~np.isin(np.arange(self.batch_size), sorted(going))
                new_BN, state = self._writer.write(state, n, how, ended_B)
                for row, ids in enumerate(np.asarray(new_BN)[: len(prompts)].tolist()):
                    if row in going:
                        written[row] += itertools.takewhile(lambda i: i not in ends, ids)
                done, n = done + n, 2 * n
                going = {
                    row for row in going if len(written[row]) == done and not _stopped(decode(written[row]), stops)
                }
        return [postprocess_generated_text(decode(ids), stops, None) for ids in written]


def _alike(requests: Sequence[Instance]) -> Iterator[tuple[dict, list[int]]]:
    """(options, numbers of the requests that have them), in the order of the requests."""
    groups: dict[str, tuple[dict, list[int]]] = {}
    for number, request in enumerate(requests):
        options = request.args[1]
        groups.setdefault(repr(sorted(options.items())), (options, []))[1].append(number)
    yield from groups.values()


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _stopped(text: str, stops: Sequence[str]) -> bool:
    return any(stop and stop in text for stop in stops)
