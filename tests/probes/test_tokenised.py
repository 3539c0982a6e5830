# SPDX-License-Identifier: Apache-2.0
"""Tasks in text through tokenizers that cut text in other ways, against solvers that read the decoded text alone."""

import re
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hybridlm.data.tokenizer import ByteTokenizer, DnaTokenizer, load_tokenizer
from hybridlm.errors import ConfigError
from hybridlm.probes import MQAR, UNSCORED, Needle, Phonebook, VariableTracking
from hybridlm.probes.tokenised import InTokens, for_tokenizer, inner
from tests.probes.solvers import SOLVERS

TASKS = {
    "needle": (Needle(needles=2), 130),
    "phonebook": (Phonebook(), 260),
    "phonebook of 4": (Phonebook(entries=4), 260),
    "variable_tracking": (VariableTracking(hops=2, chains=2), 240),
}
"""Name -> (task, tokens of a row)."""


@cache
def text_of_tasks() -> list[str]:
    """Rows of all tasks, on which vocabularies are trained: their words are tokens, numbers are some digits each."""
    rng = np.random.default_rng(5)
    return [story.text(900) for task, _ in TASKS.values() for story in task.stories(rng, 0, 40, 900)]


def byte_level(trim: bool) -> Tokenizer:
    """As GPT-2: a space belongs to the word behind it; its place does not where offsets are trimmed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text_of_tasks(), trainer)
    return tokenizer


def spaces_are_signs() -> Tokenizer:
    """As SentencePiece: a space is a letter of words, one stands before the text, digits are apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(text_of_tasks(), trainer)
    return tokenizer


def no_pieces() -> Tokenizer:
    """Nothing but the text says where tokens end: they reach over words, in front of an answer too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    letters = [chr(i) for i in (10, *range(32, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([line for text in text_of_tasks() for line in text.split(". ")], trainer)
    return tokenizer


KINDS = {
    "byte level": lambda: byte_level(True),
    "byte level, whole offsets": lambda: byte_level(False),
    "spaces are signs": spaces_are_signs,
    "no pieces": no_pieces,
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Name of a kind -> its tokenizer, as a run has it."""

    @cache
    def open_(kind: str):
        file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        KINDS[kind]().save(str(file))
        return load_tokenizer(str(file))

    return open_


SLOW = [(kind, "phonebook of 4") for kind in KINDS if kind != "spaces are signs"]
each = pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=pytest.mark.slow if (kind, name) in SLOW else ())
        for kind in KINDS
        for name in TASKS
    ],
)


@each
def test_a_solver_of_the_decoded_text_is_right_letter_by_letter(kind, name, opened):
    """At each token that is asked, of the text before it; the tokens that are asked are the whole answer."""
    tokenizer, (task, length) = opened(kind), TASKS[name]
    solve, whole = SOLVERS[type(task).__name__], {"Needle": 7, "Phonebook": 10, "VariableTracking": 15}
    examples = InTokens(task, tokenizer, bos=True).batch(3, 1, 5, length)
    merged = 0
    for row, targets in zip(examples.tokens_BT.tolist(), examples.targets_BT.tolist(), strict=True):
        places = [t for t, target in enumerate(targets) if target != UNSCORED]
        assert row[0] == tokenizer.bos_id and places
        letters = 0
        for t in places:
            before = tokenizer.decode(row[: t + 1])
            said = tokenizer.decode([*row[: t + 1], targets[t]])
            assert said.startswith(before.rstrip()) and [*row, 0][t + 1] in (targets[t], 0)
            piece = said[len(before) :] if len(said) > len(before) else said[len(before.rstrip()) :]
            known = re.match(r"\D* ?" if type(task) is not VariableTracking else r".*?(?=[A-Z]* ?[A-Z]*$)", piece)[0]
            merged += len(known.strip()) > 0
            before += known
            for letter in piece[len(known) :]:
                if letter != " ":
                    assert chr(solve(task, list(before.encode()))) == letter, (before, piece)
                    letters += 1
                before += letter
        assert letters == whole[type(task).__name__]
    assert (merged > 0) <= (kind == "no pieces")


@each
def test_rows_are_the_trainers_and_fill_their_length(kind, name, opened):
    """Decoded and encoded whole they are the same tokens; of so few, some are padding: words have more and less."""
    tokenizer, (task, length) = opened(kind), TASKS[name]
    tokens = InTokens(task, tokenizer, bos=True)
    examples = tokens.batch(0, 2, 10, length)
    assert examples.tokens_BT.shape == (10, length) and (examples.scored_BT.sum(axis=1) > 0).all()
    for row, scored, targets in zip(examples.tokens_BT, examples.scored_BT, examples.targets_BT, strict=True):
        last = int(np.flatnonzero(scored)[-1])
        assert not row[last + 1 :].any() and (last >= length - 32 or name == "phonebook of 4")
        ids = [*row[: last + 1], targets[last]]
        assert tokenizer.encode(tokenizer.decode(ids), bos=True).tolist() == ids
    again = InTokens(task, tokenizer, bos=True).batch(0, 2, 10, length)
    assert (examples.tokens_BT == again.tokens_BT).all() and (examples.targets_BT == again.targets_BT).all()
    facet = {"Needle": ("depth", {0, 25, 50, 75, 100}), "Phonebook": ("depth", set(range(0, 100, 10)))}
    facet = facet.get(type(task).__name__, ("hop", {0, 1, 2}))
    assert set(examples.facets[facet[0]][examples.scored_BT].tolist()) <= facet[1]
    if type(task) is Needle:  # at each depth in turn
        at = [set(of[scored].tolist()) for of, scored in zip(examples.facets["depth"], examples.scored_BT, strict=True)]
        assert at == [{task.depths[row % 5]} for row in range(10)]


def test_chance_and_the_bound(opened):
    """All that is asked is among what is guessed; a state bounds whole answers, whatever tokens they are."""
    for kind, name in (
        ("byte level", "needle"),
        ("spaces are signs", "variable_tracking"),
        ("byte level", "phonebook"),
    ):
        task, length = InTokens(TASKS[name][0], opened(kind), bos=False), TASKS[name][1]
        examples = task.batch(1, 0, 40, length)
        asked = examples.targets_BT[examples.scored_BT]
        assert np.isin(asked, task.answers).all() and task.chance(length) == 1 / len(task.answers)
        ends = {task.tokenizer.decode([i]).split()[-1] for i in task.answers}  # a token may hold what is before, too
        assert all(set(end) <= set(task.task.letters) for end in ends) and len(ends) < 150
        bounds = [task.fixed_state(length, bits) for bits in (0, 1, 5, 20, 100, 1e4)]
        assert task.chance(length) <= bounds[0] < 1 and bounds == sorted(bounds) and bounds[-1] == 1
    # two needles of log2(9 * 10^6) bits each, less the bit of rows that are drawn again
    needle, length = InTokens(TASKS["needle"][0], opened("byte level"), bos=False), 130
    bits = 2 * np.log2(9e6) - 1
    assert needle.fixed_state(length, bits) == 1 and needle.fixed_state(length, bits - 1) < 1


def test_bytes_and_tasks_without_a_language_stay_as_they_are(opened):
    assert for_tokenizer(Needle(), ByteTokenizer(), True) == Needle()
    assert for_tokenizer(MQAR(), opened("byte level"), True) == MQAR()
    made = for_tokenizer(Needle(), opened("byte level"), True)
    assert inner(made) == Needle() and not made.is_text and made.vocab_size == 700
    assert Needle(over="tokens").is_text is False


def test_other_alphabets(tmp_path):
    """A tokenizer without capitals tells names apart by small letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    letters = [chr(i) for i in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(text_of_tasks(), trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    small = load_tokenizer(str(tmp_path))
    task = InTokens(VariableTracking(hops=1), small, bos=False)
    examples = task.batch(0, 0, 3, 120)
    for targets in examples.targets_BT:
        said = small.decode(targets[targets != UNSCORED]).replace(" ", "").replace("#", "")
        assert re.fullmatch("[a-z]{10}", said)
    assert np.isin(examples.targets_BT[examples.scored_BT], task.answers).all()


def test_what_cannot_be_is_one_line(opened):
    tokens = opened("byte level")
    with pytest.raises(
        ConfigError, match=r"^Needle is text, whose answers data.tokenizer dna does not tell apart: take"
    ):
        InTokens(Needle(), DnaTokenizer(), True).check(400)
    with pytest.raises(ConfigError, match=r"^length \(20\) must be at least \d+ tokens of .* for needles \(1\)"):
        InTokens(Needle(), tokens, True).check(20)
    least = next(n for n in range(20, 200) if _fits(InTokens(Needle(), tokens, True), n))
    assert InTokens(Needle(), tokens, True).batch(0, 0, 8, least).scored_BT.any(axis=1).all()


def _fits(task, length: int) -> bool:
    try:
        task.check(length)
    except ConfigError:
        return False
    return True
