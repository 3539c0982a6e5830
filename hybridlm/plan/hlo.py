# SPDX-License-Identifier: Apache-2.0
"""Optimised HLO as text: computations with the times they run, the exchanges, kernels and large arrays in them."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hybridlm.plan.collectives import KINDS, Collective, parts

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
"""Types of elements and their size."""
SHAPE = re.compile(rf"\b({'|'.join(BITS)})\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:to_apply=|calls=|called_computation=|called_computations=\{)%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
CALLS = ("call", "call-start", "async-start", "custom-call-start")
"""Operations that run another computation once: at once, or on another core (TPUs' SparseCores take exchanges)."""
_NO_ARRAY = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "constant"}
"""Operations whose result is another's, or is listed where it is made."""


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    """Type of the result, a tuple in brackets."""
    op: str
    rest: str
    """From the operation on: operands and attributes."""

    @property
    def source(self) -> str:
        """Where it comes from: the named scopes and primitive of the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Program:
    """A parsed text."""

    computations: dict[str, list[Instruction]]
    runs: Counter
    """Times that each computation runs a step."""
    entry: str = ""
    donated: frozenset[int] = frozenset()
    """Results that are written where an argument was."""
    unknown: list[str] = field(default_factory=list)
    """Loops whose trips the text does not say: counted as `least_trips`."""


def n_bytes(shape: str) -> int:
    """Bytes of all arrays in the text of a type."""
    total = 0
    for kind, dims in SHAPE.findall(shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * BITS[kind] // 8
    return total


def parse(text: str) -> Program:
    """The computations of a compiled program (`compiled.as_text()`). ValueError where it has no entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                entry, current = (found[2] if found[1] else entry), computations.setdefault(found[2], [])
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(*found.groups()))
    if entry is None:
        raise ValueError("text has no ENTRY computation: it is not that of a compiled program")
    head = text.partition("\n")[0]
    donated = frozenset(int(n) for n in re.findall(r"\{(\d+)\}: \(\d+, \{[\d, ]*\}, (?:may|must)-alias", head))
    program = Program(computations, Counter(), entry, donated)
    _count(program, entry, 1)
    return program


def _instruction(name: str, rest: str) -> Instruction:
    depth, end = 0, len(rest)
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter == " ":
            end = i
            break
    shape, tail = rest[:end], rest[end + 1 :]
    op = re.match(r"[\w\-]+", tail)
    return Instruction(name, shape, op[0] if op else "", tail)


def _count(program: Program, name: str, times: int) -> None:
    program.runs[name] += times
    for instruction in program.computations.get(name, ()):
        if instruction.op == "while":
            n = trips(program, instruction)
            if n is None:
                program.unknown.append(instruction.name)
            _count(program, body_of(instruction), times * (n or least_trips(program, instruction)))
        elif instruction.op in (*CALLS, "fusion"):
            if called := CALLED.search(instruction.rest):
                _count(program, called[1], times)
        elif instruction.op == "conditional":
            for one, many in BRANCHES.findall(instruction.rest):
                for branch in [one] if one else many.split(","):
                    _count(program, branch.strip().lstrip("%"), times)


def _named(found: re.Match[str] | None) -> str:
    """What a pattern found that every program has."""
    assert found is not None
    return found[1]


def trips(program: Program, loop: Instruction) -> int | None:
    """What the compiler says, else the constant that the condition compares with."""
    if known := re.search(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)', loop.rest):
        return int(known[1])
    condition = _named(re.search(r"condition=%?([\w.\-]+)", loop.rest))
    constants = []
    for name in [condition, *CALLED.findall(" ".join(i.rest for i in program.computations.get(condition, ())))]:
        for instruction in program.computations.get(name, ()):
            if found := re.match(r"constant\((\d+)\)", instruction.rest):
                constants.append(int(found[1]))
    return max(constants, default=None)


def body_of(loop: Instruction) -> str:
    """The computation that a loop repeats."""
    return _named(re.search(r"body=%?([\w.\-]+)", loop.rest))


def least_trips(program: Program, loop: Instruction) -> int:
    """Of a loop that ends by what it computes, as one over the rows that experts have: as many as take all rows once,
    those of the array of which the body cuts the smallest share, but for a part that may be padding."""
    most = 1
    for name in _with_fusions(program, body_of(loop)):
        names = {i.name: i for i in program.computations[name]}
        for instruction in names.values():
            operand = re.search(r"\(%?([\w.\-]+)", instruction.rest) if instruction.op == "dynamic-slice" else None
            if operand is not None and operand[1] in names:
                most = max(most, _parts(names[operand[1]].shape, instruction.shape) - 1)
    return most


def _with_fusions(program: Program, name: str) -> Iterator[str]:
    if name in program.computations:
        yield name
    for instruction in program.computations.get(name, ()):
        if instruction.op == "fusion":
            yield from _with_fusions(program, _named(CALLED.search(instruction.rest)))


def _parts(whole: str, part: str) -> int:
    return parts(_dims(whole), _dims(part))


def _dims(shape: str) -> list[int]:
    found = SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


def collectives(program: Program) -> list[Collective]:
    """What the program exchanges. An all-reduce of which each device keeps its shard counts as reduce-scatter; one that
    goes on behind other work counts once."""
    return [found for name in program.computations for found in _collectives(program, name)]


def _collectives(program: Program, name: str) -> Iterator[Collective]:
    instructions = program.computations[name]
    custom = " ".join(i.rest for i in instructions if i.op == "custom-call")
    if not program.runs[name] or name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in custom:
        return
    for instruction in instructions:
        kind = instruction.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        starts = instruction.op.endswith("-start")
        results = _results(instruction.shape) if starts else instruction.shape
        sizes = [n_bytes(f"{of}[{dims}]") for of, dims in SHAPE.findall(results)]
        apart = starts and results == instruction.shape and kind != "all-reduce"  # those give their operands, too
        size = max(sizes, default=0) if apart else sum(sizes)
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        elif kind == "reduce-scatter" and not apart:
            size *= len(_group(instruction))
        what = f"{instruction.shape.split('{')[0]} {instruction.source}"
        source, group = instruction.source, _group(instruction)
        yield Collective(kind, _axes(instruction), program.runs[name], size, what, source, group)


def _results(shape: str) -> str:
    """Of `((operands), results)`, as compilers of GPUs say what a `-start` gives, the results; else the whole."""
    depth = 0
    for at, letter in enumerate(shape if shape.startswith("((") else ""):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 1 and letter == ")":
            return shape[at + 1 :]
    return shape


def _axes(instruction: Instruction) -> str:
    """Mesh axes, as compilers name them for whole axes; else how large the groups are."""
    if named := re.search(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}", instruction.rest):
        return "*".join(re.findall(r"\w+", named[1]))
    return f"groups of {len(_group(instruction))}"


def _group(instruction: Instruction) -> tuple[int, ...]:
    """Devices of the first group of a collective; one device where the text does not say."""
    text = instruction.rest
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(n) for n in found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", text):
        sizes = [int(n) for n in (found[3] or f"{found[1]},{found[2]}").split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else list(range(len(sizes)))
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return tuple(devices.reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"(\w+)'?=(\d+)", found[1])}
        axes = set(re.findall(r"\w+", found[2]))
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return tuple(devices[tuple(slice(None) if name in axes else 0 for name in sizes)].flatten().tolist())
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(found[1]), int(found[2])
    return (0,)


def kernels(program: Program) -> dict[str, int]:
    """Times a step that each Pallas TPU kernel runs, by name."""
    found: Counter = Counter()
    for name, instructions in program.computations.items():
        for instruction in instructions:
            if instruction.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest:
                found[re.sub(r"\.\d+$", "", instruction.name)] += program.runs[name]
    return {name: runs for name, runs in sorted(found.items()) if runs}


class Large(NamedTuple):
    """An array that some instruction makes."""

    bytes: int
    shape: str
    """Type and dims."""
    source: str
    """See `Instruction.source`."""


def largest(program: Program, count: int = 12) -> list[Large]:
    """The largest arrays in memory, one for each type and shape; what lives inside a fusion is not in memory."""
    found: dict[str, Large] = {}
    every = [i for instructions in program.computations.values() for i in instructions]
    fused = {_named(CALLED.search(i.rest)) for i in every if i.op == "fusion"}
    for name, instructions in program.computations.items():
        if not program.runs[name] or name in fused:
            continue
        for instruction in instructions:
            if instruction.op in _NO_ARRAY or instruction.op.endswith("-done"):
                continue
            for kind, dims in SHAPE.findall(instruction.shape):
                shape = f"{kind}[{dims}]"
                found.setdefault(shape, Large(n_bytes(shape), shape, instruction.source))
    return sorted(found.values(), key=lambda large: -large.bytes)[:count]
