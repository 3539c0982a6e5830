# SPDX-License-Identifier: Apache-2.0
"""Conversations as text: the chat template that a tokenizer comes with, or a plain format where it has none.

Templates are Jinja, as `tokenizer_config.json` ("chat_template") or `chat_template.jinja` beside it hold them, and are
rendered as transformers does: sandboxed, with `trim_blocks`, `lstrip_blocks`, loop controls and `{% generation %}`.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import storage
from hybridlm.data.tokenizer import BESIDE, Tokenizer, json_object
from hybridlm.errors import ConfigError, require

Messages = Sequence[Mapping[str, Any]]
"""Of each turn its "role" ("system", "user", "assistant", ...) and "content", and what else the template reads."""

# Unicode's noncharacters, which no text has: they mark places in what a template makes.
_BREAK, _OPEN, _CLOSE, *_CONTENTS = list("\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4")
_RESERVED = re.compile("[\ufdd0-\ufdd4]")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()
    """(first, behind the last) character of what the assistant writes, with what ends its turn; in order."""
    spelled: tuple[int, ...] = ()
    """Where a message, and not the template, spells a special token: it is text there."""


@dataclass(frozen=True)
class Template:
    """How conversations are written; see `template_of`."""

    source: str = ""
    """Jinja; "": the plain format `User: ...`, empty line, `Assistant: ...`."""
    name: str = "the plain format"
    """Where it stands, for messages."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """What templates call special tokens: {"bos_token": "<s>"}."""
    special: frozenset[str] = frozenset()
    """The tokenizer's special tokens."""

    @property
    def adds_bos(self) -> bool:
        """Whether the text lacks the document's first token, which templates of tokenizers write themselves."""
        return not self.source

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation; with the head of the assistant's next turn at its end where asked.

        ConfigError, one line, for messages without a role, where the template refuses them, and without jinja2.
        """
        return _RESERVED.sub("", self._raw(_checked(messages), add_generation_prompt))

    def spans(self, messages: Messages, add_generation_prompt: bool = False, answers: bool = True) -> Rendered:
        """The same text, which of it the assistant writes (unless not `answers`), where messages spell special tokens.

        What a template encloses in `{% generation %}` is the assistant's. Without that, an answer begins where the text
        of the messages before, with the head of the next turn, ends, or else with its content, and ends with what
        stands behind every answer. ConfigError as `render`, and where no span can be told.
        """
        messages = [self._escaped(message) for message in _checked(messages)]
        raw = self._raw(messages, add_generation_prompt)
        if not answers:
            spans = []
        elif _has_marks(self.source):
            opened = [match.start() for match in re.finditer(_OPEN, raw)]
            spans = [(start, raw.index(_CLOSE, start)) for start in opened]
        else:
            of_assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._span(messages, i, raw, add_generation_prompt) for i in of_assistant]
        kept = np.cumsum([0, *(not _RESERVED.match(c) for c in raw)]) if _RESERVED.search(raw) else None
        at = (lambda i: i) if kept is None else (lambda i: int(kept[i]))
        spelled = tuple(at(match.start()) - 1 for match in re.finditer(_BREAK, raw))
        answers = tuple((at(start), at(stop)) for start, stop in spans)
        return Rendered(raw if kept is None else _RESERVED.sub("", raw), answers, spelled)

    def encode(self, tokenizer: Tokenizer, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """(int32 ids of a conversation, True where the assistant writes the id), both [T].

        Special tokens that the template writes are read as such, those that messages spell as text. The document's
        first token is put in front where `adds_bos`; none at the end.
        """
        ids, starts = tokenizer.encode_template(rendered.text, rendered.spelled)
        ours = np.zeros(len(ids), bool)
        for start, stop in rendered.answers:
            ours |= (starts >= start) & (starts < stop)
        if self.adds_bos and tokenizer.bos_id is not None:
            ids, ours = np.concatenate([[tokenizer.bos_id], ids]), np.concatenate([[False], ours])
        return ids.astype(np.int32), ours

    def stops(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """(ids, strings) that end an answer: the end of the document, and what stands behind every answer."""
        ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        if not self.source:
            return tuple(ids), ("\n\nUser:",)
        end = self.turn_end
        named = [word for word in self.special if word in end]
        first = min(named, key=lambda word: (end.index(word), -len(word)), default=None)
        if first is not None:
            ids += [int(i) for i in tokenizer.encode_template(first)[0]]
            return tuple(dict.fromkeys(ids)), ()
        return tuple(ids), (end,) if end.strip() else ()

    @functools.cached_property
    def turn_end(self) -> str:
        """What the template writes behind every answer, without white space at its end; "" where it writes nothing."""
        if not self.source:
            return ""
        pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _CONTENTS[0]}]
        raw = self._tried(pair, False)
        if raw is None or _CONTENTS[0] not in raw:
            return ""
        return re.sub(f"[{_OPEN}{_CLOSE}]", "", raw[raw.rindex(_CONTENTS[0]) + 1 :]).rstrip()

    def _raw(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """What the template makes, marks included."""
        if not self.source:
            return _plain(messages, add_generation_prompt)
        import jinja2

        try:
            return _compiled(self.source).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ConfigError(f"the chat template of {self.name} refuses the messages: {error}") from None
        except RecursionError:
            raise ConfigError(f"the chat template of {self.name} calls itself without end") from None

    def _tried(self, messages: list[dict], add_generation_prompt: bool) -> str | None:
        """`_raw`; None where the template refuses, as some do messages that no user's ends."""
        try:
            return self._raw(messages, add_generation_prompt)
        except ConfigError:
            return None

    def _span(self, messages: list[dict], i: int, raw: str, add_generation_prompt: bool) -> tuple[int, int]:
        """(start, stop) of the answer in message i of what was made of all, with or without the head of another."""
        if not self.source:
            start = len(_plain(messages[:i], True))
            more = len(messages) > i + 1 and messages[i + 1]["role"] == "user"
            return start, len(_plain(messages[: i + 1], False)) + (len("\n\nUser:") if more else 0)
        before, after = self._tried(messages[:i], True), self._tried(messages[: i + 1], False)
        start = len(before) if before is not None and raw.startswith(before) else None
        stop = None
        if after is not None and raw.startswith(after):
            stop = len(after.rstrip()) if self.turn_end else len(after)
        if start is None or stop is None or stop < start:
            first, last = self._content(messages, i, raw, add_generation_prompt)
            start, stop = first if start is None or start > first else start, last
        return start, stop

    def _content(self, messages: list[dict], i: int, raw: str, add_generation_prompt: bool) -> tuple[int, int]:
        """Of the content of message i, with the turn's end: what changes with it."""
        changed = ([*messages[:i], {**messages[i], "content": mark}, *messages[i + 1 :]] for mark in _CONTENTS)
        one, two = (self._tried(others, add_generation_prompt) for others in changed)
        if one is not None and two is not None and one != two:
            start = next(n for n, (a, b) in enumerate(zip(one, two)) if a != b)
            behind = one[next(-n for n, (a, b) in enumerate(zip(one[::-1], two[::-1])) if a != b) or len(one) :]
            stop = len(raw) - len(behind)
            if raw[:start] == one[:start] and raw.endswith(behind) and stop >= start:
                return start, stop + (len(self.turn_end) if raw[stop:].startswith(self.turn_end) else 0)
        raise ConfigError(f"the chat template of {self.name} does not tell what of its text messages[{i}] is")

    def _escaped(self, value: Any) -> Any:
        """A message in which special tokens are broken, so that they are not taken for the template's."""
        if isinstance(value, str):
            return self._broken.sub(lambda match: match[0][0] + _BREAK + match[0][1:], value) if self.special else value
        if isinstance(value, Mapping):
            return {key: self._escaped(inside) for key, inside in value.items()}
        if isinstance(value, list | tuple):
            return [self._escaped(inside) for inside in value]
        return value

    @functools.cached_property
    def _broken(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))


def template_of(tokenizer: Tokenizer) -> Template:
    """The template that lies beside a tokenizer's tokenizer.json; the plain format where there is none.

    ConfigError, one line, for files that cannot be read, and where jinja2 is missing or the template is not Jinja.
    """
    path: Path | None = getattr(tokenizer, "path", None)
    if path is None:
        return Template()
    settings = json_object(path.with_name(BESIDE[0]))
    named = json_object(path.with_name(BESIDE[1])) | settings
    tokens = {key: _word(value) for key, value in named.items() if key.endswith("_token") and _word(value) is not None}
    tokens |= {
        f"{end}_token": word for end in ("bos", "eos") if (word := getattr(tokenizer, f"{end}_token")) is not None
    }
    special = frozenset(tokenizer.special)
    source, name = _source(path, settings)
    if not source:
        return Template(special=special)
    _check_jinja(source, name)
    return Template(source, name, tokens, special)


def _check_jinja(source: str, name: str) -> None:
    """ConfigError, one line, where jinja2 is missing or `source` is no template."""
    try:
        import jinja2
    except ImportError:
        raise ConfigError(f"{name} holds a chat template, which needs jinja2: pip install 'hybridlm[chat]'") from None
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{name}: the chat template is not Jinja: {error.message} (line {error.lineno})") from None


def _source(path: Path, settings: dict) -> tuple[str, str]:
    """(the template's text, its file); "" where there is none. path: of the tokenizer.json."""
    file = path.with_name(BESIDE[2])
    try:
        return storage.read_bytes(file).decode(), str(file)
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    source, file = settings.get("chat_template"), path.with_name(BESIDE[0])
    if isinstance(source, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        require("default" in by_name, f'{file}: none of the templates in "chat_template" is called default')
        source = by_name["default"]
    require(isinstance(source, str | None), f'{file}: "chat_template" is {type(source).__name__}, not a text')
    return source or "", str(file)


def _word(value: Any) -> str | None:
    """A token, as a text or as {"content": text}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _checked(messages: Messages) -> list[dict]:
    """The messages as dicts without empty entries and reserved characters."""
    require(isinstance(messages, Sequence) and not isinstance(messages, str), "messages must be a list of objects")
    for i, message in enumerate(messages):
        require(isinstance(message, Mapping), f"messages[{i}] ({type(message).__name__}) must be an object with a role")
        role = message.get("role")
        require(isinstance(role, str) and bool(role), f"messages[{i}].role ({role!r}) must be a text")
        content = message.get("content")
        fits = content is None or isinstance(content, str | list | tuple)
        require(fits, f"messages[{i}].content ({type(content).__name__}) must be a text, or a list of parts")
    return [{key: _clean(value) for key, value in message.items() if value is not None} for message in messages]


def _clean(value: Any) -> Any:
    """Values that a template may see: those of JSON alone."""
    if isinstance(value, str):
        return _RESERVED.sub("\ufffd", str(value))
    if isinstance(value, Mapping):
        return {str(key): _clean(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inside) for inside in value]
    return value if isinstance(value, bool | int | float | None) else str(value)


def _plain(messages: list[dict], add_generation_prompt: bool) -> str:
    turns = []
    for message in messages:
        content = message.get("content", "")
        if not isinstance(content, str):
            content = "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
        role = message["role"]
        turns.append(content if role == "system" else f"{role[0].upper()}{role[1:]}: {content}")
    return "\n\n".join([*turns, "Assistant:"] if add_generation_prompt else turns)


def _has_marks(source: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None


@functools.lru_cache(maxsize=8)
def _compiled(source: str):
    """The template, in a sandbox with what transformers gives it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` puts marks around what it holds."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 reads it so)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
