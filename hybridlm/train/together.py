# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run tell each other beside arrays. With one process nothing travels."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hybridlm.errors import AgainError, ConfigError, RunError

ERRORS = {kind.__name__: kind for kind in (ConfigError, RunError, AgainError)}


def gathered(value) -> list:
    """The JSON values of all processes, in the order of the processes; each has to call it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.int32(len(raw)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(raw)] = raw
    rows = process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(ask: Callable[[], Any]) -> Any:
    """What the first process is told by `ask`, a JSON value, in all; its ConfigError or RunError is raised by all.

    So one process looks at what another could see otherwise, and none waits for one that has left.
    """
    if jax.process_count() == 1:
        return ask()
    told, raised = None, None
    if jax.process_index() == 0:
        try:
            told = {"value": ask()}
        except Exception as error:  # whatever it is, the others hear of it before it ends this process
            kind = type(error).__name__
            told = {"error": [kind, str(error)] if kind in ERRORS else ["RunError", f"{kind}: {error}"]}
            raised = error
    told = gathered(told)[0]
    if raised is not None:
        raise raised
    if "error" in told:
        kind, message = told["error"]
        raise ERRORS[kind](message)
    return told["value"]


def one_problem(mine: str | None) -> str | None:
    """A problem that any process has, for all of them; None where none has one."""
    for process, problem in enumerate(gathered(mine)):
        if problem is not None:
            return problem if jax.process_count() == 1 else f"{problem}, says process {process}"
    return None
