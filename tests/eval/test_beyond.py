# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study length`, and models read with other rotary embeddings than they were trained with."""

import json
from dataclasses import replace

import jax
import pytest
from flax import nnx

from hybridlm.cli import main
from hybridlm.config import NTK, YaRN
from hybridlm.eval import evaluate_sets, open_published, open_run
from hybridlm.model.init import abstract
from hybridlm.study.length import read_rows
from tests.eval.test_sets import LLAMA, check_by_position, documents_of
from tests.train.conftest import CONFIG


def study(*words) -> int:
    return main(["study", "length", *map(str, words)])


@pytest.fixture
def beyond(trained, tmp_path):
    """Words of a study of the run, to four times its rows."""
    words = ["--run", trained / "run", "--times", "4", "--dir", tmp_path / "study"]
    return [*words, f"--data.val_path={trained}/long.jsonl"]


def test_what_the_study_reads(trained, beyond, tmp_path, capsys):
    """A scaling's losses by position are those of the model with that scaling, of documents that fill a row."""
    assert study(*beyond, "--methods", "yarn") == 0
    said = capsys.readouterr().out
    (row,) = read_rows(tmp_path / "study" / "length.json")
    assert (row.method, row.trained, row.length, row.step, row.gate) == ("yarn", 32, 128, 2, "none")
    assert [bucket.tokens for bucket in row.buckets] == [2, 2, 4, 8, 16, 32, 64, 128]
    assert {bucket.label: f"{bucket.loss:.4f}" for bucket in row.buckets}["64-128"] in said
    words = (f"--data.val_path={trained}/long.jsonl", "--data.seq_len=128", "--data.packing=best_fit")
    subject = open_run(trained / "run", words=words)
    block = subject.config.model.blocks["*"]
    blocks = {**subject.config.model.blocks, "*": replace(block, rope=replace(block.rope, scaling=YaRN(4.0, 32)))}
    graphdef = abstract(replace(subject.config.model, blocks=blocks)).graphdef
    model = nnx.merge(graphdef, nnx.to_pure_dict(nnx.state(subject.model, nnx.Param)))
    result = evaluate_sets(replace(subject, model=model))["long"]
    assert [bucket.loss for bucket in row.buckets] == [bucket.long_loss for bucket in result.by_position]
    page = (tmp_path / "study" / "length.html").read_text()
    assert "YaRN" in page and "<svg" in page and (tmp_path / "study" / "length.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_second_start_reads_nothing_again(beyond, tmp_path, capsys, monkeypatch):
    assert study(*beyond, "--methods", "none", "yarn") == 0
    plain, yarn = read_rows(tmp_path / "study" / "length.json")
    assert [bucket.loss for bucket in plain.buckets] != [bucket.loss for bucket in yarn.buckets]
    capsys.readouterr()
    monkeypatch.setattr("hybridlm.eval.sets.evaluate_sets", lambda *args: pytest.fail("read again"))
    assert study(*beyond, "--methods", "yarn", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [line["method"] for line in printed["summary"]] == ["yarn"] and len(printed["rows"]) == 2


@pytest.mark.slow
def test_a_length_with_a_factor_of_its_own(trained, beyond, tmp_path):
    """`dynamic`: of each length the positions that shorter ones do not reach, its factor the ratio of the lengths."""
    assert study(*beyond, "--methods", "dynamic") == 0
    (row,) = read_rows(tmp_path / "study" / "length.json")
    expected = []
    for length, alpha in ((32, 1.0), (64, 2.0), (128, 4.0)):
        words = [f"--data.val_path={trained}/long.jsonl", f"--data.seq_len={length}", "--data.packing=best_fit"]
        words += ["--model.blocks.*.rope.scaling=NTK", f"--model.blocks.*.rope.scaling.alpha={alpha}"]
        subject = open_run(trained / "run", words=words)
        assert subject.model.config.blocks["*"].rope.scaling == NTK(alpha)
        result = evaluate_sets(subject)["long"]
        expected += [
            (b.to, b.long_tokens, b.long_loss) for b in result.by_position if b.to > length // 2 or length == 32
        ]
    assert [(b.to, b.tokens, b.loss) for b in row.buckets] == expected
    documents = [ids for ids in documents_of(trained, subject.tokenizer) if len(ids) == 129]
    assert len(documents) == 2
    check_by_position(evaluate_sets(subject)["long"], jax.jit(lambda ids: subject.model(ids)),
                      documents_of(trained, subject.tokenizer), 128)  # fmt: skip


@pytest.mark.slow
def test_a_published_folder_with_another_scaling(tmp_path):
    (tmp_path / "dna.jsonl").write_text('{"text": "ACGTACGTACGTACGGTTTACAACGTACGTA"}\n')
    words = [f"--data.val_path={tmp_path}/dna.jsonl", "--data.tokenizer=dna", f"--data.cache_dir={tmp_path}/cache"]
    words += ["--data.seq_len=32"]
    (symbol,) = [s for s, block in open_published(LLAMA, words).config.model.blocks.items() if hasattr(block, "rope")]
    scaled = [f"--model.blocks.{symbol}.rope.scaling=Linear", f"--model.blocks.{symbol}.rope.scaling.factor=4"]
    plain, linear = (open_published(LLAMA, [*words, *more]) for more in ([], scaled))
    assert linear.model.config.blocks[symbol].rope.scaling.factor == 4
    losses = [evaluate_sets(subject)["dna"].loss for subject in (plain, linear)]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_a_study_that_trains(tmp_path, trained, capsys):
    """Gates, seeds and what is trained on; the same words a second time train and read nothing."""
    (tmp_path / "mini.py").write_text(CONFIG.format(folder=trained))
    words = ["--config", tmp_path / "mini.py", "--times", "2", "--methods", "none", "yarn", "--seeds", "1"]
    words += ["--gates", "none", "head", "--tune-steps", "1", "--limit", "1", "--dir", tmp_path / "study"]
    words += ["--tune-batch", "8"]
    words += ["--run.steps=1", "--run.eval_every=-1", "--run.sample_tokens=0"]
    assert study(*words) == 0
    rows = read_rows(tmp_path / "study" / "length.json")
    assert {(row.gate, row.seed, row.method, row.tuned) for row in rows} == {
        (gate, 1, method, tuned) for gate in ("none", "head") for method in ("none", "yarn")
        for tuned in (0, 1)
    }  # fmt: skip
    assert len(rows) == 8 and {(row.trained, row.length, row.step) for row in rows} == {(32, 64, 1)}
    longer = json.loads((tmp_path / "study" / "gate=head,seed=1,yarn,1x64" / "config.json").read_text())
    assert longer["data"]["seq_len"] == 64 and longer["data"]["batch_size"] == 8
    scaling = longer["model"]["blocks"]["*"]["rope"]["scaling"]
    assert (scaling["type"], scaling["factor"], scaling["original_max_positions"]) == ("YaRN", 2.0, 32)
    assert longer["init"]["run"].endswith("study/gate=head,seed=1")
    said = capsys.readouterr().out
    assert "6 runs in" in said and "6 to train" in said and "with gate head the loss rises" in said
    assert study(*words, "--json") == 0
    again = capsys.readouterr()
    assert len(json.loads(again.out)["gates"]) == 4
    assert "0 to train" in again.err and "[1/8]" not in again.err
    assert study(*words, "--optim.lr=0.5") == 2
    assert "holds a run with another config: optim.lr (0.01 there, 0.5 now); choose another --dir" in (
        capsys.readouterr().err
    )
