# SPDX-License-Identifier: Apache-2.0
"""A run that evaluated two sets while it trained, for all tests of this folder."""

import jax
import pytest

from hybridlm.cli import main, train_main
from hybridlm.sharding import make_mesh
from tests.train.conftest import CONFIG, write_texts


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder with texts, `run` of 2 steps on one device, and `long.jsonl`: documents of 1 to 129 tokens, of which two
    fill a row of 128."""
    folder = tmp_path_factory.mktemp("trained")
    write_texts(folder)
    text = (folder / "val-0.txt").read_text()
    sizes = (127, 1, 60, 127, 3, 100, 64, 33)
    lines = (f'{{"text": "{text[i : i + size]}"}}\n' for i, size in enumerate(sizes))
    (folder / "long.jsonl").write_text("".join(lines))
    (folder / "mini.py").write_text(CONFIG.format(folder=folder))
    words = ["--run.steps=2", "--run.eval_every=2", "--run.eval_batches=0", "--run.sample_tokens=0"]
    words += ["--data.val_path", f"first={folder}/val-0.txt", f"{folder}/val-1.txt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridlm.train.loop.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        assert train_main(["--config", str(folder / "mini.py"), *words]) == 0
    return folder


@pytest.fixture
def command(capsys):
    """`hybridlm eval` with words: (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["eval", *map(str, words)])
        return code, *capsys.readouterr()

    return run
