# SPDX-License-Identifier: Apache-2.0
"""What became of a run, as its records, its checkpoints and its lock tell."""

from collections.abc import Sequence
from typing import NamedTuple

ENDINGS = ("stop", "failed", "gave_up", "end")
"""Kinds of records that are the last of a start."""


class State(NamedTuple):
    """A word, and what can be said beside it."""

    word: str
    """`running`, `complete`, `stopped`, `failed`; a survey has `broken`, too."""
    why: str


def state_of(asked: int | None, records: Sequence[dict], checkpoints: Sequence[int], holder: str | None) -> State:
    """The state of a run that asks for so many steps. holder: who uses its folder now.

    A start that ended without a record, as all did before there were such records, was stopped where everything is
    saved, and failed where steps were lost.
    """
    if holder is not None:
        return State("running", holder)
    ended = max((r["step"] for r in records if r["kind"] == "end"), default=-1)
    saved = checkpoints[-1] if checkpoints else 0
    if asked is not None and not records and checkpoints and saved >= asked:
        return State("complete", "")  # made of another run, as quantised ones are
    if asked is not None and ended >= asked and (saved >= asked or not checkpoints):
        return State("complete", "" if checkpoints else "no checkpoint")
    newest = f"the newest checkpoint is of step {saved}" if checkpoints else "no checkpoint"
    last = _last_ending(records)
    if last is not None and last["kind"] == "stop":
        return State("stopped", f"at step {last['step']}, {newest}")
    if last is not None and last["kind"] in ("failed", "gave_up"):
        return State("failed", " ".join(str(last.get("why")).split())[:300])
    reached = max((r["step"] for r in records if r["kind"] in ("train", "val")), default=0)
    if reached <= saved or (last is not None and last["kind"] == "end"):
        return State("stopped", f"at step {max(reached, saved)}, {newest}" if reached or saved else "before a step")
    return State("failed", f"it ended without a word after step {reached}, {newest}")


def _last_ending(records: Sequence[dict]) -> dict | None:
    """How the last start ended, where it said so."""
    for record in reversed(records):
        if record["kind"] in ENDINGS:
            return record
        if record["kind"] == "start":
            return None
    return None
