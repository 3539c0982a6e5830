# SPDX-License-Identifier: Apache-2.0
"""How fast data is hashed, tokenised and read: python -m tests.data.throughput FOLDER [MB].

Text of documents with log-normal lengths (median 400 bytes, mean 670), byte tokenizer, rows of 4,096 tokens.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np

from hybridlm.cli import main as hybridlm
from hybridlm.data import make_loader, open_corpus
from hybridlm.data.config import DataConfig
from hybridlm.data.identity import content_hashes

SEQ_LEN, BATCH, BATCHES = 4096, 16, 300


def write_text(file: Path, megabytes: int) -> None:
    """JSON lines of random letters."""
    rng, size = np.random.default_rng(0), 0
    with open(file, "w", encoding="utf-8") as lines:
        while size < megabytes * 1e6:
            text = rng.integers(97, 123, int(rng.lognormal(6, 1)) + 1, np.uint8).tobytes().decode()
            lines.write(json.dumps({"text": text}) + "\n")
            size += len(text)


def seconds_of(what: str, amount: float, unit: str, action) -> None:
    """Runs and prints amount / time."""
    began = time.perf_counter()
    action()
    print(f"{what}: {amount / (time.perf_counter() - began):.3g} {unit}", flush=True)


def rate(config: DataConfig, what: str) -> None:
    """Tokens per second of a loader, after its first batches."""
    with make_loader(config) as loader:
        for _ in range(20):
            next(loader)
        tokens = BATCHES * BATCH * SEQ_LEN / 1e6
        seconds_of(
            f"{what}, rows {loader.fill:.2%} full", tokens, "M tokens/s", lambda: [next(loader) for _ in range(BATCHES)]
        )


def main(argv: list[str] | None = None) -> None:
    """Prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the text, its shards and its cache go")
    parser.add_argument("megabytes", type=int, nargs="?", default=200, help="of text (200)")
    args = parser.parse_args(argv)
    folder, megabytes = args.folder, args.megabytes
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)
    text = folder / "text.jsonl"
    write_text(text, megabytes)
    size = text.stat().st_size
    seconds_of("hash of the text", size / 1e9, "GB/s", lambda: content_hashes([text]))
    words = ["tokenize", str(text), "--out", str(folder / "shards")]
    seconds_of("hybridlm tokenize, bytes", size / 1e6, "MB/s", lambda: hybridlm(words))
    fields = dict(seq_len=SEQ_LEN, batch_size=BATCH, cache_dir=str(folder / "cache"), prefetch=8)
    of_text = DataConfig(path=(str(text),), **fields)
    seconds_of("token cache, made", size / 1e6, "MB/s", lambda: open_corpus(of_text))
    seconds_of("token cache, opened and verified with its text", size / 1e9, "GB/s", lambda: open_corpus(of_text))
    for packing in ("split", "best_fit"):
        for workers in (0, 2):
            how = f"{packing}, {workers} workers" if workers else f"{packing}, threads"
            rate(DataConfig(path=(str(text),), packing=packing, workers=workers, **fields), f"cache, {how}")
            shards = DataConfig(path=(str(folder / "shards"),), packing=packing, workers=workers, **fields)
            rate(shards, f"shards, {how}")


if __name__ == "__main__":
    main()
