# SPDX-License-Identifier: Apache-2.0
"""What a compiled program computes and moves, by class of work: FLOPs of its matrix products and kernels, and bytes of
the device's memory that each operation reads and writes, times the trips of the loops around it.

Bytes are those of arrays: an operand once, a result once; of a slice, what is cut out; of an update in place, what is
written. What the compiler keeps in faster memory on the chip (a TPU's VMEM) counts where it is copied. Of the branches
of a conditional the one that moves the least counts.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

from hybridlm.plan import hlo
from hybridlm.plan.classes import MLP, NORMS, OTHER, PROJECTIONS, class_of, sublayer_of
from hybridlm.plan.collectives import KINDS
from hybridlm.plan.dots import flops_of
from hybridlm.plan.hlo import BRANCHES, CALLED, CALLS, SHAPE, Instruction, Program
from hybridlm.plan.kernels import kernel_cost
from pallas_kernels.cost import Array

FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain",
}  # fmt: skip
"""Operations that move nothing."""
CUTS = ("dynamic-slice", "slice", "gather")
_ARRAY = re.compile(rf"({SHAPE.pattern})(\{{[^{{}}]*\}})?")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
REACH = 4
"""Steps from an operation without a class to one that has one."""
KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton")
"""What targets of custom calls are called that run Pallas kernels."""


@dataclass
class Work:
    """Of a device and a step."""

    flops: float = 0.0
    bytes: float = 0.0

    def add(self, other: "Work", times: float = 1) -> None:
        """So many more."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes


@dataclass
class Counts:
    """By class of work, and what could not be counted."""

    by_class: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    unknown: dict[str, None] = field(default_factory=dict)
    """Kernels of which nothing is known but what they read and write, and loops counted as `hlo.least_trips`."""

    def add(self, other: "Counts", times: float = 1) -> None:
        for name, work in other.by_class.items():
            self.by_class[name].add(work, times)
        self.unknown |= other.unknown

    @property
    def all(self) -> Work:
        total = Work()
        for work in self.by_class.values():
            total.add(work)
        return total


def work(program: Program, computation: str = "") -> Counts:
    """Of a parsed program, or of one run of a computation in it."""
    return _Counter(program).of(computation or program.entry)


def hbm_bytes(shape: str) -> int:
    """Bytes of the arrays in the text of a type that lie in the device's memory."""
    return sum(hlo.n_bytes(array) for array, _, _, layout in _ARRAY.findall(shape) if not _ON_CHIP.search(layout or ""))


class _Counter:
    """Counts computations, each once."""

    def __init__(self, program: Program):
        self.program = program
        self._names = {
            name: {instruction.name: instruction for instruction in instructions}
            for name, instructions in program.computations.items()
        }
        self._counts: dict[str, Counts] = {}
        self._classes: dict[str, str] = {}
        self._uses: dict[str, dict[str, list[Instruction]]] = {}
        self._touched: dict[tuple[str, str], int | None] = {}

    def of(self, name: str) -> Counts:
        """What one run of a computation costs."""
        if name not in self._counts:
            counts = self._counts[name] = Counts()
            for instruction in self.program.computations.get(name, ()):
                self._add(counts, name, instruction)
        return self._counts[name]

    def _add(self, counts: Counts, name: str, instruction: Instruction) -> None:
        op = instruction.op
        if op in FREE or op.endswith(("-update", "-done")) or op.removesuffix("-start") in KINDS:
            return
        if op == "while":
            n = hlo.trips(self.program, instruction)
            if n is None:
                n = hlo.least_trips(self.program, instruction)
                counts.unknown[f"loop {instruction.source or instruction.name}: taken as {n:,} trips"] = None
            counts.add(self.of(hlo.body_of(instruction)), n)
        elif op == "conditional":
            branches = [n.strip().lstrip("%") for one, many in BRANCHES.findall(instruction.rest)
                        for n in ([one] if one else many.split(","))]  # fmt: skip
            counts.add(min((self.of(branch) for branch in branches), key=lambda c: c.all.bytes))
        elif op in CALLS:
            if called := CALLED.search(instruction.rest):
                counts.add(self.of(called[1]))
        elif op == "fusion":
            called = CALLED.search(instruction.rest)[1]
            flops = sum(self._flops(inside) for inside in self._fused(called))
            found = Work(flops, self._moved_by_fusion(name, instruction, called))
            counts.by_class[self._class(name, instruction)].add(found)
        else:
            found = Work(flops_of(instruction, self._names[name]), self._moved(name, instruction))
            if op == "custom-call" and (kernel := self._kernel(name, instruction, counts)) is not None:
                found.flops = kernel
            counts.by_class[self._class(name, instruction)].add(found)

    # Classes and FLOPs

    def _fused(self, called: str) -> list[tuple[str, Instruction]]:
        """All instructions of a fusion, those of fusions inside it too."""
        found = []
        for instruction in self.program.computations.get(called, ()):
            found.append((called, instruction))
            if instruction.op == "fusion":
                found += self._fused(CALLED.search(instruction.rest)[1])
        return found

    def _flops(self, inside: tuple[str, Instruction]) -> float:
        return flops_of(inside[1], self._names[inside[0]])

    def _class(self, name: str, instruction: Instruction) -> str:
        """Its own, else that of what uses it, else of what it is made from: copies and slices serve others."""
        found = self._own_class(instruction)
        for look in (self._users, self._makers):
            seen, near = {instruction.name}, [instruction]
            for _ in range(REACH if found == OTHER else 0):
                near = [i for one in near for i in look(name, one) if i.name not in seen]
                seen |= {i.name for i in near}
                found = next((c for i in near if (c := self._own_class(i)) != OTHER), OTHER)
                if found != OTHER:
                    return found
        return found

    def _own_class(self, instruction: Instruction) -> str:
        """Of a fusion that of its matrix product where it has one, else its own, else that of most operations in it."""
        if instruction.op != "fusion":
            return class_of(instruction.source)
        if instruction.name not in self._classes:
            self._classes[instruction.name] = self._class_of_fusion(instruction)
        return self._classes[instruction.name]

    def _class_of_fusion(self, instruction: Instruction) -> str:
        fused = self._fused(CALLED.search(instruction.rest)[1])
        products = [inside for inside in fused if self._flops(inside)]
        sources = [i.source for _, i in fused if i.source and i.op not in KINDS]
        names = [found for source in sources if (found := class_of(source)) != OTHER]
        for _, product in products:
            if (found := class_of(product.source)) != OTHER:
                return found
        if products and (others := [found for found in names if found != NORMS]):
            return max(others, key=others.count)
        if products and names:  # a product whose name the compiler lost, fused with the norm of its input
            return MLP if any(".MLP/" in source for source in sources) else PROJECTIONS
        if (found := class_of(instruction.source)) != OTHER:
            return found
        return max(names, key=names.count) if names else OTHER

    def _users(self, name: str, instruction: Instruction) -> list[Instruction]:
        if name not in self._uses:
            uses = self._uses[name] = defaultdict(list)
            for user in self.program.computations[name]:
                for operand in operands_of(user):
                    uses[operand].append(user)
        return self._uses[name][instruction.name]

    def _makers(self, name: str, instruction: Instruction) -> list[Instruction]:
        return [self._names[name][o] for o in operands_of(instruction) if o in self._names[name]]

    def _kernel(self, name: str, instruction: Instruction, counts: Counts) -> float | None:
        """FLOPs of a Pallas kernel; None for other custom calls."""
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        if target is None or not any(word in target[1] for word in KERNELS):
            return None
        scopes = instruction.source.split("/")
        gpu = "tpu" not in target[1]
        kernel = ["", *scopes][-2] if gpu else re.sub(r"\.\d+$", "", instruction.name)
        operands = [a for operand in operands_of(instruction) for a in _arrays(self._shape(name, operand))]
        cost = kernel_cost(kernel, operands, _arrays(instruction.shape), gpu=gpu)
        if cost is None:
            counts.unknown[f"FLOPs of the kernel {kernel} in {sublayer_of(instruction.source)}"] = None
        return 0.0 if cost is None else cost.flops

    # Bytes

    def _shape(self, name: str, operand: str) -> str:
        found = self._names[name].get(operand)
        return found.shape if found else ""

    def _moved(self, name: str, instruction: Instruction) -> float:
        """Of an operation outside of fusions."""
        op, operands = instruction.op, operands_of(instruction)
        result = hbm_bytes(instruction.shape)
        if op.endswith("-start"):  # a copy: its result is (what is written, what is read, ...)
            return result
        if op in CUTS:
            return 2 * result
        if op == "dynamic-update-slice":
            return 2 * hbm_bytes(self._shape(name, operands[1]))
        if op == "scatter":
            return 2 * hbm_bytes(self._shape(name, operands[-1]))
        return result + sum(hbm_bytes(self._shape(name, operand)) for operand in set(operands))

    def _moved_by_fusion(self, name: str, instruction: Instruction, called: str) -> float:
        inside = self.program.computations.get(called, ())
        parameters = [i for i in inside if i.op == "parameter"]
        read = 0
        for parameter in parameters:
            if hbm_bytes(parameter.shape):
                touched = self._touches(called, parameter.name)
                read += hbm_bytes(parameter.shape) if touched is None else min(touched, hbm_bytes(parameter.shape))
        return read + self._written(called, instruction.shape)

    def _touches(self, called: str, operand: str) -> int | None:
        """Bytes that a computation reads of an operand by cutting parts out; None: all of it."""
        key = called, operand
        if key not in self._touched:
            total: int | None = 0
            for user in self.program.computations.get(called, ()):
                operands = operands_of(user)
                if operand not in operands or user.op == "parameter":
                    continue
                part = self._part(called, user, operand, operands)
                total = None if part is None or total is None else total + part
            self._touched[key] = total
        return self._touched[key]

    def _part(self, called: str, user: Instruction, operand: str, operands: list[str]) -> int | None:
        if user.op in CUTS and operands[0] == operand:
            return hlo.n_bytes(user.shape)
        if user.op == "dynamic-update-slice" and operands[0] == operand:
            return 0
        if user.op == "scatter" and operands[0] == operand:  # the rows that are added to
            return hlo.n_bytes(self._shape(called, operands[-1]))
        if user.op == "bitcast":
            return self._touches(called, user.name)
        if user.op == "fusion":
            inner = CALLED.search(user.rest)[1]
            parameters = {_number(i): i.name for i in self.program.computations.get(inner, ()) if i.op == "parameter"}
            parts = [self._touches(inner, parameters[n]) for n, o in enumerate(operands) if o == operand]
            return None if None in parts else sum(parts)
        return None

    def _written(self, called: str, shape: str) -> int:
        """Bytes of a fusion's results: of updates in place what they write."""
        inside = self.program.computations.get(called, ())
        if not inside:
            return hbm_bytes(shape)
        root = inside[-1]
        roots = [self._names[called].get(o) for o in operands_of(root)] if root.op == "tuple" else [root]
        return sum(self._update(called, one) for one in roots if one is not None) if hbm_bytes(shape) else 0

    def _update(self, called: str, one: Instruction) -> int:
        while one.op == "bitcast" and (under := self._names[called].get(operands_of(one)[0])) is not None:
            one = under
        if one.op in ("dynamic-update-slice", "scatter"):
            return hlo.n_bytes(self._shape(called, operands_of(one)[1 if one.op != "scatter" else -1]))
        if one.op == "fusion":
            return self._written(CALLED.search(one.rest)[1], one.shape)
        return hbm_bytes(one.shape)


def operands_of(instruction: Instruction) -> list[str]:
    """Names of the operands, in order."""
    start = instruction.rest.find("(")
    depth = 0
    for end in range(start, len(instruction.rest)):
        depth += (instruction.rest[end] == "(") - (instruction.rest[end] == ")")
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", instruction.rest[start:end])
    return []


def _number(parameter: Instruction) -> int:
    return int(re.match(r"parameter\((\d+)\)", parameter.rest)[1])


def _arrays(shape: str) -> list[Array]:
    return [
        Array(tuple(int(d) for d in dims.split(",") if d), max(hlo.BITS[kind] // 8, 1))
        for kind, dims in SHAPE.findall(shape)
    ]
