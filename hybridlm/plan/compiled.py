# SPDX-License-Identifier: Apache-2.0
"""The third stage of a plan: the step as the compiler of the devices makes it. Of one device and one step."""

import re
import time
from dataclasses import dataclass

import jax

from hybridlm.errors import ConfigError
from hybridlm.plan import collectives, hlo
from hybridlm.plan.collectives import Collective, Totals
from hybridlm.plan.hlo import Large
from hybridlm.plan.live import Peak, peak
from hybridlm.plan.work import Counts, work


@dataclass(frozen=True)
class Memory:
    """Bytes, as the compiler says."""

    peak: int
    """At once, arguments and results among them."""
    arguments: int
    """The train state and the batch, with the padding of tiles."""
    outputs: int
    aliased: int
    """Of the outputs, what lies where an argument was: the new state."""
    temporaries: int
    """Everything else, as if there were no order of arrays in time: may be more than the peak leaves."""
    code: int


@dataclass(frozen=True)
class Compiled:
    """See the module."""

    seconds: float
    cpu_seconds: float
    """Of all threads of the compiler."""
    memory: Memory
    collectives: list[Collective]
    kernels: dict[str, int]
    work: Counts
    largest: list[Large]
    live: Peak
    """What lives at the worst moment, read from the order of the program."""
    instructions: int
    text_bytes: int

    @property
    def exchanges(self) -> dict[str, Totals]:
        """By kind."""
        return collectives.totals(self.collectives, by_axes=False)


_SIZE = r"([\d.]+)([KMGT]?)"
WANT = (rf"Used {_SIZE} of {_SIZE} hbm", rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
"""How compilers of TPUs say what a program needs of a device's memory, and what there is."""
OF_CORE = rf"memory space (?!hbm)(\w+)\. Used {_SIZE} of {_SIZE} "
"""How they say what one operation needs of a core's own memory."""


class DoesNotFit(RuntimeError):
    """The compiler gives up: the program needs more memory than a device has, or an operation more than a core."""

    def __init__(self, said: str):
        """said: the compiler's own words."""
        found = next(filter(None, (re.search(pattern, said) for pattern in WANT)), None)
        units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        self.needed = round(float(found[1]) * units[found[2]]) if found else None
        more = f": it needs {_words(found[1], found[2])} of {_words(found[3], found[4])}" if found else ""
        if of_core := re.search(OF_CORE, said):
            space, *sizes = of_core.groups()
            name = re.search(r'op_name="([^"]+)"', said)
            what = "/".join(name[1].split("/")[-2:]) if name else "an operation"
            more = f" of a core ({space}): {what} needs {_words(*sizes[:2])} of {_words(*sizes[2:])}"
        super().__init__(f"the compiler gives up, for want of memory{more}")


def _words(number: str, unit: str) -> str:
    return f"{number} {unit}iB" if unit else f"{number} B"


def compile(lowered: jax.stages.Lowered, backend: str) -> Compiled:
    """Minutes for large models. DoesNotFit where a TPU's compiler says so, ConfigError where XLA has no way."""
    began, cpu = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            raise DoesNotFit(str(error)) from error
        if found := re.search(r"No supported config found for HLO: (\S+) = (\S+)", str(error)):
            raise ConfigError(
                f"topology: XLA's compiler finds no way to compute {found[1]} ({found[2]}) without a card; "
                "ask for --stage lowered, or plan where such a card is"
            ) from error
        raise
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return read(program, backend, seconds, cpu_seconds)


def read(program: jax.stages.Compiled, backend: str, seconds: float = 0.0, cpu_seconds: float = 0.0) -> Compiled:
    """Of a compiled program."""
    text, said = program.as_text(), program.memory_analysis()
    outputs, aliased = said.output_size_in_bytes, said.alias_size_in_bytes
    whole = said.argument_size_in_bytes + outputs - aliased + said.temp_size_in_bytes  # all that CPUs' compiler says
    parsed = hlo.parse(text)
    return Compiled(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        memory=Memory(
            peak=whole if backend == "cpu" else said.peak_memory_in_bytes,
            arguments=said.argument_size_in_bytes,
            outputs=outputs,
            aliased=aliased,
            temporaries=said.temp_size_in_bytes,
            code=said.generated_code_size_in_bytes,
        ),
        collectives=hlo.collectives(parsed),
        kernels=hlo.kernels(parsed),
        work=work(parsed),
        largest=hlo.largest(parsed),
        live=peak(parsed),
        instructions=sum(map(len, parsed.computations.values())),
        text_bytes=len(text),
    )
