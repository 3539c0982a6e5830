# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study ratio`: how much attention a task needs. The models of a grid, their questions, their results."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridlm import storage
from hybridlm.config import Config, DataConfig, Muon, OptimConfig, RunConfig, Wsd
from hybridlm.config.stored import from_dict
from hybridlm.config.tree import to_dict
from hybridlm.errors import ConfigError, RunError, require, within
from hybridlm.infer.cache_size import cache_size
from hybridlm.model.flops import forward_flops
from hybridlm.probes import PROBES
from hybridlm.probes.scoring import check_vocabulary
from hybridlm.study import answers, on_task
from hybridlm.study.grid import Point, Sizes, count, model_of, share
from hybridlm.study.on_task import Trained, Trial
from hybridlm.study.together import train_together
from hybridlm.train.provenance import versions
from hybridlm.train.records import read_json
from pallas_kernels.platform import device_name, platform

RECIPE = Config(
    name="ratio",
    data=DataConfig(seq_len=256, batch_size=8),
    optim=OptimConfig(
        lr=5e-3, rule=Muon(lr=0.03), schedule=Wsd(decay_fraction=0.25, final_lr_ratio=0.05), warmup_steps=20
    ),
    run=RunConfig(steps=500, log_every=20),
)
"""How every model of a grid is trained, unless the words say otherwise."""
PART_TOKENS = 256
"""Of the rows that a CPU takes at once: those of 2,048 tokens leave its caches, and steps take a quarter longer."""
MAY_SET = ("data.seq_len", "data.batch_size", "optim.", "run.steps", "run.log_every")
"""What words may say of it: names, or what names begin with."""
MEMBER, RESULT = "member.json", "result.json"
"""In a model's folder: what it was asked, and, written last, what came of it."""


@dataclass(frozen=True)
class Study:
    """What all models of a grid are asked."""

    task: str
    """Name in PROBES."""
    stages: tuple[Trial, ...]
    """What they are trained on, each for an equal share of the steps: the task, and before it easier ones of it."""
    tests: tuple[Trial, ...]
    """What they are scored on; figures show the first."""
    config: Config
    """Steps, rows and optimizer of the training; its model is none of the grid's."""
    sizes: Sizes
    rows: int = 64
    """Rows of a batch that is scored."""
    batches: int = 4
    """Such batches of each test."""


class Member(NamedTuple):
    """One model of a grid."""

    point: Point
    seed: int
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.point.file},seed={self.seed}"


def members(study: Study, points: Sequence[Point], seeds: Sequence[int], folder: Path) -> list[Member]:
    """The models, the seeds of one kind next to each other.

    ConfigError, with the kind of model, for the first that cannot be.
    """
    found = []
    for point in points:
        model = model_of(point, study.sizes)
        with within(f"{point.name}: "):
            on_task.check(replace(study.config, model=model), study.stages)
            for task, length in study.tests:
                task.check(length)
                check_vocabulary(model.vocab_size, task)
        for seed in seeds:
            run = replace(study.config.run, seed=seed, dir="")
            optim = at_rate(study.config.optim, point.rate)
            config = replace(study.config, name=point.file, model=model, run=run, optim=optim)
            found.append(Member(point, seed, config, folder / "models" / f"{point.file},seed={seed}"))
    return found


def at_rate(optim: OptimConfig, rate: float) -> OptimConfig:
    """With `rate` times the learning rates, that of the rule among them where it has one of its own."""
    own = getattr(optim.rule, "lr", None)
    rule = optim.rule if own is None else replace(optim.rule, lr=own * rate)
    return replace(optim, lr=optim.lr * rate, rule=rule)


def in_parts(config: Config) -> Config:
    """With each step's rows in microbatches on a CPU, of at least 256 tokens, where optim.accumulate is as usual: equal
    beyond rounding, as the loss is the mean of all. Elsewhere as it is: a GPU takes all rows as fast as some."""
    rows, usual = config.data.batch_size, OptimConfig().accumulate
    if platform() != "cpu" or config.optim.accumulate != usual:
        return config
    most = max(1, rows * config.data.seq_len // PART_TOKENS)
    parts = max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)
    return replace(config, optim=replace(config.optim, accumulate=parts))


def alike(members: Sequence[Member]) -> list[list[Member]]:
    """Members that differ in seed and rate alone, kind by kind: those that can be trained together."""
    kinds: dict[Point, list[Member]] = {}
    for member in members:
        kinds.setdefault(replace(member.point, rate=1.0), []).append(member)
    return list(kinds.values())


def asked(study: Study, member: Member) -> dict[str, Any]:
    """What a model is asked, as JSON: its result has it, too."""
    test = {"trials": trials_as_json(study.tests), "rows": study.rows, "batches": study.batches}
    spec = {"point": asdict(member.point), "seed": member.seed, "task": study.task, "test": test,
            "stages": trials_as_json(study.stages), "config": to_dict(member.config)}  # fmt: skip
    return json.loads(json.dumps(spec))


def result(study: Study, member: Member) -> dict[str, Any] | None:
    """What came of a model; None where it is not done. ConfigError where the folder has that of another question."""
    file = member.folder / RESULT
    if not storage.exists(file):
        return None
    try:
        found = read_json(file)
        there = found["asked"]
        there["point"] = asdict(Point(**there["point"]))  # of an earlier version: with what it could not be asked
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): remove it, and the model is trained again") from None
    here = asked(study, member)
    differing = [key for key in here if there.get(key) != here[key]]
    said = f"{member.folder} holds a model with another {', '.join(differing)}: choose another --dir"
    require(not differing, said)
    return found


class Order(NamedTuple):
    """What a model's folder says is asked of it."""

    folder: Path
    spec: dict[str, Any]
    config: Config
    stages: list[Trial]
    tests: list[Trial]

    @property
    def rate(self) -> float:
        """Factor of the learning rates, in its config already."""
        return Point(**self.spec["point"]).rate


def order(folder: Path) -> Order:
    """ConfigError where the folder's file is none."""
    with within(f"{folder / MEMBER}: "):
        spec = read_json(folder / MEMBER)
        stages, tests = (trials_of(spec["task"], given) for given in (spec["stages"], spec["test"]["trials"]))
        return Order(folder, spec, from_dict(spec["config"]), stages, tests)


def train_member(folder: Path) -> dict[str, Any]:
    """Trains, scores and keeps the model whose folder says what is asked of it; writes its result last."""
    one = order(folder)
    trained = on_task.train_on(in_parts(one.config), one.stages, _say)
    scores = answers.scored(trained.model, one.tests, one.spec["test"]["rows"], one.spec["test"]["batches"])
    return _keep(one, trained, scores, 1)


def train_members(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """As `train_member`, of models that are `alike`, by one program; `seconds` of each is its share of the time.

    RunError, with the folders, where some were not finite any more: the others are kept.
    """
    orders = [order(folder) for folder in folders]
    first = orders[0]
    base = in_parts(replace(first.config, optim=at_rate(first.config.optim, 1 / first.rate)))
    seeds, rates = [one.config.run.seed for one in orders], [one.rate for one in orders]
    trained = train_together(base, seeds, rates, first.stages, _say)
    test, params = first.spec["test"], trained.state["params"]
    scores = answers.scored_together(trained.graphdef, params, first.tests, test["rows"], test["batches"])
    failed = [i for i in range(len(orders)) if trained.skipped[i] >= base.optim.max_skipped]
    kept = [_keep(one, trained.of(i), scores[i], len(orders)) for i, one in enumerate(orders) if i not in failed]
    named = ", ".join(str(orders[i].folder) for i in failed)
    if failed:
        raise RunError(f"loss or gradient not finite at the end: lower optim.lr: {named}")
    return kept


def _say(line: str) -> None:
    print(line, flush=True)


def _keep(one: Order, trained: Trained, scores: list[dict[str, Any]], together: int) -> dict[str, Any]:
    """Writes the folder of a run, and the result last."""
    on_task.keep(one.folder, one.config, trained)
    found = {
        "asked": one.spec, "scores": scores, "losses": trained.losses, "seconds": round(trained.seconds / together, 1),
        "cpu_seconds": round(time.process_time() / together, 1), "together": together, "device": device_name(),
        "versions": versions(), **measures(one.config, one.tests),
    }  # fmt: skip
    storage.write_text(one.folder / RESULT, json.dumps(found, indent=1) + "\n")
    return found


def trials_as_json(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The fields of each task, and its length."""
    return [{"length": trial.length, "fields": _fields(trial.task)} for trial in trials]


def trials_of(name: str, given: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """The inverse of `trials_as_json`, for tasks of a name."""
    require(name in PROBES, f"no task {name!r}: there are {', '.join(PROBES)}")
    made = []
    for one in given:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in one["fields"].items()}
        task: Any = PROBES[name]
        made.append(Trial(replace(task, **values), one["length"]))
    return made


def _fields(task: Any) -> dict[str, Any]:
    return asdict(task)


def labels(trials: Sequence[Trial]) -> list[str]:
    """`pairs=32, 128 tokens`: the length of each, and its fields in which they differ."""
    fields = [_fields(trial.task) for trial in trials]
    differ = [name for name in fields[0] if len({str(of[name]) for of in fields}) > 1]
    words = ([f"{name}={of[name]}" for name in differ] for of in fields)
    return [", ".join([*said, f"{trial.length:,} tokens"]) for said, trial in zip(words, trials)]


def measures(config: Config, tests: Sequence[Trial]) -> dict[str, Any]:
    """What a model costs, counted from its config: parameters; bytes of its cache and forward FLOPs a token, each at
    the lengths of the tests."""
    model = config.model
    return {
        "params": count(model),
        "cache_bytes": [cache_size(model, 1, length).total().bytes for _, length in tests],
        "flops_per_token": [forward_flops(model, length) for _, length in tests],
    }


class Kind(NamedTuple):
    """The models of one point of the grid, all seeds together."""

    point: Point
    seeds: list[int]
    params: int
    cache_bytes: list[int]
    """By test, as all that follow."""
    flops_per_token: list[float]
    accuracies: np.ndarray
    """[seeds, tests]."""
    losses: list[list]
    """Of each seed (step, loss)."""
    chance: list[float]

    @property
    def share(self) -> float:
        """Of attention among the mixers."""
        return share(self.point.ratio)

    def spread(self, at: int = 0) -> tuple[float, float, float]:
        """(mean, lowest, highest) accuracy of the seeds in the at-th test."""
        values = self.accuracies[:, at]
        return float(values.mean()), float(values.min()), float(values.max())


def kinds(results: Sequence[Mapping[str, Any]]) -> list[Kind]:
    """Results by kind of model, in order of their share of attention."""
    by: dict[Point, list[Mapping[str, Any]]] = {}
    for found in results:
        by.setdefault(Point(**found["asked"]["point"]), []).append(found)
    return sorted((_kind(point, of) for point, of in by.items()), key=lambda kind: kind.share)


def at_best_rate(found: Sequence[Kind]) -> list[Kind]:
    """Of kinds that differ in the learning rate alone the one whose seeds have the highest mean in the first test, as
    one of the usual rate; the lowest rate where some are alike."""
    best: dict[Point, Kind] = {}
    for kind in sorted(found, key=lambda kind: kind.point.rate):
        plain = replace(kind.point, rate=Point().rate)
        if plain not in best or kind.spread()[0] > best[plain].spread()[0]:
            best[plain] = kind._replace(point=plain)
    return sorted(best.values(), key=lambda kind: kind.share)


def _kind(point: Point, of: Sequence[Mapping[str, Any]]) -> Kind:
    accuracies = np.array([[score["accuracy"] for score in one["scores"]] for one in of])
    first = of[0]
    return Kind(
        point, [one["asked"]["seed"] for one in of], first["params"], first["cache_bytes"], first["flops_per_token"],
        accuracies, [one["losses"] for one in of], [score["chance"] for score in first["scores"]],
    )  # fmt: skip


def recovered(kind: Kind, found: Sequence[Kind], at: int = 0) -> float | None:
    """Of what attention alone has above chance the share that a kind has, on the mean of the seeds; None where the grid
    has no attention alone with the same gate, or that is at chance itself."""
    whole = [one for one in found if one.share == 1 and one.point.gate == kind.point.gate]
    whole = whole or [one for one in found if one.share == 1 and kind.share == 0]
    if not whole:
        return None
    most = max(one.spread(at)[0] for one in whole) - kind.chance[at]
    return (kind.spread(at)[0] - kind.chance[at]) / most if most > 0 else None


def as_json(study: Study, found: Sequence[Kind], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of a study: what was asked, and of each kind of model what came of it."""
    data, optim = study.config.data, to_dict(study.config.optim)
    return {
        "task": study.task, "tests": trials_as_json(study.tests), "stages": trials_as_json(study.stages),
        "sizes": asdict(study.sizes),
        "training": {"steps": study.config.run.steps, "batch_size": data.batch_size, "seq_len": data.seq_len,
                     "tokens": study.config.run.steps * data.batch_size * data.seq_len, "optim": optim},
        "devices": sorted({one["device"] for one in results}), "versions": results[0]["versions"] if results else {},
        "kinds": [
            {
                "name": kind.point.name, **asdict(kind.point), "share": kind.share, "seeds": kind.seeds,
                "params": kind.params, "cache_bytes": kind.cache_bytes, "flops_per_token": kind.flops_per_token,
                "chance": kind.chance, "accuracies": kind.accuracies.tolist(),
                "recovered": [recovered(kind, found, at) for at in range(len(study.tests))],
                "last_losses": [losses[-1][1] for losses in kind.losses],
            }
            for kind in found
        ],
    }  # fmt: skip
