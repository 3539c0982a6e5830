# SPDX-License-Identifier: Apache-2.0
"""`hybridlm chat`: a conversation with the model of a run or of a published checkpoint."""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start_alone
from hybridlm.cli.words import split_section
from hybridlm.cli.writing import add_options, check_options, in_force, mesh_of, open_model, options_of
from hybridlm.errors import ConfigError, print_line

HELP = "/reset forgets the conversation, /quit or end of input (Ctrl-D) ends, Ctrl-C stops an answer"


def run(words: list[str], prog: str) -> int:
    """Talks until the end of input; see Command."""
    of_mesh, words = split_section(words, "mesh")
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    check_options(args)
    start_alone("chat")
    mesh = mesh_of(of_mesh)
    with in_force(mesh):
        return _talk(args, *open_model(args, mesh))


def _talk(args: argparse.Namespace, model, tokenizer) -> int:
    from hybridlm.data.template import template_of
    from hybridlm.infer.chat import Conversation
    from hybridlm.infer.show import Screen

    template = template_of(tokenizer)
    conversation = Conversation(model, tokenizer, template, options_of(args), args.system)
    talking, screen = sys.stdin.isatty(), Screen(sys.stdout)
    if talking:
        print_line(f"{template.name}; {HELP}")
    for line in _lines(talking):
        if line in ("/quit", "/exit"):
            break
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/") and line[1:].isalpha():
            print_line(f"{line} is no command: {HELP}")
        elif line:
            _answer(conversation, line, screen, args.stats)
    return 0


CHAT = Command("chat", (("--run runs/NAME [...]", "talk with a run's model, or with --hf FOLDER's"),), run)


def _answer(conversation, line: str, screen, stats: bool) -> None:
    """Shows the answer to a turn; one line where the turn is refused, and the conversation goes on."""
    try:
        with _interruptible() as stopped:
            for piece in conversation.ask(line, stopped):
                screen.write(piece)
    except ConfigError as error:
        print_line(f"error: {error}")
        return
    screen.write("\n")
    if stats:
        print_line(str(conversation.speed))


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only told of by what this gives; a second one interrupts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = []

    def note(number, frame) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(talking: bool) -> Iterator[str]:
    """What the user types, line by line, up to the end of input; Ctrl-C drops the line."""
    if talking:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines and keeps a history)
    while True:
        try:
            line = input("> ") if talking else sys.stdin.readline()
        except EOFError:
            print_line("", sys.stdout)
            return
        except KeyboardInterrupt:
            if not talking:
                raise
            print_line(f"\n{HELP}")
            continue
        if not talking and not line:
            return
        yield line.strip()


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, f"Talks with the model of a run, or of a published checkpoint: {HELP}.")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first of all")
    add_options(parser, 512)
    parser.add_argument("--stats", action="store_true", help="say behind each answer what it took, on standard error")
    return parser
