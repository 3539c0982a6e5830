# SPDX-License-Identifier: Apache-2.0
"""`hybridlm quantize` and training with rounded matrices: folders that load everywhere, gradients, bits per byte."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hybridlm
from hybridlm.cli import main
from hybridlm.config import QuantizeConfig
from hybridlm.config.find import load_config
from hybridlm.config.resume import refused
from hybridlm.errors import ConfigError
from hybridlm.hf import to_hf
from hybridlm.layers.quantized import Quantized
from hybridlm.model import init, quantize
from hybridlm.train.quantized import TABLE, quantize_run
from tests.hf.hf_support import FOLDER
from tests.tolerances import check_close
from tests.train.conftest import make_batch, small_config, small_program

pytestmark = pytest.mark.quantize
RUN = Path(__file__).resolve().parents[1] / "fixtures" / "runs" / "hybrid" / "run"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The fixture's run in int8."""
    folder = tmp_path_factory.mktemp("quantised") / "out"
    assert main(["quantize", str(RUN), str(folder)]) == 0
    return folder


def said(capsys, *words, code=0):
    assert main(list(map(str, words))) == code
    return capsys.readouterr()


def one_line(capsys, *words) -> str:
    err = said(capsys, *words, code=2).err
    assert err.count("\n") == 1, err
    return err


def matrices(model) -> list[Quantized]:
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def test_the_folder_loads_as_a_run(out, capsys):
    run, before = hybridlm.load_run(out), hybridlm.load_run(RUN)
    assert (run.step, run.tokenizer.fingerprint) == (before.step, before.tokenizer.fingerprint)
    assert run.config.quantize == QuantizeConfig("int8", stored=True) and run.config.model == before.config.model
    assert {leaf.values.dtype for leaf in matrices(run.model)} == {jnp.dtype("int8")}
    told = (out / TABLE).read_text()
    assert told.startswith(" ") and "matrices" in told and "int8, a scale for each output" in told and "norms" in told


@pytest.mark.slow
def test_training_with_products_in_fp8():
    """Parameters stay float32; the loss falls as without, with some matrices left out, too."""

    def losses(*overrides):
        config, mesh, program = small_program(overrides)
        with jax.set_mesh(mesh):
            state, found = program.init(), []
            for _ in range(30):
                state, metrics = program.train_step(state, make_batch(config, 0))
                found.append(float(metrics["loss"].value()))
        assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
        return np.array(found)

    exact, near = losses(), losses("quantize.products=fp8")
    kept = losses("quantize.products=fp8", "quantize.keep=mixer.in_*")
    for found in (near, kept):
        assert 0 < np.abs(found - exact)[:3].max() < 0.02 * exact[0]
        assert found[-1] < 0.7 * found[0] and abs(found[-1] - exact[-1]) < 0.1 * (exact[0] - exact[-1])
    assert (near != kept).any()


def test_the_line_to_go_on_with_names_the_config_file(tmp_path, capsys):
    text = said(capsys, "quantize", RUN, tmp_path / "out", "--config", "hybrid_tiny").out
    assert text.endswith(f"generate --run {tmp_path / 'out'} --config hybrid_tiny --prompt TEXT\n")


@pytest.mark.slow
def test_it_writes_text(out, capsys):
    run = hybridlm.load_run(out)
    words = ["--run", out, "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "6", "--json", "--quiet"]
    text = json.loads(said(capsys, "generate", *words).out)["text"]
    prompt = jnp.asarray(run.tokenizer.encode("def ", bos=run.tokenizer.bos_id is not None))[None]
    new = hybridlm.generate(run.model, prompt, max_new_tokens=6, eos_id=run.tokenizer.eos_id)
    assert run.tokenizer.decode(jax.device_get(new)[0].tolist()).startswith(text)


def test_what_cannot_be_done_is_one_line(out, capsys, tmp_path):
    line = lambda *words: one_line(capsys, *words)
    assert f"{out} is not empty: choose a new folder" in line("quantize", RUN, out)
    assert "holds a quantised model: name the run that it was made of" in line("quantize", out, tmp_path / "again")
    assert "quantize.keep (w_x) fits no matrix" in line("quantize", RUN, tmp_path / "a", "--quantize.keep", "w_x")
    assert "needs quantize.weights=int8, not fp8" in line(
        "quantize", RUN, tmp_path / "a", "--quantize.weights=fp8", "--quantize.activations=int8"
    )
    assert "step (7)" in line("quantize", RUN, tmp_path / "a", "--step", "7")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_bytes((RUN / "config.json").read_bytes())
    assert "begun has no checkpoint yet" in line("quantize", tmp_path / "begun", tmp_path / "a")
    assert "give the folder to write" in line("quantize", RUN)
    assert "give a run or a published folder, or --config NAME" in line("quantize")
    assert "no published family has" in line("convert", "to-hf", out, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"the model is quantised .* give the one that it was made of"):
        to_hf(hybridlm.load_run(out).model, tmp_path / "a")
    train = ["train", "--config", "hybrid_tiny", f"--run.dir={tmp_path / 'b'}", "--data.tokenizer=byte"]
    assert "holds a quantised model" in line(*train, f"--init.run={out}")
    told = f"{out} holds a quantised model, which is not trained on: train the run that it was made of"
    assert told in line("train", "--config", "hybrid_tiny", f"--run.dir={out}")
    assert "quantize.weights (int8) and lora.rank (2) exclude" in line(
        *train, "--quantize.weights=int8", "--lora.rank=2"
    )
    assert not [name for name in ("again", "a") if (tmp_path / name).exists()]
    text = said(capsys, "quantize", "--config", "hybrid_tiny", "--quantize.weights=fp8").out
    assert "matrices" in text and "fp8, a scale for each output" in text


@pytest.mark.slow
def test_gradients_are_those_at_the_rounded_matrices(monkeypatch):
    """Straight through: the state in float32 moves by the gradient that a model of the rounded matrices has."""
    plain = lambda optim, steps, info, lengths=None: (optax.sgd(1.0), lambda step: 1.0)
    monkeypatch.setattr("hybridlm.train.step.make_optimizer", plain)
    config, mesh, program = small_program.__wrapped__(("--quantize.weights=int8", "--optim.accumulate=2"))
    with jax.set_mesh(mesh):
        state, batch = program.init(), make_batch(config, 0)
        before = jax.device_get(state["params"])
        after = jax.device_get(program.train_step(state, jax.device_put(batch, program.batch_sharding))[0]["params"])
    graphdef = init.abstract(config.model).graphdef

    def loss(params):
        logits = nnx.merge(graphdef, params)(batch["tokens"], batch["segment_ids"], batch["positions"])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(batch["targets"], 0))
        return jnp.sum(nats * (batch["targets"] >= 0)) / (batch["targets"] >= 0).sum()

    near = quantize.round_matrices(before, config.model, config.quantize)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(near), jax.tree.leaves(before), strict=True))
    expected = jax.jit(jax.grad(loss))(near)
    for a, b, grad in zip(*map(jax.tree.leaves, (before, after, expected)), strict=True):
        check_close(a - b, grad, dtype="float32", what="model gradient")


def test_rounding_may_change_on_resume_and_storage_may_not():
    config = small_config()
    later = replace(config, quantize=QuantizeConfig("int8", "int8", ("in_dt",)))
    assert not refused(config, later) and not refused(later, config)
    assert refused(config, replace(config, quantize=QuantizeConfig("int8", stored=True))).keys() == {"quantize.stored"}


def bits(capsys, *words) -> float:
    found = json.loads(said(capsys, "eval", *words, "--json", "--batch", "8").out)
    return next(iter(found["sets"].values()))["bits_per_byte"]


def trained(capsys, mini, folder: Path, *options: str) -> None:
    small = ("--model.d_model=64", "--run.steps=150", "--run.save_every=0", "--run.eval_every=0")
    said(capsys, "train", "--config", mini, *small, f"--run.dir={folder}", *options)


@pytest.mark.slow
def test_bits_per_byte_within_a_percent(mini, tmp_path, capsys, one_device):
    """Of a model trained here, quantised after training; eval and probe read the folders."""
    trained(capsys, mini, tmp_path / "plain")
    before = bits(capsys, "--run", tmp_path / "plain", "--model.compute_dtype=bfloat16")
    assert before < 3.5  # of bytes that would be 8: letters and words were learned
    for weights, options in (("int8", ()), ("fp8", ()), ("int8", ("--quantize.activations=int8",))):
        out = tmp_path / f"{weights}{len(options)}"
        said(capsys, "quantize", tmp_path / "plain", out, f"--quantize.weights={weights}", *options)
        found = bits(capsys, "--run", out, "--model.compute_dtype=bfloat16")
        assert abs(found / before - 1) < 0.01, (weights, options, before, found)
    probed = said(
        capsys, "probe", "--run", tmp_path / "int80", "--tasks", "copying", "--lengths", "64", "--batches", "1"
    )
    assert "copying" in probed.out


@pytest.mark.slow
def test_trained_for_it(mini, tmp_path, capsys, one_device):
    """The loss of the run's own last evaluation, which rounds, is that of the quantised folder."""
    trained(capsys, mini, tmp_path / "aware", "--quantize.weights=int8", "--quantize.activations=int8")
    records = [json.loads(line) for line in (tmp_path / "aware" / "metrics.jsonl").read_text().splitlines()]
    of_run = [record["bits_per_byte"] for record in records if record["kind"] == "val"][-1]
    said(capsys, "quantize", tmp_path / "aware", tmp_path / "out")
    assert hybridlm.load_run(tmp_path / "out").config.quantize == QuantizeConfig("int8", "int8", stored=True)
    found = bits(capsys, "--run", tmp_path / "out", "--limit", "2")
    assert abs(found / of_run - 1) < 0.002, (found, of_run)


@pytest.mark.slow
def test_a_published_folder(tmp_path, capsys):
    """The same parameters as of a run of it."""
    out, run = tmp_path / "out", tmp_path / "run"
    said(capsys, "quantize", FOLDER / "nemotron_h", out, "--quantize.weights=fp8", "--data.tokenizer=byte")
    said(capsys, "convert", "from-hf", FOLDER / "nemotron_h", run, "--data.tokenizer=byte")
    quantize_run(run, tmp_path / "again", {"weights": "fp8"})
    a, b = (hybridlm.load_run(folder) for folder in (out, tmp_path / "again"))
    assert matrices(a.model) and a.step == b.step == 0
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a.model, nnx.Param), nnx.state(b.model, nnx.Param))


def test_config_words():
    config = load_config("hybrid_tiny", ["--quantize.weights=int8", "--quantize.keep", "in_dt", "w_o"])
    assert config.quantize == QuantizeConfig("int8", None, ("in_dt", "w_o"))
