# SPDX-License-Identifier: Apache-2.0
"""A plan: a config on devices, stage after stage, each an answer of its own."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hybridlm.config import Config
from hybridlm.plan.bounds import Bounds, Cost, bounds, cost
from hybridlm.plan.collectives import Collective
from hybridlm.plan.compiled import Compiled, DoesNotFit, compile
from hybridlm.plan.counted import Counted, count
from hybridlm.plan.described import described
from hybridlm.plan.lowered import Lowered, lower
from hybridlm.plan.slices import Devices

STAGES = ("counted", "lowered", "compiled")


@dataclass
class Plan:
    """What is known so far."""

    name: str
    """Of the config."""
    config: Config
    devices: Devices
    tokens: float | None = None
    """Of the whole training."""
    price: float | None = None
    """Of a chip and an hour."""
    counted: Counted | None = None
    lowered: Lowered | None = None
    compiled: Compiled | None = None
    refused: str = ""
    """Of a program that the compiler gave up: why, in a line."""
    needed_bytes: int | None = None
    """That the compiler says it needs, of such a one."""

    def run(self, last: str) -> Iterator[str]:
        """The stages up to `last`: the name of each when it is known. ConfigError where something does not fit."""
        self.counted = count(self.config, self.devices)
        yield "counted"
        if last == "counted":
            return
        with described(self.config, self.devices.compilable()) as there:
            self.lowered, lowered = lower(there)
            yield "lowered"
            if last == "lowered":
                return
            try:
                self.compiled = compile(lowered, self.devices.backend)
            except DoesNotFit as error:
                self.refused, self.needed_bytes = str(error), error.needed
        yield "compiled"

    @property
    def exchanges(self) -> list[Collective]:
        """All of the compiled program, with what crosses from slice to slice."""
        found = [c for c in self.compiled.collectives if c.runs]
        crossing = [c for c in found if len({d // self.devices.domain for d in c.group}) > 1]
        if crossing or not self.lowered:
            return found
        n, domain = self.devices.count // self.devices.domain, self.devices.domain
        return found + [c._replace(group=tuple(range(0, n * domain, domain))) for c in self.lowered.between_slices]

    @property
    def bounds(self) -> Bounds | None:
        """None before the program is compiled, and on devices of which no peaks are known."""
        if self.compiled is None or self.devices.peaks is None:
            return None
        return bounds(self.compiled.work, self.exchanges, self.devices)

    @property
    def cost(self) -> Cost | None:
        found = self.bounds
        if found is None:
            return None
        return cost(found, self.devices, self.counted.tokens, self.counted.model_flops, self.tokens, self.price)

    @property
    def best_seconds(self) -> float | None:
        """Of a step, were there model FLOPs alone: known at once."""
        peak = self.devices.peaks
        return None if peak is None else self.counted.model_flops / (peak.tflops * 1e12)

    @property
    def room(self) -> int | None:
        """Bytes that the device has left: at most, before the program is compiled; None where its memory is unknown."""
        if self.counted.memory is None:
            return None
        return self.counted.memory - (self.compiled.memory.peak if self.compiled else self.counted.least)

    @property
    def fits(self) -> bool | None:
        """As far as is known; None where the device's memory is not."""
        return False if self.refused else None if self.room is None else self.room >= 0

    @property
    def needed(self) -> int | None:
        """Bytes of a device, as the compiler says; None before it did."""
        return self.compiled.memory.peak if self.compiled else self.needed_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, bytes and seconds, of a device and a step unless named otherwise."""
        stages = {stage: _plain(getattr(self, stage)) for stage in STAGES if getattr(self, stage) is not None}
        if self.compiled is not None:
            found = stages["compiled"]
            found["collectives"] = _plain(self.compiled.exchanges)
            found["work"] = {name: _plain(work) for name, work in self.compiled.work.by_class.items()}
            found["not_counted"] = list(self.compiled.work.unknown)
            found["live"] = {"bytes": self.compiled.live.bytes, "at": self.compiled.live.at,
                             "by_kind": self.compiled.live.by_kind}  # fmt: skip
        return {
            "config": self.name,
            "topology": self.devices.words,
            "device": {"kind": self.devices.kind, **(_plain(self.devices.peaks) or {})},
            "mesh": dataclasses.asdict(self.config.mesh),
            **stages,
            "fits": self.fits,
            "refused": self.refused or None,
            "bounds": _plain(self.bounds),
            "cost": _plain(self.cost),
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1) + "\n"


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dicts."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
