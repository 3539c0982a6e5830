# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness: each request equal to full logits in NumPy and to itself one by one; tasks of one's own.

Rows are dealt over eight devices; nothing is fetched: tasks and their data are files that the tests write.
"""

import json
import math
import sys
from functools import partial

import jax
import numpy as np
import pytest

from hybridlm.errors import ConfigError
from hybridlm.eval import evaluate_tasks, open_run

LENGTH = 64
harness = pytest.mark.harness


@pytest.fixture(scope="module")
def subject(trained):
    return open_run(trained / "run", words=[f"--data.seq_len={LENGTH}", "--data.batch_size=8"])


@pytest.fixture(scope="module")
def model(subject):
    from hybridlm.eval import HarnessModel

    return HarnessModel(subject)


@pytest.fixture(scope="module")
def logits_after(subject):
    """(ids) -> float64 logits [tokens, V] after each of at most LENGTH tokens, from one pass without a cache."""
    forward = jax.jit(lambda ids: subject.model(ids))

    def of(ids):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(forward(row), np.float64)[0, : len(ids)]

    return of


def requests_of(kind: str, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def asked(model, kind: str, arguments):
    return getattr(model, kind)(requests_of(kind, arguments))


def encoded(text: str) -> list[int]:
    return [256, *text.encode()]


def scored(logits_after, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation, of which and of whose context the last LENGTH + 1 tokens are read."""
    ids = (context + continuation)[-(LENGTH + 1) :]
    logits = logits_after(ids[:-1])[-len(continuation) :]
    nats = logits[np.arange(len(continuation)), continuation] - np.log(np.exp(logits).sum(-1))
    return nats.sum(), bool((logits.argmax(-1) == continuation).all())


@harness
def test_loglikelihood(model, logits_after):
    likeliest = bytes([int(logits_after(encoded("abc"))[-1, :128].argmax())]).decode()
    pairs = [
        ("abc", c) for c in ("d", "e", " def", likeliest, likeliest, "a longer one of them all, as long as a rope")
    ]
    pairs += [(" ".join(["word"] * n), " gf") for n in (1, 3, 9, 12, 13, 40)]
    pairs += [("trailing  ", "spaces"), ("trailing", "  spaces"), ("", "hello"), ("é", "ü"), ("x" * 500, "y" * LENGTH)]
    results = asked(model, "loglikelihood", pairs)
    for (context, continuation), (nats, is_greedy) in zip(pairs, results, strict=True):
        cut = context.rstrip()
        ids = list((context[len(cut) :] + continuation).encode())
        expected = scored(logits_after, encoded(cut) if context else [256], ids)
        assert nats == pytest.approx(expected[0], rel=1e-4, abs=1e-4) and is_greedy == expected[1], context
    assert results[3][1] and results[3] == results[4] and not all(greedy for _, greedy in results)
    assert results[12] == pytest.approx(results[13], rel=1e-5)
    for pair, result in zip(pairs[::3], results[::3], strict=True):
        assert asked(model, "loglikelihood", [pair])[0] == pytest.approx(result, rel=1e-5, abs=1e-5)
    with pytest.raises(ConfigError, match=rf"a continuation of {LENGTH + 1} tokens: the model reads 1 to {LENGTH}"):
        asked(model, "loglikelihood", [("a", "y" * (LENGTH + 1))])


@harness
def test_rolling(model, logits_after):
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abcdefgh "), n)) for n in (1, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH + 5)]
    found = asked(model, "loglikelihood_rolling", [(text,) for text in (*texts, "")])
    assert found[-1] == 0.0
    for text, nats in zip(texts, found, strict=False):
        ids, total, end = encoded(text), 0.0, 0
        while end < len(text):  # windows of LENGTH predictions; the last one takes what it needs of the one before it
            begin, end = end, min(end + LENGTH, len(text))
            window = ids[max(end - LENGTH, 0) : end + 1]
            total += scored(logits_after, window[: begin - end], window[begin - end :])[0]
        assert nats == pytest.approx(total, rel=1e-4)
        assert asked(model, "loglikelihood_rolling", [(text,)])[0] == pytest.approx(nats, rel=1e-5)


def written(logits_after, prompt: str, n: int, stops=()) -> str:
    """The likeliest tokens one after the other, up to eos or a stop sequence."""
    ids, new = encoded(prompt)[-(LENGTH - n) :], []
    while len(new) < n and 257 not in new:
        new.append(int(logits_after(ids + new)[-1].argmax()))
    text = bytes(i for i in new if i < 256).decode("utf-8", "replace")
    for stop in stops:
        text = text.split(stop)[0]
    return text


@harness
def test_generate_until(model, logits_after):
    """Over the first round of tokens and into the next, prompts of all lengths in one batch."""
    prompts = ["a", "ab cd", "the longest prompt of all of them, which loses its first tokens", "gh ", ""]
    whole = [written(logits_after, prompt, 40) for prompt in prompts]
    stop = whole[1][5:7]
    options = [({"max_gen_toks": 40, "until": []}, ()), ({"max_gen_toks": 40, "until": [stop, "\0"]}, (stop,))]
    arguments = [(prompt, option) for option, _ in options for prompt in prompts]
    found = asked(model, "generate_until", arguments)
    expected = [written(logits_after, prompt, 40, stops) for _, stops in options for prompt in prompts]
    assert found == expected and found[: len(prompts)] == whole != found[len(prompts) :]
    assert asked(model, "generate_until", arguments[1:2]) == found[1:2]
    sampled = [("ab", {"max_gen_toks": 8, "temperature": 1.0, "do_sample": True, "top_p": 0.9, "until": []})]
    assert asked(model, "generate_until", sampled) == asked(model, "generate_until", sampled)
    with pytest.raises(ConfigError, match=r"max_gen_toks \(64\) of a task leaves no room"):
        asked(model, "generate_until", [("a", {"max_gen_toks": 64, "until": []})])


@harness
@pytest.mark.slow
def test_texts_are_read_in_pieces_and_once(subject, model, logits_after, monkeypatch):
    """Contexts and continuations far longer than what is read at once are scored alike; however many continuations a
    context has, and however many rounds a text takes, a token of a prompt is read once."""
    from hybridlm.eval import HarnessModel
    from hybridlm.model.decoding import Writer

    read = []
    whole = Writer.read
    monkeypatch.setattr(Writer, "read", lambda self, state, *rows: (read.append(rows), whole(self, state, *rows))[1])
    short = HarnessModel(subject)
    short._writer.prefill_chunk = 16
    pairs = [("ab " * 8, "cd" * n) for n in (1, 9, 19)] + [("a", "efgh" * 15)]
    expected = asked(model, "loglikelihood", pairs)
    read.clear()
    for (nats, greedy), other in zip(asked(short, "loglikelihood", pairs), expected, strict=True):
        assert nats == pytest.approx(other[0], rel=1e-5) and greedy == other[1]
    assert len(read) == 1 and sorted(read[0][1].tolist())[-2:] == [2, 24]
    read.clear()
    option = {"max_gen_toks": 40, "until": []}
    assert asked(short, "generate_until", [("gh ab", option)]) == [written(logits_after, "gh ab", 40)]
    assert [lengths.sum() for _, lengths in read] == [6 + short.batch_size - 1]


@harness
def test_conversations_by_the_tokenizers_template(subject, tmp_path, monkeypatch):
    """Special words of the template are read as tokens, an answer that has begun is gone on with, and an answer ends
    where the template ends one; a tokenizer without a template is refused."""
    import dataclasses

    from hybridlm.data.tokenizer import load_tokenizer
    from hybridlm.eval import HarnessModel
    from tests.data.test_data_tokenizer import train_bpe
    from tests.data.test_template import CHATML, SPECIAL

    with pytest.raises(ConfigError, match=r"^--apply-chat-template: the tokenizer byte comes with no chat template$"):
        HarnessModel(subject, chat=True)
    train_bpe(tmp_path / "tokenizer.json", SPECIAL)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    model = HarnessModel(dataclasses.replace(subject, tokenizer=tokenizer), chat=True)
    turn = {"role": "user", "content": "the theme"}
    text = model.apply_chat_template([turn])
    assert text.startswith("<|im_start|>user\nthe theme<|im_end|>\n<|im_start|>assistant")
    ids = model.tok_encode(text)
    start, end = (int(tokenizer.encode_template(word)[0][0]) for word in ("<|im_start|>", "<|im_end|>"))
    assert ids.count(start) == 2 and ids.count(end) == 1 and model.tok_encode("of") == tokenizer.encode("of").tolist()
    begun = model.apply_chat_template([turn, {"role": "assistant", "content": "this"}], add_generation_prompt=False)
    assert begun.endswith("this") and begun.startswith(text[: text.rindex("assistant")])
    told = []
    monkeypatch.setattr("hybridlm.eval.harness.sampling", lambda **options: told.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked(model, "generate_until", [(text, {"max_gen_toks": 8, "until": []})])
    assert end in told[0]["eos_id"]


TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
target_delimiter: ""
{rest}
"""
REST = {
    "multiple_choice": """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "generate_until": """
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["~"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@harness
def test_tasks_of_ones_own(trained, command, logits_after, tmp_path, monkeypatch):
    """By the command line, from YAML and JSON lines: what each comes to follows from full logits."""
    import lm_eval.tasks

    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # 14,000 others take 10 seconds to list
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    choices = ["d", "ef", " g"]
    questions = ["ab", "cd ef", "gh a b", "h"]
    best = [int(np.argmax([scored(logits_after, encoded(q), list(c.encode()))[0] for c in choices])) for q in questions]
    rows = [
        {
            "question": q,
            "choices": choices,
            "answer": (b + (i == 0)) % 3,
            "written": written(logits_after, q, 8) * (i < 2),
        }
        for i, (q, b) in enumerate(zip(questions, best, strict=True))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, rest in REST.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data, rest=rest))
    names = [f"local_{kind}" for kind in REST]
    words = ["--run", trained / "run", "--length", LENGTH, "--batch", 8, "--include-path", tmp_path]
    code, said, error = command(*words, "--tasks", *names, "--json")
    assert code == 0, error
    found = json.loads(said)
    nats = sum(scored(logits_after, [256], list(q.encode()))[0] for q in questions)
    bits = -nats / math.log(2) / sum(map(len, questions))
    values = [
        found["tasks"][name][key] for name, key in zip(names, ("acc,none", "bits_per_byte,none", "exact_match,none"))
    ]
    assert values == pytest.approx([0.75, bits, 0.5], rel=1e-4)
    assert found["examples"] == dict.fromkeys(names, 4) and found["step"] == 2 and found["seq_len"] == LENGTH
    words[-2] = "--include_path"  # as the harness spells it
    code, said, _ = command(*words, "--tasks", names[0], "--limit=1")
    assert code == 0 and said.splitlines()[-1].split() == [names[0], "1", "acc", "0.0000"], said
    code, _, error = command(*words, "--tasks", "local_multiple_choise")
    assert code == 2 and error.startswith("error: --tasks (local_multiple_choise): no task of that name: did you mean")


@harness
def test_a_model_of_another_objective_is_refused(subject):
    import dataclasses

    from hybridlm.config import Masked
    from hybridlm.eval import HarnessModel

    optim = dataclasses.replace(subject.config.optim, objective=Masked(tokens=(97, 106), mask_token=263))
    masked = dataclasses.replace(subject, config=dataclasses.replace(subject.config, optim=optim))
    with pytest.raises(ConfigError, match=r"^tasks ask for the next token, and .* \(optim.objective Masked\)"):
        HarnessModel(masked)


def test_without_the_harness_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ConfigError, match=r"^--tasks needs lm-evaluation-harness .*: pip install 'hybridlm\[lm-eval\]'$"
    ):
        evaluate_tasks(None, ["arc_easy"])
