# SPDX-License-Identifier: Apache-2.0
"""A seeded generator of mutated inputs: configs, data, tokenizers, published folders, prompts and run folders.

`Sound` makes one sound input of each kind; `make_case(sound, folder, kind, seed)` copies it, alters one to three things
and gives the words of a command that reads it. The same seed makes the same case.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybridlm.cli import main
from hybridlm.config.find import load_config
from hybridlm.config.keys import leaf_paths
from tests.data.support import mutate, write_megatron, write_nanogpt
from tests.faults.runs import write_config

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = ("llama", "mamba2", "jamba", "granitemoehybrid", "nemotron_h", "zamba2", "qwen2", "falcon_h1")
NUMBERS = ("0", "-1", "1", "2", "3", "0.5", "10**20", "2**31", "2**63", "-2**63", "10**9", "1e300", "1e39")
OTHERS = (
    "None", "True", "False", "float('nan')", "float('inf')", "-float('inf')", "''", "'x'", r"'a\0b'", r"'\udcff'", "()",
    "[]", "{}", "(1, 2)", "('x',)", "b'x'", "object", "object()", "'../..'", "32.0", "[[]]", "1j", "range(3)",
)  # fmt: skip
WORDS = (
    "", "x", "nan", "inf", "-inf", "-1", "0", "1e400", "1" * 5000, "10" * 30, "0x10", "True", "None", "\u00b2",
    "\udcff",
    "a\0b", "[]", "{}", "1.5", "-0", " ", "\x1b[2J", "../..", "/dev/null", "s3://", "file://host/x",
)  # fmt: skip


class Case(NamedTuple):
    """One command on altered inputs."""

    what: str
    """What was altered, to be read."""
    words: list[str]
    """Of the command line, behind `hybridlm`."""


class Sound:
    """Sound inputs of every kind, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("texts", "tokens", "tokenizer", "config"):
            (folder / name).mkdir(parents=True)
        self.config = write_config(folder / "config")
        self._write_texts(folder / "texts")
        self._write_tokens(folder / "tokens")
        self._write_tokenizer(folder / "tokenizer")
        for name in FAMILIES:
            shutil.copytree(GOLDEN / name, folder / "published" / name, ignore=shutil.ignore_patterns("golden.npz"))
        self._write_run(folder / "published" / "bytes", folder / "run")
        self.keys = [key for key in leaf_paths(load_config(str(self.config))) if key not in KEPT]

    def _write_texts(self, folder: Path) -> None:
        lines = "".join(json.dumps({"text": f"document {i} " + "abc " * (i % 7)}) + "\n" for i in range(40))
        (folder / "a.txt").write_text("some words and more of them " * 20)
        (folder / "b.jsonl").write_text(lines)
        (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        import pyarrow
        import pyarrow.parquet

        (folder / "d.jsonl.zst").write_bytes(bytes(pyarrow.Codec("zstd").compress(lines.encode())))
        table = pyarrow.table({"text": [f"row {i} of a table" for i in range(40)]})
        pyarrow.parquet.write_table(table, folder / "e.parquet")

    def _write_tokens(self, folder: Path) -> None:
        documents = [np.arange(3, 3 + i % 30 + 2) for i in range(60)]
        write_megatron(folder / "megatron", documents)
        write_nanogpt(folder / "nano.bin", documents)
        write_nanogpt(folder / "headed.bin", documents, header=True)
        text = str(self.folder / "texts" / "b.jsonl")
        assert main(["tokenize", text, "--out", str(folder / "shards"), "--workers=1"]) == 0

    def _write_tokenizer(self, folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        train = trainers.BpeTrainer(vocab_size=262, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(["document abc some words"], train)
        tokenizer.save(str(folder / "tokenizer.json"))
        ends = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(ends))

    def _write_run(self, published: Path, run: Path) -> None:
        from safetensors.numpy import load_file, save_file

        published.mkdir()
        tensors = load_file(GOLDEN / "llama" / "model.safetensors")
        rows = np.random.default_rng(0).normal(size=(264, 32)).astype(np.float32)
        save_file(tensors | dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), rows), published / SINGLE)
        config = json.loads((GOLDEN / "llama" / "config.json").read_text())
        (published / "config.json").write_text(json.dumps({**config, "vocab_size": 264}))
        for file in (self.folder / "tokenizer").iterdir():
            shutil.copy(file, published)
        assert main(["convert", "from-hf", str(published), str(run)]) == 0


SINGLE = "model.safetensors"
KEPT = {"run.dir", "data.cache_dir", "cluster.coordinator", "cluster.processes", "cluster.index", "data.workers"}
"""Keys that cases do not alter: what is written where, processes and addresses."""


# Altering -----------------------------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, values):
    """One of some values."""
    values = list(values)
    return values[int(rng.integers(len(values)))]


def another_value(rng: np.random.Generator):
    """A JSON value of some type."""
    values = [
        None, True, False, -1, 0, 3, 64, 10**9, 10**20, 10**30, 1.5, 1e300, "", "x", "3", "../x", [], [1], [None], {},
        {"a": 1}, "\u00b2", "a\0b", float("nan"), float("inf"), {"__float__": [1]},
    ]  # fmt: skip
    return pick(rng, values)


def with_another_value(value, rng: np.random.Generator):
    """The JSON value with one node replaced, removed or added."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        key = pick(rng, value if isinstance(value, dict) else range(len(value)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if isinstance(copy, dict) and rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = with_another_value(copy[key], rng)
        return copy
    return another_value(rng)


def alter_json(file: Path, rng: np.random.Generator) -> str:
    """Another value somewhere in a JSON file."""
    file.write_text(json.dumps(with_another_value(json.loads(file.read_bytes()), rng)))
    return "value"


def alter_header(file: Path, rng: np.random.Generator) -> str:
    """Another value somewhere in the header of a safetensors file, whose length is right."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(with_another_value(json.loads(raw[8 : 8 + length]), rng)).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    return "header"


def alter_bytes(file: Path, rng: np.random.Generator) -> str:
    """Other bytes."""
    file.write_bytes(mutate(file.read_bytes(), rng))
    return "bytes"


def make_deep(file: Path, rng: np.random.Generator) -> str:
    """JSON that is nested too deep to be read."""
    file.write_text(pick(rng, ("[" * 100_000, '{"a":' * 50_000, '{"text": ' + "[" * 100_000)))
    return "deep"


def make_other(file: Path, rng: np.random.Generator) -> str:
    """No file: nothing, a folder, a pipe, a link to somewhere else, to a device or to itself."""
    kind = pick(rng, ("gone", "folder", "pipe", "link out", "link to nothing", "link to a device", "loop"))
    outside = file.parent.parent / "outside"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "link out":
            file.symlink_to(outside)
        case "link to nothing":
            file.symlink_to(file.parent / "nothing")
        case "link to a device":
            file.symlink_to("/dev/zero")
        case "loop":
            file.symlink_to(file)
    return kind


def alter(file: Path, rng: np.random.Generator) -> str:
    """Alters a file in one of all ways that it can be; which, in a word."""
    ways: list[Callable] = [alter_bytes, alter_bytes, make_other]
    if _is_json(file):
        ways += [alter_json] * 6 + [make_deep]
    if file.suffix == ".safetensors":
        ways += [alter_header] * 6
    return f"{file.name}: {pick(rng, ways)(file, rng)}"


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def alter_some(folder: Path, rng: np.random.Generator) -> str:
    """Alters one to three files under a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    chosen = rng.choice(len(files), min(len(files), int(rng.integers(1, 4))), replace=False)
    return ", ".join(alter(files[i], rng) for i in chosen)


# Kinds --------------------------------------------------------------------------------------------------------------


def _of_configs(sound: Sound, folder: Path, rng: np.random.Generator) -> Case:
    """Values of fields in a config file, or on the command line."""
    file = folder / "in" / "nano.py"
    shutil.copytree(sound.config.parent, folder / "in")
    text = sound.config.read_text().replace(str(sound.config.parent), str(folder / "in"))
    words, done = [], []
    for key in rng.choice(sound.keys, int(rng.integers(1, 4)), replace=False):
        if rng.random() < 0.5:
            value = pick(rng, NUMBERS + OTHERS)
            text += f"\n_before_{len(done)} = config\n"
            text += f"def config(): return _set(_before_{len(done)}(), {str(key).split('.')!r}, {value})\n"
        else:
            value = pick(rng, WORDS + NUMBERS[:6])
            words.append(f"--{key}={value}")
        done.append(f"{key}={value[:40]}")
    file.write_text(SET + text)
    return Case(", ".join(done), [*_training(folder, file), *words])


SET = """
import dataclasses

def _set(node, path, value):
    if not path:
        return value
    if isinstance(node, dict):
        return {**node, path[0]: _set(node[path[0]], path[1:], value)}
    return dataclasses.replace(node, **{path[0]: _set(getattr(node, path[0]), path[1:], value)})
"""


def _training(folder: Path, config: Path) -> list[str]:
    out = folder / "out"
    return ["train", "--config", str(config), f"--run.dir={out}/run", f"--data.cache_dir={out}/cache"]


def _of_data(sound: Sound, folder: Path, rng: np.random.Generator) -> Case:
    """Text and tokens in every format, trained on or tokenised."""
    shutil.copytree(sound.folder / "texts", folder / "in" / "texts")
    shutil.copytree(sound.folder / "tokens", folder / "in" / "tokens")
    _write_nano(sound, folder)
    places = ["texts/a.txt", "texts/b.jsonl", "texts/c.jsonl.gz", "texts/d.jsonl.zst", "texts/e.parquet", "texts"]
    place = pick(rng, [*places, "tokens/megatron.bin", "tokens/nano.bin", "tokens/headed.bin", "tokens/shards"])
    path = folder / "in" / place
    if path.is_dir():
        done = alter_some(path, rng)
    else:
        beside = path.with_suffix(".idx")
        done = alter(beside if beside.exists() and rng.random() < 0.6 else path, rng)
    if place in places and rng.random() < 0.5:
        return Case(done, ["tokenize", str(path), "--out", str(folder / "out" / "shards"), "--workers=1"])
    words = [f"--data.path={path}", "--data.val_fraction=0.2"]
    return Case(done, [*_training(folder, folder / "in" / "nano.py"), *words])


def _of_tokenizers(sound: Sound, folder: Path, rng: np.random.Generator) -> Case:
    """tokenizer.json and tokenizer_config.json."""
    shutil.copytree(sound.config.parent, folder / "in")
    shutil.copytree(sound.folder / "tokenizer", folder / "in" / "tokenizer")
    done = alter_some(folder / "in" / "tokenizer", rng)
    given = folder / "in" / "tokenizer"
    if rng.random() < 0.5:
        text = str(folder / "in" / "val.txt")
        return Case(done, ["tokenize", text, "--out", f"{folder}/out", f"--tokenizer={given}", "--workers=1"])
    return Case(done, [*_training(folder, folder / "in" / "nano.py"), f"--data.tokenizer={given}"])


def _of_published(sound: Sound, folder: Path, rng: np.random.Generator) -> Case:
    """config.json, tensors, index and tokenizer of published folders."""
    name = pick(rng, (*FAMILIES, "bytes"))
    path = folder / "in" / name
    shutil.copytree(sound.folder / "published" / name, path)
    for file in (sound.folder / "tokenizer").iterdir():
        shutil.copy(file, path)
    if rng.random() < 0.3:
        _split_tensors(path)
    if rng.random() < 0.6:
        done = ", ".join(alter_json(path / "config.json", rng) for _ in range(int(rng.integers(1, 4))))
    else:
        done = alter_some(path, rng)
    return Case(f"{name}: {done}", ["convert", "from-hf", str(path), str(folder / "out" / "run")])


def _write_nano(sound: Sound, folder: Path) -> None:
    """The config without its own text."""
    lines = sound.config.read_text().splitlines()
    text = "\n".join("cache_dir='', seq_len=16," if "val_path" in line else line for line in lines)
    (folder / "in" / "nano.py").write_text(text)


def _split_tensors(path: Path) -> None:
    """The tensors in two files with an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, path / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _of_prompts(sound: Sound, folder: Path, rng: np.random.Generator) -> Case:
    """Prompts and options of generate."""
    shutil.copytree(sound.folder / "run", folder / "in" / "run")
    prompts = ["a", "", "\udcff", "\0", "\x1b]0;x\x07", "é\U0001f40d", "<s></s>", "a" * 600, "\n\t\r", "\ufffd"]
    words = ["generate", f"--run={folder}/in/run", f"--prompt={pick(rng, prompts)}", "--max-new-tokens=3"]
    options = ("temperature", "top-p", "top-k", "seed", "max-new-tokens", "step", "data.tokenizer", "config")
    numbers = ("nan", "inf", "-inf", "1e400", "10" * 20, "2000000000", "-1", "0", "1.5", "x", "", str(2**64), "\u00b2")
    for name in rng.choice(options, int(rng.integers(1, 4)), replace=False):
        words.append(f"--{name}={pick(rng, numbers if rng.random() < 0.5 else MILD.get(name, numbers))}")
    return Case(" ".join(words[2:])[:200], words)


MILD = {
    "temperature": ("0", "0.7", "1e-30", "1e30"), "top-p": ("0.5", "1", "1e-9"), "seed": ("7", "-1", str(2**62)),
    "top-k": ("1", "2000000000"), "step": ("0",), "max-new-tokens": ("3",),
}  # fmt: skip
"""Values that are served."""


def _of_runs(sound: Sound, folder: Path, rng: np.random.Generator) -> Case:
    """Files of a run's folder, from which text is written, or an export."""
    shutil.copytree(sound.folder / "run", folder / "in" / "run")
    run = folder / "in" / "run"
    small = [run / "config.json", run / "tokenizer" / "tokenizer.json", run / "checkpoints" / "0" / "manifest.json"]
    small += [run / "checkpoints" / "0" / name / "metadata" for name in ("loop", "config")]
    done = alter(pick(rng, small), rng) if rng.random() < 0.6 else alter_some(run, rng)
    if rng.random() < 0.3:
        shutil.rmtree(small[2]) if small[2].is_dir() else small[2].unlink(missing_ok=True)
        done += ", without a manifest"
    if rng.random() < 0.5:
        return Case(done, ["convert", "to-hf", str(run), str(folder / "out" / "published")])
    return Case(done, ["generate", f"--run={run}", "--prompt=a", "--max-new-tokens=3"])


KINDS: dict[str, Callable[[Sound, Path, np.random.Generator], Case]] = {
    "configs": _of_configs,
    "data": _of_data,
    "tokenizers": _of_tokenizers,
    "published folders": _of_published,
    "prompts": _of_prompts,
    "run folders": _of_runs,
}


def make_case(sound: Sound, folder: Path, kind: str, seed: int) -> Case:
    """The case of a kind and a seed, whose inputs are in folder/in and whose output goes to folder/out."""
    (folder / "out").mkdir(parents=True)
    rng = np.random.default_rng([seed, *kind.encode()])
    return KINDS[kind](sound, folder, rng)
