# SPDX-License-Identifier: Apache-2.0
"""A model of this project as lm-evaluation-harness asks for one: `lm_eval.api.model.LM`.

The harness gives texts; how they become tokens is its own `TemplateLM`'s, as for its model of transformers: context and
continuation are encoded together and cut where the context alone ends, its trailing spaces being the continuation's.
Each context is read once into the model's cache, from which each of its continuations is scored.

Axis letters: B rows, T tokens of contexts, K tokens of continuations, D model, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from hybridlm.errors import require
from hybridlm.eval.subject import Subject
from hybridlm.model.generation import generate
from hybridlm.sharding import batch_sharding

MAX_GEN_TOKENS = 256
"""Tokens that are written where a task does not say how many; the harness's own number."""
FIRST_WRITTEN = 32
"""Tokens that are written before stop sequences are looked for; each time after it twice as many."""
LOGITS_TOKENS = 64
"""Positions of a row whose logits are in memory at once."""

Scored = tuple[float, bool]
"""(log-likelihood of a continuation in nats, whether each of its tokens is the likeliest)."""


class HarnessModel(TemplateLM):
    """A subject for `lm_eval.simple_evaluate(HarnessModel(subject), ...)`; tasks are scored in batches of the subject's
    config on its mesh. Contexts beyond data.seq_len lose their first tokens, texts of rolling tasks are read in windows
    of it, both as the harness does. ConfigError for a model that sees ahead."""

    def __init__(self, subject: Subject):
        super().__init__()
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
        self._graphdef, self._params = nnx.split(subject.model)

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
        return self.subject.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The ids of a text, behind bos where the subject's texts begin with it, or as `add_special_tokens` says."""
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

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs) -> list[Scored]:
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
        n_turns = max(map(len, turns))
        longest = max(len(continuation) for of_context in turns for continuation in of_context)
        tokens_BT, lengths_B = self._rows(contexts, _rounded(max(map(len, contexts))))
        max_len = tokens_BT.shape[1] + _rounded(longest)
        x_BD, cache = _read(self._graphdef, self._params, tokens_BT, lengths_B, max_len)
        for turn in range(n_turns):
            here = [of_context[turn] if turn < len(of_context) else () for of_context in turns]
            width = max(map(len, here))
            tokens_BK, lengths_B = self._rows(here, 1 if width == 1 else _rounded(width))
            scored = jax.device_get(_after(self._graphdef, self._params, cache, x_BD, tokens_BK, lengths_B))
            for row, (continuation, of_context) in enumerate(zip(here, wanted, strict=True)):
                for number in of_context[continuation] if continuation else ():
                    results[number] = float(scored[0][row]), bool(scored[1][row])

    def _rows(self, rows: Sequence[Sequence[int]], width: int) -> tuple[jax.Array, jax.Array]:
        """(tokens int32 [B, width], their numbers int32 [B]) of batch_size rows, on the mesh; rows of nobody have one
        token."""
        tokens, lengths = np.zeros((self.batch_size, width), np.int32), np.ones(self.batch_size, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)], lengths[number] = row, len(row)
        return jax.device_put(tokens, batch_sharding(self.subject.mesh)), jnp.asarray(lengths)

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
        """Texts after some prompts. Rows that have not come to an end go on in the next round from what they wrote."""
        sampling = {name: options[name] for name in ("temperature", "top_k", "top_p") if options.get(name) is not None}
        decode, eos = self.subject.tokenizer.decode, self.subject.tokenizer.eos_id
        written: list[list[int]] = [[] for _ in prompts]
        going, done, n = list(range(len(prompts))), 0, FIRST_WRITTEN
        while going and done < n_new:
            n = min(n, n_new - done)
            rows = [prompts[row] + written[row] for row in going]
            tokens_BT, lengths_B = self._rows(rows, max(map(len, rows)))
            with jax.set_mesh(self.subject.mesh):
                key = jax.random.fold_in(jax.random.key(0), done)
                new_BN = np.asarray(
                    generate(self.subject.model, tokens_BT, n, lengths=lengths_B, eos_id=eos, key=key, **sampling)
                )
            for row, ids in zip(going, new_BN.tolist()):
                written[row] += ids[: ids.index(eos)] if eos in ids else ids
            done, n = done + n, 2 * n
            ended = {row for row in going if len(written[row]) < done or _stopped(decode(written[row]), stops)}
            going = [row for row in going if row not in ended]
        return [postprocess_generated_text(decode(ids), stops, None) for ids in written]


@partial(jax.jit, static_argnums=(0, 4))
def _read(graphdef, params, tokens_BT, lengths_B, max_len: int):
    """(hidden vector [B, D] of each row's last token, the cache after it, for rows of up to max_len tokens)."""
    model = nnx.merge(graphdef, params)
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    cache = model.init_cache(tokens_BT.shape[0], max_len)
    x_BTD, cache = model.extend_hidden(tokens_BT, cache, real_BT.astype(jnp.int32))
    return jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0], cache


@partial(jax.jit, static_argnums=0)
def _after(graphdef, params, cache, x_BD, tokens_BK, lengths_B):
    """(log-likelihood [B] of the tokens after what is in the cache, whether each is the likeliest [B])."""
    model = nnx.merge(graphdef, params)
    real_BK = jnp.arange(tokens_BK.shape[1])[None] < lengths_B[:, None]
    x_BKD = x_BD[:, None]
    if tokens_BK.shape[1] > 1:
        y_BKD, _ = model.extend_hidden(tokens_BK[:, :-1], cache, real_BK[:, 1:].astype(jnp.int32))
        x_BKD = jnp.concatenate([x_BKD, y_BKD], axis=1)

    def part(total, at):
        x_BCD, token_BC, real_BC = at
        logits_BCV = model.logits(x_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, token_BC[..., None], axis=-1)[..., 0]
        nats_BC = jnp.where(real_BC, chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1), 0.0)
        is_likeliest_BC = (jnp.argmax(logits_BCV, axis=-1) == token_BC) | ~real_BC
        return (total[0] + nats_BC.sum(-1), total[1] & is_likeliest_BC.all(-1)), None

    batch, width = tokens_BK.shape
    n = min(width, LOGITS_TOKENS)
    parts = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(batch, width // n, n, *a.shape[2:]), 1, 0), (x_BKD, tokens_BK, real_BK)
    )
    start = jnp.zeros((batch,), jnp.float32), jnp.ones((batch,), bool)
    return lax.scan(part, start, parts)[0]


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


def _rounded(n: int) -> int:
    """A width of few different ones, so that few programs are compiled: a power of two, from 512 on a multiple of it.
    All above LOGITS_TOKENS are multiples of that."""
    return max(16, 1 << (n - 1).bit_length()) if n <= 512 else -(-n // 512) * 512
