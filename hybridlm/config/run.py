# SPDX-License-Identifier: Apache-2.0
"""The run itself, and where its first parameters come from."""

import math
from dataclasses import dataclass, field

from hybridlm.errors import require
from hybridlm.fields import MOST, check_fields


@dataclass(frozen=True)
class RunConfig:
    """The run itself: its length, folder, and what it writes when."""

    steps: int = 1000
    """Optimizer steps."""
    seed: int = field(default=0, metadata={MOST: 2**63 - 1})
    """Seed of parameters and of the order of rows."""
    dir: str = ""
    """Folder of the run; empty: runs/NAME."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 500
    """Steps between evaluations; 0: only after the last step; -1: never."""
    eval_batches: int = 0
    """Validation batches an evaluation reads; 0: all."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end and on Ctrl-C; -1: never, not then either."""
    keep: int = 2
    """Checkpoints kept, newest first."""
    keep_every: int = 0
    """Checkpoints of multiples of so many steps are kept, too; 0: none on that account."""
    keep_best: int = 0
    """So many checkpoints of the lowest validation loss are kept, too; those of steps with an evaluation count."""
    from_step: int | None = None
    """Step of the checkpoint to go back to, once; later ones move to superseded/. 0: begins again; None: the newest."""
    sample_prompt: str = ""
    """Start of the text written at the end of the run."""
    sample_tokens: int = 0
    """Length of that text, tokens; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str = ""
    """Project of Weights & Biases to write to, or ENTITY/PROJECT; empty: none. WANDB_MODE=offline keeps it here."""
    report: bool = True
    """Write the run as a page, report.html, when it ends or stops."""
    inspect_every: int = 0
    """Steps between records of what each kind of block does (gradient, update, decays, attention), each at the cost of
    about a step; 0: none."""
    max_rollbacks: int = 3
    """Times that a run that diverges (optim.max_skipped) goes back to a good checkpoint and leaves out what it read
    since, before it is past the step at which it failed; 0: it ends at once."""
    spike_threshold: float = 0.0
    """Diverged is a run, too, whose loss is above the median of recent ones by so many median deviations; 0: it is
    not."""
    spike_window: int = 100
    """Steps whose losses the median is of."""
    spike_steps: int = 10
    """So many steps in a row have to be above it."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a jax.profiler trace; None: none."""
    watchdog: float = 600.0
    """Seconds without a finished step, or five times the longest step if that is more, after which the run ends with
    the stacks of its threads in a file, to be started again; 0: never. Ten times as long where it compiles or saves."""
    heartbeat: float = 30.0
    """Seconds without a sign of life after which a process of several counts as lost and the others end."""

    def __post_init__(self):
        check_fields(self, "run.")
        for name in ("steps", "log_every", "keep", "spike_steps"):
            require(getattr(self, name) >= 1, f"run.{name} ({getattr(self, name)}) must be at least 1")
        counts = ("eval_batches", "keep_every", "keep_best", "sample_tokens", "seed", "inspect_every", "max_rollbacks")
        for name in counts:
            require(getattr(self, name) >= 0, f"run.{name} ({getattr(self, name)}) must not be negative")
        for name in ("eval_every", "save_every"):
            require(getattr(self, name) >= -1, f"run.{name} ({getattr(self, name)}) must be -1, 0 or positive")
        k, window = self.spike_threshold, self.spike_window
        require(0 <= k < math.inf, f"run.spike_threshold ({k}) must be 0 (never) or a number of median deviations")
        require(3 <= window <= 10_000, f"run.spike_window ({window}) must be between 3 and 10000 steps")
        project = self.wandb.rpartition("/")[2]
        wrong = bool(self.wandb) and (not project or self.wandb.count("/") > 1 or set(project) & set(r"\\#?%:"))
        require(not wrong, f"run.wandb ({self.wandb}) must be PROJECT or ENTITY/PROJECT, without any of / \\ # ? % :")
        at = self.from_step
        require(at is None or at >= 0, f"run.from_step ({at}) must not be negative")
        every, saved = self.keep_every, self.save_every
        require(
            saved <= 0 or every % saved == 0,
            f"run.keep_every ({every}) must be a multiple of run.save_every ({saved}): no other checkpoints are there",
        )
        require(0 <= self.watchdog < math.inf, f"run.watchdog ({self.watchdog}) must be 0 (never) or seconds")
        require(1 <= self.heartbeat <= 3600, f"run.heartbeat ({self.heartbeat}) must be between 1 and 3600 seconds")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            require(
                1 <= first <= last,
                f"run.profile_steps ({first} {last}) must be a first step of at least 1 and a last step not before it",
            )


@dataclass(frozen=True)
class InitConfig:
    """Where the first parameters come from."""

    hf: str | None = None
    """Folder of a published checkpoint, which gives the model, too; None: drawn from run.seed; empty: to be given."""
    run: str | None = None
    """Folder of another run to take parameters from, alone: RUN, of its newest checkpoint, or RUN@STEP; None: none."""

    def __post_init__(self):
        check_fields(self, "init.")
        require(
            not (self.hf and self.run), f"init.hf ({self.hf}) and init.run ({self.run}) exclude each other: give one"
        )
