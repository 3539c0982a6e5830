# SPDX-License-Identifier: Apache-2.0
"""Held-out sets: equal to what training recorded, and by position to sums over the logits of documents one by one."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import Masked
from hybridlm.data import open_corpus
from hybridlm.eval import evaluate_sets, open_published, open_run
from hybridlm.eval.report import label, sets_as_text
from hybridlm.eval.sets import Bucket, n_buckets, number
from hybridlm.hf import from_hf
from hybridlm.train.batches import Batches
from hybridlm.train.evaluate import evaluate
from hybridlm.train.run_folder import read_metrics
from hybridlm.train.step import make_program

LLAMA = Path(__file__).parents[1] / "golden" / "llama"


def test_buckets_are_powers_of_two():
    context = np.array([1, 2, 3, 4, 5, 8, 9, 16384, 16385, 32768], np.int32)
    assert np.asarray(number(context)).tolist() == [0, 1, 2, 2, 3, 3, 4, 14, 15, 15]
    assert [n_buckets(n) for n in (1, 2, 3, 4, 5, 32768)] == [1, 2, 3, 3, 4, 16]
    shown = [label(Bucket(2 ** (i - 1) if i else 0, 2**i, 0, 0.0, 0, 0.0)) for i in (0, 1, 2, 10, 11, 15, 21)]
    assert shown == ["1", "1-2", "2-4", "512-1k", "1k-2k", "16k-32k", "1M-2M"]


def test_equals_what_training_recorded_and_itself(trained, command):
    """On eight devices, of a run on one; a second time to the last bit."""
    (record,) = [r for r in read_metrics(trained / "run" / "metrics.jsonl") if r["kind"] == "val"]
    words = ("--run", trained / "run", "--json")
    code, first, _ = command(*words)
    assert code == 0 and command(*words)[1] == first
    found = json.loads(first)
    assert list(found["sets"]) == ["first", "val-1"]
    assert (found["step"], found["seq_len"], found["packing"], found["devices"]) == (2, 32, "split", 8)
    for name, of_set in found["sets"].items():
        size = len((trained / f"val-{int(name != 'first')}.txt").read_text())
        assert of_set["documents"] == 1 and of_set["bytes"] == size and of_set["tokens"] == size + 1
        assert of_set["loss"] == pytest.approx(record[f"loss/{name}"], rel=1e-6)
        assert of_set["bits_per_byte"] == pytest.approx(record[f"bits_per_byte/{name}"], rel=1e-6)
        assert of_set["perplexity"] == pytest.approx(math.exp(record[f"loss/{name}"]), rel=1e-5)
        assert sum(bucket["tokens"] for bucket in of_set["by_position"]) == size + 1
    own = f"--data.val_path=only={trained}/val-1.txt"  # the text that is trained on plays no part
    alone = json.loads(command(*words, own, "--data.path=nowhere", "--data.cache_dir", trained / "other")[1])
    assert alone["sets"] == {"only": found["sets"]["val-1"]}


def nats_of(logits_of, ids, length: int) -> np.ndarray:
    """Cross entropy of each token but the first; zeros behind a document change nothing before them."""
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(logits_of(row), np.float64)[0, : len(ids) - 1]
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]


def by_hand(logits_of, documents, length: int, least: int = 0) -> dict[int, tuple[int, float]]:
    """(tokens, loss) by the largest context of a bucket, in float64, of documents that have `least` targets."""
    sums: dict[int, list] = {}
    for ids in documents:
        assert len(ids) <= length + 1
        if len(ids) - 1 < least:
            continue
        nats = nats_of(logits_of, ids, length)
        for before, nat in enumerate(nats, start=1):
            to = 1 << math.ceil(math.log2(before))
            sums.setdefault(to, []).append(nat)
    return {to: (len(values), float(np.mean(values))) for to, values in sums.items()}


def check_by_position(result, logits_of, documents, length: int):
    for of, least in (("", 0), ("long_", length)):
        found = {b.to: (getattr(b, f"{of}tokens"), getattr(b, f"{of}loss")) for b in result.by_position}
        expected = by_hand(logits_of, documents, length, least)
        assert {to: n for to, (n, _) in found.items() if n} == {to: n for to, (n, _) in expected.items()}
        for to, (_, loss) in expected.items():
            assert found[to][1] == pytest.approx(loss, rel=1e-5), (of, to)
    everything = by_hand(logits_of, documents, length).values()
    total = sum(n * loss for n, loss in everything) / sum(n for n, _ in everything)
    assert result.loss == pytest.approx(total, rel=1e-5)


def documents_of(folder, tokenizer):
    texts = [json.loads(line)["text"] for line in (folder / "long.jsonl").read_text().splitlines()]
    return [tokenizer.encode(text, bos=True, eos=True) for text in texts]


def test_by_position_equals_documents_one_by_one(trained):
    words = (f"--data.val_path={trained}/long.jsonl", "--data.seq_len=128", "--data.packing=best_fit")
    subject = open_run(trained / "run", words=words)
    result = evaluate_sets(subject)["long"]
    documents = documents_of(trained, subject.tokenizer)
    check_by_position(result, jax.jit(lambda ids: subject.model(ids)), documents, 128)
    long = [bucket.long_tokens for bucket in result.by_position]
    assert long == [2, 2, 4, 8, 16, 32, 64, 128]
    said = sets_as_text(subject, {"long": result})
    change = result.by_position[-1].long_loss - result.by_position[-2].long_loss
    assert f"from 32-64 to 64-128 tokens of context ({change:+.4f} nats, 128 tokens)" in said
    assert ("does not fall" in said) == (change >= 0)
    some = evaluate_sets(dataclasses.replace(subject, config=with_data(subject.config, packing="split")), limit=1)
    assert some["long"].tokens <= result.tokens


def with_data(config, **fields):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def test_what_a_run_held_out_of_its_text(trained):
    """Without val_path: the share of the documents that training holds out, and nothing else."""
    subject = open_run(trained / "run")
    config = with_data(subject.config, val_path=(), val_fraction=0.3)
    (result,) = (found := evaluate_sets(dataclasses.replace(subject, config=config))).values()
    assert list(found) == ["validation"]
    assert result.documents == open_corpus(config.data).stats["val"]["documents"] > 1


@pytest.mark.slow
def test_a_masked_objective_hides_what_training_hides(trained):
    subject = open_run(trained / "run", words=(f"--data.val_path={trained}/val-0.txt",))
    masked = Masked(tokens=(97, 106), mask_token=263)
    config = dataclasses.replace(subject.config, optim=dataclasses.replace(subject.config.optim, objective=masked))
    subject = dataclasses.replace(subject, config=config)
    result = evaluate_sets(subject)["val-0"]
    program = make_program(config, subject.mesh)
    with jax.set_mesh(subject.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, program.state_like["params"])
        params = jax.device_put(nnx.to_pure_dict(nnx.state(subject.model, nnx.Param)), shardings)
        rows = config.data.batch_size, program.batch_sharding
        with Batches(config, open_corpus(config.data), "val", *rows) as batches:
            expected = evaluate(program.eval_step, params, batches, 0, stop=lambda: False)["loss"]
    assert result.tokens == expected.weight < 0.3 * result.bytes
    assert result.loss == pytest.approx(expected.value(), rel=1e-5)


def test_a_published_folder(tmp_path, command):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGT"), n)) for n in (31, 7, 20, 31)]
    (tmp_path / "dna.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    words = (f"--data.val_path={tmp_path}/dna.jsonl", "--data.tokenizer=dna", f"--data.cache_dir={tmp_path}/cache")
    subject = open_published(LLAMA, (*words, "--data.seq_len=32", "--mesh.fsdp=2"))
    model = from_hf(LLAMA)
    documents = [subject.tokenizer.encode(text, bos=True, eos=True) for text in texts]
    (result,) = evaluate_sets(subject).values()
    check_by_position(result, jax.jit(lambda ids: model(ids)), documents, 32)
    for more, told in (((), "error: a published model holds out no text: give --data.val_path A B, or --tasks NAME"),
                       (words[:1], "error: there is no tokenizer: give --data.tokenizer=PATH")):  # fmt: skip
        assert told in (out := command("--hf", LLAMA, *more))[2] and out[0] == 2
    assert "has a vocabulary of 258 tokens" in command("--hf", LLAMA, "--data.tokenizer=byte", *words[:1])[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "give --run DIR or --hf FOLDER, one of them"),
        (("--run=a", "--hf=b"), "give --run DIR or --hf FOLDER, one of them"),
        (("--hf=a", "--step=3"), "--step (3) is of a run: give --run"),
        (("--run=a", "--length=0"), "--length (0) must be at least 1"),
        (("--run=a", "--num-fewshot=1"), "--num-fewshot is of tasks: give --tasks NAME"),
        (("--run=a", "--num_fewshot=1"), "--num-fewshot is of tasks: give --tasks NAME"),  # as the harness spells it
        (("--run=a", "--apply-chat-template"), "--apply-chat-template is of tasks: give --tasks NAME"),
        (("--run=a", "--limt=1"), "unknown option --limt: did you mean --limit? see hybridlm eval --help"),
        (("--run=nowhere",), "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(words, told, command):
    code, said, error = command(*words)
    assert code == 2 and told in error and error.count("\n") == 1 and not said


def test_options_of_the_run_are_one_line(trained, command):
    for words, told in (
        (
            ("--optim.lr=1",),
            "--optim.lr is no option of an evaluation: --data.KEY, --mesh.KEY and --model.compute_dtype",
        ),
        (("--model.blocks.*.n_heads=4",), "--model.blocks.*.n_heads is no option of an evaluation"),
        (("--data.val_pth=x",), "did you mean"),
        (("--data.val_path=nowhere.txt",), "data.val_path ('nowhere.txt'): no file matches"),
        (("--batch=3",), "data.batch_size (3) not divisible by mesh.data * mesh.fsdp (8)"),
        (("--step=1",), "step (1) has no checkpoint in"),
    ):
        code, said, error = command("--run", trained / "run", *words)
        assert code == 2 and told in error and error.count("\n") == 1 and not said, error
