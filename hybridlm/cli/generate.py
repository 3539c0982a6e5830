# SPDX-License-Identifier: Apache-2.0
"""`hybridlm generate`: text from the model of a run or of a published checkpoint."""

import argparse
import sys

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start_alone
from hybridlm.cli.words import split_section
from hybridlm.cli.writing import add_options, check_options, in_force, mesh_of, open_model, options_of
from hybridlm.errors import ConfigError, print_line, require

STANDARD_INPUT = "-"


def run(words: list[str], prog: str) -> int:
    """Writes texts; see Command."""
    of_mesh, words = split_section(words, "mesh")
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    check_options(args)
    prompts = _prompts(args)
    start_alone("generate")
    from hybridlm.infer.show import Screen, show, show_json
    from hybridlm.infer.texts import Speed, write

    mesh = mesh_of(of_mesh)
    options, speed, screen = options_of(args), Speed(), Screen(sys.stdout)
    with in_force(mesh):
        model, tokenizer = open_model(args, mesh)
        events = write(model, tokenizer, prompts, options, batch=args.batch, speed=speed)
        (show_json if args.json else show)(events, prompts, screen)
    if not args.quiet:
        print_line(str(speed))
    return 0


GENERATE = Command(
    "generate",
    (
        ("--run runs/NAME --prompt TEXT [...]", "write text with a run's model"),
        ("--hf FOLDER --prompt-file FILE [...]", "the same with that of a published checkpoint"),
    ),
    run,
)


def _prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, those of files behind the others; the start of a document where there is none."""
    from_input = [*args.prompt_file, *args.prompt_lines].count(STANDARD_INPUT)
    require(from_input <= 1, "standard input (-) can be read once: give it to --prompt-file or to --prompt-lines")
    prompts = list(args.prompt)
    for name in args.prompt_file:
        prompts.append(_text(name, "--prompt-file").removesuffix("\n"))
    for name in args.prompt_lines:
        lines = [line.rstrip("\r") for line in _text(name, "--prompt-lines").split("\n")]
        prompts += [line for line in lines if line]
    given = args.prompt or args.prompt_file or args.prompt_lines
    require(bool(prompts) or not given, "--prompt-lines: there is no line that is not empty")
    return prompts or [""]


def _text(name: str, option: str) -> str:
    """What a file holds, or standard input for "-"; ConfigError for what cannot be read, or is not UTF-8."""
    try:
        if name == STANDARD_INPUT:
            return sys.stdin.buffer.read().decode()
        return storage.read_bytes(storage.as_path(name)).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} ({name}) is no UTF-8 text: byte {error.start} is {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"{option} ({name}): {error.strerror or error}") from None


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, "Writes text with the model of a run, or of a published checkpoint.")
    parser.add_argument(
        "--prompt", nargs="+", action="extend", default=[], metavar="TEXT",
        help="start of the text; several give a text each (the start of a document)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-file", nargs="+", action="extend", default=[], metavar="FILE",
        help="files of which each is a prompt, but for a line end at its end; - is standard input",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-lines", nargs="+", action="extend", default=[], metavar="FILE",
        help="files of which each line is a prompt; - is standard input",
    )  # fmt: skip
    add_options(parser, 200)
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts that are gone on with at once (8)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    parser.add_argument("--quiet", action="store_true", help="say nothing of the speed on standard error")
    return parser
