# SPDX-License-Identifier: Apache-2.0
"""What the program that writes tokens moves on an H100 that is not there, as compiled, beside what has to move:

    python tests/infer/decode_program.py --config hybrid_1b --batch 1 --context 131072

It needs JAX 0.11 with the CUDA compiler (`pip install 'jax[cuda13]'`) and no GPU; half a minute on two cores. Bytes are
those of `hybridlm.plan.work` inside the loop over tokens; kernels of Pallas count all that they are given, which is
more than they read where depths are in one stack (--unroll 1).
"""

import argparse
import os
import re
import sys
from pathlib import Path


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="hybrid_1b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--topology", default="h100:1")
    parser.add_argument("--unroll", type=int, help="model.unroll (what writing takes on a GPU)")
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="matrices in eight bits")
    parser.add_argument(
        "--read", action="store_true", help="the program that reads a piece of a prompt, its memory alone"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="write the compiled program")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from hybridlm.config.find import load_config
    from hybridlm.infer.bound import moved
    from hybridlm.model.config import QuantizeConfig

    overrides = [] if args.unroll is None else [f"--model.unroll={args.unroll}"]
    model = load_config(args.config, overrides).model
    rounding = QuantizeConfig(weights=args.quantize, stored=args.quantize is not None)
    compiled = compile_step(model, args.batch, args.context, args.topology, rounding, args.read)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if args.text is not None:
        args.text.write_text(text, encoding="utf-8")
    held = sum(getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp"))
    print(f"arguments, results and all beside them {(held - memory.alias_size_in_bytes) / 2**30:.2f} GiB")
    print(f"beside arguments and results {memory.temp_size_in_bytes / 2**20:,.0f} MiB")
    if args.read:
        return
    counts, scattered = of_a_token(text)
    for name, work in sorted(counts.by_class.items(), key=lambda item: -item[1].bytes):
        print(f"{name:12} {work.bytes / 1e6:12,.1f} MB")
    print(f"{'cache, written in place, but counted whole':12} {-scattered / 1e6:12,.1f} MB")
    must = moved(model, args.batch, args.context, rounding=rounding)
    print(f"a token moves {(counts.all.bytes - scattered) / 1e9:.2f} GB, has to move {must.all / 1e9:.2f} GB: {must}")


def compile_step(model, batch: int, context: int, topology: str, rounding, read: bool):
    """The compiled program that writes greedily, or that reads a piece of a prompt, for a described GPU."""
    import jax
    import numpy as np
    from flax import nnx
    from jax.sharding import SingleDeviceSharding

    from hybridlm.layers.cache import AS_COMPUTED
    from hybridlm.model import decoding
    from hybridlm.model.quantize import of_run
    from hybridlm.plan.slices import read_devices
    from pallas_kernels.platform import assume_platform

    there = SingleDeviceSharding(read_devices(topology).compilable()[0])

    def put(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), tree)

    with assume_platform("gpu", capability="9.0"):
        graphdef, params = nnx.split(of_run(model, rounding).model())
        unroll = decoding.UNROLL["gpu"]
        graphdef, params = jax.eval_shape(lambda p: decoding._prepared(graphdef, p, unroll), params)
        cache, *arrays = jax.eval_shape(lambda p: decoding._empty(graphdef, p, batch, context, AS_COMPUTED), params)
        key, number = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), np.int32)
        ends = jax.ShapeDtypeStruct((1,), np.int32)
        given = put((cache, params, *arrays, key, number, number))
        if read:
            piece = jax.ShapeDtypeStruct((batch, decoding.CHUNK), np.int32)
            lengths = jax.ShapeDtypeStruct((batch,), np.int32)
            return decoding._read.lower(
                given[0], given[2], graphdef, given[1], *put((piece, lengths))
            ).compile()  # fmt: skip
        lowered = decoding.writing("gpu").lower(given[0], graphdef, *given[1:], 0.0, None, put(ends), True, None)
    return lowered.compile()


def of_a_token(text: str):
    """`plan.work.Counts` of the body of the outermost loop, and bytes that they have too many: of keys and values that
    are scattered in place, all of the cache is counted as read and written."""
    from hybridlm.plan import hlo
    from hybridlm.plan.work import work

    program = hlo.parse(text)
    (loop,) = [one for one in program.computations[program.entry] if one.op == "while"]
    body = re.search(r"body=%?([\w.\-]+)", loop.rest)[1]
    scattered = 0
    for one in program.computations[body]:
        inside = program.computations.get(hlo.CALLED.search(one.rest)[1], ()) if one.op == "fusion" else ()
        if inside and inside[-1].op == "scatter":
            scattered += 2 * hlo.n_bytes(one.shape)
    return work(program, body), scattered


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
