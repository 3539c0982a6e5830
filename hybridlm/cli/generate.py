# SPDX-License-Identifier: Apache-2.0
"""`hybridlm generate`: text from the model of a run."""

import argparse

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
from hybridlm.errors import ConfigError


def run(words: list[str], prog: str) -> int:
    """Writes text; see Command."""
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    for name, low, high in (("max_new_tokens", 1, None), ("temperature", 0, None), ("top_k", 1, None), ("top_p", 0, 1)):
        value = getattr(args, name)
        if value is not None and (value < low or (high is not None and value > high)):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"--{name.replace('_', '-')} ({value:g}) must be {limit}")
    start()
    import jax

    from hybridlm.config.find import read_config
    from hybridlm.train.sample import load_run, sample_text

    like = None if args.config is None else read_config(args.config)
    model, tokenizer, _ = load_run(storage.as_path(args.run), args.step, like)
    text = sample_text(
        model, tokenizer, args.prompt, key=jax.random.key(args.seed), max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
    )  # fmt: skip
    print(text)
    return 0


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
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    return parser
