# SPDX-License-Identifier: Apache-2.0
"""Held-out sets: loss, perplexity and bits per byte of each, and the loss by how much of its document a token follows.

Rows are packed as in training: a token sees its own document alone, whatever else stands in its row. So the loss at a
position tells what that much text of one document is worth; in text laid end to end it would not, as most of what
stands before a token is of other documents. A document longer than a row is cut, and what is cut off begins anew.

Later positions are of longer documents, which are other texts than short ones: the loss is given, too, of the documents
that fill a row alone, of which every position has as many tokens.

Axis letters: B rows, T tokens of a row.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hybridlm.cluster import from_first, on_all
from hybridlm.config import Config
from hybridlm.data import Corpus, open_corpus, open_held_out
from hybridlm.errors import within
from hybridlm.eval.subject import Subject
from hybridlm.sharding import batch_sharding
from hybridlm.train.batches import Batches
from hybridlm.train.evaluate import evaluate
from hybridlm.train.loss import token_losses
from hybridlm.train.metrics import Mean, Metrics, bits_per_byte

OWN = "validation"
"""What a set without a name is called: the share of the training text that a run holds out."""
LONG = "long"

Show = Callable[[Iterable, str, int], Iterable]
"""(batches, name of the set, how many) -> the batches, shown as they are taken."""


@dataclass(frozen=True)
class Bucket:
    """Tokens that follow more than `above` and at most `to` tokens of their document, themselves not counted."""

    above: int
    to: int
    tokens: int
    loss: float
    """Nats a token; NaN of none."""
    long_tokens: int
    """Those of documents that fill a row."""
    long_loss: float


@dataclass(frozen=True)
class SetResult:
    """What a model makes of a set."""

    documents: int
    bytes: int
    tokens: int
    """Those that were predicted; of a masked objective, those that were hidden."""
    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float
    by_position: tuple[Bucket, ...]


def evaluate_sets(
    subject: Subject, limit: int = 0, show: Show = lambda batches, name, n: batches
) -> dict[str, SetResult]:
    """The sets of the subject's config by name, on its mesh: those of data.val_path, else what the run held out.

    The objective is that of training: of a masked one, the loss is at the tokens that an evaluation of the run hides.
    limit: batches of each set; 0: all. Whatever the mesh and the rows of a batch, results are the same up to rounding,
    and bit for bit from one time to the next. Raises ConfigError for what cannot be read.
    """
    config, mesh = subject.config, subject.mesh
    score = make_score(config, nnx.graphdef(subject.model))
    params = nnx.to_pure_dict(nnx.state(subject.model, nnx.Param))
    results = {}
    with jax.set_mesh(mesh):
        for name, corpus in open_sets(subject).items():
            with within(f"set {name}: "):
                batches = Batches(config, corpus, "val", config.data.batch_size, batch_sharding(mesh))
            with batches:
                n = len(batches.loader)
                shown = show(batches, name, min(n, limit or n))
                metrics = evaluate(score, params, shown, limit, stop=lambda: False)
            results[name] = _result(metrics, corpus.stats["val"])
    return results


def open_sets(subject: Subject) -> Mapping[str, Corpus]:
    """The held-out sets of the subject's config by name, tokenised. Of several processes the first makes the entries of
    data.cache_dir, in which the others find them, or else make them where they have a folder of their own."""
    if jax.process_count() > 1:
        from_first(lambda: list(_open_sets(subject)))
    return on_all(lambda: _open_sets(subject))


def _open_sets(subject: Subject) -> Mapping[str, Corpus]:
    data = subject.config.data
    if data.val_path:
        return open_held_out(data, subject.tokenizer)
    return {name or OWN: corpus for name, corpus in open_corpus(data, subject.tokenizer).held_out.items()}


def make_score(config: Config, graphdef: nnx.GraphDef) -> Callable:
    """(params, batch) -> metrics: `loss`, and by the number of its bucket that of each, and of long documents alone."""
    prepare, room = config.optim.objective.prepare, config.model.prefix_tokens

    @jax.jit
    def score(params, batch) -> Metrics:
        model = nnx.merge(graphdef, params)
        # what is hidden is what an evaluation of the run hides, see train/step.py
        batch = prepare(batch, lambda: jax.random.fold_in(jax.random.key(config.run.seed), batch["tokens"].sum()))
        x_BTD = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
        nats_BT = token_losses(
            x_BTD, model.unembedding(), batch["targets"], multiplier=model.logit_scale,
            softcap=config.model.logit_softcap,
        )  # fmt: skip
        is_real_BT = batch["targets"] >= 0
        bucket_BT = jnp.where(is_real_BT, number(batch["positions"] + 1 - room), -1)
        is_long_B1 = (batch["positions"][:, -1:] == bucket_BT.shape[1] - 1) & (batch["segment_ids"][:, -1:] > 0)
        metrics = {"loss": _mean(nats_BT, is_real_BT)}
        for i in range(n_buckets(bucket_BT.shape[1])):
            metrics[str(i)] = _mean(nats_BT, bucket_BT == i)
            metrics[f"{i} {LONG}"] = _mean(nats_BT, (bucket_BT == i) & is_long_B1)
        return metrics

    return score


def number(context: jax.Array) -> jax.Array:
    """The bucket of tokens that follow so many, of at least 1, int32: 0 for 1, i for 2**(i - 1) < context <= 2**i."""
    return 32 - lax.clz(context - 1)


def n_buckets(seq_len: int) -> int:
    """How many buckets tokens of a row are in."""
    return (seq_len - 1).bit_length() + 1


def _mean(nats_BT, chosen_BT) -> Mean:
    return Mean(jnp.sum(jnp.where(chosen_BT, nats_BT, 0.0)), jnp.sum(chosen_BT, dtype=jnp.float32))


def _result(metrics: Metrics, stats: Mapping) -> SetResult:
    loss, per_pair = metrics["loss"].value(), stats["bytes_per_pair"]
    buckets = []
    for i in range(sum(name.isdecimal() for name in metrics)):
        of_all, of_long = metrics[str(i)], metrics[f"{i} {LONG}"]
        above = 2 ** (i - 1) if i else 0
        numbers = [value for mean in (of_all, of_long) for value in (int(mean.weight), mean.value())]
        buckets.append(Bucket(above, 2**i, *numbers))
    return SetResult(
        stats["documents"], stats["bytes"], int(metrics["loss"].weight), loss,
        math.exp(loss) if loss < 700 else math.inf, bits_per_byte(loss, per_pair) if per_pair else math.nan,
        tuple(buckets),
    )  # fmt: skip
