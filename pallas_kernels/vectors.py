# SPDX-License-Identifier: Apache-2.0
"""Checks ops against numbers of published runs: `python -m pallas_kernels.vectors FOLDER [--implementation xla]`.

Each .npz file of the folder is one call. `in_X` are its inputs, `out_Y` its outputs and final states, `w_Y` weights of
the loss sum(out_Y * w_Y) over all Y that have such, `grad_X` the loss's gradients; `meta` is JSON text with the op's
name and its options. segment_ids count documents from 0.

Prints each file's worst error, of outputs and of gradients: the largest difference over the largest number of that
array (of a gradient: over a hundredth of the largest gradient, if that is more). Exits with 1 if one leaves the
tolerance or nothing was compared, with 2 for arguments that cannot be. A file of an op that is not here is one line.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import enable_x64
from pallas_kernels.op import IMPLEMENTATIONS
from pallas_kernels.oracle import SMALL_GRADIENT
from pallas_kernels.published import ANGLES, FUNCTIONS, LOOSE

TOLERANCES = {"float32": (1e-5, 1e-4), "float64": (1e-6, 1e-6)}
"""dtype -> (of outputs, of gradients); float64 is as exact as the stored numbers are."""

LOOSE_TOLERANCES = (1e-4, 5e-4)
"""In float32 of ops that react to rounding: names of `pallas_kernels.published.LOOSE`."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.vectors", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of .npz files")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="xla", help="default: xla")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32", help="default: float32")
    parser.add_argument("--only", metavar="GLOB", default="*", help="files to take, as 'kda-*' (default: all)")
    options = parser.parse_args(argv)
    paths = sorted(options.folder.glob(f"{options.only}.npz"))
    if not paths:
        parser.error(f"folder ({str(options.folder)!r}) has no files {options.only}.npz")
    results = [check(path, options.implementation, options.dtype) for path in paths]
    compared, failed = (results.count(passes) for passes in (True, False))
    print(f"{compared} of {len(paths)} files within tolerance, {failed} not, {results.count(None)} not compared")
    return 0 if compared and not failed else 1


def check(path: Path, implementation: str, dtype: str = "float32") -> bool | None:
    """Prints a file's line; returns whether it is within tolerance, None if it could not be compared."""
    try:
        name, kinds = compare(path, implementation, dtype)
    except NotImplementedError as error:
        print(f"{path.stem:40} not compared: {error}", flush=True)
        return None
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        print(f"{path.stem:40} FAIL {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return False
    limits = tolerances(name, dtype)
    line, passes = [], True
    for kind, limit in zip(("outputs", "gradients"), limits, strict=True):
        if found := kinds[kind]:
            worst = max(found, key=lambda name: found[name])
            line.append(f"{kind} {found[worst]:.1e} of {limit:.0e} ({worst})")
            passes &= found[worst] <= limit
    print(f"{path.stem:40} {'ok  ' if passes else 'FAIL'} {', '.join(line)}", flush=True)
    return passes


def tolerances(name: str, dtype: str) -> tuple[float, float]:
    """Of the op's outputs and gradients."""
    return LOOSE_TOLERANCES if dtype == "float32" and name in LOOSE else TOLERANCES[dtype]


def compare(path: Path, implementation: str, dtype: str) -> tuple[str, dict[str, dict[str, float]]]:
    """(op, `errors`) of one file; raises what `evaluate` raises."""
    name, *found = evaluate(path, implementation, dtype)
    return name, errors(*found)


def errors(out: dict, grads: dict, parts: dict) -> dict[str, dict[str, float]]:
    """{"outputs": error by name, "gradients": error by name} of what `evaluate` gives."""
    floor = SMALL_GRADIENT * max((np.abs(array).max(initial=0) for array in parts["grad_"].values()), default=0)
    return {
        "outputs": {key: _error(out[key], array, angle=key in ANGLES) for key, array in parts["out_"].items()},
        "gradients": {f"d{key}": _error(grads[key], array, floor=floor) for key, array in parts["grad_"].items()},
    }


def evaluate(path: Path, implementation: str, dtype: str, compiler_options: dict | None = None) -> tuple:
    """(op, outputs, gradients, the file's arrays by prefix), each by name.

    Raises NotImplementedError for an op or a call that is not served, ValueError for a file whose outputs are others
    than the op's, and what reading raises.
    """
    with np.load(path, allow_pickle=False) as file:
        data = {key: file[key] for key in file.files}
    meta = json.loads(str(data.pop("meta")))
    name = meta["op"]
    if name not in FUNCTIONS:
        raise NotImplementedError(f"op ({name!r}) is not one of pallas_kernels.published")
    parts = {
        prefix: {key[len(prefix) :]: array for key, array in data.items() if key.startswith(prefix)}
        for prefix in ("in_", "out_", "w_", "grad_")
    }
    with enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        out, grads = _run(name, parts, meta["options"], implementation, dtype, compiler_options)
    if missing := parts["out_"].keys() - out.keys():
        raise ValueError(f"outputs ({', '.join(sorted(missing))}) of the file are not of the op: {', '.join(out)}")
    if missing := parts["grad_"].keys() - grads.keys():
        raise ValueError(f"gradients ({', '.join(sorted(missing))}) of the file are of no floating-point input")
    return name, out, grads, parts


def _run(name: str, parts: dict, options: dict, implementation: str, dtype: str, compiler_options) -> tuple[dict, dict]:
    """(outputs, gradients), by name."""
    arrays = {k: jnp.asarray(a, dtype) for k, a in parts["in_"].items() if a.dtype.kind == "f"}
    fixed = {k: jnp.asarray(a, jnp.int32) for k, a in parts["in_"].items() if a.dtype.kind != "f"}
    if "segment_ids" in fixed:
        fixed["segment_ids"] += 1  # 0 is padding here
    weights = {k: jnp.asarray(w, dtype) for k, w in parts["w_"].items()}

    def loss(arrays):
        out = FUNCTIONS[name]({**arrays, **fixed}, options, implementation)
        return sum(jnp.sum(out[key] * weight) for key, weight in weights.items()), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=compiler_options)(arrays)
    return jax.tree.map(np.asarray, (out, grads))


def _error(actual, expected, *, floor: float = 0.0, angle: bool = False) -> float:
    """Largest difference over the largest number, or over `floor` if more; inf where not finite or of another shape."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = actual - expected
    if angle:
        difference = np.remainder(difference + np.pi, 2 * np.pi) - np.pi
    scale = max(np.abs(expected).max(initial=0), floor)
    worst = np.abs(difference).max(initial=0)
    return float(worst / scale) if scale else (float("inf") if worst else 0.0)


if __name__ == "__main__":
    sys.exit(main())
