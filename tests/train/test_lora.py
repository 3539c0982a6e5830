# SPDX-License-Identifier: Apache-2.0
"""Adapters: their gradients against dense ones, what stays as it is, and runs that hold them."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from hybridlm.cli import main
from hybridlm.config import MLP, Attention, ConfigError, Mamba2, MeshConfig, MoE, Router, Shared
from hybridlm.config.overrides import override
from hybridlm.config.resume import refused
from hybridlm.data import open_corpus
from hybridlm.model import lora
from hybridlm.model.init import abstract
from hybridlm.sharding import make_mesh
from hybridlm.train.base import load_base
from hybridlm.train.metrics import on_host
from hybridlm.train.run_folder import read_metrics
from hybridlm.train.sample import load_model
from hybridlm.train.step import make_program
from tests.hf.hf_support import FOLDER
from tests.tolerances import check_close
from tests.train.conftest import make_batch, small_config


def adapted(pattern: str, *words: str):
    """A hybrid with a scanned stack, fused matrices, experts and a shared transformer, and adapters of rank 2."""
    config = small_config("--lora.rank=2", "--lora.alpha=3", *words)
    attention, mlp = Attention(n_heads=4, n_kv_heads=2, d_head=8), MLP(d_ff=16)
    blocks = {
        "M": Mamba2(d_state=8, d_head=8, chunk=8), "*": attention,
        "-": MoE(n_experts=4, d_ff=16, router=Router(top_k=2), balance_weight=0.0, z_weight=0.0),
        "S": Shared(mixer=Mamba2(d_state=8, d_head=8, chunk=8), attention=attention, mlp=mlp, mlp_adapter=2),
    }  # fmt: skip
    return replace(config, model=replace(config.model, pattern=pattern, blocks=blocks))


def program_on(config, sizes=(1, 1, 1)):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    return mesh, make_program(config, mesh)


def by_hand(w, a, b, leaf, scale):
    """W + scale * A B, one plain matrix product for each depth and each of fused matrices."""
    if leaf.stacked:
        inner = replace(leaf, stacked=False, shape=leaf.shape[1:])
        return jnp.stack([by_hand(w[i], a[i], b[i], inner, scale) for i in range(len(w))])
    if leaf.fused_axes:
        axis = leaf.fused_axes[0]
        inner = replace(
            leaf, fused_axes=tuple(i - 1 for i in leaf.fused_axes[1:]),
            axes=leaf.axes[:axis] + leaf.axes[axis + 1 :], shape=leaf.shape[:axis] + leaf.shape[axis + 1 :],
        )  # fmt: skip
        axis_b = axis if axis < 1 else axis - (leaf.n_in - 1)
        take = lambda x, i, at: jnp.moveaxis(x, at, 0)[i]
        of_each = [(take(w, i, axis), take(a, i, axis), take(b, i, axis_b)) for i in range(w.shape[axis])]
        return jnp.stack([by_hand(*each, inner, scale) for each in of_each], axis)
    rank = a.shape[-1]
    return w + scale * (a.reshape(-1, rank) @ b.reshape(rank, -1)).reshape(w.shape)


def dense(config, base, low, batch):
    """Mean loss of the model whose matrices were merged by hand."""
    info, flat, of_low = lora.flat(abstract(config.model).info), lora.flat(base), lora.flat(low)
    for path in {path[:-1] for path in of_low}:
        pair = of_low[*path, "lora_a"], of_low[*path, "lora_b"]
        flat[path] = by_hand(flat[path], *pair, info[path], config.lora.scale)
    model = nnx.merge(abstract(config.model).graphdef, lora.unflat(flat))
    logits, valid = model(batch["tokens"], batch["segment_ids"], batch["positions"]), batch["targets"] >= 0
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, batch["targets"], 0))
    return jnp.sum(nats * valid) / valid.sum()


def some_adapters(like, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.1, like)


def gradient_of(program, config, low, batch):
    """That of the train step, read off what plain gradient descent does to the adapters."""
    state = program.init()
    state["params"] = jax.device_put(low, jax.tree.map(lambda x: x.sharding, program.state_like["params"]))
    base = jax.device_get(program.base.params)
    after, metrics = program.train_step(state, jax.device_put(batch, program.batch_sharding))
    return base, after, on_host(metrics)


@pytest.fixture
def descent(monkeypatch):
    """The optimizer takes steps of one times the gradient."""
    plain = lambda optim, steps, info, lengths=None: (optax.sgd(1.0), lambda step: 1.0)
    monkeypatch.setattr("hybridlm.train.step.make_optimizer", plain)


@pytest.mark.parametrize(
    ("pattern", "words", "sizes"),
    [
        ("SS", ("--optim.accumulate=2",), (1, 1, 1)),
        pytest.param("M*-SM*-S", ("--optim.accumulate=2", "--model.remat=full"), (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("M*-M*-", (), (1, 4, 1), marks=pytest.mark.slow),
        pytest.param("M*-SM*-S", ("--optim.accumulate=2",), (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("M*-M*-", ("--model.unroll=4",), (1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_dense_model(descent, pattern, words, sizes):
    config = override(adapted(pattern), words)
    mesh, program = program_on(config, sizes)
    with jax.set_mesh(mesh):
        low, batch = some_adapters(program.state_like["params"]), make_batch(config, 0)
        base, after, metrics = gradient_of(program, config, low, batch)
        after, unchanged = jax.device_get((after["params"], program.base.params))
    loss, grads = jax.jit(jax.value_and_grad(partial(dense, config), argnums=1))(base, low, batch)
    check_close(metrics["loss"].value(), loss, dtype="float32", what="loss")
    ours = lora.flat(jax.tree.map(lambda a, b: a - b, low, after))
    kinds = {path[2:-1] if path[0] == "shared" else path[3:-1] for path in ours}
    of_shared = {("attention", "w_q"), ("mlp", "w_in"), ("link", "adapters", "mlp", "b")} if "S" in pattern else set()
    assert {("mixer", "in_zx"), ("mixer", "out")} | of_shared <= kinds
    for path, expected in lora.flat(grads).items():
        assert np.linalg.norm(ours[path] - expected) < 1e-4 * np.linalg.norm(expected) + 1e-6, path
    jax.tree.map(np.testing.assert_array_equal, base, unchanged)


def test_the_base_has_no_optimizer_state():
    program = program_on(small_config("--lora.rank=2"))[1]
    sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if len(x.shape))
    assert sizes(program.state_like["opt_state"]) == 2 * sizes(program.state_like["params"])  # two moments of adapters
    assert sizes(program.base.like) > sizes(program.state_like["params"])


@pytest.mark.slow
def test_the_loss_falls_and_the_base_stays():
    config = small_config(
        "--lora.rank=4", "--lora.blocks", "M", "*", "--lora.matrices", "in_*", "w_?", "--optim.lr=0.03"
    )
    program = program_on(config)[1]
    batch, losses, state = make_batch(config, 0), [], program.init()
    base = jax.device_get(program.base.params)
    names = {".".join(path[3:-1]) for path in lora.flat(state["params"])}
    assert names == {f"mixer.{name}" for name in ("in_zx", "in_BC", "in_dt", "w_q", "w_k", "w_v", "w_o")}
    for _ in range(8):
        state, metrics = program.train_step(state, batch)
        losses.append(on_host(metrics)["loss"].value())
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, base, jax.device_get(program.base.params))
    merged = program.model(state["params"])(batch["tokens"], batch["segment_ids"], batch["positions"])
    valid = batch["targets"] >= 0
    nats = optax.softmax_cross_entropy_with_integer_labels(merged, jnp.where(valid, batch["targets"], 0))
    evaluated = on_host(program.eval_step(state["params"], batch))["loss"].value()
    check_close(evaluated, (nats * valid).sum() / valid.sum(), dtype="float32", what="loss")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lora.rank=-1"], "lora.rank (-1) must not be negative; 0 trains all parameters"),
        (["--lora.rank=2", "--lora.alpha=0"], "lora.alpha (0.0) must be positive"),
        (["--lora.rank=2", "--lora.blocks", "M", "x"], "lora.blocks (x) is none of the pattern's: M * -"),
    ],
)
def test_words_that_cannot_be(words, told):
    with pytest.raises(ConfigError) as error:
        small_config(*words)
    assert str(error.value) == told


@pytest.mark.quick
def test_matrices_and_ranks_that_are_not_there():
    config = small_config("--lora.rank=2", "--lora.blocks", "-", "--lora.matrices", "in_zx")
    with pytest.raises(
        ConfigError, match=r"lora.matrices \(in_zx\) fit no matrix of lora.blocks \(-\), which have mixer"
    ):
        lora.adapters(config.model, config.lora)
    config = small_config("--lora.rank=33", "--lora.blocks", "M")
    with pytest.raises(ConfigError, match=r"lora.rank \(33\) is above the smaller side of every matrix: at most 32"):
        lora.adapters(config.model, config.lora)
    small = lora.adapters(config.model, replace(config.lora, rank=16))
    shapes = {".".join(path[3:]): spec.b.shape for path, spec in small.items()}
    assert shapes["mixer.in_dt"] == (1, 8, 8) and shapes["mixer.in_zx"] == (1, 16, 2, 8, 8)  # dt has 8 heads
    for word in ("--lora.rank=3", "--lora.alpha=2", "--lora.blocks=M", "--lora.matrices=out"):
        assert list(refused(small_config("--lora.rank=2"), small_config("--lora.rank=2", word)))


TALKS = [
    [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * 3}] for word in "abcdefgh" * 5
]


def published_bytes(folder):
    """A golden checkpoint whose vocabulary is wide enough for bytes."""
    folder.mkdir()
    tensors = load_file(FOLDER / "llama" / "model.safetensors")
    draw = np.random.default_rng(0).normal(size=(264, 32)).astype(np.float32)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = 0.1 * draw
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((FOLDER / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 264, "eos_token_id": 257}))
    return folder


@pytest.fixture
def words(tmp_path, one_device):
    """A run that tunes adapters on conversations, without its number of steps and its folder."""
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    return [
        "train", "--config", "configs/continue_from_hf.py", f"--init.hf={published_bytes(tmp_path / 'published')}",
        f"--data.path={tmp_path}/chat.jsonl", "--data.format=chat", "--data.packing=best_fit", "--data.seq_len=64",
        "--data.val_fraction=0.2", f"--data.cache_dir={tmp_path}/cache", "--data.batch_size=4", "--optim.accumulate=1",
        "--optim.lr=0.02", "--optim.warmup_steps=1", "--optim.schedule=constant", "--run.log_every=1",
        "--run.sample_tokens=0", "--run.tensorboard=False", "--model.compute_dtype=float32", "--lora.rank=4",
        "--lora.alpha=8", "--lora.blocks", "*", "--lora.matrices", "w_[qv]",
    ]  # fmt: skip


def test_a_run_of_adapters(words, tmp_path, capsys):
    """Resumed bit for bit; its checkpoints hold adapters, its folder the base once; loaded, it has them merged."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert main([*words, "--run.steps=6", f"--run.dir={tmp_path}/straight"]) == 0
    said = capsys.readouterr().out
    assert "answers are trained on" in said and "has no tokenizer.json" in said and "adapters of rank 4:" in said
    assert f" chat --run {tmp_path}/straight\n" in said
    assert main([*words, "--run.steps=3", f"--run.dir={run}"]) == 0
    (tmp_path / "published").rename(tmp_path / "elsewhere")
    words = [word if not word.startswith("--init.hf") else f"--init.hf={tmp_path}/elsewhere" for word in words]
    assert main([*words, "--run.steps=6", f"--run.dir={run}"]) == 0
    model, config, _, step = load_model(run)
    straight = load_model(tmp_path / "straight")[0]
    ours, theirs = (nnx.to_pure_dict(nnx.state(one)) for one in (model, straight))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert step == 6 and config.lora.rank == 4
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size(run / "checkpoints" / "6" / "params") < size(run / "base" / "0" / "params")

    records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] in ("train", "val")]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] and all(0 < r["trained"] < 0.5 for r in records if r["kind"] == "train")
    begun = next(r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "start")
    assert 0 < begun["answers_share"] < 0.5  # what a model card of shards goes by

    assert main(["convert", "to-hf", str(run), str(out)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "elsewhere", out))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.rpartition("self_attn.")[2] for name in changed} == {"q_proj.weight", "v_proj.weight"}
    assert main(["convert", "from-hf", str(out), str(tmp_path / "back")]) == 0
    tokens = np.arange(24).reshape(2, 12)
    check_close(load_model(tmp_path / "back")[0](tokens), model(tokens), dtype="float32", what="logits")
    capsys.readouterr()
    texts = []
    for folder in (run, tmp_path / "back"):
        assert main(["generate", "--run", str(folder), "--prompt", "say a", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["eval", "--run", str(run), "--json"]) == 0
    (of_set,) = json.loads(capsys.readouterr().out)["sets"].values()
    recorded = [record for record in records if record["kind"] == "val"][-1]
    assert of_set["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    assert of_set["bits_per_byte"] == pytest.approx(recorded["bits_per_byte"], rel=1e-5)
    held_out = open_corpus(config.data).stats["val"]
    assert of_set["tokens"] == held_out["trained"][0] < held_out["pairs"] / 2  # answers alone, there as here


@pytest.mark.slow
def test_runs_from_runs_and_what_is_refused(mini, one_device, capsys):
    """Adapters on another run's parameters; all parameters from a run of adapters; a base that is gone."""
    words = ["train", "--config", str(mini), "--run.eval_every=-1", "--run.sample_tokens=0"]
    plain, low, after = (mini.parent / name for name in ("plain", "low", "after"))
    of = lambda run: nnx.to_pure_dict(nnx.state(load_model(run)[0]))
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
    assert main([*words, "--run.steps=2", f"--run.dir={plain}"]) == 0
    tuned = [*words, f"--init.run={plain}", "--lora.rank=2", f"--run.dir={low}"]
    assert main([*tuned, "--run.steps=2"]) == 0
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of(plain))
    assert same(load_base(low, like), of(plain)) and not same(of(low), of(plain))
    for word in ("--lora.rank=1", "--lora.alpha=1", "--lora.matrices=w_q", "--lora.blocks=M"):
        assert main([*tuned, word, "--run.steps=4"]) == 2
        assert f"holds a run with another config: {word[2:].partition('=')[0]}" in capsys.readouterr().err
    assert main([*words, f"--init.run={low}", "--run.steps=1", "--optim.lr=1e-30", f"--run.dir={after}"]) == 0
    assert f"parameters of step 2 of {low}" in capsys.readouterr().out
    assert same(of(after), of(low))
    (low / "base").rename(mini.parent / "aside")
    for again in ([*tuned, "--run.steps=4"], ["generate", "--run", str(low), "--prompt", "a"]):
        assert main(again) == 1
        assert "base, which holds what the run's adapters belong to, is missing: put it back" in capsys.readouterr().err
