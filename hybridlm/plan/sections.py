# SPDX-License-Identifier: Apache-2.0
"""What a plan says, as tables of text: the same for the terminal and for the page."""

from dataclasses import dataclass

from hybridlm.plan.classes import sublayer_of
from hybridlm.plan.live import KINDS
from hybridlm.plan.plan import Plan
from hybridlm.plan.search import Result

MEBIBYTE = 2**20
SHOWN = 12
"""Rows of lists that could be long."""


@dataclass(frozen=True)
class Section:
    """A table with a heading; without `head` its rows are pairs, or triples with a remark."""

    title: str
    rows: list[tuple[str, ...]]
    head: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines below it."""


def sections(plan: Plan, stage: str) -> list[Section]:
    """Of a stage that is known."""
    return {"head": _head, "counted": _counted, "lowered": _lowered, "compiled": _compiled}[stage](plan)


def size(n: float) -> str:
    """Bytes in words."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(n) >= unit:
            return f"{n / unit:,.2f} {name}"
    return f"{n:,.0f} B"


def amount(n: float) -> str:
    """A number with a letter for its thousands."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= unit:
            return f"{n / unit:,.2f} {name}"
    return f"{n:,.0f}"


def seconds(t: float) -> str:
    """A time in words."""
    for least, unit, factor, digits in ((10, "s", 1, 1), (1, "s", 1, 2), (1e-3, "ms", 1e3, 1), (0, "us", 1e6, 1)):
        if t >= least:
            return f"{t * factor:,.{digits}f} {unit}"
    return "0"


def few(n: float) -> str:
    """Whole where it is large, three digits where it is small."""
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def between(pair: tuple[float, float], words=seconds) -> str:
    """`a to b`, the smaller first."""
    low, high = sorted(pair)
    return f"{words(low)} to {words(high)}"


def _head(plan: Plan) -> list[Section]:
    devices, peak = plan.devices, plan.devices.peaks
    chips = "" if devices.count == devices.chips else f" of {devices.chips:,} chips"
    hosts = f"{devices.hosts:,} host{'s' * (devices.hosts > 1)}"
    rows = [("devices", f"{devices.count:,}{chips}, {devices.kind}, on {hosts}")]
    if peak is not None and peak.gib is not None:
        links = f"{peak.links_gbs:g} GB/s to its neighbours, {peak.network_gbs:g} GB/s to the network"
        speed = f"{peak.tflops:g} TFLOP/s (bfloat16), {peak.gbs:,g} GB/s memory"
        rows.append(("a device has", f"{peak.gib:g} GiB, {speed}, {links}"))
    return [Section(f"{plan.name} on {devices.words}", rows)]


def _counted(plan: Plan) -> list[Section]:
    found = plan.counted
    state = ", ".join(f"{name} {size(n)}" for name, n in found.state.items() if n >= 1024)
    least, most = found.rows_of_host
    read = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    shared = f", each row on {found.readers} hosts" if found.readers > 1 else ""
    micro = "" if found.microbatches == 1 else f" in {found.microbatches} microbatches"
    rows = [
        ("mesh", " x ".join(f"{name} {n}" for name, n in found.mesh.items()) or "one device"),
        ("parameters", f"{found.parameters:,}"),
        ("tokens a step", f"{found.tokens:,}{micro}, {found.tokens_of_device:,} a device and microbatch"),
        ("rows a host", f"{read} of {found.rows:,}{shared}"),
        ("sublayers compiled", f"{found.compiled} of {found.depth}"),
        ("state a device", f"{size(sum(found.state.values()))}: {state}"),
        ("gradients", size(found.gradients)),
        ("inputs of sublayers", f"{size(found.inputs)}, kept under every remat policy"),
    ]
    if found.whole >= MEBIBYTE:
        some = [f"{name} {size(n)}" for name, n in list(found.replicated.items())[:3]]
        largest = f", among them {', '.join(some)}" if some else ", each below a mebibyte"
        rows.append(("whole on every device", f"{size(found.whole)}{largest}"))
    if found.repeated:
        rows.append(("repeated", found.repeated))
    if found.memory is not None:
        share = found.least / found.memory
        verdict = "does not fit" if share > 1 else "may fit"
        rows.append(("needs at least", f"{size(found.least)}, {share:.0%} of {size(found.memory)}: {verdict}"))
    rows.append(("model FLOPs", f"{amount(found.model_flops)} a device and step"))
    if plan.best_seconds is not None:
        speed = found.tokens / plan.best_seconds
        rows.append(("a step takes at least", f"{seconds(plan.best_seconds)}, at most {amount(speed)} tokens/s"))
    return [Section("Counted", rows)]


def _lowered(plan: Plan) -> list[Section]:
    found = plan.lowered
    share = found.flops.all / plan.counted.model_flops if plan.counted.model_flops else 0.0
    rows = [
        ("traced, lowered", f"{seconds(found.trace_seconds)}, {seconds(found.lower_seconds)}"),
        ("FLOPs", f"{amount(found.flops.all)} a device and step, {share:.2f} times the model's"),
    ]
    rows += [tuple(line.split(": ", 1)) for line in found.choices]
    notes = tuple(f"not known: {name}" for name in found.flops.unknown[:SHOWN])
    made = [Section("Lowered", rows, notes=notes)]
    if found.kernels:
        made.append(Section("Kernels", [(n, f"{k:,}") for n, k in found.kernels.items()], ("kernel", "runs a step")))
    if found.exchanges:
        rows = [(n, f"{t.runs:,}", size(t.bytes)) for n, t in found.exchanges.items()]
        made.append(Section("Exchanges asked for by name", rows, ("kind, axes", "runs a step", "bytes a device")))
    return made


def _compiled(plan: Plan) -> list[Section]:
    if plan.compiled is None:
        return [Section("Compiled", [("DOES NOT FIT", plan.refused)])]
    return _fitting(plan)


def _fitting(plan: Plan) -> list[Section]:
    found, memory, have = plan.compiled, plan.compiled.memory, plan.counted.memory
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    fit = "" if have is None else f", {memory.peak / have:.0%} of {size(have)}: {verdict}"
    about = f"{plan.counted.compiled} sublayers, {found.instructions:,} instructions"
    rows = [
        ("compiled", f"{seconds(found.seconds)}, {seconds(found.cpu_seconds)} of CPU; {about}"),
        ("peak memory", size(memory.peak) + fit),
        ("arguments", f"{size(memory.arguments)}, of which {size(memory.aliased)} are written in place"),
        ("code", size(memory.code)),
    ]
    rows += [(f"at the peak, {kind}", size(found.live.by_kind[kind])) for kind in KINDS]
    where = f"{size(found.live.bytes)} in all, in {sublayer_of(found.live.at)}"
    note = f"What lives at the peak is read from the order of the program: {where}."
    made = [Section("Compiled", rows, notes=(note,)), _largest(plan)]
    rows = [(n, f"{t.ops:,}", f"{t.runs:,}", size(t.bytes)) for n, t in found.exchanges.items()]
    if rows:
        made.append(Section("Exchanges", rows, ("kind", "in the program", "runs a step", "bytes a device")))
    return made + _bounds(plan) + _cost(plan)


def _largest(plan: Plan) -> Section:
    """Arrays of one maker, kind and shape in a row."""
    live = plan.compiled.live
    named: dict[tuple[str, str, str], list[int]] = {}
    for buffer in live.arrays:
        named.setdefault((sublayer_of(buffer.source), live.kind(buffer), buffer.shape), []).append(buffer.bytes)
    rows = [
        (name, kind, f"{len(sizes)} x {shape}" if len(sizes) > 1 else shape, size(sum(sizes)))
        for (name, kind, shape), sizes in sorted(named.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    ]
    return Section("Largest arrays at the peak", rows, ("made by", "what", "array", "bytes"))


def _bounds(plan: Plan) -> list[Section]:
    found, notes = plan.bounds, tuple(f"not known: {name}" for name in list(plan.compiled.work.unknown)[:SHOWN])
    if found is None:
        work = sorted(plan.compiled.work.by_class.items(), key=lambda item: -item[1].flops)
        rows = [(name, amount(one.flops), size(one.bytes)) for name, one in work]
        return [Section("Work a device and step", rows, ("class", "FLOPs", "memory"), notes)]
    ordered = sorted(found.rows.items(), key=lambda item: -item[1].alone - item[1].exchange_exposed)
    rows = [
        (name, amount(row.flops), size(row.bytes), size(row.exchanged), seconds(row.arithmetic), seconds(row.memory),
         between((row.exchange, row.exchange_exposed)), row.binds)
        for name, row in [*ordered, ("all", found.total)]
    ]  # fmt: skip
    head = ("class", "FLOPs", "memory", "sent", "arithmetic", "memory time", "exchange", "bound by")
    return [Section("What bounds it, a device and step, at the peaks of the data sheet", rows, head, notes)]


def _cost(plan: Plan) -> list[Section]:
    found = plan.cost
    if found is None:
        return []
    rows = [
        ("a step", between(found.seconds), "exchanges hidden, to nothing hidden"),
        ("tokens/s", between(found.tokens_per_second, amount)),
        ("MFU", between(found.mfu, lambda share: f"{share:.1%}")),
    ]
    if found.days is not None:
        rows.append((f"{amount(plan.tokens)} tokens", between(found.days, lambda d: f"{few(d)} days")))
        rows.append(("chip hours", between(found.chip_hours, few)))
    if found.price is not None:
        rows.append(("price", between(found.price, few), f"at {plan.price:g} a chip and hour"))
    return [Section("What it costs", rows)]


def compared(results: list[Result], title: str) -> Section:
    """Compiled candidates, in their order."""
    rows = [
        (result.words or "as it is", "fits" if result.fits else result.why or "does not fit",
         "" if result.peak is None else size(result.peak),
         "" if result.seconds is None else between(result.seconds))
        for result in results
    ]  # fmt: skip
    return Section(title, rows, ("change", "", "peak memory", "a step"))
