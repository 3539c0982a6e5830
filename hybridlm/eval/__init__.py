# SPDX-License-Identifier: Apache-2.0
"""Trained models evaluated: on held-out sets, by position, and on the tasks of lm-evaluation-harness."""

from hybridlm.lazy import exporter

_EXPORTS = {
    "HarnessModel": "hybridlm.eval.harness",
    "SetResult": "hybridlm.eval.sets",
    "Subject": "hybridlm.eval.subject",
    "evaluate_sets": "hybridlm.eval.sets",
    "evaluate_tasks": "hybridlm.eval.tasks",
    "open_published": "hybridlm.eval.subject",
    "open_run": "hybridlm.eval.subject",
}
__all__ = sorted(_EXPORTS)
__getattr__ = exporter(__name__, _EXPORTS)
