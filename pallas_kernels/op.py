# SPDX-License-Identifier: Apache-2.0
"""What an op is, and the one door to all of them: `call`. Decided while the call is traced.

An op is a folder of `pallas_kernels.ops` whose `__init__` holds `OP = Op(...)`; modules are named there as
"module:function" and imported when they are first asked for, so that importing `pallas_kernels` loads no kernel.
"""

import contextlib
import dataclasses
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import compat, context, platform
from pallas_kernels.varying import vary_alike

IMPLEMENTATIONS = ("auto", "reference", "xla", "tpu", "gpu")
KERNELS = ("tpu", "gpu")  # named as the platform that they need
HOPPER = "9.0"  # compute capability of the GPUs that the gpu kernels are written for

_logger = logging.getLogger("pallas_kernels")
_logged: set[tuple[str, str]] = set()
_collecting: list[list[str]] = []


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `supports` and `slower` take the op's arguments and return a reason or None."""

    function: str | Callable  # "module:function", or the function
    supports: str | None = None  # of a kernel: why it cannot serve a call
    slower: str | None = None  # of a kernel: why xla is faster at a call
    capability: str | None = None  # compute capability that a gpu kernel is written for
    oldest_jax: tuple[int, int] | None = None  # whose Pallas a kernel is written for
    takes: tuple[str, ...] = ()  # of the arguments that the op offers beyond its own, those that this one can use
    gradients: bool = True
    forward_mode: bool = False  # whether jax.jvp goes through it
    gradient_forward_mode: bool = True  # whether jax.jvp goes through its gradient, with documents too

    def load(self) -> Callable:
        return _load(self.function)


@dataclasses.dataclass(frozen=True)
class Op:
    """An op: its implementations, on what grounds `auto` takes a kernel, and what bench, oracle and tests ask of it.

    The module `cases` has CASES (by name), TEST_CASES, BENCH_CASES, CONTRACT (the smallest case of each implementation
    that shows all of its contract), `make_inputs(case, dtype)` (arrays by name), `make_settings(case)` (the other
    arguments) and `count_flops(case)` (of the forward pass, as the maths needs them).
    """

    name: str
    cases: str
    positional: tuple[str, ...]  # names of its positional arrays in inputs of `cases`
    implementations: Mapping[str, Implementation]
    proven: tuple[str, ...] = ()  # platforms whose kernel passes every case there and is measured to beat xla
    # TPU generations for which the kernel passes every case interpreted, compiles, and is faster than xla by the
    # compiler's own estimates, forward and backward, at every shape of docs/results/tpu-*.md: no TPU has run it.
    estimated: tuple[str, ...] = ()
    context: str | None = None  # what splits its tokens over a mesh axis
    integers: tuple[str, ...] = ()  # inputs that have no gradients
    gradient_factor: float = 3.0  # multiplications of forward and backward over those of the forward pass
    rows: tuple[str, ...] = ()  # inputs whose first axis is a batch of rows that know nothing of each other
    tokens: tuple[str, ...] = ()  # inputs [batch, tokens, ...], as is the first result: token t sees none behind t
    has_segments: bool = False  # takes segment_ids
    padding_may_be_nan: bool = False  # not only any finite numbers may stand in padding
    states: tuple[str, ...] = ()  # inputs that continue rows; with return_final_state their ends are results 1, 2, ...
    hints: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # settings that change no result: some values
    # Kernel by the name of its pallas_call -> "module:function" from (operands, results), lists of `cost.Array`, to the
    # FLOPs of its matrix products: what plans count of it, see `pallas_kernels.cost`.
    costs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gpu_costs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # likewise of kernels for GPUs

    @property
    def has_states(self) -> bool:
        return bool(self.states)

    def cases_module(self) -> ModuleType:
        """The module of named shapes."""
        return pkgutil.resolve_name(self.cases)


def call(
    op: Op,
    implementation: str,
    args: tuple,
    kwargs: dict,
    *,
    offered: Mapping | None = None,
    context_axis: str | None = None,
    context_options: Mapping | None = None,
):
    """The op on checked arguments, by the implementation that `select` gives; raises what it raises.

    offered: arguments by name for implementations that take them (`Implementation.takes`).
    context_axis: mesh axis that splits the tokens, with what the op's `context` asks beside the op's arguments.
    """

    def run(*args, **kwargs):
        args, kwargs, more = vary_alike((args, kwargs, dict(offered or {})))
        chosen = select(op, implementation, args, kwargs)
        return chosen.load()(*args, **kwargs, **{name: more[name] for name in chosen.takes if name in more})

    if context_axis is None or context.axis_size(context_axis) == 1:
        return run(*args, **kwargs)
    if op.context is None:
        raise ValueError(f"context_axis ({context_axis!r}): the tokens of {op.name} cannot be split")
    return _load(op.context)(run, args, context_axis=context_axis, **(context_options or {}), **kwargs)


def select(op: Op, implementation: str, args: tuple, kwargs: dict) -> Implementation:
    """What serves the op on these arguments.

    Raises ValueError for an unknown implementation and NotImplementedError, with argument and limit, where a named one
    cannot serve this call. `auto` falls back to xla instead and logs its choice once. A call on empty arrays, as of a
    batch of no rows, is served by the reference whatever is named.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation ({implementation!r}) not one of {', '.join(IMPLEMENTATIONS)}")
    if args and not args[0].size:  # nothing to compute, which the reference does without dividing by any size
        return op.implementations["reference"]
    if implementation not in ("auto", *KERNELS):
        return op.implementations[implementation]
    here = platform.platform()
    if implementation == "auto":
        choice, why = _choose(op, here, args, kwargs)
        _log_once(op.name, f"{op.name}: auto uses {choice} on {here} ({why})")
        return op.implementations[choice]
    if implementation != here:
        raise NotImplementedError(
            f"implementation ({implementation!r}) of {op.name} needs that platform, the default is {here!r}"
        )
    if reason := limit(op, implementation, args, kwargs):
        raise NotImplementedError(f"implementation ({implementation!r}) of {op.name} cannot serve this call: {reason}")
    return op.implementations[implementation]


def _choose(op: Op, here: str, args: tuple, kwargs: dict) -> tuple[str, str]:
    """(xla or the kernel of the platform, why)."""
    grounds = _why_kernel(op, here)
    if grounds is None:
        return "xla", _why_no_kernel(op, here)
    if axes := _automatic_axes():
        return "xla", f"outside of a shard_map over mesh axes ({', '.join(axes)}) a kernel cannot be split"
    if reason := limit(op, here, args, kwargs):
        return "xla", f"the {here} kernel cannot serve this call: {reason}"
    slower = op.implementations[here].slower
    if reason := slower and _load(slower)(*args, **kwargs):
        return "xla", reason
    return here, grounds


def _why_kernel(op: Op, here: str) -> str | None:
    """On what grounds `auto` takes the op's kernel on this platform for calls that it serves; None: on none."""
    if here in op.proven:
        return "proven on this platform"
    estimated = here == "tpu" and platform.tpu_generation() in op.estimated
    return "faster by the compiler's estimate" if estimated else None


def _why_no_kernel(op: Op, here: str) -> str:
    if here == "tpu" and op.estimated and platform.tpu_generation() is None:
        return f"generation of the TPU unknown: {platform.HOW_TO_NAME_IT}"
    return f"no {here} kernel of it is proven faster"


def limit(op: Op, name: str, args: tuple, kwargs: dict) -> str | None:
    """Why the kernel `name` cannot serve the call, or None if it can."""
    kernel = op.implementations.get(name)
    if kernel is None:
        return f"{op.name} has no {name} kernel"
    if reason := kernel.oldest_jax and compat.why_too_old(kernel.oldest_jax):
        return reason
    if kernel.capability and (capability := platform.gpu_capability()) not in (None, kernel.capability):
        return f"compute capability of the device ({capability}) not that of Hopper ({kernel.capability})"
    if reason := kernel.supports and _load(kernel.supports)(*args, **kwargs):
        return reason
    flags: Any = jax.config  # whose values its type does not name
    return "64-bit types are on (jax_enable_x64), kernels count in 32 bits" if flags.jax_enable_x64 else None


def why_not_hopper(oldest_jax: tuple[int, int]) -> str | None:
    """Why a kernel for Hopper GPUs that is no op's cannot serve here; None where it can, or where the GPU is described
    and not at hand."""
    if reason := compat.why_too_old(oldest_jax):
        return reason
    is_hopper = platform.platform() == "gpu" and platform.gpu_capability() in (None, HOPPER)
    return None if is_hopper else "it is written for Hopper GPUs"


def why_not_products(
    oldest_jax: tuple[int, int], dtype: DTypeLike, sizes: Mapping[str, int], multiples: Sequence[int]
) -> str | None:
    """`why_not_hopper` of a kernel of products in bfloat16, or why it cannot serve these sizes, each of which must be a
    multiple, not zero, of its own number."""
    if reason := why_not_hopper(oldest_jax):
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"products are of type {jnp.dtype(dtype)}, not bfloat16"
    for (name, size), multiple in zip(sizes.items(), multiples, strict=True):
        if not size or size % multiple:
            return f"{name} ({size}) no multiple of {multiple}"
    return None


def _automatic_axes() -> tuple[str, ...]:
    """Axes of the mesh at hand over which the compiler, not a shard_map, splits arrays; none where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    kinds = () if mesh.empty else zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != manual and mesh.shape[name] > 1)


def _load(function: str | Callable) -> Callable:
    return pkgutil.resolve_name(function) if isinstance(function, str) else function


@contextlib.contextmanager
def choices() -> Iterator[list[str]]:
    """Within, what `auto` chooses and why is collected, a line each, whether it was logged before or not. A function
    that `jax.jit` has traced already chooses no more."""
    found: list[str] = []
    _collecting.append(found)
    try:
        yield found
    finally:
        _collecting.pop()


def _log_once(name: str, message: str) -> None:
    for found in _collecting:
        if message not in found:
            found.append(message)
    if (name, message) not in _logged:
        _logged.add((name, message))
        _logger.info(message)
