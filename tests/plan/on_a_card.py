# SPDX-License-Identifier: Apache-2.0
"""Plans for one GPU against the GPU: `python -m tests.plan.on_a_card --plans FOLDER [NAME ...]` trains a few steps of
each config on random rows and prints the measured peak of memory and time of a step beside what its plan says.

FOLDER holds `NAME.json`, as `hybridlm plan OPTIONS --topology h100:1 --json FOLDER/NAME.json` writes it, with the
options of RUNS, on any machine. Each config has a process of its own: a device tells the peak of a process alone.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

DOCUMENTS = 5
"""In a row."""
RUNS = {
    "granite4_h_3": (
        "--config", "granite4_h:tiny", "--model.pattern=MEME*E", "--data.batch_size=8", "--model.remat=kernels",
    ),
    "hybrid_1b": ("--config", "hybrid_1b"),
    "transformer_1b": ("--config", "transformer_1b"),
    "mamba2_1b": ("--config", "mamba2_1b"),
}  # fmt: skip
"""Name -> options of the plan and of the run. The first is a cut of a published model with experts: 3 of Granite 4.0 H
tiny's 40 layers, one of them attention, each followed by 64 experts, 6 a token."""


def main(words: list[str] | None = None) -> int:
    """0: all that was asked for was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; none: all")
    parser.add_argument("--plans", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=8, help="timed, after two that are not (8)")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which a config is given up (4)")
    parser.add_argument("--here", action="store_true", help="in this process, one config")
    args = parser.parse_args(words)
    names = args.names or list(RUNS)
    if args.here:
        print(json.dumps(measured(RUNS[names[0]], args.steps)), flush=True)
        return 0
    lost = 0
    for name in names:
        command = [sys.executable, "-m", "tests.plan.on_a_card", name, "--here", "--plans", str(args.plans)]
        try:
            done = subprocess.run(
                [*command, "--steps", str(args.steps)], stdout=subprocess.PIPE, timeout=60 * args.minutes, check=True
            )
        except subprocess.SubprocessError as error:
            print(f"{name}: not measured: {error}", flush=True)
            lost += 1
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps({"name": name} | against(json.loads((args.plans / f"{name}.json").read_text()), found)))
        sys.stdout.flush()
    return min(lost, 1)


def measured(options: tuple[str, ...], steps: int) -> dict:
    """Of the default device: bytes at the peak, as the allocator and the compiler say, and seconds of a step."""
    import jax
    import numpy as np

    from hybridlm.config.find import load_config
    from hybridlm.sharding import make_mesh
    from hybridlm.train.step import make_program

    config = load_config(options[1], list(options[2:]))
    device = jax.devices()[0]
    mesh = make_mesh(config.mesh, [device])
    with jax.set_mesh(mesh):
        program = make_program(config, mesh)
        tell("imported")
        state = program.init()
        batch = {name: jax.device_put(rows, program.batch_sharding) for name, rows in random_batch(config).items()}
        jax.block_until_ready((state, batch))
        tell("initialised")
        began, before = time.perf_counter(), device.memory_stats() or {}
        lowered = program.train_step.lower(program.state_like, program.batch_like(config.data))
        tell("lowered")
        step = lowered.compile()
        compiled = time.perf_counter() - began
        tell("compiled")
        seconds, losses = [], []
        for _ in range(steps + 2):
            began = time.perf_counter()
            state, metrics = step(state, batch, program.train_step.lengths)
            losses.append(float(metrics["loss"].value()))
            seconds.append(time.perf_counter() - began)
            tell(f"step of {seconds[-1]:.3f} s, peak {(device.memory_stats() or {}).get('peak_bytes_in_use')}")
    said, after = step.memory_analysis(), device.memory_stats() or {}
    return {
        "device": device.device_kind, "jax": jax.__version__, "compile_seconds": compiled,
        "peak": after.get("peak_bytes_in_use"), "peak_before_steps": before.get("peak_bytes_in_use"),
        "limit": after.get("bytes_limit"), "peak_said_here": said.peak_memory_in_bytes,
        "temporaries_said_here": said.temp_size_in_bytes, "arguments_said_here": said.argument_size_in_bytes,
        "seconds": float(np.median(seconds[2:])), "all_seconds": seconds, "losses": losses,
    }  # fmt: skip


def tell(what: str) -> None:
    """A line on stderr, with the CPU seconds of this process: how far a run came that was cut."""
    print(f"{time.strftime('%H:%M:%S')} {what}, {time.process_time():.0f} s of CPU", file=sys.stderr, flush=True)


def random_batch(config) -> dict:
    """Rows of documents of the same length, of random tokens."""
    import numpy as np

    rows, length = config.data.batch_size, config.data.seq_len
    places = np.arange(length)
    of, size = np.minimum(places // (length // DOCUMENTS), DOCUMENTS - 1), length // DOCUMENTS
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=(rows, length + 1))
    made = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": of + 1, "positions": places - of * size}
    return {name: np.ascontiguousarray(np.broadcast_to(x, (rows, length)), np.int32) for name, x in made.items()}


def against(plan: dict, found: dict) -> dict:
    """Planned beside measured: GB, milliseconds, and whether the plan kept what it says."""
    peak, bounds = plan["compiled"]["memory"]["peak"], plan["cost"]["seconds"]
    return {
        "planned_GB": round(peak / 1e9, 2), "measured_GB": round(found["peak"] / 1e9, 2),
        "memory": round(peak / found["peak"], 4), "within_10%": abs(peak / found["peak"] - 1) <= 0.1,
        "planned_ms": [round(1e3 * t, 1) for t in bounds], "measured_ms": round(1e3 * found["seconds"], 1),
        "lower_end_holds": bounds[0] <= found["seconds"], "inside": bounds[0] <= found["seconds"] <= bounds[1],
        **{name: found[name] for name in found if name not in ("peak", "seconds")},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
