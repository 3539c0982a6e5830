# SPDX-License-Identifier: Apache-2.0
"""Loss, gradients, optimizer and schedule."""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.optim import old
from hybridlm.optim.adamw import AdamW
from hybridlm.optim.objective import OBJECTIVES, AnyObjective, NextToken, Objective
from hybridlm.optim.rules import RULES, Rule, UpdateRule
from hybridlm.optim.schedule import SCHEDULES, Cosine, Schedule, Shape


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Loss, gradients, optimizer and schedule.

    The constructor takes the words of earlier versions, too (name="muon", muon_lr=0.02, schedule="wsd"): see old.py.
    """

    lr: float = 3e-4
    """Peak learning rate, of all that has none of its own in the rule."""
    rule: Rule = AdamW()  # noqa: RUF009 (frozen)
    """How gradients become updates."""
    schedule: Schedule = Cosine()  # noqa: RUF009 (frozen)
    """The learning rate after the warmup."""
    objective: AnyObjective = NextToken()  # noqa: RUF009 (frozen)
    """What the model is to predict."""
    warmup_steps: int = 100
    """Steps of linear warmup from zero."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; recurrence parameters, norms, biases and embeddings have none."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: never."""
    accumulate: int = 1
    """Microbatches whose gradients are summed for one step; divides data.batch_size."""
    gather_once: bool | None = None
    """On a mesh with fsdp, weights of sublayers are put together once a step, not at each use: two bytes a number on
    every device, and fewer exchanges. Experts are not, tables over the vocabulary where their gradients are scattered
    once. For GPUs, whose loops are written out (model.unroll). None: on GPUs, where it takes at most a sixteenth of a
    device's memory."""
    scatter_once: bool | None = None
    """Where weights are gathered once, gradients of microbatches are summed whole on every device and scattered once a
    step, in the type of the weights, not in every microbatch: four bytes a number, of which fsdp would save its share.
    None: where what it would save is at most a sixteenth of a device's memory, with tables over the vocabulary, or
    without."""
    split_over_data: bool | None = None
    """On a mesh with data, each replica keeps and updates a share of parameters and moments, and weights are put
    together once a step: 12 bytes a number less of AdamW's, shared by so many devices, for as many bytes exchanged. Not
    with adapters, slices, or rules that do not update every number by itself, as Muon. None: on GPUs of one process."""
    offload: bool = False
    """Moments of the optimizer lie in the host's pinned memory between updates: devices have that much more room, and
    each step moves them there and back."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition (Chowdhery et al. 2022, PaLM, section 5)."""
    max_skipped: int = 10
    """Non-finite steps in a row, each skipped, after which the run goes back (run.max_rollbacks) or ends."""
    numbers: InitVar[Mapping[str, Any] | None] = None
    """What old.py remembers of rules and schedules that were chosen before; not compared, shown or stored."""

    OLD_WORDS: ClassVar[Mapping[str, Any]] = old.HINTS
    """Words of earlier versions, which have their places in the rule and the schedule, and their types."""
    BY_NAME: ClassVar[frozenset[str]] = old.BY_NAME
    """Words whose value may be the name of a class, for the constructor to build."""

    def __post_init__(self, numbers):
        object.__setattr__(self, "numbers", numbers)
        parts = (("rule", UpdateRule, RULES), ("schedule", Shape, SCHEDULES), ("objective", Objective, OBJECTIVES))
        for name, contract, known in parts:
            value, classes = getattr(self, name), ", ".join(f"{kind.__name__}()" for kind in known)
            fits = isinstance(value, contract) and not isinstance(value, type)
            require(fits, f"optim.{name} ({value!r}) must be one of {classes}")
        check_fields(self, "optim.")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optim.{name} ({value}) must be positive")
        for name in ("weight_decay", "warmup_steps", "z_loss"):
            require(getattr(self, name) >= 0, f"optim.{name} ({getattr(self, name)}) must not be negative")
        for name in ("accumulate", "max_skipped"):
            require(getattr(self, name) >= 1, f"optim.{name} ({getattr(self, name)}) must be at least 1")

    def __getattr__(self, word: str):
        """Words of earlier versions can be read, too: `optim.muon_lr`."""
        return old.read(self, word)


OptimConfig.__init__ = old.accepting(OptimConfig.__init__)  # type: ignore[method-assign]
OptimConfig.__annotations__["numbers"] = ClassVar[Any]  # for tyro, whose help would offer it as an option
