# SPDX-License-Identifier: Apache-2.0
"""`hybridlm cache`: what a model remembers of the tokens that it has read, in bytes, before there is a model."""

import argparse
import json

from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.words import split_overrides
from hybridlm.cli.writing import CACHE as CACHE_OPTIONS
from hybridlm.cli.writing import add_cache_options, cache_types


def run(words: list[str], prog: str) -> int:
    """Prints the tables, or JSON; see Command."""
    mine, overrides = split_overrides(words, CACHE_OPTIONS)
    args = parse(_parser(prog), mine)
    if args is None:
        return 0
    from hybridlm.config.find import load_config
    from hybridlm.infer.cache_claims import CLAIMS
    from hybridlm.infer.cache_size import as_json, cache_size, transformer_beside

    config = load_config(args.config, overrides)
    types = cache_types(args)
    size = cache_size(config.model, args.batch, args.context, config.mesh, types)
    beside, claim = transformer_beside(config.model, size), CLAIMS.get(config.name)
    at_claim = size
    if claim is not None:  # what is published is of caches in the type of the model
        of_claim = (args.batch, args.context) if claim.context is None else (1, claim.context)
        at_claim = cache_size(config.model, *of_claim)
    if args.json:
        published = None if claim is None else {**claim._asdict(), "here_bytes": at_claim.of_tokens.bytes}
        print(json.dumps({"config": args.config, **as_json(size, beside), "published": published}, indent=1))
        return 0
    from hybridlm.plan.tables import show_section

    for section in (_kinds(args.config, config.model, size), _beside(size, beside), _published(claim, at_claim)):
        show_section(section)
    return 0


CACHE = Command(
    "cache",
    (("--config NAME --context N [--batch B] [--section.key=value ...]", "how large a model's cache is, and of what"),),
    run,
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(
        prog,
        "How many bytes a model remembers of the tokens that it has read, by kind, beside a transformer of its size. "
        "Nothing is built. Options of the config, as --model.compute_dtype=float32 or --mesh.tensor=8, stand beside "
        "these.",
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a config, as hybrid_8b or jamba:52b")
    parser.add_argument("--context", required=True, type=int, metavar="N", help="tokens of each row, written and read")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows at once (1)")
    add_cache_options(parser)
    parser.add_argument("--json", action="store_true", help="all of it as JSON, bytes as whole numbers")
    return parser


def _kinds(name: str, model, size):
    """By what is held."""
    from hybridlm.plan.sections import Section
    from hybridlm.plan.sections import size as words

    head = ("", "sublayers", "type", "a row, once", "a row, each token", "all rows")
    rows = []
    for kind, total in {**size.kinds, "all": size.total()}.items():
        row = (kind, f"{total.sublayers:,}" if kind in size.kinds else "", size.dtypes.get(kind, ""))
        row += (words(total.constant), words(total.per_token), words(total.bytes))
        rows.append((*row, words(total.device_bytes)) if size.mesh else row)
    notes = [_types(size.types, model.compute_dtype)]
    if model.prefix_tokens:
        notes.append(f"{model.prefix_tokens} prefix tokens of each row count once")
    if size.mesh:
        head += ("on each device",)
        split = " x ".join(f"{axis} {n}" for axis, n in size.mesh.items())
        notes.append(f"mesh: {split}; an axis of -1 counts as 1. Rows are split, and heads over tensor; tokens are not")
        if not size.rows_split:
            notes.append(f"the mesh does not divide {size.batch} rows: every device keeps all of them")
    plural = "" if size.batch == 1 else "s"
    return Section(f"Cache of {name}: {size.batch:,} row{plural} of {size.context:,} tokens", rows, head, tuple(notes))


def _types(types, compute_dtype: str) -> str:
    """Which are stored as what."""
    said = [] if types.states is None else [f"states {types.states}, computed in float32"]
    if types.keys is not None:
        said.append(f"keys, values and latents {types.keys}")
    states = "states are float32, " if types.states is None else ""
    rest = f"{states}the rest is of model.compute_dtype ({compute_dtype})"
    return f"stored smaller: {'; '.join(said)}; {rest}" if said else f"{rest}; --cache.* stores them smaller"


def _beside(size, beside):
    """Of the transformer, and how much less this is."""
    from hybridlm.plan.sections import Section
    from hybridlm.plan.sections import size as words

    theirs, mine, kept = beside.size.total(), size.total(), size.of_tokens.bytes
    rows = [
        ("attention in each", f"{beside.mixers:,} sublayers: {beside.attention}"),
        ("a row, each token", f"{words(theirs.per_token)}, here {words(mine.per_token)}"),
        ("all rows", f"{words(theirs.bytes)}, here {words(mine.bytes)}: {_less(mine.bytes, theirs.bytes)}"),
        ("of tokens alone", f"{_less(kept, beside.size.of_tokens.bytes)}, without states and windows of convolutions"),
    ]
    return Section("Beside a transformer of the same width and depth", rows)


def _published(claim, size):
    """What the publisher says."""
    from hybridlm.plan.sections import Section
    from hybridlm.plan.sections import size as words

    if claim is None:
        return Section("Published", [], notes=("no figure of this config's cache is known here",))
    plural = "" if size.batch == 1 else "s"
    rows = [
        ("published", f"{claim.says} ({claim.source})"),
        ("here", f"{words(size.of_tokens.bytes)} of tokens, {size.batch:,} row{plural} of {size.context:,}"),
    ]
    return Section("Published", rows)


def _less(mine: int, theirs: int) -> str:
    """How much smaller."""
    if not theirs or mine >= theirs:
        return "no less"
    return f"{1 - mine / theirs:.1%} less" + (f", {theirs / mine:,.1f} times smaller" if mine else "")
