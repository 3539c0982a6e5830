# SPDX-License-Identifier: Apache-2.0
"""Texts: batched as one by one, stop strings as by brute force, what a terminal, a pipe and a script are shown."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.data.tokenizer import ByteTokenizer
from hybridlm.errors import ConfigError
from hybridlm.infer.show import Screen, show, show_json, visible
from hybridlm.infer.texts import Done, Options, Piece, Speed, write
from hybridlm.model.generation import generate
from tests.data.test_stream import brute
from tests.infer.letters import LETTERS, Letters
from tests.model.model_support import VARIANTS, build, small

N = 24
PROMPTS = ["to be or not", "a", "the quick brown fox jumps over", "z", "again and again"]


@pytest.fixture(scope="module")
def model():
    return build(small("*"))


@pytest.fixture(scope="module")
def alone(model):
    """Of each prompt what comes, greedily, of it alone."""
    tokens = [Letters().encode(prompt) for prompt in PROMPTS]
    return [np.asarray(generate(model, ids[None], N))[0].tolist() for ids in tokens]


@pytest.mark.parametrize(("batch", "block"), [pytest.param(8, 1, marks=pytest.mark.slow), (2, 5)])
def test_batched_as_one_by_one(model, alone, batch, block):
    """Stop strings and ends of documents included; rows end apart."""
    texts = [Letters().decode(ids) for ids in alone]
    stops, eos = (texts[0][5:8], texts[2][9]), alone[1][3]
    tokenizer, speed = Letters(eos), Speed()
    options = Options(max_new_tokens=N, stop=stops)
    events = list(write(model, tokenizer, PROMPTS, options, batch=batch, block=block, speed=speed))
    done = {event.row: event for event in events if isinstance(event, Done)}
    reasons = set()
    for row, ids in enumerate(alone):
        text, n, reason = brute(tokenizer, ids, stops, eos)
        of = done[row]
        assert (of.text, of.new_tokens, of.reason) == (text, n, reason)
        assert of.prompt_tokens == len(PROMPTS[row])
        pieces = [event.text for event in events if isinstance(event, Piece) and event.row == row]
        assert "".join(pieces) == text and all(pieces)
        reasons.add(reason)
    assert {"stop", "eos"} <= reasons
    assert speed.prompt_tokens == sum(map(len, PROMPTS)) and speed.new_tokens == sum(
        of.new_tokens for of in done.values()
    )
    assert speed.first_seconds > 0 and f"{speed.new_tokens} written, the first after" in str(speed)


def test_pieces_come_as_they_are_written(model, alone):
    """The first letter is there after one step, not at the end."""
    first = next(iter(write(model, Letters(), PROMPTS[:1], Options(max_new_tokens=500))))
    assert first == Piece(0, LETTERS[alone[0][0]])


EVENTS = [
    Piece(1, "x\x1b[2J"),
    Piece(0, "ab"),
    Done(1, "x\x1b[2J", "stop", 1, 2),
    Piece(0, "c"),
    Done(0, "abc", "eos", 3, 4),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, events=EVENTS, prompts=("p\r", "q"), how=show):
    """What stands on the stream after each event."""
    states = []

    def told():
        for event in events:
            yield event
            states.append(stream.getvalue())

    how(told(), list(prompts), Screen(stream))
    return states


def test_a_terminal_grows_in_order_and_obeys_nothing():
    states = shown(Terminal())
    head = "==> prompt 1 <==\np^M"
    assert states[:4] == [head, head + "ab", head + "ab", head + "abc"]
    assert states[4] == head + "abc\n\n==> prompt 2 <==\nqx^[[2J\n"
    assert shown(Terminal(), [Piece(0, "a"), Done(0, "a", "eos", 0, 1)], ["p"])[-1] == "pa\n"


def test_a_pipe_has_the_text_as_it_is():
    assert shown(io.StringIO())[-1] == "==> prompt 1 <==\np\rabc\n\n==> prompt 2 <==\nqx\x1b[2J\n"


def test_json_is_a_line_for_each_prompt_in_order():
    states = shown(io.StringIO(), how=show_json)
    assert states[3] == "" and states[4].count("\n") == 2 and "\x1b" not in states[4]
    first, second = map(json.loads, states[4].splitlines())
    assert first == {"prompt": "p\r", "text": "abc", "reason": "eos", "prompt_tokens": 3, "new_tokens": 4}
    assert second["text"] == "x\x1b[2J"


@given(st.text())
def test_visible_text_has_no_control_characters(text):
    seen = visible(text)
    assert all(c.isprintable() or c in "\n\t\u200c\u200d" for c in seen)
    assert visible(seen) == seen
    if text.isprintable():
        assert seen == text


def test_visible_examples():
    assert visible("a\x1b[31m\x07\x7f\x9b\u202e\u00a0\ufdd0\U000e0001é\t\n") == (
        "a^[[31m^G^?\\x9b\\u202e \\ufdd0\\U000e0001é\t\n"
    )


@pytest.mark.parametrize(
    ("kind", "prompts", "changes", "told"),
    [
        ("M", [], {}, "there is no prompt"),
        ("M", ["a", ""], {}, r"prompt 2 \(''\) has no token and the tokenizer no start token: give --prompt"),
        ("bytes", ["a"], {}, r"byte gives token 256, beyond the model's vocab_size \(29\)"),
        ("M", ["a"], {"stop": ("",)}, r"stop \(''\) must not be empty"),
        ("M", ["a"], {"max_new_tokens": 2**31}, r"max_new_tokens \(2147483648\) must be at most"),
        ("both_ways", ["a"], {}, "cannot be decoded token by token: .* is bidirectional"),
    ],
)
def test_errors_are_one_line(model, kind, prompts, changes, told):
    model = build(small("x", {"x": VARIANTS[kind]})) if kind == "both_ways" else model
    tokenizer = ByteTokenizer() if kind == "bytes" else Letters()
    with pytest.raises(ConfigError, match=told):
        list(write(model, tokenizer, prompts, Options(**{"max_new_tokens": 2, **changes})))
