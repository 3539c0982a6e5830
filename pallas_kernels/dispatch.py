# SPDX-License-Identifier: Apache-2.0
"""Chooses the implementation of an op; the only reader of the platform. Decided when the call is traced."""

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Callable

from pallas_kernels.compat import automatic_axes, default_device_platform, gpu_capability, tpu_generation, vary_alike

IMPLEMENTATIONS = ("auto", "reference", "xla", "tpu", "gpu")

HOPPER = "9.0"  # compute capability of the GPUs that the gpu kernels are written for

# (op, platform) whose kernel passes every case on that platform and is measured to be faster than xla.
PROVEN: frozenset[tuple[str, str]] = frozenset({("ssd", "gpu"), ("attention", "gpu"), ("causal_conv1d", "gpu")})

# (op, TPU generation) whose kernel passes every case interpreted, compiles for that generation, and is faster than xla
# by the compiler's own estimates, forward and backward, at every shape of docs/kernels.md: no TPU has run it.
ESTIMATED: frozenset[tuple[str, str]] = frozenset(
    (op, generation) for op in ("ssd", "attention", "causal_conv1d") for generation in ("v5e", "v5p", "v6e")
)

_logger = logging.getLogger("pallas_kernels")
_logged: set[tuple[str, str]] = set()
_assumed: list[str] = []


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what `assume_platform` says, else the platform of the default device."""
    return _assumed[-1] if _assumed else default_device_platform()


@contextlib.contextmanager
def assume_platform(name: str):
    """Traces calls for another platform than the one at hand, e.g. to compile for a TPU on a machine without one."""
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()


def run(op: str, implementation: str, args: tuple, kwargs: dict):
    """`op(*args, **kwargs)` by the implementation that `select` gives; raises what it raises."""
    args, kwargs = vary_alike((args, kwargs))
    return select(op, implementation, args, kwargs)(*args, **kwargs)


def select(op: str, implementation: str, args: tuple, kwargs: dict) -> Callable:
    """The function that serves `op(*args, **kwargs)`.

    Raises ValueError for an unknown implementation and NotImplementedError, with argument and limit, where a named one
    cannot serve this call. `auto` falls back to xla instead and logs its choice once.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation ({implementation!r}) not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation in ("reference", "xla"):
        return _load(op, implementation)
    here = platform()
    if implementation == "auto":
        grounds = why_kernel(op)
        if grounds is None:
            choice, why = "xla", f"no {here} kernel of it is proven faster"
        elif axes := automatic_axes():
            choice, why = "xla", f"outside of a shard_map over mesh axes ({', '.join(axes)}) a kernel cannot be split"
        elif reason := _limit(op, here, args, kwargs):
            choice, why = "xla", f"the {here} kernel cannot serve this call: {reason}"
        elif reason := _slower(op, here, args, kwargs):
            choice, why = "xla", reason
        else:
            choice, why = here, grounds
        _log_once(op, f"{op}: auto uses {choice} on {here} ({why})")
        return _load(op, choice)
    if implementation != here:
        raise NotImplementedError(
            f"implementation ({implementation!r}) of {op} needs that platform, the default is {here!r}"
        )
    if reason := _limit(op, implementation, args, kwargs):
        raise NotImplementedError(f"implementation ({implementation!r}) of {op} cannot serve this call: {reason}")
    return _load(op, implementation)


def why_kernel(op: str) -> str | None:
    """On what grounds `auto` takes the op's kernel on the platform at hand for calls that it serves; None: on none."""
    here = platform()
    if (op, here) in PROVEN:
        return "proven on this platform"
    estimated = here == "tpu" and (op, tpu_generation()) in ESTIMATED
    return "faster by the compiler's estimate" if estimated else None


def _load(op: str, name: str) -> Callable:
    return getattr(importlib.import_module(_module(op, name)), f"{op}_{name}")


def _module(op: str, name: str) -> str:
    """Name of the module of an implementation."""
    module = f"pallas_kernels.ops.{op}.{name}"
    spec = importlib.util.find_spec(module)
    return f"{module}.api" if spec is not None and spec.submodule_search_locations else module


def _limit(op: str, name: str, args: tuple, kwargs: dict) -> str | None:
    """Why the kernel `name` cannot serve the call, or None if it can."""
    module_name = _module(op, name)
    if importlib.util.find_spec(module_name) is None:
        return f"{op} has no {name} kernel"
    if name == "gpu" and (capability := gpu_capability()) not in (None, HOPPER):
        return f"compute capability of the device ({capability}) not that of Hopper ({HOPPER})"
    return importlib.import_module(module_name).supports(*args, **kwargs)


def _slower(op: str, name: str, args: tuple, kwargs: dict) -> str | None:
    """Why xla is faster than the kernel `name` at this call, as far as its module says so; else None."""
    slower = getattr(importlib.import_module(_module(op, name)), "slower", None)
    return slower and slower(*args, **kwargs)


def _log_once(op: str, message: str) -> None:
    if (op, message) not in _logged:
        _logged.add((op, message))
        _logger.info(message)
