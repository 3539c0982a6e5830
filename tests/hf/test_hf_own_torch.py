# SPDX-License-Identifier: Apache-2.0
"""Our own format as others use it (the `parity` extra): transformers with the code that lies in the folder."""

import json
from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest

import hybridlm
from hybridlm.cli import main
from hybridlm.data.as_files import files_of
from hybridlm.data.tokenizer import ByteTokenizer, FileTokenizer
from hybridlm.hf.card import About
from hybridlm.train.sample import load_run
from tests.hf.hf_support import ATOL, forward
from tests.hf.own_support import ALL, config_of, random_config
from tests.model.model_support import VOCAB, build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (3, 15)).astype(np.int32)
IDS = np.ones_like(TOKENS)
IDS[0, :4] = IDS[1, -5:] = IDS[2, [3, 8, 9]] = 0
"""Padding on the left, on the right, and in between."""


def logits(model) -> tuple[np.ndarray, np.ndarray]:
    """Ours of TOKENS, plain and with the padding of IDS, by one program for each config."""
    found = np.asarray(forward(model, np.concatenate([TOKENS, TOKENS]), np.concatenate([np.ones_like(IDS), IDS])))
    return found[: len(TOKENS)], found[len(TOKENS) :]


def published(folder, **options):
    """The model as transformers loads it: every key, and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def export(config, folder, **options):
    """(our model, as transformers loads its export)."""
    model = build(config)
    hybridlm.to_hf(model, folder, family="hybridlm", **options)
    return model, published(folder)


def ids(array) -> "torch.Tensor":
    return torch.tensor(array, dtype=torch.long)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


BY_THE_MINUTE = ("attentions", "mambas", "composed", "random-0")
CONFIGS = [
    pytest.param(config, id=name, marks=() if name in BY_THE_MINUTE else pytest.mark.slow)
    for name, config in (
        *((name, config_of(name)) for name in ALL),
        *((f"random-{seed}", random_config(seed)) for seed in range(12)),
    )
]


@pytest.mark.parametrize("config", CONFIGS)
def test_logits(config, tmp_path):
    """Plain, padded anywhere, and through the cache in pieces as ours; greedy text with a cache as without."""
    ours, theirs = export(config, tmp_path / "model")
    expected, padded = logits(ours)
    atol = ATOL * max(1, np.abs(expected).max() / 5)
    np.testing.assert_allclose(theirs(ids(TOKENS)).logits.numpy(), expected, rtol=0, atol=atol)
    real = IDS != 0
    found = theirs(ids(TOKENS), attention_mask=ids(IDS)).logits.numpy()
    np.testing.assert_allclose(found[real], padded[real], rtol=0, atol=atol)
    cache, parts = None, []
    for start, stop in pairwise([0, 6, 7, 8, 15]):
        out = theirs(
            ids(TOKENS[:, start:stop]), attention_mask=ids(IDS[:, :stop]), past_key_values=cache, use_cache=True
        )
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        parts.append(out.logits)
    np.testing.assert_allclose(torch.cat(parts, 1).numpy()[real], padded[real], rtol=0, atol=atol)
    left = ids(TOKENS[:, :8]), {"attention_mask": ids(np.sort(IDS[:, :8], axis=1)), "pad_token_id": 0}
    texts = [theirs.generate(left[0], **left[1], max_new_tokens=6, do_sample=False, use_cache=use) for use in (1, 0)]
    assert torch.equal(*texts)


def test_greedy_text_is_ours(tmp_path):
    ours, theirs = export(config_of("attentions"), tmp_path / "model")
    expected = hybridlm.generate(ours, TOKENS[:1, :5], max_new_tokens=8, temperature=0.0, key=jax.random.key(0))
    found = theirs.generate(ids(TOKENS[:1, :5]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found[0, 5:].tolist() == np.asarray(expected)[0].tolist()


def test_beams_and_batches_of_copies(tmp_path):
    """Beam search moves rows of the cache; sampling several texts repeats them."""
    theirs = export(config_of("composed"), tmp_path / "model")[1]
    prompt, options = ids(TOKENS[:2, :5]), {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(prompt, **options), theirs.generate(prompt, use_cache=False, **options))
    many = theirs.generate(prompt, max_new_tokens=3, do_sample=True, num_return_sequences=3, pad_token_id=0)
    assert many.shape == (6, 8)


def test_embeddings_as_prompt_and_hidden_states(tmp_path):
    theirs = export(config_of("routed"), tmp_path / "model")[1]
    prompt = ids(TOKENS[:1, :5])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(prompt, **options)[:, 5:]
    embedded = theirs.get_input_embeddings()(prompt)
    for use_cache in (True, False):
        assert torch.equal(theirs.generate(inputs_embeds=embedded, use_cache=use_cache, **options), expected)
    out = theirs(prompt, output_hidden_states=True, return_dict=False)
    assert len(out[-1]) == 5 and torch.is_tensor(out[0])
    last = theirs(prompt, logits_to_keep=1).logits
    torch.testing.assert_close(last, out[0][:, -1:])


@pytest.mark.parametrize("name", ["mambas", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rwkv7", "latents"))])
def test_gradients_and_loss(name, tmp_path):
    """The loss that transformers takes; every parameter is reached, with activations kept or made again."""
    ours, theirs = export(config_of(name), tmp_path / "model")
    before = logits(ours)[0][:, :-1]
    log_p = before - np.log(np.exp(before).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, TOKENS[:, 1:, None], -1).mean()
    grads = []
    for again in (False, True):
        theirs.train()
        if again:
            getattr(theirs, "activation_checkpointing_enable", theirs.gradient_checkpointing_enable)()
        theirs.zero_grad()
        with torch.enable_grad():
            loss = theirs(ids(TOKENS), labels=ids(TOKENS)).loss
            loss.backward()
        assert abs(loss.item() - expected) < ATOL
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in theirs.parameters())
        grads.append([p.grad.clone() for p in theirs.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "mambas" else pytest.mark.slow) for name in ALL]
)
def test_stored_in_bfloat16(name, tmp_path):
    """Read in float32 it is what we read; in bfloat16 the parameters of recurrences and norms stay float32.

    What is near in bfloat16 is the middle one of the tokens: where a head's norm divides by next to nothing, as at one
    token of `decays`, rounding grows to a half of it, in our own bfloat16 to a seventh, by the CPU's order of sums.
    """
    ours = build(config_of(name))
    hybridlm.to_hf(ours, tmp_path / "model", family="hybridlm", dtype="bfloat16")
    again = hybridlm.from_hf(tmp_path / "model", compute_dtype="float32")
    expected, _ = logits(again)
    np.testing.assert_allclose(
        published(tmp_path / "model", dtype=torch.float32)(ids(TOKENS)).logits.numpy(), expected, rtol=0, atol=ATOL
    )
    narrow = published(tmp_path / "model", dtype="auto")
    kinds = {name: p.dtype for name, p in narrow.named_parameters()}
    assert kinds["model.norm.weight"] == torch.float32 and kinds["model.embed_tokens.weight"] == torch.bfloat16
    if name == "mambas":
        assert kinds["model.layers.0.mixer.A_log"] == torch.float32
        assert kinds["model.layers.0.mixer.in_proj.weight"] == torch.bfloat16
    found = narrow(ids(TOKENS)).logits
    assert found.dtype == torch.float32
    of_tokens = np.sqrt(np.square(found.numpy() - expected).mean(-1) / np.square(expected).mean())
    assert np.median(of_tokens) < 0.025


def test_saved_by_transformers_and_read_by_us(tmp_path):
    ours, theirs = export(config_of("composed"), tmp_path / "model")
    theirs.save_pretrained(tmp_path / "saved")
    again = hybridlm.from_hf(tmp_path / "saved")
    np.testing.assert_array_equal(logits(again), logits(ours))
    np.testing.assert_array_equal(published(tmp_path / "saved")(ids(TOKENS)).logits, theirs(ids(TOKENS)).logits)


@pytest.mark.parametrize(
    "name", ["hybrid_1b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hybrid_tiny", "hybrid_125m"))]
)
def test_the_configs_that_ship(name, tmp_path):
    """Their blocks and patterns, narrowed."""
    model, narrow = (
        hybridlm.load_config(name).model,
        {"*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 8}, "-": {"d_ff": 48}},
    )
    narrow["M"] = {"d_state": 8, "d_head": 16}
    blocks = {symbol: replace(block, **narrow[symbol]) for symbol, block in model.blocks.items()}
    config = replace(model, vocab_size=VOCAB, d_model=32, blocks=blocks, compute_dtype="float32", remat="none")
    ours = build(config)
    hybridlm.to_hf(ours, tmp_path / "model")
    theirs, (expected, _) = published(tmp_path / "model"), logits(ours)
    np.testing.assert_allclose(theirs(ids(TOKENS)).logits.numpy(), expected, rtol=0, atol=ATOL)


@pytest.mark.slow
def test_a_run_of_hybrid_tiny(tmp_path):
    """Trained a few steps, converted on the command line: logits, and greedy text as `generate` writes it."""
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["train", "--config", "hybrid_tiny", f"--run.dir={run}", "--run.steps=3", "--data.batch_size=8"]
    words += ["--data.seq_len=64", "--run.eval_every=-1", "--run.sample_tokens=0", "--run.tensorboard=False"]
    assert main(words) == 0
    assert main(["convert", "to-hf", str(run), str(out)]) == 0
    model, tokenizer, _ = load_run(run)
    theirs, text = published(out), "def f(x):"
    prompt = transformers.AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")
    ours = tokenizer.encode(text, bos=True)[None]
    assert prompt["input_ids"].tolist() == ours.tolist()
    np.testing.assert_allclose(theirs(**prompt).logits.numpy(), forward(model, ours), rtol=0, atol=ATOL)
    expected = hybridlm.generate(model, ours, max_new_tokens=20, temperature=0.0, key=jax.random.key(0))
    found = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)
    n = found.shape[1] - ours.shape[1]
    assert found[0, -n:].tolist() == np.asarray(expected)[0, :n].tolist()


def test_the_byte_tokenizer(tmp_path):
    """The same ids as in training, from tokenizer.json by us and by transformers; text ends at eos."""
    files, ours = files_of(ByteTokenizer()), ByteTokenizer()
    config = replace(config_of("mambas"), vocab_size=264)
    model = build(config)
    ends = {"bos_token_id": 256, "eos_token_id": 257}
    hybridlm.to_hf(model, tmp_path / "model", about=About(files=files, ids=ends))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    read = FileTokenizer(tmp_path / "model" / "tokenizer.json")
    assert (read.bos_id, read.eos_id, theirs.bos_token_id, theirs.eos_token_id) == (256, 257, 256, 257)
    for text in ("", "def f(x):\n\treturn x  # äöü €", "".join(map(chr, range(300)))):
        expected = ours.encode(text, bos=True).tolist()
        assert theirs(text)["input_ids"] == read.encode(text, bos=True).tolist() == expected
        assert theirs.decode(expected, skip_special_tokens=True) == text
    loaded = published(tmp_path / "model")
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (256, 257)
    batch = theirs(["ab", "abcdef"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0].tolist()[0] == 0
    assert loaded.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 2
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == 257
