# SPDX-License-Identifier: Apache-2.0
"""Training on from a published folder keeps its tokenizer, or says that it does not."""

import shutil

import pytest

from hybridlm import load_config
from hybridlm.data import load_tokenizer
from hybridlm.train.tokenizer_copy import told_of_other
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
