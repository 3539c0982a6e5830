# SPDX-License-Identifier: Apache-2.0
"""Conversations: each answer is that of the whole conversation read anew, and only what is new is read."""

import functools
import os
import signal

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from hybridlm.cli.chat import _interruptible
from hybridlm.data.template import Template
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.errors import ConfigError
from hybridlm.infer import chat
from hybridlm.infer.chat import Conversation
from hybridlm.infer.texts import Options
from tests.data.test_stream import brute
from tests.data.test_template import CHATML, THINKING, needs_jinja
from tests.infer.letters import LETTERS, Letters
from tests.model.model_support import QUICK, VOCAB, build, small

N = 16
TURNS = ["to be", "or not", "to be that is", "the question"]


@pytest.fixture(scope="module")
def model():
    return build(small("M*"))


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """A tokenizer of letters with tokens around turns, all of the small models' vocabulary."""
    special = ["<|im_start|>", "<|im_end|>"]
    letters = [c for c in LETTERS if c not in "zq"]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.add_special_tokens(special)
    backend.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("turns")
    backend.save(str(folder / "tokenizer.json"))
    assert backend.get_vocab_size() == VOCAB
    return load_tokenizer(str(folder))


ROOM = 400


@functools.partial(jax.jit, compiler_options=QUICK)
def following(model, tokens_BT, length):
    """The most likely token behind so many."""
    return model(tokens_BT)[0, length - 1].argmax()


def read_anew(model, ids) -> list[int]:
    """N tokens behind a text by full forwards, of which a longer one knows nothing of what stands behind."""
    tokens = np.zeros((1, ROOM), np.int32)
    tokens[0, : len(ids)] = ids
    for length in range(len(ids), len(ids) + N):
        tokens[0, length] = following(model, tokens, length)
    return tokens[0, len(ids) : len(ids) + N].tolist()


def answer(conversation, text, **more):
    return "".join(conversation.ask(text, **more))


def test_plain_turns(model, monkeypatch):
    """The oracle reads the whole conversation anew; here each turn reads its own letters, though the cache grows."""
    monkeypatch.setattr(chat, "LEAST_ROOM", 64)
    tokenizer, template = Letters(), Template()
    conversation = Conversation(model, tokenizer, template, Options(max_new_tokens=N), system="be brief")
    before, asked, stops = "", "", ("\n\nUser:",)
    for turn in TURNS:
        messages = [*conversation.messages, {"role": "user", "content": turn}]
        prompt = template.render(messages, add_generation_prompt=True)
        ids = read_anew(model, tokenizer.encode(prompt))
        expected = brute(tokenizer, ids, stops, None)[0]
        assert answer(conversation, turn) == expected
        # an answer that does not begin with the space that the format has there is read once more
        known = before if prompt.startswith(before) else asked
        assert prompt.startswith(known) and conversation.speed.prompt_tokens == len(prompt) - len(known)
        before, asked = prompt + expected, prompt
        assert conversation.messages[-1]["content"] == expected.removeprefix(" ")
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * len(TURNS)]
    conversation.reset()
    answer(conversation, TURNS[0])
    assert conversation.speed.prompt_tokens == len("be brief\n\nUser: to be\n\nAssistant:")


@needs_jinja
@pytest.mark.parametrize("name", ["chatml", "thinking"])
def test_turns_of_a_template(model, turns, name):
    """With tokens that end turns; where a template leaves out what was written before, the last answer is read anew."""
    template = Template({"chatml": CHATML, "thinking": THINKING}[name], name, special=turns.special)
    conversation = Conversation(model, turns, template, Options(max_new_tokens=N))
    history, text = [], ""
    for turn in TURNS[:3]:
        messages = [*conversation.messages, {"role": "user", "content": turn}]
        prompt = template.render(messages, add_generation_prompt=True)
        kept = prompt.startswith(text)
        if name == "thinking" and history:  # the oracle begins anew: the same, as letters are tokens
            kept, history, text = False, [], ""
        more = turns.encode_template(prompt[len(text) :])[0].tolist()
        history, new_ids = [*history, *more], len(more)
        new = read_anew(model, history)
        expected, n, reason = brute(turns, new, (), turns.encode_template("<|im_end|>")[0][0])
        assert answer(conversation, turn) == expected
        assert conversation.messages[-1] == {"role": "assistant", "content": expected}
        history += new[:n]
        text = prompt + turns.decode(new[:n]) + ("<|im_end|>" if reason == "eos" else "")
        assert kept or name == "thinking" or turn == TURNS[0]
        if turn != TURNS[0]:
            read, whole = conversation.speed.prompt_tokens, len(history) - n
            assert read == new_ids if kept else read < whole


def test_an_answer_can_be_stopped(model):
    """By whoever asks, before and behind a piece; the conversation goes on from what was written."""
    conversation = Conversation(model, Letters(), Template(), Options(max_new_tokens=400))
    pieces = []
    for piece in conversation.ask("to be", stopped=lambda: len(pieces) >= 3):
        pieces.append(piece)
    assert len(pieces) == 3 and conversation.messages[-1]["content"].strip() == "".join(pieces).strip()
    asked = conversation.ask("or not")
    next(asked)
    asked.close()
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert answer(conversation, "that is", stopped=lambda: True) == ""
    answer(conversation, "the question", stopped=lambda: len(conversation.messages) > 0)
    assert conversation.speed.prompt_tokens < 60


def test_the_first_interrupt_is_told_the_second_interrupts():
    with pytest.raises(KeyboardInterrupt), _interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@needs_jinja
def test_a_turn_that_is_refused_changes_nothing(model, turns):
    refusing = "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    conversation = Conversation(
        model, turns, Template(refusing, "it", special=turns.special), Options(max_new_tokens=2)
    )
    for turn in TURNS[:2]:
        answer(conversation, turn)
        messages = list(conversation.messages)
        if len(messages) > 3:
            break
    with pytest.raises(ConfigError, match="the chat template of it refuses the messages: too long"):
        answer(conversation, TURNS[2])
    assert conversation.messages == messages
