# SPDX-License-Identifier: Apache-2.0
"""What bounds a step, and between which times it lies: by class of work, at the peaks of the device's data sheet.

The lower end hides everything behind the slowest of three: the matrix units, the memory, and exchanges over all links
at once. The upper end hides nothing: each class takes the longer of its arithmetic and its memory, one after the other,
and exchanges wait, each on a ring of two links. No program reaches peaks, so neither end is a forecast.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields

from hybridlm.plan.classes import CLASSES, class_of
from hybridlm.plan.collectives import Collective
from hybridlm.plan.slices import Devices
from hybridlm.plan.work import Counts, Work
from pallas_kernels.platform import Peaks


@dataclass(frozen=True)
class Row:
    """A class of work, of a device and a step."""

    flops: float
    bytes: float
    """Of the device's memory."""
    exchanged: float
    """Bytes that the device sends."""
    arithmetic: float
    """Seconds at the peak of the matrix units; the next three likewise."""
    memory: float
    exchange: float
    """Over all links at once."""
    exchange_exposed: float
    """Over a ring."""

    @property
    def alone(self) -> float:
        """Seconds without exchanges."""
        return max(self.arithmetic, self.memory)

    @property
    def binds(self) -> str:
        """The longest of the three."""
        times = {"arithmetic": self.arithmetic, "memory": self.memory, "exchange": self.exchange_exposed}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Bounds:
    """Of a step; seconds."""

    rows: dict[str, Row]
    """By class."""

    @property
    def total(self) -> Row:
        """Of all classes."""
        rows = self.rows.values()
        return Row(*(sum(getattr(row, one.name) for row in rows) for one in fields(Row)))

    @property
    def lower(self) -> float:
        """Everything hidden behind what takes longest."""
        total = self.total
        return max(total.arithmetic, total.memory, total.exchange)

    @property
    def upper(self) -> float:
        """Nothing hidden."""
        return sum(row.alone + row.exchange_exposed for row in self.rows.values())


def bounds(counts: Counts, exchanges: Iterable[Collective], devices: Devices) -> Bounds:
    """ValueError for devices whose peaks are not known."""
    peak = devices.peaks
    if peak is None or peak.links_gbs is None:
        raise ValueError(f"devices ({devices.words}): no peaks are known of {devices.kind}")
    sent: dict[str, float] = defaultdict(float)
    seconds: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for exchange in exchanges:
        name = class_of(exchange.source)
        size = exchange.runs * on_the_wire(exchange.kind, exchange.bytes, len(exchange.group))
        fast, slow = seconds[name]
        hidden, exposed = _times(size, exchange.group, devices, peak)
        sent[name] += size
        seconds[name] = fast + hidden, slow + exposed
    rows = {}
    for name in CLASSES:
        work = counts.by_class.get(name, Work())
        fast, slow = seconds[name]
        if work.flops or work.bytes or sent[name]:
            arithmetic, memory = work.flops / (peak.tflops * 1e12), work.bytes / (peak.gbs * 1e9)
            rows[name] = Row(work.flops, work.bytes, sent[name], arithmetic, memory, fast, slow)
    return Bounds(rows)


def on_the_wire(kind: str, size: float, group: int) -> float:
    """Bytes that a device sends in an exchange among `group` devices whose operand (of a gather: result) has this size:
    the least that any algorithm can do with."""
    if kind == "collective-permute":
        return size
    share = (group - 1) / group if group else 0.0
    return size * share * (2 if kind == "all-reduce" else 1)


def _times(size: float, group: tuple[int, ...], devices: Devices, peak: Peaks) -> tuple[float, float]:
    """Seconds (over all links, over a ring) of bytes that each device of a group sends."""
    domains = {device // devices.domain for device in group}
    if len(domains) > 1:  # each device of a slice or host can take a part of what all of it sends
        members = max(len(group) // len(domains), 1)
        rate = peak.network_gbs * 1e9
        return size / members / rate, size / rate
    rate = peak.links_gbs * 1e9
    return size / rate, size / (rate * min(1.0, 2 / peak.links))


@dataclass(frozen=True)
class Cost:
    """Of training on so many tokens: pairs are (at best, if nothing is hidden)."""

    seconds: tuple[float, float]
    """Of a step."""
    tokens_per_second: tuple[float, float]
    mfu: tuple[float, float]
    """Model FLOPs over the peak, 0 to 1."""
    days: tuple[float, float] | None
    """None: no number of tokens is asked for."""
    chip_hours: tuple[float, float] | None
    price: tuple[float, float] | None
    """In the unit of the price of a chip's hour."""


def cost(
    found: Bounds, devices: Devices, step_tokens: int, model_flops: float, tokens: float | None, price: float | None
) -> Cost:
    """model_flops: of a device and a step. price: of an hour of a chip."""
    times = found.lower, found.upper
    hours = None if tokens is None else tuple(tokens / step_tokens * t / 3600 for t in times)
    chip_hours = None if hours is None else tuple(h * devices.chips for h in hours)
    return Cost(
        seconds=times,
        tokens_per_second=tuple(step_tokens / t for t in times),
        mfu=tuple(model_flops / t / (devices.peaks.tflops * 1e12) for t in times),
        days=None if hours is None else tuple(h / 24 for h in hours),
        chip_hours=chip_hours,
        price=None if chip_hours is None or price is None else tuple(h * price for h in chip_hours),
    )
