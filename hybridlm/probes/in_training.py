# SPDX-License-Identifier: Apache-2.0
"""A run probed while it trains: `probe.tasks`, by programs beside that of the step, which they leave as it is.

Examples are drawn once and are the same each time: what changes from one probe to the next is the model. They are
packed into rows of data.seq_len tokens, as many as of an evaluation, so that all tasks and lengths share a program, and
the devices of any mesh share the rows. Every process draws all examples and counts all answers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.data import Corpus
from hybridlm.errors import require, within
from hybridlm.model import quantize
from hybridlm.model.init import abstract
from hybridlm.probes.forward import HITS, REST, Forward
from hybridlm.probes.named import AnyProbe, probe_of
from hybridlm.probes.packed import Packed, Shape
from hybridlm.probes.repeated_bigrams import RepeatedBigrams, as_json, check_ids, frequent_pairs, read_set
from hybridlm.probes.scoring import Score, check_vocabulary, state_bits
from hybridlm.probes.task import Task
from hybridlm.probes.tokenised import for_tokenizer
from hybridlm.sharding import RULES
from hybridlm.train.batches import Batches
from hybridlm.train.probing import CHANCE, Probes
from hybridlm.train.step import Program

BOUND = "fixed_state"
"""Of a record: by the name of a task and length, what a state of this size allows at best."""
BY = "by"
"""Of a record: by the name of a task and length, facet, and value: [right, asked]."""


def check(config: Config) -> None:
    """See `train.probing.Probes`."""
    for word, probe in chosen(config).items():
        if isinstance(probe, RepeatedBigrams):
            check_ids(config.model.vocab_size)
            every = config.run.eval_every
            said = f"probe.tasks ({word}) is read of the held-out sets, which run.eval_every ({every}) leaves closed"
            require(every >= 0, f"{said}: set it to 0, or more")
            continue
        if not probe.is_text:
            with within(f"probe.tasks ({word}): "):
                check_vocabulary(config.model.vocab_size, probe)
                for length in lengths(config):
                    probe.check(length)


def open_probe(
    config: Config, mesh: Mesh, program: Program, corpus: Corpus, held_out: Mapping[str, Batches]
) -> "InTraining":
    """See `train.probing.Probes`: with what hangs on the tokenizer checked, and all examples drawn."""
    bos = corpus.tokenizer.bos_id is not None
    probes: dict[str, AnyProbe] = {}
    for word, probe in chosen(config).items():
        if isinstance(probe, RepeatedBigrams):
            require(bool(held_out), f"probe.tasks ({word}): there is no held-out set: give data.val_path")
            probes[word] = probe
            continue
        task = probes[word] = for_tokenizer(probe, corpus.tokenizer, bos)
        with within(f"probe.tasks ({word}): "):
            for length in lengths(config):
                task.check(length)
    return InTraining(config, mesh, program, corpus, held_out, probes)


IN_TRAINING = Probes(check, open_probe)


def chosen(config: Config) -> dict[str, AnyProbe]:
    """The probes of a config by their words."""
    return {word: probe_of(word, "probe.tasks") for word in config.probe.tasks}


def lengths(config: Config) -> tuple[int, ...]:
    """Tokens of examples."""
    return config.probe.lengths or (config.data.seq_len - config.model.prefix_tokens,)


@dataclass(frozen=True)
class InTraining:
    """The probe of a run."""

    config: Config
    mesh: Mesh
    program: Program
    corpus: Corpus
    held_out: Mapping[str, Batches]
    probes: Mapping[str, AnyProbe]

    def __call__(self, params, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """See `train.probing.Probe`: of tasks the accuracy as NAME/LENGTH, of held-out text the loss as NAME/hits and
        NAME/rest, with the name of the set between where there are several."""
        args = (params, *self.program.base.args)
        values: dict[str, Any] = {}
        tables: dict[str, dict[str, Any]] = {CHANCE: {}, BOUND: {}, BY: {}}
        for word, probe in self.probes.items():
            if isinstance(probe, RepeatedBigrams):
                found = self._bigrams(word, probe, args, stop)
                if found is None:
                    return None
                values |= found
                continue
            for length in lengths(self.config):
                score = self._forward.score(args, self._examples(probe, length), stop)
                if score is None:
                    return None
                name = f"{word}/{length}"
                values[name] = score.accuracy
                for table, entry in self._about(probe, score).items():
                    tables[table][name] = entry
        return values | {name: table for name, table in tables.items() if table}

    def _about(self, task: Task, score: Score) -> dict[str, Any]:
        said: dict[str, Any] = {CHANCE: task.chance(score.length)}
        if self._bits is not None:
            said[BOUND] = task.fixed_state(score.length, self._bits)
        by = {facet: {str(value): list(count) for value, count in of.items()} for facet, of in score.by.items()}
        return said | ({BY: by} if by else {})

    def _bigrams(self, word: str, probe: RepeatedBigrams, args, stop: Callable[[], bool]) -> dict[str, Any] | None:
        values: dict[str, Any] = {}
        several = len(self.held_out) > 1
        for name, batches in self.held_out.items():
            frequent, room = self._frequent[word], self.config.model.prefix_tokens
            metrics = read_set(self._forward, args, batches, frequent, self.config.run.eval_batches, stop, room)
            if metrics is None:
                return None
            said, at = as_json(metrics), f"{word}/{name}" if several else word
            tokens = said[HITS]["tokens"] + said[REST]["tokens"]
            values |= {f"{at}/{part}": said[part]["loss"] for part in (HITS, REST)}
            values[f"{at}/share"] = said[HITS]["tokens"] / tokens if tokens else None
        return values

    @cached_property
    def _forward(self) -> Forward:
        """Of the model that an evaluation reads: rounded where training rounds it."""
        model, rounding, program = self.config.model, self.config.quantize, self.program
        graphdef = quantize.abstract(model, rounding).graphdef if rounding.activations else program.graphdef
        return Forward(
            graphdef, self.mesh, lambda *args: quantize.round_matrices(program.whole(*args), model, rounding)
        )

    @cached_property
    def _bits(self) -> int | None:
        return state_bits(abstract(self.config.model).model())

    @cached_property
    def _drawn(self) -> dict[tuple[Task, int], Packed]:
        return {}

    def _examples(self, task: Task, length: int) -> Packed:
        """Those of a task and length."""
        key = (task, length)
        if key not in self._drawn:
            probe, room = self.config.probe, self.config.model.prefix_tokens
            examples = task.batch(probe.seed, 0, probe.examples, length)
            self._drawn[key] = Packed(examples, self._shape(length + room), room)
        return self._drawn[key]

    def _shape(self, span: int) -> Shape:
        """Of batches of an evaluation; of examples that are longer, with as many tokens."""
        data, mesh = self.config.data, self.mesh.shape
        rows, tokens = data.batch_size // self.config.optim.accumulate, data.seq_len
        if span <= tokens:
            return Shape(rows, tokens)
        across, along = (math.prod(mesh.get(axis, 1) for axis in RULES[name]) for name in ("batch", "tokens"))
        longer = -(-span // along) * along
        return Shape(max(rows * tokens // longer // across, 1) * across, longer)

    @cached_property
    def _frequent(self) -> dict[str, Any]:
        """Of each probe of bigrams its frequent pairs, counted at the first probe."""
        bigrams = {word: probe for word, probe in self.probes.items() if isinstance(probe, RepeatedBigrams)}
        return {word: frequent_pairs(probe, self.corpus) for word, probe in bigrams.items()}
