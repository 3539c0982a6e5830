# SPDX-License-Identifier: Apache-2.0
"""`hybridlm generate`: text from the model of a run."""

import argparse

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
from hybridlm.errors import require
from hybridlm.fields import REAL, WHOLE


def run(words: list[str], prog: str) -> int:
    """Writes text; see Command."""
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    for name, (low, high, note) in LIMITS.items():
        value = getattr(args, name)
        fits = value is None or (low <= value <= high and (value > 0 or not note))  # nan is none of it
        text = f"{value:g}" if isinstance(value, float) else str(value)[:40]
        limit = f"at least {low}" if not note and not fits and value < low else f"between {low} and {high:.10g}{note}"
        require(fits, f"--{name.replace('_', '-')} ({text}) must be {limit}")
    start()
    import jax

    from hybridlm.config.find import read_config
    from hybridlm.train.progress import printable
    from hybridlm.train.sample import load_run, sample_text

    like = None if args.config is None else read_config(args.config)
    model, tokenizer, _ = load_run(storage.as_path(args.run), args.step, like, args.tokenizer)
    text = sample_text(
        model, tokenizer, args.prompt, key=jax.random.key(args.seed), max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
    )  # fmt: skip
    print("\n".join(printable(line) for line in text.split("\n")))
    return 0


LIMITS = {
    "max_new_tokens": (1, WHOLE, ""),
    "temperature": (0, REAL, ""),
    "top_k": (1, WHOLE, ""),
    "top_p": (0, 1, ", and above 0"),
    "seed": (-(2**63), 2**63 - 1, ""),
}
"""Lowest and highest value of the options that are numbers, and what else holds; memory may set a lower one."""


GENERATE = Command("generate", (("--run runs/NAME --prompt TEXT [...]", "write text with a run's model"),), run)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, "Writes text with the model of a run.")
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of the run, as runs/hybrid_tiny")
    parser.add_argument("--prompt", default="", help="start of the text (default: the start of a document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that hold P of the mass")
    parser.add_argument("--seed", type=int, default=0, help="of the choices (0)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (the newest)")
    parser.add_argument(
        "--data.tokenizer", dest="tokenizer", metavar="PATH", help="tokenizer.json, or byte (that of the run)"
    )
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    return parser
