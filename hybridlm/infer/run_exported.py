# SPDX-License-Identifier: Apache-2.0
"""Writes text with an exported model: `python run.py PROMPT ...`. Needs jax, flatbuffers, safetensors, tokenizers."""

import json
import os
import sys
from pathlib import Path

import jax.export
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

if jax.__version__.startswith("0.10."):  # some of its fusions for CPUs are faulty
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_experimental_ynn_fusion_type="


def write(folder: Path, prompts: list[list[int]], n_new: int) -> np.ndarray:
    """The likeliest n_new tokens behind each prompt, [B, n_new]."""
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = jax.device_put({name: w for f in folder.glob("*.safetensors") for name, w in load_file(f).items()})
    here = {"gpu": "cuda"}.get(jax.devices()[0].platform, jax.devices()[0].platform)
    files = next(files for name, files in manifest["programs"].items() if name.split(":")[0] == here)
    read = lambda step: jax.export.deserialize(bytearray((folder / files[step]).read_bytes())).call
    start, (prefill, decode) = read("start"), [jax.jit(read(step), donate_argnums=1) for step in ("prefill", "decode")]

    size, lengths = manifest["prefill"], np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-lengths.max() // size) * size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = start(weights, lengths)
    for at in range(0, tokens.shape[1], size):  # a row whose prompt has ended stays as it is
        _logits, token, cache = prefill(weights, cache, tokens[:, at : at + size], np.clip(lengths - at, 0, size))
    written = [token]
    while len(written) < n_new:  # a token drawn from the logits would do as well
        _logits, token, cache = decode(weights, cache, token)
        written.append(token)
    return np.stack(written, axis=1)


if __name__ == "__main__":
    here, texts = Path(__file__).parent, sys.argv[1:]
    known, words = json.loads((here / "manifest.json").read_text()), Tokenizer.from_file(str(here / "tokenizer.json"))
    first, eos = [known["bos_id"]] * (known["bos_id"] is not None), known["eos_id"]
    prompts = [first + words.encode(text, add_special_tokens=False).ids for text in texts]
    n_new = min(50, known["context"] - max(map(len, prompts)))
    for text, row in zip(texts, write(here, prompts, n_new).tolist(), strict=True):
        print(text + words.decode(row[: row.index(eos)] if eos in row else row))
