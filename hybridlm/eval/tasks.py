# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness, run through its own Python API."""

import contextlib
import difflib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridlm.errors import ConfigError, require
from hybridlm.eval.report import about, table
from hybridlm.eval.subject import Subject

BOOTSTRAPS = 1000
"""Draws for the standard error of a metric that has no formula for it."""


def evaluate_tasks(
    subject: Subject,
    tasks: Sequence[str | dict],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` finds of the subject.

    tasks: names of tasks and groups, or tasks as the harness's YAML has them. include_path: folder of more tasks.
    limit: examples of each; None: all. num_fewshot: examples in front of each question; None: as the task says.
    apply_chat_template: questions, and examples as turns before them, are a conversation by the tokenizer's template.
    Raises ConfigError for tasks that are not known and where the harness is not installed. Tasks whose data are not on
    this machine are fetched by the harness.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        told = f"--tasks needs lm-evaluation-harness ({error}): pip install 'hybridlm[lm-eval]'"
        raise ConfigError(told) from error
    from hybridlm.eval.harness import HarnessModel

    require(include_path is None or Path(include_path).is_dir(), f"--include-path ({include_path}) is no folder")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = manager.all_tasks
    for name in (task for task in tasks if isinstance(task, str)):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"{len(known)} are known, see lm-eval ls tasks"
            raise ConfigError(f"--tasks ({name}): no task of that name: {hint}")
    model = HarnessModel(subject, apply_chat_template)
    # what it prints is no result; forked processes would wait for this one's threads
    with contextlib.redirect_stdout(sys.stderr), _environment(DISABLE_MULTIPROC="1"):
        return simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot,
            batch_size=model.batch_size, log_samples=False, bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=apply_chat_template,
        )  # fmt: skip


def tasks_as_json(subject: Subject, found: Mapping[str, Any]) -> dict:
    """The subject, and metrics and number of examples by task."""
    samples = {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()}
    tasks = {name: dict(_metrics(values)) for name, values in found["results"].items()}
    return {**about(subject), "tasks": tasks, "examples": samples}


def tasks_as_text(subject: Subject, found: Mapping[str, Any]) -> str:
    """A table of metrics with their standard errors."""
    said = tasks_as_json(subject, found)
    rows = [["task", "examples", "metric", "value", "standard error"]]
    for name, metrics in said["tasks"].items():
        errors = {key: value for key, value in metrics.items() if "_stderr" in key}
        for key, value in metrics.items():
            if key not in errors and value is not None:
                error = errors.get(key.replace(",", "_stderr,", 1))
                shown = "" if error is None else f"{error:.4f}"
                rows.append(
                    [name, str(said["examples"].get(name, "")), key.removesuffix(",none"), f"{value:.4f}", shown]
                )
    step = "" if subject.step is None else f", step {subject.step}"
    return f"{subject.name}{step}\n\n{table(rows)}"


def _metrics(values: Mapping[str, Any]):
    """(metric, number) of a task; a number that there is not is None."""
    for key, value in values.items():
        if "," not in key:  # its name, its alias, how many
            continue
        finite = isinstance(value, int | float) and math.isfinite(value)
        yield key, float(value) if finite else None


@contextlib.contextmanager
def _environment(**values: str):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
