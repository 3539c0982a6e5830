# SPDX-License-Identifier: Apache-2.0
"""A grid of `hybridlm study ratio` as text, as a figure and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hybridlm import page as html
from hybridlm.eval.report import table
from hybridlm.model.flops import train_flops
from hybridlm.page import as_svg
from hybridlm.study.figures import Line, Panel, draw
from hybridlm.study.grid import Point, model_of
from hybridlm.study.ratio import Kind, Study, at_best_rate, recovered, trials_as_json
from hybridlm.study.ratio import labels as tests_of
from hybridlm.train.progress import short

HEAD = (
    "attention", "parameters", "cache of a row", "FLOPs a token", "accuracy", "lowest", "highest", "seeds",
    "of attention's",
)  # fmt: skip
FREE = ("gate", "placement", "arrangement", "state", "state_bytes", "mixer")
"""What tells a line of the figure from another; along it the ratio goes."""


def as_text(study: Study, found: Sequence[Kind]) -> str:
    """A table for each test."""
    parts = []
    for at, label in enumerate(tests_of(study.tests)):
        rows = [list(HEAD), *(_cells(kind, found, at) for kind in found)]
        parts.append(f"{study.task}, {label}, chance {_share(found[0].chance[at])}:\n{table(rows)}")
    return "\n\n".join(parts)


def _cells(kind: Kind, found: Sequence[Kind], at: int) -> list[str]:
    mean, low, high = kind.spread(at)
    got = recovered(kind, found, at)
    return [
        kind.point.name, f"{kind.params:,}", f"{kind.cache_bytes[at]:,} B", short(kind.flops_per_token[at]),
        _share(mean), _share(low), _share(high), str(len(kind.seeds)), "-" if got is None else f"{got:.0%}",
    ]  # fmt: skip


def _share(value: float) -> str:
    return f"{value:.3f}"


def lines(found: Sequence[Kind]) -> dict[Point, list[Kind]]:
    """Kinds of models along which the ratio alone changes, by the point that stands for them: one without attention is
    where all lines of its mixer and state begin, attention alone where those of its gate end."""
    inner = [kind for kind in found if 0 < kind.share < 1]
    keys = list(dict.fromkeys(replace(kind.point, ratio=Point().ratio) for kind in inner or found))
    made: dict[Point, list[Kind]] = {}
    for key in keys:
        here = [kind for kind in found if _is_on(kind, key)]
        if here:
            made[key] = sorted(here, key=lambda kind: kind.share)
    return made


def _is_on(kind: Kind, key: Point) -> bool:
    point = replace(key, ratio=kind.point.ratio).plain()
    return point == kind.point


def labels(keys: Sequence[Point]) -> list[str]:
    """In what the lines differ from each other."""
    differ = [name for name in FREE if len({getattr(key, name) for key in keys}) > 1]
    words = lambda key, name: ("gate" if key.gate else "no gate") if name == "gate" else f"{getattr(key, name)}"
    units = {"state": "state ", "state_bytes": "bytes of state "}
    return [", ".join(units.get(name, "") + words(key, name) for name in differ) or key.mixer for key in keys]


def figure(study: Study, found: Sequence[Kind], title: str = ""):
    """Accuracy in the first test over the share of attention, the bytes of the cache and FLOPs; over the documents of
    the stages and over those longer than any of them, where there are such; bars from the lowest to the highest seed;
    and how the loss came down; each kind at the best of its learning rates. A matplotlib figure."""
    found = at_best_rate(found)
    grouped = lines(found)
    names = labels(list(grouped))
    word = f"accuracy, {tests_of(study.tests)[0]}"
    axes = {
        "share of attention among the mixers": (lambda kind: kind.share, False),
        "bytes of the cache of a row": (lambda kind: kind.cache_bytes[0], True),
        "forward FLOPs a token": (lambda kind: kind.flops_per_token[0], True),
    }
    panels = []
    for axis, (of, log) in axes.items():
        drawn = []
        for n, (name, kinds) in enumerate(zip(names, grouped.values())):
            spreads = np.array([kind.spread() for kind in kinds])
            x = np.array([of(kind) for kind in kinds], float)
            order = np.argsort(x, kind="stable")
            x, spreads = x[order], spreads[order]
            drawn.append(Line(x, spreads[:, 0], name, n, dots=True, between=(spreads[:, 1], spreads[:, 2])))
        panels.append(Panel(axis, word, drawn, log=log))
    tests, first = study.tests, len(grouped)
    easier = [at for at, test in enumerate(tests) if test in study.stages]
    longer = [at for at, test in enumerate(tests) if test.task == tests[0].task]
    for axis, which in (
        ("tokens of a document, as it was learned", easier),
        ("tokens of a document of the last task", longer),
    ):
        if len(which) > 1:
            panels.append(Panel(axis, f"accuracy, {study.task}", _by_test(study, found, which, first), log=True))
    panels.append(Panel("steps", "training loss, nats an answer", _losses(found, first)))
    return draw(panels, title, columns=2)


def _by_test(study: Study, found: Sequence[Kind], which: Sequence[int], first: int) -> list[Line]:
    """Of each kind of model its accuracy over the length of some tests; colours behind those of the lines."""
    order = sorted(which, key=lambda at: study.tests[at].length)
    x = [study.tests[at].length for at in order]
    made = []
    for n, kind in enumerate(found):
        mean, low, high = np.array([kind.spread(at) for at in order]).T
        made.append(Line(x, mean, kind.point.name, first + n, dots=True, between=(low, high)))
    return made


def _losses(found: Sequence[Kind], first: int) -> list[Line]:
    """The mean of the seeds, of each kind of model, in the colours of `_by_test`."""
    made = []
    for n, kind in enumerate(found):
        whole = min(map(len, kind.losses))
        steps = [step for step, _ in kind.losses[0][:whole]]
        mean = np.mean([[loss for _, loss in losses[:whole]] for losses in kind.losses], axis=0)
        made.append(Line(steps, mean, kind.point.name, first + n))
    return made


def as_page(study: Study, found: Sequence[Kind], results: Sequence[Mapping[str, Any]], command: str) -> str:
    """The page."""
    data, steps = study.config.data, study.config.run.steps
    n_tokens = steps * data.batch_size * data.seq_len
    first = trials_as_json(study.tests)[0]["fields"]
    fields_of = ", ".join(f"{name}={value}" for name, value in first.items())
    stages = "; then ".join(tests_of(study.stages))
    devices = sorted({str(one["device"]) for one in results})
    minutes = sum(one["seconds"] for one in results) / 60
    flops = [train_flops(model_of(kind.point, study.sizes), data.seq_len) * n_tokens for kind in found]
    told = (
        f"{study.task} ({fields_of}), learned by {stages}. Every model: {steps:,} steps of {data.batch_size} rows of "
        f"{data.seq_len} tokens ({n_tokens:,} tokens, {min(flops):.2g} to {max(flops):.2g} FLOPs), about "
        f"{study.sizes.params:,} parameters, width {study.sizes.d_model}, {study.sizes.mixers} mixers. {len(results)} "
        f"models took {minutes:.0f} minutes of training in all on {', '.join(devices)}."
    )
    drawn = "Dots: means of the seeds; bars: from the lowest seed to the highest."
    if len({kind.point.rate for kind in found}) > 1:
        drawn += " Each kind of model is drawn at the best of its learning rates."
    figures = html.figure(as_svg(figure(study, found)), drawn)
    parts = [html.paragraph(told), html.preformatted(command), figures]
    for at, label in enumerate(tests_of(study.tests)):
        rows = [_cells(kind, found, at) for kind in found]
        parts += [html.heading(label), html.table(HEAD, rows, numbers=range(1, len(HEAD)))]
        parts.append(html.paragraph(f"Chance: {_share(found[0].chance[at])}.", note=True))
    versions = results[0]["versions"] if results else {}
    parts.append(html.paragraph(", ".join(f"{name} {number}" for name, number in versions.items()), note=True))
    return html.page(f"How much attention {study.task} needs", *parts)
