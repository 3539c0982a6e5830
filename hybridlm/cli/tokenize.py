# SPDX-License-Identifier: Apache-2.0
"""`hybridlm tokenize`: text into a folder of tokenised shards, which training reads as it reads text."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.errors import require

COMPRESSED = (".gz", ".zst", ".parquet")


def run(words: list[str], prog: str) -> int:
    """Tokenises, or goes on where an earlier call was interrupted; see Command."""
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    for name, most in (("workers", 1024), ("shard_tokens", 2**40), ("bpe_bytes", 2**50)):
        value = getattr(args, name)
        require(value >= 1, f"--{name.replace('_', '-')} ({value}) must be at least 1")
        require(value <= most, f"--{name.replace('_', '-')} ({str(value)[:40]}) must be at most {most}")
    require(0 <= args.val_fraction < 1, f"--val-fraction ({args.val_fraction}) must be in [0, 1)")
    if args.train_bpe is not None:
        from hybridlm.data.train_bpe import check_size

        require(args.tokenizer is None, "--train-bpe makes the tokenizer: leave --tokenizer out")
        require(args.format == "text", "--train-bpe learns from text: give --format=chat the tokenizer of a model")
        check_size(args.train_bpe)
    _tokenize(args)
    return 0


TOKENIZE = Command("tokenize", (("TEXT ... --out FOLDER", "text into tokenised shards, or go on with that"),), run)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, "Text into tokenised shards on all cores. Started again, it goes on where it stopped.")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="files, folders, patterns: .txt, .jsonl, .fasta, ...")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the shards, new or to go on with")
    parser.add_argument("--tokenizer", metavar="PATH", help="byte, dna, or a tokenizer.json (byte)")
    parser.add_argument("--bos-token", metavar="TOKEN", help="put before each document (found in the tokenizer)")
    parser.add_argument("--eos-token", metavar="TOKEN", help="put after each document (found in the tokenizer)")
    parser.add_argument(
        "--train-bpe", type=int, metavar="N", help="train a byte-level BPE of N tokens on the text first"
    )
    parser.add_argument("--bpe-bytes", type=int, default=2 << 30, metavar="N", help="most text to train it on (2 GiB)")
    parser.add_argument("--format", choices=("text", "chat"), default="text", help="what records hold, as data.format")
    parser.add_argument("--text-key", default="text", metavar="NAME", help="field or column of the text (text)")
    parser.add_argument("--val", nargs="+", default=(), metavar="TEXT", help="validation text (a share of TEXT)")
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="X", help="share held out, without --val")
    parser.add_argument("--shard-tokens", type=int, default=1 << 28, metavar="N", help="tokens of a shard (268435456)")
    parser.add_argument("--workers", type=int, default=_cores(), metavar="N", help="processes (one for each core)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of other text or settings")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenize(args: argparse.Namespace) -> None:
    from hybridlm.data.chat import chat_of
    from hybridlm.data.formats import open_source
    from hybridlm.data.identity import content_hashes
    from hybridlm.data.make_shards import WORK, Job, check_plan, make_shards
    from hybridlm.data.tokenizer import keep_tokenizer, load_tokenizer

    folder = storage.as_path(args.out)
    require(not storage.in_bucket(folder), f"{args.out} is in a bucket: tokenise into a folder and copy that there")
    spec = args.tokenizer or "byte"
    given = None if args.train_bpe is not None else load_tokenizer(spec, bos=args.bos_token, eos=args.eos_token)
    chat = chat_of(args.format, given)
    how = {"text_key": args.text_key, "records": chat and chat.read}
    train = open_source(args.text, argument="TEXT", **how)
    held_out = open_source(args.val, argument="--val", **how) if args.val else None
    sources = [source for source in (train, held_out) if source]
    with _Bar() as bar:
        files = [file for source in sources for file in source.files]
        sizes = sum(size for size, _ in storage.versions(file.path for file in files))
        bar.begin("reading", sizes)
        memory = folder / WORK if folder.is_dir() else None
        hashes = content_hashes([file.path for file in files], memory, progress=bar.advance)
        plan = {
            "text": [[file.name, digest] for file, digest in zip(files, hashes)],
            "validation files": len(held_out.files) if held_out else 0,
            "tokenizer": given.fingerprint if given else [args.train_bpe, args.bpe_bytes],
            "text_key": args.text_key,
            "val_fraction": args.val_fraction,
            "shard_tokens": args.shard_tokens,
        } | ({"chat": chat.identity} if chat else {})
        progress = check_plan(folder, plan, args.overwrite)
        if progress == "complete":
            bar.stop()
            print(f"{folder} is complete")
            return
        known = sizes if not any(file.path.suffix.lower() in COMPRESSED for file in files) else None
        made = folder / "tokenizer.json"
        if args.train_bpe:
            if progress == "new" or not made.exists():
                from hybridlm.data.train_bpe import train_bpe

                bar.begin("training the BPE", known)
                train_bpe(train, args.train_bpe, made, args.bpe_bytes, bar.to)
            spec, given = str(made), load_tokenizer(str(made), bos=args.bos_token, eos=args.eos_token)
        assert given is not None  # trained, where none was given
        keep_tokenizer(given, folder)
        bar.begin("tokenising", known)
        job = Job(
            folder, spec, (args.bos_token, args.eos_token), args.text_key, args.val_fraction, args.shard_tokens,
            lenient=False, format=args.format,
        )  # fmt: skip
        manifest = make_shards(job, train, held_out, given, args.workers, bar.to)
    _report(folder, manifest, args)


def _report(folder: Path, manifest: dict, args: argparse.Namespace) -> None:
    from hybridlm.data.tokenizer import BUILT_IN
    from hybridlm.train.commands import python_command

    for split, about in manifest["splits"].items():
        print(
            f"{split}: {about['documents']:,} documents, {about['bytes']:,} bytes, {about['tokens']:,} tokens in "
            f"{len(about['shards'])} shards"
        )
    name = manifest["tokenizer"]["name"]
    tokenizer = "" if name == "byte" else f" --data.tokenizer={name if name in BUILT_IN else folder}"
    print(f"next: {python_command()} train.py --config CONFIG --data.path={folder}{tokenizer}")


class _Bar:
    """Progress on a terminal; nothing elsewhere."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = None
        self.advance: Callable[[int], None] = self._advance

    def __enter__(self):
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def begin(self, what: str, total: int | None) -> None:
        """The next piece of work, of so many bytes where that is known."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total)

    def _advance(self, n: int) -> None:
        self._progress.advance(self._task, n)

    def to(self, done: int) -> None:
        """So much of it is done."""
        self._progress.update(self._task, completed=done)

    def stop(self) -> None:
        """Takes it off the screen."""
        if self._progress.live.is_started:
            self._progress.stop()
