# SPDX-License-Identifier: Apache-2.0
"""Times and checks ops: `python -m pallas_kernels.bench OP [--impl a,b] [--case NAME] [--check] [--json FILE]`.

OP is a name in `pallas_kernels`. Without --case all timed cases run (on a CPU the smallest). The
forward row times the outputs alone, the forward + backward row outputs and the gradients of every array. Milliseconds
are medians over repetitions of many calls in flight, divided by their number. TFLOP/s counts what the maths needs (no
recomputation), GB/s every argument and result once. --check compares every test case (or the one of --case), gradients
included, with the float64 reference and exits with 1 if a tensor leaves the tolerance table.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import oracle, platform
from pallas_kernels.op import IMPLEMENTATIONS
from pallas_kernels.ops import OPS

PASSES = ("fwd", "fwd+bwd")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=tuple(OPS))
    parser.add_argument("--impl", default="xla", help="implementations, separated by commas (default: xla)")
    parser.add_argument("--case", help="name of one case; see pallas_kernels/ops/OP/cases.py")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--check", action="store_true", help="compare with the float64 reference instead of timing")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--plot", metavar="FILE", help="also draw the milliseconds to FILE (needs matplotlib)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent measuring each row (default: 1)")
    options = parser.parse_args(argv)
    implementations = options.impl.split(",")
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            parser.error(f"--impl {name!r} not one of {', '.join(IMPLEMENTATIONS)}")
    module = OPS[options.op].cases_module()
    if options.case and options.case not in module.CASES:
        parser.error(f"--case {options.case!r} not one of {', '.join(module.CASES)}")

    kind, here = platform.device_name(), platform.platform()
    print(f"{options.op} {options.dtype} on {kind} ({here}), jax {jax.__version__}")
    if options.check:
        selected = (
            [module.CASES[options.case]] if options.case else [*module.TEST_CASES, *getattr(module, "WIDTH_CASES", ())]
        )
        rows = [check(options.op, case, name, options.dtype) for case in selected for name in implementations]
    else:
        selected = [module.CASES[options.case]] if options.case else module.BENCH_CASES
        if not options.case and here == "cpu":
            selected = [case for case in module.BENCH_CASES if case.name == "tiny"]
            print("a CPU: only the case 'tiny' is timed, others by --case")
        rows = []
        for case in selected:
            rows += time_case(options.op, case, implementations, options.dtype, options.seconds)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"op": options.op, "dtype": options.dtype, "device": kind, "jax": jax.__version__,
                       "rows": rows}, file, indent=1)  # fmt: skip
    if options.plot and not options.check:
        plot(rows, options.op, options.plot)
    return 0 if all(row.get("passes", True) for row in rows) else 1


def check(op: str, case, implementation: str, dtype: str) -> dict:
    """Compares one case with the oracle; prints and returns its row."""
    module = OPS[op].cases_module()
    row = {"case": case.name, "impl": implementation, "dtype": dtype}
    try:
        with jax.default_matmul_precision("highest"):
            found = oracle.compare(op, module.make_inputs(case, dtype), dtype=dtype, implementation=implementation,
                                   **module.make_settings(case))  # fmt: skip
    except NotImplementedError as error:
        print(f"{case.name:24} {implementation:10} not served: {error}")
        return row | {"served": False}
    worst = max(found, key=lambda name: found[name][0] / found[name][1])
    passes = all(error <= limit for error, limit in found.values())
    print(f"{case.name:24} {implementation:10} {'ok  ' if passes else 'FAIL'} worst {worst} {found[worst][0]:.1e}"
          f" of {found[worst][1]:.0e}", flush=True)  # fmt: skip
    return row | {"served": True, "passes": passes, "errors": {name: error for name, (error, _) in found.items()}}


def time_case(op: str, case, implementations: list[str], dtype: str, seconds: float) -> list[dict]:
    """Times one case; prints and returns a row for each implementation and pass. xla is timed for its ratio anyway."""
    implementations = ["xla", *(name for name in implementations if name != "xla")]
    flops, (forward_bytes, gradient_bytes) = OPS[op].cases_module().count_flops(case), count_bytes(op, case, dtype)
    rows: list[dict] = []
    reference: dict = {}
    for implementation in implementations:
        for which in PASSES:
            row = {"case": case.name, "impl": implementation, "pass": which, "dtype": dtype}
            try:
                milliseconds = measure(*make_call(op, case, implementation, dtype, which), seconds)
            except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                print(f"{case.name:24} {implementation:10} {which:8} not served: {str(error).splitlines()[0][:150]}")
                rows.append(row | {"served": False})
                continue
            reference.setdefault(which, milliseconds if implementation == "xla" else None)
            factor = 1 if which == "fwd" else OPS[op].gradient_factor
            row |= rates(milliseconds, factor * flops, forward_bytes if which == "fwd" else gradient_bytes)
            row["ratio_to_xla"] = milliseconds / reference[which] if reference[which] else None
            rows.append(row)
            print_row(row)
    return rows


def rates(milliseconds: float, flops: float, n_bytes: float) -> dict:
    """Milliseconds with what they amount to, and the share of the roofline on a known device."""
    found = {"ms": milliseconds, "tflops": flops / milliseconds / 1e9, "gbs": n_bytes / milliseconds / 1e6}
    if peaks := platform.peaks():
        found["roofline"] = max(found["tflops"] / peaks.tflops, found["gbs"] / peaks.gbs)
    return found


def print_row(row: dict) -> None:
    share = f"{100 * row['roofline']:5.1f}% of roofline" if "roofline" in row else ""
    ratio = f"{row['ratio_to_xla']:6.2f} x xla" if row["ratio_to_xla"] else ""
    print(f"{row['case']:24} {row['impl']:10} {row['pass']:8} {row['ms']:10.3f} ms {row['tflops']:8.2f} TFLOP/s"
          f" {row['gbs']:8.1f} GB/s {ratio} {share}", flush=True)  # fmt: skip


def make_call(op: str, case, implementation: str, dtype: str, which: str) -> tuple[Callable, tuple]:
    """(jitted function, its arguments)."""
    module = OPS[op].cases_module()
    arrays, fixed = jax.device_put(oracle.split(op, module.make_inputs(case, dtype)))
    settings = {**module.make_settings(case), "implementation": implementation}

    def forward(arrays, fixed):
        return oracle.call(op, {**arrays, **fixed}, **settings)

    if which == "fwd":
        return jax.jit(forward), (arrays, fixed)
    shapes = jax.eval_shape(forward, arrays, fixed)
    rng = np.random.default_rng(1)
    cotangents = tuple(jnp.asarray(rng.standard_normal(s.shape, np.float32), s.dtype) for s in shapes)

    def both(arrays, fixed, cotangents):
        out, pull = jax.vjp(lambda arrays: forward(arrays, fixed), arrays)
        return out, pull(cotangents)

    return jax.jit(both), (arrays, fixed, cotangents)


def measure(function, args: tuple, seconds: float) -> float:
    """Median milliseconds a call. Calls are queued and waited for together, so that launching does not count."""
    jax.block_until_ready(function(*args))

    def run(n_calls: int) -> float:
        start = time.perf_counter()
        for _ in range(n_calls):
            out = function(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / n_calls

    once = min(run(1) for _ in range(2))
    n_repetitions = 7
    n_calls = int(min(200, max(1, seconds / n_repetitions / once)))
    return 1e3 * statistics.median(run(n_calls) for _ in range(n_repetitions if once < seconds else 3))


def count_bytes(op: str, case, dtype: str) -> tuple[int, int]:
    """Bytes of (arguments and outputs, the same with cotangents, arguments again and gradients)."""
    module = OPS[op].cases_module()
    arrays, fixed = oracle.split(op, module.make_inputs(case, dtype))
    shapes = jax.eval_shape(lambda a, f: oracle.call(op, {**a, **f}, **module.make_settings(case)), arrays, fixed)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return size(arrays) + size(fixed) + size(shapes), 3 * size(arrays) + 2 * size(fixed) + 2 * size(shapes)


def plot(rows: list[dict], op: str, path: str) -> None:
    """Bars of milliseconds, by case and pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "ms" in row]
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(timed) + 1), layout="constrained")
    axis.barh([f"{row['case']} {row['pass']} {row['impl']}" for row in timed], [row["ms"] for row in timed])
    axis.set_xlabel("milliseconds")
    axis.set_title(f"pallas_kernels.{op}")
    axis.invert_yaxis()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
