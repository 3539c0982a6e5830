# SPDX-License-Identifier: Apache-2.0
"""Which way to run a config is best on given devices, and which change makes one fit: guessed for all, compiled for a
few, every compiled result kept as a line of JSON, so that a search goes on where it stopped."""

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from hybridlm.config import Config
from hybridlm.config.tree import to_dict
from hybridlm.errors import ConfigError, require
from hybridlm.plan.change import Change, activations, current, guesses, smaller
from hybridlm.plan.counted import count
from hybridlm.plan.plan import Plan
from hybridlm.plan.slices import Devices


@dataclass(frozen=True)
class Result:
    """Of a compiled candidate."""

    words: str
    """The options that make it of the config; "" for the config itself."""
    fits: bool | None
    """None: the device's memory is not known."""
    peak: int | None = None
    """Bytes of a device; None: the compiler gave up, see `why`."""
    seconds: tuple[float, float] | None = None
    """Of a step, see `plan.bounds`; None where it does not fit."""
    compile_seconds: float = 0.0
    why: str = ""
    """Of one that cannot be, a line."""


Compile = Callable[[Config], Plan]
UNSURE = 1.25
"""Times what there is that a policy may seem to need and is compiled still: padding is not in its shapes."""


def compiled(name: str, devices: Devices) -> Compile:
    """Makes whole plans of configs."""

    def make(config: Config) -> Plan:
        plan = Plan(name, config, devices)
        for _ in plan.run("compiled"):
            pass
        return plan

    return make


@contextlib.contextmanager
def path_of(option: str, path: Path | str) -> Iterator[None]:
    """What the system says of a path becomes a ConfigError that names the option."""
    try:
        yield
    except OSError as error:
        hint = "" if error.errno == errno.ENOSPC else ": give a file in a folder that is there"
        raise ConfigError(f"{option} ({path}): {error.strerror or error}{hint}") from error


class Book:
    """Results on disk, a line each, by what they are of."""

    def __init__(self, path: Path | None = None):
        """ConfigError where there is a file that cannot be read."""
        self.path, self.results = path, {}
        if path is not None and path.exists():
            with path_of("--search", path):
                lines = path.read_text(encoding="utf-8").splitlines()
            for line in lines:
                try:
                    kept = json.loads(line)
                    seconds = None if kept["seconds"] is None else tuple(kept["seconds"])
                    fields = {name: kept[name] for name in Result.__dataclass_fields__} | {"seconds": seconds}
                    self.results[kept["key"]] = Result(**fields)
                except (ValueError, KeyError, TypeError):  # the last line of an interrupted search
                    continue

    def begin(self) -> None:
        """Makes the file where there is none. ConfigError where it cannot be written: before anything is compiled."""
        if self.path is not None:
            with path_of("--search", self.path):
                self.path.open("a").close()

    def of(self, change: Change, config: Config, devices: Devices, compile: Compile) -> Result:
        """The result of a change: what is kept of it, else what compiling it gives, which is kept then."""
        try:
            changed = change.set_in(config)
        except ConfigError as error:
            return Result(" ".join(change.words(config)), False, why=str(error))
        key = key_of(changed, devices)
        if key not in self.results:
            self.results[key] = _result(change, config, changed, compile)
            self._append({"key": key, "config": config.name, "topology": devices.words, **asdict(self.results[key])})
        return self.results[key]

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        with path_of("--search", self.path):
            torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + json.dumps(line) + "\n")


def key_of(config: Config, devices: Devices) -> str:
    """Of what a result depends on: the config's program, the devices and the version of JAX."""
    names = ("model", "data", "optim", "mesh", *(name for name in ("lora", "quantize") if getattr(config, name).on))
    parts = {name: to_dict(getattr(config, name)) for name in names}
    text = json.dumps([parts, devices.words, jax.__version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result(change: Change, config: Config, changed: Config, compile: Compile) -> Result:
    words = " ".join(change.words(config))
    try:
        plan = compile(changed)
    except ConfigError as error:
        return Result(words, False, why=str(error))
    if plan.compiled is None:
        return Result(words, False, why=plan.refused)
    times = None if plan.bounds is None or plan.fits is False else (plan.bounds.lower, plan.bounds.upper)
    return Result(words, plan.fits, plan.compiled.memory.peak, times, plan.compiled.seconds)


def search(
    config: Config, devices: Devices, best: int, book: Book, compile: Compile
) -> Iterator[tuple[int, int, Result]]:
    """Compiles the config as it is and the changes that seem fastest, until `best` of those fit or twice as many were
    tried: (how many of how many seem to fit, result) as each is known. ConfigError where nothing can be ranked."""
    require(devices.peaks is not None, f"--search ranks by time: no peaks are known of {devices.words}")
    book.begin()
    ranked, cannot = guesses(config, devices)
    reason = f": {cannot[0]}" if cannot else ", by what it needs at least"
    require(bool(ranked), f"--search: nothing fits {devices.words}{reason}")
    here = current(config)
    yield 0, len(ranked), book.of(here, config, devices, compile)
    fitting = 0
    tried = [one for one in ranked if one.change.set_in(config) != config][: 2 * best]
    for n, one in enumerate(tried, 1):
        if fitting == best:
            return
        result = book.of(one.change, config, devices, compile)
        fitting += result.fits is not False
        yield n, len(ranked), result


def order(results: list[Result]) -> list[Result]:
    """The best first: what fits, by the time of a step in the middle between its ends."""
    return sorted(results, key=lambda result: (result.seconds is None, sum(result.seconds or (0.0, 0.0))))


def fitting(plan: Plan, most: int, book: Book, compile: Compile) -> Iterator[Result]:
    """Compiles changes that lower the memory of a plan that does not fit, the smallest first, until one fits or `most`
    were tried. Those that are known not to help enough are left out."""
    tried = 0
    for change in smaller(plan.config, plan.counted, plan.devices):
        if tried == most:
            return
        if _too_large(change, plan):
            continue
        result = book.of(change, plan.config, plan.devices, compile)
        tried += 1
        yield result
        if result.fits:
            return


def _too_large(change: Change, plan: Plan) -> bool:
    """Whether even what a step needs at least is more than there is, or what is known to be needed is by far: all that
    hangs on the rows of a microbatch shrinks with them at best, and under another policy about as shapes do."""
    try:
        counted = count(change.set_in(plan.config), plan.devices)
    except ConfigError:
        return True
    if counted.memory is None:
        return False
    if counted.least > counted.memory:
        return True
    if change.mesh != plan.config.mesh or plan.needed is None:
        return False
    here, there = (activations(plan.config, plan.counted, plan.devices, remat)
                   for remat in (plan.config.model.remat, change.remat))  # fmt: skip
    fixed, times = sum(plan.counted.state.values()), change.accumulate / plan.config.optim.accumulate
    needed = fixed + (plan.needed - fixed) * there / here / times
    return needed > counted.memory * (1.0 if there == here else UNSURE)
