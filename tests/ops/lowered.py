# SPDX-License-Identifier: Apache-2.0
"""Writes the programs that the kernels lower to: `python -m tests.ops.lowered OUT [--op OP] [--platform gpu|tpu]`.

A change that is to leave the kernels as they are leaves this text as it is. Run it in a checkout of each of the two
states, from its root, with the same interpreter, and compare:

    python -m tests.ops.lowered /tmp/before        # in the one checkout
    python -m tests.ops.lowered /tmp/after         # in the other one
    diff -rq /tmp/before /tmp/after

One file a call holds the StableHLO of the outputs alone and that of outputs and gradients, and the Mosaic modules
within them, decoded; both without source locations. Kernel names, grids, sizes and compiler parameters stay in.
`hashes.txt` has a line a file. A call that the kernel refuses is a file with the reason.

Nothing is compiled and no accelerator is asked for. TPU programs need libtpu and are lowered for a described v5e, v5p
and v6e, the small shapes for v5p alone; GPU programs (JAX 0.11) for Hopper, of 132 multiprocessors.
"""

import argparse
import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir  # the context in which JAX itself reads serialised kernels
from jax._src.lib import tpu
from jaxlib.mlir import ir

from pallas_kernels import oracle

OPS = ("ssd", "attention", "causal_conv1d", "grouped_dot")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
EVERY_CASE = "v5p"  # the generation that small shapes are lowered for: two cores share a grid
LOWERING_PLATFORM = {"gpu": "cuda", "tpu": "tpu"}
FEW_QUERIES = 16  # up to which attention is lowered with a stacked cache, too


def assume_platform(platform: str):
    """The context in which calls are traced for a platform that is not there, wherever this tree keeps it."""
    for name in ("pallas_kernels.dispatch", "pallas_kernels.platform"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name).assume_platform(platform)
    raise ModuleNotFoundError("assume_platform is neither in pallas_kernels.dispatch nor in pallas_kernels.platform")


@functools.cache
def cases_of(op: str):
    """The module of the op's named shapes, wherever this tree keeps it."""
    for name in (f"pallas_kernels.ops.{op}.cases", f"pallas_kernels.{op}.cases"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ModuleNotFoundError(f"cases of {op} are neither in pallas_kernels.ops.{op} nor in pallas_kernels.{op}")


@functools.cache
def shapes(op: str, case, dtype: str) -> tuple[dict, dict]:
    """Shapes of a case's (arrays with gradients, integers), from those of cases of one and of two rows or groups.

    Made in full, the inputs of some timed cases would fill the memory.
    """
    scaled = "batch" if hasattr(case, "batch") else "groups"
    one, two = (cases_of(op).make_inputs(dataclasses.replace(case, **{scaled: n}), dtype) for n in (1, 2))

    def scale(a, b):
        sizes = (m + (n - m) * (getattr(case, scaled) - 1) for m, n in zip(a.shape, b.shape, strict=True))
        return jax.ShapeDtypeStruct(tuple(sizes), a.dtype)

    given = {name: scale(one[name], two[name]) for name in one if one[name] is not None}
    is_fixed = {name: np.issubdtype(shape.dtype, np.integer) for name, shape in given.items()}
    return tuple({name: given[name] for name in given if is_fixed[name] == fixed} for fixed in (False, True))


def calls(op: str, case, dtype: str):
    """(suffix of the name, function of arrays, shapes of arrays with gradients, of the others) of a case."""
    given, fixed = shapes(op, case, dtype)
    settings = cases_of(op).make_settings(case)

    def call(arrays, fixed, **more):
        return oracle.call(op, {**arrays, **fixed}, **settings, **more)

    yield "", call, given, fixed
    if op == "attention" and case.queries <= FEW_QUERIES:
        stacks = {name: jax.ShapeDtypeStruct((2, *given[name].shape), given[name].dtype) for name in ("k", "v")}
        yield ".stacked", functools.partial(call, layer=1), {**given, **stacks}, fixed


def lower(call, arrays: dict, fixed: dict, platform: str, generation: str | None) -> str:
    """Text of a call for a platform: its outputs alone, then outputs and gradients."""
    mesh, place = contextlib.nullcontext(), None
    if platform == "tpu":
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
        devices = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
        mesh, place = jax.set_mesh(devices), jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())

    def loss(arrays, fixed):
        out = call(arrays, fixed, implementation=platform)
        return sum(jnp.sum(o.astype(jnp.float32)) for o in out), out

    def outputs(arrays, fixed):
        return call(arrays, fixed, implementation=platform)

    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (arrays, fixed))
    texts = []
    with mesh, assume_platform(platform):
        for function in (outputs, jax.grad(loss, has_aux=True)):
            traced = jax.jit(function).trace(*placed)
            lowered = traced.lower(lowering_platforms=(LOWERING_PLATFORM[platform],))
            texts.append(program_text(lowered.compiler_ir("stablehlo")))
    return "\n".join(texts)


def program_text(module) -> str:
    """A StableHLO module and the kernels within it, without locations."""
    kernels = []
    with module.context:

        def visit(operation):
            if operation.name == "stablehlo.custom_call":
                target = ir.StringAttr(operation.attributes["call_target_name"]).value
                if target in READERS:
                    kernels.append(READERS[target](operation))
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        text = module.operation.get_asm(enable_debug_info=False, large_elements_limit=None)
    text = re.sub(r'(kernel_hash|module) = "(?:[^"\\]|\\.)*"', r'\1 = "below"', text)
    text = re.sub(r'(backend_config = )"(?:[^"\\]|\\.)*"', r'\1"below"', text)
    return "\n".join([text, *kernels])


def read_tpu_kernel(operation) -> str:
    config = json.loads(ir.StringAttr(operation.attributes["backend_config"]).value)
    body = base64.b64decode(config["custom_call_config"].pop("body"))
    return f"// {json.dumps(config, sort_keys=True)}\n{kernel_text(body, tpu.register_dialect)}"


def read_gpu_kernel(operation) -> str:
    from jax.experimental.mosaic import gpu as mosaic_gpu

    body = ir.StringAttr(ir.DictAttr(operation.attributes["mhlo.backend_config"])["module"]).value_bytes
    return kernel_text(body, mosaic_gpu.dialect.register_dialect)


READERS = {"tpu_custom_call": read_tpu_kernel, "mosaic_gpu_v2": read_gpu_kernel}


def kernel_text(serialised: bytes, register) -> str:
    with mlir.make_ir_context() as context:
        register(context)
        context.allow_unregistered_dialects = True
        text = ir.Module.parse(serialised).operation.get_asm(enable_debug_info=False)
    return re.sub(r'(dump_basename = "\w+)_\d+"', r'\1"', text)  # counts the kernels of the process


def programs(op: str, platforms):
    """(file name, function that makes its text) of all cases of an op."""
    module = cases_of(op)
    for case in module.CASES.values():
        is_timed = case in module.BENCH_CASES
        for dtype in ("bfloat16",) if is_timed else ("bfloat16", "float32"):
            for platform in platforms:
                generations = (None,) if platform == "gpu" else TOPOLOGIES if is_timed else (EVERY_CASE,)
                for generation in generations:
                    yield f"{op}.{case.name}.{dtype}.{generation or platform}", (op, case, dtype, platform, generation)


def write(folder: Path, name: str, op, case, dtype, platform, generation) -> list[str]:
    """Writes the files of one case; returns their lines of hashes."""
    lines = []
    for suffix, *call in calls(op, case, dtype):
        try:
            text = lower(*call, platform, generation)
        except NotImplementedError as error:
            text = f"refused: {error}"
        (folder / f"{name}{suffix}.mlir").write_text(text + "\n")
        lines.append(f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {len(text):9} {name}{suffix}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.lowered", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the texts")
    parser.add_argument("--op", choices=OPS, action="append", help="one op (default: all with kernels)")
    parser.add_argument("--platform", choices=tuple(LOWERING_PLATFORM), action="append", help="default: both")
    parser.add_argument("--case", help="only programs whose file name contains this")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for op in options.op or OPS:
        for name, program in programs(op, options.platform or LOWERING_PLATFORM):
            if not options.case or options.case in name:
                lines += write(options.out, name, *program)
                print(lines[-1], flush=True)
    (options.out / "hashes.txt").write_text("\n".join(sorted(lines, key=str.split)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
