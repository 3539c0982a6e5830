# SPDX-License-Identifier: Apache-2.0
"""Training on from a published folder keeps its tokenizer, or says that it does not."""

import json
import shutil

import pytest

from hybridlm import from_hf, load_config, to_hf
from hybridlm.config import Config, DataConfig, LoraConfig
from hybridlm.data import load_tokenizer
from hybridlm.data.as_files import files_of
from hybridlm.data.tokenizer import ByteTokenizer
from hybridlm.train.about import about_run
from hybridlm.train.tokenizer_copy import keep_tokenizer, told_of_other
from tests.data.test_data_tokenizer import train_bpe
from tests.hf.hf_support import FOLDER

pytestmark = pytest.mark.quick


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(FOLDER / "llama", folder, ignore=shutil.ignore_patterns("*.npz"))
    train_bpe(folder / "tokenizer.json")
    return folder


def test_that_of_the_folder_is_the_default(published, tmp_path):
    words = [f"--init.hf={published}"]
    assert load_config("continue_from_hf", words).data.tokenizer == str(published)
    assert load_config("continue_from_hf", [*words, "--data.tokenizer=byte"]).data.tokenizer == "byte"
    assert told_of_other(load_tokenizer(str(published)), published) == ""
    assert told_of_other(load_tokenizer(str(published), bos="</s>"), published) == ""  # other ends, the same ids
    shutil.copytree(published, tmp_path / "copy")
    assert told_of_other(load_tokenizer(str(tmp_path / "copy")), published) == ""


def test_another_is_named_with_both_sizes(published, tmp_path):
    n, told = load_tokenizer(str(published)).vocab_size, told_of_other(load_tokenizer("byte"), published)
    assert told == (
        f"data.tokenizer byte (258 ids) is not the tokenizer of {published} ({n} ids): "
        "the parameters learned other tokens"
    )
    train_bpe(tmp_path / "mine.json", ("<s>", "</s>", "<x>"))
    mine = load_tokenizer(str(tmp_path / "mine.json"))
    assert f"mine.json ({mine.vocab_size} ids) is not the tokenizer of" in told_of_other(mine, published)
    (published / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in told_of_other(mine, published)


def test_the_byte_tokenizer_as_a_file_is_the_byte_tokenizer(published):
    for name, text in files_of(ByteTokenizer()).items():
        (published / name).write_text(text)
    assert told_of_other(load_tokenizer("byte"), published) == ""


def test_an_export_has_the_runs_own_tokenizer(published, tmp_path):
    """Its chat template too, where the rest is the published folder's; nothing of the other's stays beside it."""
    run, given = tmp_path / "run", tmp_path / "given"
    shutil.copytree(published, given)
    keep_tokenizer(DataConfig(tokenizer=str(given)), run)
    config = Config(data=DataConfig(tokenizer=str(given), format="chat"), lora=LoraConfig(rank=3))
    about = about_run(run, config, 2, {}, published)
    assert about.tokenizer is None and not about.files and not about.ids  # the same: that of the folder is carried
    assert about.training["adapters"].startswith("of rank 3, merged") and "answers" in about.training["conversations"]
    of_text = about_run(run, Config(), 2, {}, published).training
    assert "adapters" not in of_text and "conversations" not in of_text
    line = {"kind": "start", "step": 0, "answers_share": 0.25}  # shards of conversations are no format of their own
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    told = "answers alone were trained on, 25.0% of the tokens"
    assert about_run(run, Config(), 2, {}, published).training["conversations"] == told

    (run / "tokenizer" / "tokenizer_config.json").write_text('{"chat_template": "mine"}')
    (published / "chat_template.jinja").write_text("theirs")
    about = about_run(run, config, 2, {}, published)
    assert about.tokenizer == run / "tokenizer" and not about.ids
    to_hf(from_hf(published), tmp_path / "out", about=about)
    assert "mine" in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()

    about = about_run(tmp_path / "bytes", Config(), 2, {}, published)
    assert about.ids == {"bos_token_id": 256, "eos_token_id": 257} and about.files == files_of(ByteTokenizer())
