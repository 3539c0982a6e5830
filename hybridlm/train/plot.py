# SPDX-License-Identifier: Apache-2.0
"""loss.png: training and validation loss of a run in bits per byte, and the bigram baseline."""

import math
from pathlib import Path

import numpy as np

from hybridlm import storage


def plot_loss(records: list[dict], bigram: float | None, title: str, path: Path) -> None:
    """Draws the records of a metrics.jsonl; bigram: bits per byte of the baseline on the validation text, if known.

    A record without a finite number, as of an interval in which all steps were skipped, is a gap. Steps that the run
    went back to, skipped or was far above its loss in are marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, val = _curve(records, "train"), _curve(records, "val")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*train.T, color="tab:blue", linewidth=1.2, label="train")
    if len(val):
        axes.plot(*val.T, color="tab:orange", linewidth=1.5, marker="o", markersize=4, label="validation")
        for name in sets_of(records):
            of_set = _curve(records, "val", f"bits_per_byte/{name}")
            axes.plot(*of_set.T, linewidth=0.8, marker=".", markersize=3, label=name)
        axes.annotate(f"{val[-1, 1]:.3f}", val[-1], textcoords="offset points", xytext=(0, -14), ha="right")
    if bigram is not None:
        axes.axhline(bigram, color="gray", linestyle="--", linewidth=1, label=f"byte bigram {bigram:.3f}")
    for i, step in enumerate(sorted({r["step"] for r in records if r["kind"] == "rollback"})):
        axes.axvline(step, color="tab:red", linestyle=":", linewidth=1, label=None if i else "went back here")
    bad = sorted({r["step"] for r in records if r["kind"] in ("skipped", "spike")})
    if bad:
        axes.plot(
            bad,
            [0.01] * len(bad),
            "|",
            color="tab:red",
            transform=axes.get_xaxis_transform(),
            label="skipped or far above",
        )
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    if len(train):
        axes.set_ylim(0, 1.05 * max(train[:, 1].max(), bigram or 0.0))
    axes.grid(alpha=0.3)
    axes.legend()
    with storage.writing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def sets_of(records: list[dict]) -> list[str]:
    """Names of the held-out sets that records of evaluations tell apart."""
    names = (key for r in records if r["kind"] == "val" for key in r if key.startswith("bits_per_byte/"))
    return [key.partition("/")[2] for key in dict.fromkeys(names)]


def _curve(records: list[dict], kind: str, key: str = "bits_per_byte") -> np.ndarray:
    """(step, bits per byte) of the records of a kind: [records, 2]."""
    pairs = [(r["step"], r.get(key)) for r in records if r["kind"] == kind]
    numbers = [(step, y) for step, y in pairs if isinstance(y, int | float) and math.isfinite(y)]
    return np.array(numbers, float).reshape(-1, 2)
