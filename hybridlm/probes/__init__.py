# SPDX-License-Identifier: Apache-2.0
"""Probes: tasks whose answers stand in the row itself, which count what a model remembers; docs/probes.md.

`task` has the contract; a new task is a file, and a line in PROBES.
"""

from collections.abc import Mapping

from hybridlm.probes.classification import NShotClassification
from hybridlm.probes.copying import StringCopying
from hybridlm.probes.induction_heads import InductionHeads
from hybridlm.probes.mqar import MQAR
from hybridlm.probes.needle import Needle
from hybridlm.probes.phonebook import Phonebook
from hybridlm.probes.regression import InContextRegression
from hybridlm.probes.scoring import Score, heat_map, score, state_bits
from hybridlm.probes.selective_copying import SelectiveCopying
from hybridlm.probes.state_tracking import StateTracking
from hybridlm.probes.task import UNSCORED, Examples, Task
from hybridlm.probes.variable_tracking import VariableTracking

PROBES: Mapping[str, Task] = {
    "mqar": MQAR(),
    "selective_copying": SelectiveCopying(),
    "induction_heads": InductionHeads(),
    "copying": StringCopying(),
    "phonebook": Phonebook(),
    "needle": Needle(),
    "needle_multikey": Needle(needles=4),
    "variable_tracking": VariableTracking(),
    "parity": StateTracking("Z2"),
    "s5": StateTracking("S5"),
    "regression": InContextRegression(),
    "classification": NShotClassification(),
}
"""Tasks by name, with the numbers that they have unless others are given."""

__all__ = [
    "MQAR", "PROBES", "UNSCORED", "Examples", "InContextRegression", "InductionHeads", "NShotClassification", "Needle",
    "Phonebook", "Score", "SelectiveCopying", "StateTracking", "StringCopying", "Task", "VariableTracking", "heat_map",
    "score", "state_bits",
]  # fmt: skip
