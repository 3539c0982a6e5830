# SPDX-License-Identifier: Apache-2.0
"""What the commands that write text have in common: which model, and how its tokens are chosen."""

import argparse
from contextlib import AbstractContextManager, nullcontext

from hybridlm import storage
from hybridlm.errors import require
from hybridlm.fields import REAL, WHOLE

LIMITS = {
    "max_new_tokens": (1, WHOLE, ""),
    "temperature": (0, REAL, ""),
    "top_k": (1, WHOLE, ""),
    "top_p": (0, 1, ", and above 0"),
    "seed": (-(2**63), 2**63 - 1, ""),
    "prefill_chunk": (1, WHOLE, ""),
    "batch": (1, WHOLE, ""),
}
"""Lowest and highest value of the options that are numbers, and what else holds; memory may set a lower one."""


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The model, and how tokens are chosen."""
    parser.add_argument("--run", metavar="DIR", help="folder of the run, as runs/hybrid_tiny")
    parser.add_argument("--hf", metavar="FOLDER", help="a published checkpoint in the place of a run")
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"tokens to write ({max_new_tokens})"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that hold P of the mass")
    parser.add_argument("--seed", type=int, default=0, help="of the choices (0)")
    parser.add_argument(
        "--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end a text in front of any of these"
    )
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="tokens of a prompt that are read at once (1024)"
    )
    add_cache_options(parser)
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step of the run (the newest)")
    parser.add_argument(
        "--data.tokenizer", dest="tokenizer", metavar="PATH", help="tokenizer.json, or byte (that of the run or folder)"
    )
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    parser.epilog = "--mesh.KEY=VALUE, as of training, takes all devices: --mesh.tensor=4, say (the first alone)."


CACHE = "--cache."
"""What the names of options of caches begin with."""


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """How caches are stored."""
    parser.add_argument(
        f"{CACHE}keys", dest="cache_keys", choices=("bfloat16", "int8"),
        help="store keys, values and latents smaller (model.compute_dtype)",
    )  # fmt: skip
    parser.add_argument(
        f"{CACHE}states", dest="cache_states", choices=("bfloat16",),
        help="store recurrent states rounded; they are computed in float32 (float32)",
    )  # fmt: skip


def cache_types(args: argparse.Namespace):
    """The `layers.cache.CacheTypes` that the options say."""
    from hybridlm.layers.cache import CacheTypes

    return CacheTypes(args.cache_keys, args.cache_states)


def check_options(args: argparse.Namespace) -> None:
    """ConfigError, one line, for numbers out of range, an empty stop string, no model or two."""
    for name, (low, high, note) in LIMITS.items():
        value = getattr(args, name, None)
        fits = value is None or (low <= value <= high and (value > 0 or not note))  # nan is none of it
        text = f"{value:g}" if isinstance(value, float) else str(value)[:40]
        limit = f"at least {low}" if not note and not fits and value < low else f"between {low} and {high:.10g}{note}"
        require(fits, f"--{name.replace('_', '-')} ({text}) must be {limit}")
    require(all(args.stop), "--stop ('') must not be empty: every text holds it")
    require(args.run is not None or args.hf is not None, "give --run DIR of a run, or --hf FOLDER of a checkpoint")
    require(args.run is None or args.hf is None, f"--run ({args.run}) and --hf ({args.hf}): give one of them")
    for name in ("step", "config"):
        given = getattr(args, name) is not None and args.hf is not None
        require(not given, f"--{name} belongs to a run, but --hf ({args.hf}) is none")


def mesh_of(words: list[str]):
    """The mesh that `--mesh.KEY=VALUE` arrange all devices in; None without a word, for the first device alone."""
    if not words:
        return None
    from hybridlm.config import Config
    from hybridlm.config.overrides import override
    from hybridlm.sharding import make_mesh

    return make_mesh(override(Config(), words).mesh)


def in_force(mesh) -> AbstractContextManager:
    """Inside, what is computed is split over the mesh, where there is one."""
    import jax

    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def open_model(args: argparse.Namespace, mesh=None) -> tuple:
    """(model, tokenizer) that the options name, on the mesh in force; ConfigError where there is none.

    mesh: the same; None: the first device.
    """
    if args.hf is None:
        from hybridlm.config.find import read_config
        from hybridlm.train.sample import load_run

        like = None if args.config is None else read_config(args.config)
        return load_run(storage.as_path(args.run), args.step, like, args.tokenizer)[:2]
    from hybridlm.data.tokenizer import load_tokenizer
    from hybridlm.hf.checkpoint import open_checkpoint, tokenizer_of
    from hybridlm.hf.load import COMPUTE, from_hf

    folder = storage.as_path(args.hf)
    model = from_hf(folder, mesh=mesh, dtype=COMPUTE.get(open_checkpoint(folder).dtype, "bfloat16"))
    return model, load_tokenizer(tokenizer_of(folder, model.config) if args.tokenizer is None else args.tokenizer)


def options_of(args: argparse.Namespace):
    """The `infer.texts.Options`."""
    from hybridlm.infer.texts import Options
    from hybridlm.model.decoding import CHUNK

    return Options(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, stop=tuple(args.stop), prefill_chunk=args.prefill_chunk or CHUNK, cache=cache_types(args),
    )  # fmt: skip
