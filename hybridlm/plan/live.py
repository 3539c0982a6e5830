# SPDX-License-Identifier: Apache-2.0
"""What lives in a device's memory at the worst moment of a compiled program, read from the order of its instructions.

Compilers keep their assignment of buffers to themselves; the text has the order in which a device runs it. Followed
here: tuples, loops (whose state stays in place), updates in place and donated arguments. Not followed: how buffers are
packed, and arrays that the compiler makes once more. How near it comes to what the compiler says is in the plan.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from hybridlm.plan.hlo import CALLED, Instruction, Program
from hybridlm.plan.work import hbm_bytes, operands_of

ARGUMENT, KEPT, GRADIENT, TEMPORARY = KINDS = ("arguments", "kept activations", "gradients", "temporaries")
_ELEMENT = re.compile(r"\w+\[[\d,]*\](?:\{[^{}]*\})?")
_ALIASED = re.compile(r"output_to_operand_aliasing=\{\{\}: \((\d+), \{\}\)")
_SUBLAYER = re.compile(r"[^/()]+\.[A-Z]\w*/")


@dataclass
class Buffer:
    """An array that an instruction makes."""

    bytes: int
    shape: str
    source: str
    argument: bool = False
    stack: bool = False
    """Carried by a loop that writes one part of it a trip."""

    def kind(self, backward: bool) -> str:
        """One of KINDS. backward: whether the moment is in the backward pass."""
        if self.argument:
            return ARGUMENT
        if "transpose(" in self.source:
            return GRADIENT if self.stack else TEMPORARY
        return KEPT if backward and "jvp(" in self.source else TEMPORARY


@dataclass
class Peak:
    """The moment at which the most bytes live."""

    bytes: int
    at: str
    """What is computed then: the scopes of the instruction."""
    arrays: list[Buffer]
    """All that live, largest first."""

    @property
    def backward(self) -> bool:
        """Whether it is in the backward pass."""
        return "transpose(" in self.at or any("transpose(" in buffer.source for buffer in self.arrays)

    def kind(self, buffer: Buffer) -> str:
        """One of KINDS."""
        return buffer.kind(self.backward)

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes of each of KINDS."""
        found = dict.fromkeys(KINDS, 0)
        for buffer in self.arrays:
            found[self.kind(buffer)] += buffer.bytes
        return found


def peak(program: Program) -> Peak:
    """Of a parsed program that says its order (`is_scheduled=true`), as compiled ones do."""
    moment = _Walk(program, program.entry, [], program.donated).worst
    return Peak(moment.bytes, moment.at, sorted(moment.arrays, key=lambda buffer: -buffer.bytes))


@dataclass
class _Moment:
    bytes: int = 0
    at: str = ""
    arrays: list[Buffer] = field(default_factory=list)


Value = Buffer | list


class _Walk:
    """One computation in its order. given: the values of its parameters; they are counted where they are made."""

    def __init__(self, program: Program, name: str, given: list, donated: frozenset[int] = frozenset()):
        self.program, self.given = program, given
        self.instructions = program.computations.get(name, [])
        self.names = {i.name: i for i in self.instructions}
        self.values: dict[str, Value] = {}
        self.inner: dict[int, _Moment] = {}
        self.in_place = self._donated(donated)
        self.made: list[tuple[int, Buffer]] = []
        self.last: dict[int, int] = {}
        for n, instruction in enumerate(self.instructions):
            self._visit(n, instruction)
        self.worst = self._sweep()

    def _donated(self, outputs: frozenset[int]) -> set[str]:
        """Instructions whose result is written where an argument was."""
        if not outputs or not self.instructions:
            return set()
        root = self.instructions[-1]
        names = operands_of(root) if root.op == "tuple" else [root.name]
        found = {names[n] for n in outputs if n < len(names)}
        for name in list(found):  # also what is only passed on to the result
            while (i := self.names.get(name)) is not None and i.op in ("bitcast", "copy-done", "copy"):
                name = operands_of(i)[0]
                found.add(name)
        return found

    def _visit(self, n: int, instruction: Instruction) -> None:
        for operand in operands_of(instruction):
            for buffer in _flat(self.values.get(operand)):
                self.last[id(buffer)] = n
        self.values[instruction.name] = value = self._value(n, instruction)
        for buffer in _flat(value):
            self.last[id(buffer)] = n

    def _value(self, n: int, instruction: Instruction) -> Value:
        op, operands = instruction.op, operands_of(instruction)
        values = [self.values.get(operand) for operand in operands]
        if op == "parameter":
            number = int(re.match(r"parameter\((\d+)\)", instruction.rest)[1])
            if number < len(self.given):
                return self.given[number]
            return self._new(n, instruction.shape, instruction, argument=True)
        if op == "tuple":
            return values
        if op == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.rest)[1])
            of = values[0]
            return of[index] if isinstance(of, list) and index < len(of) else []
        if op in ("bitcast", "optimization-barrier", "opt-barrier", "dynamic-update-slice", "scatter"):
            return values[0] if values and values[0] is not None else []
        if op == "copy-done" or op.endswith("-done"):
            return self._done(values)
        if op.endswith(("-start", "-update")):  # an update may be the first to name what is made
            return self._start(n, instruction, values)
        if op == "while":
            return self._loop(n, instruction, values[0])
        if op in ("call", "conditional"):
            return self._call(n, instruction, values)
        if op == "fusion":
            return self._fusion(n, instruction, values)
        return self._new(n, instruction.shape, instruction)

    def _new(self, n: int, shape: str, instruction: Instruction, *, argument: bool = False) -> Value:
        parts = [text for text in _ELEMENT.findall(shape)]
        made = []
        for part in parts:
            size = 0 if instruction.name in self.in_place and not argument else hbm_bytes(part)
            buffer = Buffer(size, part.split("{")[0], self._source(instruction), argument)
            self.made.append((n, buffer))
            made.append(buffer)
        return made if shape.startswith("(") else made[0] if made else []

    def _source(self, instruction: Instruction) -> str:
        if instruction.op == "fusion" and not _SUBLAYER.search(instruction.source):
            inside = self.program.computations.get(CALLED.search(instruction.rest)[1], [])
            named = [i.source for i in inside if _SUBLAYER.search(i.source)]
            return named[-1] if named else instruction.source
        return instruction.source

    def _start(self, n: int, instruction: Instruction, values: list) -> Value:
        """(what is new, ...): a copy names its target first, gathers and alike their operand."""
        parts = _ELEMENT.findall(instruction.shape)
        if not parts:
            return []
        if not instruction.shape.startswith("("):
            return self._new(n, instruction.shape, instruction)
        first = instruction.op in ("copy-start", "all-reduce-start")
        target = parts[0] if first else max(parts[1:] or parts, key=hbm_bytes)
        made = self._new(n, target, instruction)
        return ["start", made, [v for v in values if v is not None]]

    def _done(self, values: list) -> Value:
        value = values[0] if values else None
        return value[1] if isinstance(value, list) and value[:1] == ["start"] else value if value is not None else []

    def _loop(self, n: int, instruction: Instruction, carried: Value) -> Value:
        name = re.search(r"body=%?([\w.\-]+)", instruction.rest)[1]
        body = _Walk(self.program, name, [carried])
        self.inner[n] = body.worst
        if body.instructions and isinstance(carried, list):
            body.name_stacks(carried)
        return carried if carried is not None else []

    def name_stacks(self, carried: list) -> None:
        """Arrays that a trip writes a part of are named after what makes the parts."""
        root = self.instructions[-1]
        for buffer, operand in zip(carried, operands_of(root), strict=False):
            made = self.names.get(operand)
            if isinstance(buffer, Buffer) and made is not None and self._updates(made):
                buffer.stack = True
                buffer.source = self._writer(made) or buffer.source

    def _updates(self, instruction: Instruction) -> bool:
        while instruction.op in ("bitcast", "get-tuple-element", "copy") and operands_of(instruction):
            under = self.names.get(operands_of(instruction)[0])
            if under is None:
                return False
            instruction = under
        if instruction.op == "fusion":
            inside = self.program.computations.get(CALLED.search(instruction.rest)[1], [])
            return any(i.op == "dynamic-update-slice" for i in inside)
        return instruction.op == "dynamic-update-slice"

    def _writer(self, instruction: Instruction) -> str:
        """Where what is written comes from: the nearest source with a sublayer in it."""
        near, seen = [instruction], set()
        for _ in range(6):
            for one in near:
                if _SUBLAYER.search(source := self._source(one)):
                    return source
            seen |= {i.name for i in near}
            near = [self.names[o] for i in near for o in reversed(operands_of(i)) if o in self.names and o not in seen]
        return instruction.source

    def _call(self, n: int, instruction: Instruction, values: list) -> Value:
        names = CALLED.findall(instruction.rest) + re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest)
        names = [name.strip().lstrip("%") for text in names for name in text.split(",")]
        given = [[v] for v in values[1:]] if instruction.op == "conditional" else [values] * len(names)
        walks = [_Walk(self.program, name, list(g)) for name, g in zip(names, given, strict=False)]
        if walks:
            self.inner[n] = max((walk.worst for walk in walks), key=lambda moment: moment.bytes)
        return self._new(n, instruction.shape, instruction)

    def _fusion(self, n: int, instruction: Instruction, values: list) -> Value:
        """New arrays, but for operands that are passed on or updated in place."""
        inside = self.program.computations.get(CALLED.search(instruction.rest)[1], [])
        made = self._new(n, instruction.shape, instruction)
        if not inside:
            return made
        names = {i.name: i for i in inside}
        root = inside[-1]
        roots = [names.get(o) for o in operands_of(root)] if root.op == "tuple" else [root]
        parts = made if isinstance(made, list) else [made]
        for k, one in enumerate(roots[: len(parts)]):
            if (number := _passed(one, names, self.program)) is not None and number < len(values):
                old, value = parts[k], values[number]
                if isinstance(old, Buffer) and isinstance(value, Buffer) and value.bytes:
                    self.made = [(m, b) for m, b in self.made if b is not old]
                    parts[k] = value
        return parts if isinstance(made, list) else parts[0]

    def _sweep(self) -> _Moment:
        """The worst moment; what is given lives elsewhere."""
        ends: dict[int, list[Buffer]] = {}
        begins: dict[int, list[Buffer]] = {}
        for n, buffer in self.made:
            if buffer.bytes:
                begins.setdefault(0 if buffer.argument else n, []).append(buffer)
                end = len(self.instructions) if buffer.argument else self.last.get(id(buffer), n)
                ends.setdefault(end, []).append(buffer)
        alive: dict[int, Buffer] = {}
        now, worst, moment = 0, -1, _Moment()
        for n, instruction in enumerate(self.instructions):
            for buffer in begins.get(n, ()):
                alive[id(buffer)] = buffer
                now += buffer.bytes
            inner = self.inner.get(n)
            total = now + (inner.bytes if inner else 0)
            if total > worst:
                worst = total
                arrays = [*alive.values(), *(inner.arrays if inner else ())]
                moment = _Moment(total, inner.at if inner and inner.at else instruction.source, arrays)
            for buffer in ends.get(n, ()):
                alive.pop(id(buffer), None)
                now -= buffer.bytes
        return moment


def _flat(value: Value | str | None) -> Iterator[Buffer]:
    if isinstance(value, Buffer):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _flat(part)


def _passed(one: Instruction | None, names: dict[str, Instruction], program: Program) -> int | None:
    """The number of the parameter that a result of a fusion is, or is an update of."""
    while one is not None:
        if one.op == "parameter":
            return int(re.match(r"parameter\((\d+)\)", one.rest)[1])
        if one.op == "fusion":
            inside = program.computations.get(CALLED.search(one.rest)[1], [])
            if aliased := _ALIASED.search(one.rest):  # a copy to another layout, in place
                number = int(aliased[1])
            else:
                number = _passed(inside[-1], {i.name: i for i in inside}, program) if inside else None
            operands = operands_of(one)
            one = names.get(operands[number]) if number is not None and number < len(operands) else None
        elif one.op in ("bitcast", "dynamic-update-slice") and operands_of(one):
            one = names.get(operands_of(one)[0])
        else:
            return None
    return None
