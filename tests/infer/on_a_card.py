# SPDX-License-Identifier: Apache-2.0
"""All that is asked of a GPU about writing and reading, within minutes: `python tests/infer/on_a_card.py --out FOLDER`.

Stages in the order of what is asked first: hybrid_1b, mamba2_1b and transformer_1b at batch 1 and 64; each at the batch
that fills the card behind 131,072 tokens; writing while the process is stopped; a trace of what the card does between
tokens; peers; reading; long contexts; hybrid_8b reading 262,144 tokens. A stage begins only while the minutes last, and
each adds to FOLDER/bench.json, so a second call goes on where the first one ended. Programs that were compiled are kept
in FOLDER/programs, or where JAX_COMPILATION_CACHE_DIR says.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("hybrid_1b", "mamba2_1b", "transformer_1b")
SIDE = ("--config", *NAMES)
LONG = ("--tokens", "512", "--rounds", "3")
"""What a call costs the host is not seen behind the first of several blocks of tokens."""
STAGES = {
    "batches": ("decode", *SIDE, "--context", "2048", "--batch", "1", "64", *LONG),
    "fill": ("decode", *SIDE, "--context", "131072", "--fill", "--tokens", "512", "--rounds", "1"),
    "stopped": (),
    "trace": (),
    "peers": ("decode", "--config", "mamba2_1b", "--context", "2048", "--batch", "1", "64", "--peers", "--rounds", "1"),
    "reading": ("prefill", *SIDE, "--context", "2048", "32768", "--batch", "1", "--rounds", "2"),
    "long": ("decode", *SIDE, "--context", "32768", "131072", "1048576", "--batch", "1", *LONG),
    "large": ("prefill", "--config", "hybrid_8b", "--context", "262144", "--batch", "1", "--rounds", "1"),
    "int8": ("prefill", "--config", "hybrid_8b", "--context", "262144", "--batch", "1", "--rounds", "1",
             "--quantize", "int8"),
    "int8_decode": ("decode", "--config", "hybrid_8b", "--context", "2048", "--batch", "1", "--rounds", "3",
                    "--quantize", "int8"),
}  # fmt: skip
"""Name -> words of `hybridlm bench`."""
IN_TRACES = "--xla_enable_command_buffers_during_profiling=true"
"""Else a traced program launches each kernel by itself."""


def main(words: list[str] | None = None) -> int:
    """Runs the stages; the exit code is that of the worst."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no stage begins (8)")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--trace-config", default="hybrid_1b")
    args = parser.parse_args(words)
    began = time.monotonic()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {IN_TRACES}".strip()
    if "peers" in args.stages:  # PyTorch wants memory of the same card
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args.out.mkdir(parents=True, exist_ok=True)
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(args.out / "programs"))
    from hybridlm.cli import main as hybridlm

    worst = 0
    for name in args.stages:
        spent = (time.monotonic() - began) / 60
        if spent > args.minutes:
            print(f"{name}: left for the next call", flush=True)
            continue
        print(f"\n{name}, after {spent:.1f} minutes", flush=True)
        if name in ("trace", "stopped"):
            (traced if name == "trace" else stopped)(args.trace_config, args.out)
            continue
        bench = args.out / (
            "bench_int8" if "--quantize" in STAGES[name] else "bench"
        )  # a file is of one kind of models
        files = ["--json", f"{bench}.json", "--html", f"{bench}.html"]
        worst = max(worst, hybridlm(["bench", *STAGES[name], *files]))
    return worst


def traced(name: str, out: Path, context: int = 2048, n_new: int = 64) -> dict:
    """What a device does while tokens are written, as its trace says: the share of the time in which a kernel runs, and
    the longest time in which none does. Written to trace.json; nothing where the device traces no kernels."""
    import jax

    from hybridlm.config.find import load_config
    from hybridlm.infer.bench_models import Ours, filled
    from hybridlm.model.decoding import Sampling
    from hybridlm.plan import xplane

    with Ours(name, load_config(name).model).opened() as opened:
        writer = opened.writer
        jax.block_until_ready(writer.write(filled(writer, 1, context, n_new), n_new, Sampling())[0])  # compiles
        state = filled(writer, 1, context, n_new)
        jax.block_until_ready(state.cache)
        with jax.profiler.trace(str(out / "trace")):
            jax.block_until_ready(writer.write(state, n_new, Sampling())[0])
    path = xplane.find(out / "trace")
    events = [] if path is None else xplane.read(path)[0]
    found = {"config": name, "tokens": n_new, **between(events)}
    (out / "trace.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)
    return found


STOPS = """
import os, signal, sys, time
pid, seconds = int(sys.argv[1]), float(sys.argv[2])
sys.stdin.readline()
os.kill(pid, signal.SIGSTOP)
time.sleep(seconds)
os.kill(pid, signal.SIGCONT)
"""


def stopped(name: str, out: Path, n_new: int = 2048) -> dict:
    """Whether tokens are written without the host: one program writes n_new of them, once left alone and once with all
    threads of this process stopped, for twice as long, as soon as it has begun. Where the device needs the host, what
    is left takes its time when the process goes on. Written to stopped.json."""
    import jax

    from hybridlm.config.find import load_config
    from hybridlm.infer.bench_models import Ours, filled
    from hybridlm.model import decoding
    from hybridlm.model.decoding import Sampling

    decoding.BLOCK, found = n_new, {"config": name, "tokens": n_new}
    with Ours(name, load_config(name).model).opened() as opened:
        for turn in ("compiles", "alone", "stopped"):
            state = filled(opened.writer, 1, 2 * n_new, n_new)
            jax.block_until_ready(state.cache)
            seconds = 2 * found.get("alone", 0.0)
            command = [sys.executable, "-c", STOPS, str(os.getpid()), str(seconds)]
            helper = subprocess.Popen(command, stdin=subprocess.PIPE, text=True) if turn == "stopped" else None
            began, busy = time.perf_counter(), time.process_time()
            written, _ = opened.writer.write(state, n_new, Sampling())
            if helper is not None:
                helper.communicate("go\n")  # this process is stopped within
                found["stopped for"] = seconds
            jax.block_until_ready(written)
            found[turn], found[f"{turn}, of the CPU"] = time.perf_counter() - began, time.process_time() - busy
    (out / "stopped.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)
    return found


def between(events) -> dict:
    """Of kernels (start and duration in nanoseconds): busy share, gaps."""
    if not events:
        return {"kernels": 0}
    end, busy, gaps = 0.0, 0.0, []
    ordered = sorted(events, key=lambda event: event.start)
    first = end = ordered[0].start
    for event in ordered:
        if event.start > end:
            gaps.append(event.start - end)
        stop = event.start + event.duration
        busy += max(0.0, stop - max(end, event.start))
        end = max(end, stop)
    gaps.sort(reverse=True)
    return {
        "kernels": len(ordered), "seconds": (end - first) / 1e9, "busy": busy / (end - first),
        "longest_gaps_us": [round(gap / 1e3, 1) for gap in gaps[:5]],
    }  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
