# SPDX-License-Identifier: Apache-2.0
"""Models of genomes, and models that the same words of the contract make, through the real command: they learn."""

from pathlib import Path

import jax
import numpy as np
import pytest

from hybridlm.cli import main, train_main
from hybridlm.config.find import config_names, load_config
from hybridlm.config.stored import from_dict
from hybridlm.config.tree import to_dict
from hybridlm.model.init import abstract
from hybridlm.train.run_folder import read_metrics
from hybridlm.train.sample import load_run
from tests.genomes import make_genome, write_fasta
from tests.train.conftest import write_texts

DOCS = Path(__file__).parents[2] / "docs"
SHORT = (
    "--run.steps=50", "--run.log_every=10", "--optim.warmup_steps=5", "--run.eval_every=0", "--run.eval_batches=2",
    "--run.save_every=0", "--run.sample_tokens=0", "--run.tensorboard=False", "--model.compute_dtype=float32",
    "--optim.lr=1e-2", "--data.batch_size=8",
)  # fmt: skip
GENOMES = {
    "caduceus:ps-1k": ("--model.d_model=32", "--model.pattern=B"),
    "caduceus:ph-1k": ("--model.d_model=32", "--model.pattern=BB"),
    "hyenadna:tiny-1k": ("--model.d_model=32", "--model.blocks.-.d_ff=64", "--model.blocks.H.filter.max_len=64"),
}
TEXTS = {
    "stripedhyena:tiny": ("--model.d_model=64", "--model.pattern=H-*-"),
    "hymba:tiny": ("--model.pattern=G-L-",),
    "titans:tiny-mac": ("--model.pattern=C-",),
    "titans:tiny-mag": ("--model.pattern=G-",),
    "titans:tiny-mal": ("--model.pattern=M*-",),
    "hunyuan_like:tiny": ("--model.pattern=ME*E",),
}

COUNTS = {
    "hunyuan_like:560b": 592_250_724_720,
    "hymba:1.5b": 1_611_267_200,
    "stripedhyena:7b": 7_646_089_216,
    "titans:mac": 161_800_368,
    "titans:mag": 161_818_800,
    "titans:mal": 161_809_584,
}
"""Parameters; of models of genomes tests/model/test_hyena.py has them."""
SIZES = [name for name in config_names() if name.partition(":")[0] in {n.partition(":")[0] for n in GENOMES | TEXTS}]


def frequencies(folder: Path) -> float:
    """Nats of a token that the frequencies of bytes leave: what a model that reads nothing before it can reach."""
    counts = np.bincount(np.frombuffer(b"".join(file.read_bytes() for file in folder.glob("train-*.txt")), np.uint8))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_counted_and_listed(name):
    config, (composition, _, size) = load_config(name), name.partition(":")
    assert from_dict(to_dict(config)) == config and config.name == f"{composition}_{size}"
    text = "".join((DOCS / page).read_text() for page in ("compositions.md", "genomes.md"))
    assert f"`{composition}`" in text
    if name in COUNTS:
        assert sum(p.size for p in jax.tree.leaves(abstract(config.model).shapes)) == COUNTS[name]
        assert f"{COUNTS[name]:,}" in text


def test_every_composition_is_trained():
    """Each of the names has a size below that learns, and what is counted is there."""
    assert {name.partition(":")[0] for name in SIZES} == {name.partition(":")[0] for name in GENOMES | TEXTS}
    assert COUNTS.keys() <= set(SIZES)


def train(config: str, tmp_path, *words: str) -> list[float]:
    """The losses of a short run."""
    words = (
        f"--config={config}",
        *SHORT,
        *words,
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--run.dir={tmp_path / 'run'}",
    )
    assert train_main(list(words)) == 0
    return [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize("config", GENOMES)
@pytest.mark.slow
def test_a_model_of_genomes_learns(config, tmp_path, one_device, capsys):
    write_fasta(tmp_path / "genome.fa.gz", make_genome(40, 300, n_motifs=1))
    words = (f"--data.path={tmp_path / 'genome.fa.gz'}", "--data.val_fraction=0.1", "--data.seq_len=64")
    losses = train(config, tmp_path, *words, *GENOMES[config])
    assert losses[-1] < 1.3 < losses[0]  # nats of a base; log 4 is 1.386
    capsys.readouterr()
    if not config.startswith("caduceus"):
        return
    assert main(["generate", "--run", str(tmp_path / "run"), "--prompt", "ACGT"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "cannot be decoded token by token: model." in told[0]
    model, tokenizer, step = load_run(tmp_path / "run")
    partner = np.arange(16)
    partner[: tokenizer.vocab_size] = tokenizer.complement
    tokens = tokenizer.encode(make_genome(1, 50, seed=9)[0])[None]
    read = jax.jit(lambda model, tokens: model(tokens))
    own, other = (np.asarray(read(model, t)) for t in (tokens, partner[tokens][:, ::-1]))
    error = np.abs(other[:, ::-1][..., partner] - own).max() / np.abs(own).max()
    assert step == 50 and (error < 1e-5) == config.startswith("caduceus:ps")


@pytest.mark.slow
@pytest.mark.parametrize("config", TEXTS)
def test_a_composition_learns(config, tmp_path, one_device):
    write_texts(tmp_path)
    words = (f"--data.path={tmp_path}/train-*.txt", f"--data.val_path={tmp_path}/val-*.txt", "--data.seq_len=64")
    losses = train(config, tmp_path, *words, *TEXTS[config])
    assert losses[-1] < frequencies(tmp_path) < losses[0]
