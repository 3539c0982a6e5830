# SPDX-License-Identifier: Apache-2.0
"""Texts on a terminal as they come, one below the other; in a pipe or a file as they are."""

import json
import unicodedata
from collections.abc import Iterable
from typing import TextIO

from hybridlm.infer.texts import Done, Piece

_JOINERS = "\u200c\u200d"
"""Make one sign of several, as in emoji; nothing that a terminal obeys."""


def visible(text: str) -> str:
    """Text in which a terminal finds nothing to obey: `^[` for the escape character, `\\u202e` for signs that are not
    seen. Lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" or c in _JOINERS else _shown(c) for c in text)


def _shown(c: str) -> str:
    code = ord(c)
    if code < 0x20 or code == 0x7F:
        return "^" + chr(code ^ 0x40)
    if unicodedata.category(c) == "Zs":
        return " "
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Screen:
    """Writes texts to a stream, each piece at once; control characters are shown, not sent, where it is a terminal."""

    def __init__(self, stream: TextIO):
        self._stream, self._terminal = stream, stream.isatty()

    def write(self, text: str) -> None:
        """Raises BrokenPipeError where nobody reads any more."""
        if text:
            self._stream.write(visible(text) if self._terminal else text)
            self._stream.flush()


def show(events: Iterable[Piece | Done], prompts: list[str], screen: Screen) -> None:
    """Prompts with their texts, in order: the first that is not whole grows on the screen, later ones wait.

    Where there are several, a line `==> prompt 1 <==` stands in front of each."""
    head = lambda row: (f"==> prompt {row + 1} <==\n" if len(prompts) > 1 else "") + prompts[row]
    waiting, done, row = [""] * len(prompts), set(), 0
    screen.write(head(0))
    for event in events:
        if isinstance(event, Piece):
            if event.row == row:
                screen.write(event.text)
            else:
                waiting[event.row] += event.text
            continue
        done.add(event.row)
        while row in done:
            screen.write("\n" if row + 1 == len(prompts) else "\n\n")
            row += 1
            if row < len(prompts):
                screen.write(head(row) + waiting[row])


def show_json(events: Iterable[Piece | Done], prompts: list[str], screen: Screen) -> None:
    """A line of JSON for each prompt, in order, as soon as all before it are there."""
    done, row = {}, 0
    for event in events:
        if isinstance(event, Piece):
            continue
        done[event.row] = event
        while row in done:
            of = done.pop(row)
            line = {
                "prompt": prompts[row], "text": of.text, "reason": of.reason, "prompt_tokens": of.prompt_tokens,
                "new_tokens": of.new_tokens,
            }  # fmt: skip
            screen.write(json.dumps(line) + "\n")
            row += 1
