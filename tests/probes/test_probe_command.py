# SPDX-License-Identifier: Apache-2.0
"""`hybridlm probe`: a published model, as JSON and as text; numbers of tasks; mistakes in one line."""

import dataclasses
import json
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.cli.probe import chosen
from hybridlm.config.find import load_config
from hybridlm.data import load_tokenizer
from hybridlm.probes import MQAR, Needle, Phonebook, StateTracking, StringCopying, score
from hybridlm.probes.tokenised import InTokens
from tests.library.runs import write_run
from tests.probes.test_tokenised import byte_level

LLAMA = Path(__file__).parents[1] / "golden" / "llama"
WORDS = ("--hf", str(LLAMA), "--data.tokenizer=dna", "--mesh.data=2", "--tasks", "copying", "--copying.letters=6")


@pytest.fixture
def command(capsys):
    """`hybridlm probe` with words: (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["probe", *words])
        return code, *capsys.readouterr()

    return run


def test_a_published_model(command, monkeypatch):
    import jax

    from hybridlm.eval import subject

    monkeypatch.setattr(subject, "make_mesh", lambda config, make=subject.make_mesh: make(config, jax.devices()[:2]))
    words = ("--lengths", "12", "--rows=4", "--batches=2", "--seed=3")
    code, said, _ = command(*WORDS, *words, "--json")
    assert code == 0
    found = json.loads(said)
    assert (found["step"], found["rows"], found["seed"], found["state_bits"], found["devices"]) == (None, 4, 3, None, 2)
    assert found["tasks"]["copying"]["fields"] == {"letters": 6}
    (one,) = found["tasks"]["copying"]["scores"]
    opened = subject.open_published(LLAMA, WORDS[2:4])
    with jax.set_mesh(opened.mesh):
        expected = score(opened.model, StringCopying(letters=6), 12, rows=4, batches=2, seed=3)
    assert (one["asked"], one["rows"], one["chance"], one["fixed_state"]) == (40, 8, 1 / 6, None)
    assert (one["right"], one["rows_all_right"]) == (expected.right, expected.whole)
    by = {int(n): (cell["right"], cell["asked"]) for n, cell in one["by"]["place"].items()}
    assert by == expected.by["place"] and one["accuracy"] == expected.accuracy
    code, text, _ = command(*WORDS, *words)
    assert code == 0 and "state grows with the text" in text and "copying, accuracy by place:" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("copying  "))
    assert row[:6] == ["copying", "12", "40", f"{one['accuracy']:.3f}", "0.167", "-"]


@pytest.mark.slow
def test_a_run_that_reads_bytes(command, tmp_path):
    """Text, on eight devices, of a model whose state is fixed: the bound is printed beside the score."""
    small = {"model.d_model": 32, "model.pattern": "M-M-", "model.blocks.-.d_ff": 64}
    write_run(tmp_path / "run", load_config("hybrid_tiny", small), steps=(7,))
    words = ("--run", str(tmp_path / "run"), "--tasks", "needle", "phonebook", "parity", "--lengths", "256", "300")
    page = tmp_path / "page.html"
    code, said, _ = command(*words, "--batches=1", "--json", "--page", str(page))
    assert code == 0 and "depth, percent" in page.read_text()
    found = json.loads(said)
    assert (found["step"], found["rows"], found["devices"], found["tokenizer"]) == (7, 16, 8, "byte")
    assert list(found["tasks"]) == ["needle", "phonebook", "parity"]
    for name, asked in (("needle", 16 * 7), ("phonebook", 16 * 10), ("parity", 16 * 256)):
        one, other = found["tasks"][name]["scores"]
        assert one["asked"] == asked and other["length"] == 300 and one["fixed_state"] == 1
    code, text, _ = command(*words, "--batches=1")
    assert code == 0 and f"state {found['state_bits']:,} bits" in text and "needle, accuracy by depth:" in text


@pytest.mark.slow
def test_a_run_that_reads_other_tokens(command, tmp_path):
    """Text by the run's own tokenizer: what is asked are its tokens, and their chance; rows begin with its bos."""
    byte_level(True).save(str(tmp_path / "tokenizer.json"))
    small = {"model.d_model": 32, "model.pattern": "M-M-", "model.blocks.-.d_ff": 64, "model.vocab_size": 700}
    config = load_config("hybrid_tiny", small | {"data.tokenizer": str(tmp_path / "tokenizer.json")})
    write_run(tmp_path / "run", config, steps=(7,))
    words = ("--run", str(tmp_path / "run"), "--tasks", "needle", "phonebook", "--lengths", "200", "--rows=8")
    code, said, error = command(*words, "--batches=1", "--json")
    assert code == 0, error
    found = json.loads(said)
    for name, task in (("needle", Needle()), ("phonebook", Phonebook())):
        tokens = InTokens(task, load_tokenizer(str(tmp_path)), True)
        (one,) = found["tasks"][name]["scores"]
        assert one["asked"] == tokens.batch(0, 0, 8, 200).scored_BT.sum() and one["rows"] == 8
        assert one["chance"] == tokens.chance(200) and one["fixed_state"] == 1
        assert found["tasks"][name]["fields"] == json.loads(json.dumps(dataclasses.asdict(task)))


def test_numbers_of_tasks():
    words = [
        "--mqar.pairs=4",
        "--needle.depths",
        "0",
        "50",
        "--needle.over=tokens",
        "--s5.group=Z60",
        "--needle.digits",
        "2",
    ]
    found = chosen(["mqar", "needle", "s5"], words)
    assert found == {
        "mqar": MQAR(pairs=4), "needle": Needle(over="tokens", depths=(0, 50), digits=2), "s5": StateTracking("Z60"),
    }  # fmt: skip
    assert chosen(["needle"], ["--needle.depths=30"])["needle"].depths == (30,)
    two = chosen(["mqar:pairs=4", "mqar"], ["--mqar.vocab_size=64"])
    assert two == {"mqar:pairs=4": MQAR(4, 64), "mqar": MQAR(vocab_size=64)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--tasks=mqar",), "give --run DIR or --hf FOLDER, one of them"),
        (("--run=x",), "the following arguments are required: --tasks; see hybridlm probe --help"),
        (("--run=x", "--tasks=mqr"), "--tasks (mqr): no task of that name: there are mqar, selective_copying"),
        (
            ("--run=x", "--tasks=mqar", "--mqar.pair=3"),
            "unknown field --mqar.pair: mqar has no pair: did you mean pairs?",
        ),
        (("--run=x", "--tasks=mqar", "--mqar.pairs=many"), "mqar.pairs ('many') must be a whole number"),
        (("--run=x", "--tasks=mqar", "--mqar.pairs"), "--mqar.pairs needs a value"),
        (("--run=x", "--tasks=mqar", "--needle.digits=3"), "--needle.digits: needle is none of --tasks: mqar"),
        (("--run=x", "--tasks=mqar", "--lengths", "31"), "mqar: length (31) must be at least 32 for pairs (8)"),
        (("--run=x", "--tasks=mqar", "--lengths", "0"), "--lengths (0) must be at least 1"),
        (("--run=x", "--tasks=mqar", "--rows=0"), "--rows (0) must be at least 1"),
        (("--hf=x", "--tasks=mqar", "--step=1"), "--step (1) is of a run: give --run"),
        (("--run=nowhere", "--tasks=mqar"), "nowhere"),
        (("--run=x", "--tasks=mqar", "--page=none/p.html"), "--page (none/p.html): there is no folder none"),
        ((*WORDS, "--rows=3"), "--rows (3) must be a multiple of 2: that many devices share them"),
        (
            (*WORDS[:5], "mqar"),
            "mqar: MQAR needs a vocabulary of 8192 tokens, the model has 64: make the task's smaller, as by",
        ),
        ((*WORDS[:5], "needle"), "needle: Needle is text, whose answers data.tokenizer dna does not tell apart: take"),
        (
            (*WORDS[:5], "copying", "repeated_bigrams"),
            "repeated_bigrams: frequent pairs are counted in the training text",
        ),
        ((*WORDS[:5], "repeated_bigrams:frequent=0"), "a published model holds out no text: give --data.val_path A B"),
    ],
)
def test_mistakes_are_one_line(words, told, command, monkeypatch):
    import jax

    from hybridlm.eval import subject

    monkeypatch.setattr(subject, "make_mesh", lambda config, make=subject.make_mesh: make(config, jax.devices()[:2]))
    code, said, error = command(*words)
    assert code == 2 and told in error and error.count("\n") == 1 and not said, error
