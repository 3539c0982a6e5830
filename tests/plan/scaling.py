# SPDX-License-Identifier: Apache-2.0
"""Compiled plans of `hybrid_1b` on v5p over chips and context: `python -m tests.plan.scaling [NAME ...]` compiles the
points that docs/results/scaling.jsonl has no line of, minutes each, and draws scaling.svg beside it; needs libtpu.

Each point is one call of `hybridlm plan`, whose words are in its line; a call that is interrupted leaves no line.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from hybridlm.page import as_svg
from hybridlm.study.figures import Line, Panel, draw

FOLDER = Path(__file__).parents[2] / "docs" / "results"
FILE, DRAWING = FOLDER / "scaling.jsonl", FOLDER / "scaling.svg"
MINUTES = 40
"""After which a point is given up."""
MEMORY_GB = 102
"""Of a v5p: 95 GiB."""


def point(topology: str, rows: int, mesh: str, *more: str) -> tuple[str, ...]:
    """Words of a plan. mesh: "data=8 fsdp=64", the other axes are 1."""
    sizes = {"data": "1", "fsdp": "1"} | dict(word.split("=") for word in mesh.split())
    axes = (f"--mesh.{name}={size}" for name, size in sizes.items())
    common = ("--config", "hybrid_1b", "--model.remat=kernels", "--topology", topology)
    defaults = {} if any("accumulate" in word for word in more) else {"--optim.accumulate": 1}
    return (*common, f"--data.batch_size={rows}", *axes, *(f"{k}={v}" for k, v in defaults.items()), *more)


POINTS = {
    "64": point("v5p:4x4x4", 256, "fsdp=64"),
    "weak 8": point("v5p:2x2x2", 32, "fsdp=8"),
    "weak 512": point("v5p:8x8x8", 2048, "data=8 fsdp=64"),
    "weak 6144": point("v5p:16x16x24", 24_576, "data=96 fsdp=64"),
    "context 1048576": point("v5p:4x4x4", 1, "context=64", "--data.seq_len=1048576"),
    "context 65536": point("v5p:4x4x4", 16, "fsdp=16 context=4", "--data.seq_len=65536"),
    "strong 8": point("v5p:2x2x2", 256, "fsdp=8", "--optim.accumulate=8"),
    "strong 256": point("v5p:4x8x8", 256, "data=4 fsdp=64"),
    "strong 1024": point("v5p:8x8x16", 256, "data=4 fsdp=64 tensor=4"),
    "context 16384": point("v5p:4x4x4", 64, "fsdp=64", "--data.seq_len=16384"),
    "context 262144": point("v5p:4x4x4", 4, "fsdp=4 context=16", "--data.seq_len=262144"),
    "weak 4096": point("v5p:16x16x16", 16_384, "data=64 fsdp=64"),
}
"""Name -> words of `hybridlm plan`. "64" is a point of all three curves: a million tokens a step, as all but those that
scale weakly."""
CURVES = {
    "weak": ("weak 8", "64", "weak 512", "weak 4096", "weak 6144"),
    "strong": ("strong 8", "64", "strong 256", "strong 1024"),
    "context": ("64", "context 16384", "context 65536", "context 262144", "context 1048576"),
}


def main(words: list[str] | None = None) -> int:
    """0: every point that was asked for has a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(POINTS)}; none: all")
    parser.add_argument("--draw", action="store_true", help="compile nothing")
    names = (args := parser.parse_args(words)).names or list(POINTS)
    missing = [name for name in names if name not in read()]
    for name in () if args.draw else missing:
        if found := compiled(POINTS[name]):
            with FILE.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name} | found) + "\n")
            print(name, json.dumps(found), flush=True)
    DRAWING.write_text(drawn(read()) + "\n", encoding="utf-8")
    print("\n".join(rows(read())))
    return int(any(name not in read() for name in names))


def read() -> dict[str, dict]:
    """The points that are known, by name; of those whose words are others now nothing is."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    kept = (json.loads(line) for line in lines)
    return {one["name"]: one for one in kept if one["words"] == list(POINTS.get(one["name"], ()))}


def compiled(words: tuple[str, ...]) -> dict | None:
    """What a plan says; None, and why on stderr, where it says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "hybridlm", "plan", "--fit", "0", *words, "--json", str(told)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=True)
            plan = json.loads(told.read_text())
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            print(f"{' '.join(words)}: {error} {getattr(error, 'stderr', '') or ''}", file=sys.stderr, flush=True)
            return None
    if "compiled" not in plan:
        print(f"{' '.join(words)}: {plan['refused']}", file=sys.stderr, flush=True)
        return {"words": list(words), "refused": plan["refused"] or done.stdout[-300:]}
    exchanged = sum(row["exchanged"] for row in plan["bounds"]["rows"].values())
    counted, found = plan["counted"], plan["compiled"]
    return {
        "words": list(words), "devices": counted["devices"], "tokens": counted["tokens"],
        "tokens_a_row": counted["tokens"] // counted["rows"], "peak_bytes": found["memory"]["peak"],
        "exchanged_bytes": exchanged, "seconds": plan["cost"]["seconds"], "mfu": plan["cost"]["mfu"],
        "compile_seconds": round(found["seconds"], 1), "compile_cpu_seconds": round(found["cpu_seconds"], 1),
    }  # fmt: skip


def rows(known: dict[str, dict]) -> list[str]:
    """Lines of a table, curve by curve; of a point that does not fit why."""
    made = ["| curve | chips | rows x tokens | mesh | peak, GB | sent, GB | step, ms | MFU |", "|" + " --- |" * 8]
    for what, names in CURVES.items():
        for name in names:
            if (one := known.get(name)) is None:
                continue
            words = dict(word.lstrip("-").split("=") for word in one["words"] if "=" in word)
            mesh = [f"{k[5:]} {n}" for k, n in words.items() if k.startswith("mesh.") and n != "1"]
            mesh += [f"{n} microbatches" for k, n in words.items() if k == "optim.accumulate" and n != "1"]
            shape = f"{int(words['data.batch_size']):,} x {int(words.get('data.seq_len', 4096)):,}"
            cells = [one["refused"], "", "", ""] if "refused" in one else [
                f"{one['peak_bytes'] / 1e9:.1f}", f"{one['exchanged_bytes'] / 1e9:.1f}",
                " to ".join(f"{1e3 * t:,.0f}" for t in one["seconds"]),
                " to ".join(f"{100 * m:.0f}" for m in reversed(one["mfu"])) + "%",
            ]  # fmt: skip
            chips = one["words"][one["words"].index("--topology") + 1]
            made.append("| " + " | ".join([what, chips, shape, ", ".join(mesh), *cells]) + " |")
    return made


def drawn(known: dict[str, dict]) -> str:
    """MFU between its ends by chips, weak and strong, and by tokens a row, of curves with two points; memory below. All
    axes of one quantity are the same, from nothing to all of it."""
    panels, places = [], []
    for what, x in (("weak", "devices"), ("strong", "devices"), ("context", "tokens_a_row")):
        points = [known[name] for name in CURVES[what] if "seconds" in known.get(name, {})]
        if len(points) < 2 and panels:  # no curve yet
            continue
        places.append(at := sorted(one[x] for one in points))
        points.sort(key=lambda one: one[x])
        lines = [
            Line(at, [100 * one["mfu"][end] for one in points], label, n=end, dots=True)
            for end, label in enumerate(("exchanges hidden", "nothing hidden"))
        ]
        memory = [Line(at, [one["peak_bytes"] / 1e9 for one in points], "peak memory", n=2, dots=True)]
        title = {"weak": "chips, 4 rows each", "strong": "chips, 256 rows in all", "context": "tokens a row, 64 chips"}
        panels.append(
            (Panel(title[what], "MFU at peaks, %", lines, log=True), Panel(title[what], "GB", memory, log=True))
        )
    figure = draw([above for above, _ in panels] + [below for _, below in panels], "hybrid_1b on v5p: compiled plans")
    tops = [100] * len(panels) + [MEMORY_GB] * len(panels)
    for axes, at, top in zip(figure.axes, places * 2, tops, strict=False):
        far = [2 * n <= after for n, after in itertools.pairwise(at)] + [True]  # others' labels would touch
        axes.set_xticks(at, [f"{n:,}" if alone else "" for n, alone in zip(at, far, strict=True)])
        axes.minorticks_off()
        axes.set_ylim(0, top)
    return as_svg(figure)


if __name__ == "__main__":
    sys.exit(main())
