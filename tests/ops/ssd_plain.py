# SPDX-License-Identifier: Apache-2.0
"""`ssd` beside a plain version in chunked einsums: `python -m tests.ops.ssd_plain [--case NAME] [--dtype TYPE]`.

The plain version is the listing of Dao and Gu (2024, section 6) with whole rows and without documents: differences of a
float32 cumulative sum, products in the type of x, gradients by `jax.grad`. It loses small decays behind large ones and
keeps its [Q, Q] arrays for the backward; it says what an implementation for any backend could cost.
"""

import argparse

import jax
import jax.numpy as jnp

from pallas_kernels import bench, oracle, platform
from pallas_kernels.ops.ssd import cases

CHUNKS = (64, 128, 256)
"""Of both versions: the fastest plain one is what `ssd` is held against."""


def plain_ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H=None, *, chunk: int) -> jax.Array:
    """y [B, T, H, P]; chunk divides T. Axis letters as in `pallas_kernels.ops.ssd.xla`."""
    (n_batch, n_tokens, n_heads, _), n_groups, dtype = x_BTHP.shape, B_BTGN.shape[2], x_BTHP.dtype

    def cut(array, *axes):
        return array.reshape(n_batch, n_tokens // chunk, chunk, *axes, *array.shape[3:])

    dot = lambda equation, left, right: jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
    per_group = n_groups, n_heads // n_groups
    x, B, C = cut(x_BTHP, *per_group), cut(B_BTGN, n_groups), cut(C_BTGN, n_groups)
    dt = cut(dt_BTH, *per_group)
    xdt = (x * dt[..., None]).astype(dtype)
    sums_BCGRQ = jnp.moveaxis(jnp.cumsum(dt * A_H.reshape(1, 1, 1, *per_group), axis=2), 2, -1)
    visible = jnp.expand_dims(jnp.tri(chunk, dtype=bool), range(4))
    within = jnp.exp(jnp.where(visible, sums_BCGRQ[..., None] - sums_BCGRQ[..., None, :], -jnp.inf))
    weights = (dot("bcqgn,bcsgn->bcgqs", C, B)[:, :, :, None] * within).astype(dtype)
    y = dot("bcgrqs,bcsgrp->bcqgrp", weights, xdt)
    tail = jnp.moveaxis(jnp.exp(sums_BCGRQ[..., -1:] - sums_BCGRQ), -1, 2)
    states = dot("bcqgrp,bcqgn->bcgrpn", (xdt * tail[..., None]).astype(dtype), B)

    def step(state, of_chunk):
        added, through = of_chunk
        return through[..., None, None] * state + added, state

    through = jnp.exp(sums_BCGRQ[..., -1])
    _, entering = jax.lax.scan(
        step, jnp.zeros_like(states[:, 0]), (jnp.moveaxis(states, 1, 0), jnp.moveaxis(through, 1, 0))
    )
    across = dot("bcqgn,bcgrpn->bcqgrp", C, jnp.moveaxis(entering, 0, 1).astype(dtype))
    y += across * jnp.moveaxis(jnp.exp(sums_BCGRQ), -1, 2)[..., None]
    if D_H is not None:
        y += x * D_H.reshape(1, 1, 1, *per_group, 1)
    return y.reshape(x_BTHP.shape).astype(dtype)


def calls(case: cases.Case, dtype: str, which: str, chunks=CHUNKS) -> dict:
    """Name -> (jitted function, arguments), of one pass (`bench.PASSES`): ours with its own chunk and with others."""
    arrays, _ = oracle.split("ssd", cases.make_inputs(case, dtype))
    dy_BTHP = jnp.ones_like(arrays["x"])

    def of(plain):
        def both(arrays, dy_BTHP):
            y_BTHP, pull = jax.vjp(plain, arrays)
            return y_BTHP, pull(dy_BTHP)

        return (jax.jit(plain), (arrays,)) if which == "fwd" else (jax.jit(both), (arrays, dy_BTHP))

    def ours(chunk):
        return of(lambda a: oracle.call("ssd", a, implementation="xla", chunk=chunk)[0])

    def plain(chunk):
        return of(lambda a: plain_ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a.get("D"), chunk=chunk))

    found = {"xla": ours(None)} | {f"xla {n}": ours(n) for n in chunks}
    return found | {f"plain {n}": plain(n) for n in chunks}


def main(words: list[str] | None = None) -> int:
    """Prints milliseconds in turn, and the ratio to the fastest plain one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", default="b8_t2048", choices=tuple(cases.CASES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    parser.add_argument("--passes", nargs="+", default=bench.PASSES, choices=bench.PASSES)
    args = parser.parse_args(words)
    print(f"ssd {args.case} {args.dtype} on {platform.device_name()}, jax {jax.__version__}", flush=True)
    for which in args.passes:
        ready = calls(cases.CASES[args.case], args.dtype, which, args.chunks)
        times = {name: bench.measure(*call, args.seconds) for name, call in ready.items()}
        again = {name: bench.measure(*call, args.seconds) for name, call in ready.items()}  # in turn: clocks move
        best = {name: min(times[name], again[name]) for name in ready}
        fastest = min((item for item in best.items() if item[0].startswith("plain")), key=lambda item: item[1])
        print(which, *(f"{name} {ms:.3f} ms" for name, ms in best.items()), sep="  ")
        print(f"{which}: xla takes {best['xla'] / fastest[1]:.2f} of {fastest[0]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
