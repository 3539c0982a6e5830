# SPDX-License-Identifier: Apache-2.0
"""Exported programs give what the model gives: in a process that cannot import this project, of every mixer, with
kernels where a device is named; and what cannot be exported is one line that leaves everything as it was."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import hybridlm
from hybridlm import storage
from hybridlm.cli import export as command
from hybridlm.cli import main
from hybridlm.config import QuantizeConfig
from hybridlm.config.find import load_config
from hybridlm.errors import ConfigError
from hybridlm.infer import export as module
from hybridlm.infer.export import Program, export, lowered
from hybridlm.infer.steps import Steps
from hybridlm.infer.target import Target, targets
from hybridlm.layers.block import passes, sees_ahead
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.model import quantize
from hybridlm.model.decoding import Writer, _prepared
from hybridlm.model.init import abstract
from tests.model.model_support import VARIANTS, build, random_tokens, small
from tests.tolerances import check_close

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "fixtures" / "runs" / "hybrid" / "run"
PROMPTS = ("def f(", "class Reader:\n    def __init__(self, x")
PLATFORMS = ("cpu", "cuda", "tpu")
WITHOUT_US = """
import runpy, sys
sys.modules["hybridlm"] = sys.modules["pallas_kernels"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0] + "/run.py", run_name="__main__")
assert not any(name.split(".")[0] in ("hybridlm", "pallas_kernels", "flax") for name, m in sys.modules.items() if m)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run, exported for all platforms and any number of rows."""
    out = tmp_path_factory.mktemp("exported") / "out"
    words = ["export", str(RUN), str(out), "--context", "80", "--prefill", "16", "--platforms", *PLATFORMS]
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def read(folder: Path, file: str) -> jax_export.Exported:
    return jax_export.deserialize(bytearray((folder / file).read_bytes()))


def greedy(folder: Path, rows: list[list[int]], n_new: int, piece: int) -> np.ndarray:
    """Tokens [B, n_new] by the exported programs, on the CPU; pieces are cut otherwise than in run.py."""
    files = json.loads((folder / "manifest.json").read_text())["programs"]["cpu"]
    start, prefill, decode = (jax.jit(read(folder, files[step]).call) for step in ("start", "prefill", "decode"))
    weights = {k: a for file in folder.glob("*.safetensors") for k, a in load_file(file).items()}
    lengths = np.array([len(row) for row in rows], np.int32)
    cache = start(weights, lengths)
    for at in range(0, max(lengths), piece):
        here = [row[at : at + piece] for row in rows]
        tokens = np.array([row + [0] * (piece - len(row)) for row in here], np.int32)
        _, token, cache = prefill(weights, cache, tokens, np.array([len(row) for row in here], np.int32))
    out = []
    for _ in range(n_new):
        out.append(np.asarray(token))
        _, token, cache = decode(weights, cache, token)
    return np.stack(out, axis=1)


# A run --------------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_generate_without_this_project(folder):
    run = hybridlm.load_run(RUN)
    rows = [run.tokenizer.encode(text, bos=True).tolist() for text in PROMPTS]
    assert len(rows[0]) < 16 < len(rows[1])
    code = [sys.executable, "-c", WITHOUT_US, str(folder), *PROMPTS]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    spelled, eos = Tokenizer.from_file(str(folder / "tokenizer.json")), run.tokenizer.eos_id
    n_new = 80 - len(rows[1])
    assert n_new < 50  # as many as the context has room for
    expected = np.asarray(hybridlm.generate(run.model, rows, n_new)).tolist()
    expected = [row[: row.index(eos)] if eos in row else row for row in expected]
    texts = [spelled.decode(row) for row in expected]
    assert [spelled.encode(text, add_special_tokens=False).ids for text in texts] == expected  # none is lost in text
    assert done.stdout == "".join(f"{p}{text}\n" for p, text in zip(PROMPTS, texts, strict=True))


def test_the_manifest_is_of_what_programs_take(folder, manifest):
    """Names, shapes, types; what goes in comes out, for every platform."""
    rows = lambda shape: ["batch" if name == "batch" else int(name) for name in map(str, shape)]
    for name in PLATFORMS:
        for step, file in manifest["programs"][name].items():
            program = read(folder, file)
            assert program.platforms == (name,) and program.nr_devices == 1
            args, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
            given = {"weights": args[0], "cache": program_cache(program, step, args)}
            for kind, arrays in given.items():
                found = {k: {"shape": rows(a.shape), "dtype": a.dtype.name} for k, a in arrays.items()}
                assert found == {k: {n: v[n] for n in ("shape", "dtype")} for k, v in manifest[kind].items()}
    for of in (manifest["cache"], manifest["weights"]):
        assert all(len(array["axes"]) == len(array["shape"]) for array in of.values())
    assert {a["holds"] for a in manifest["cache"].values()} >= {"recurrent states", "keys and values"}
    assert manifest["batch"] is None and manifest["bos_id"] == 256 and manifest["model"] == "run"
    state = next(a for a in manifest["cache"].values() if a["holds"] == "recurrent states")
    assert state["dtype"] == "float32" and state["block"] == "M" and "heads" in state["axes"]


def program_cache(program, step: str, args: tuple) -> dict:
    """The cache that a program gives, which is also the one that it takes."""
    out = jax.tree.unflatten(program.out_tree, program.out_avals)
    if step == "start":
        return out
    logits, token, cache = out
    assert str(logits.shape) == "(batch, 264)" and logits.dtype == np.float32 and token.dtype == np.int32
    same = {k: (str(a.shape), a.dtype) for k, a in cache.items()}
    assert same == {k: (str(a.shape), a.dtype) for k, a in args[1].items()}
    return cache


def test_programs_for_any_device_have_no_kernel(folder, manifest):
    assert all(b"tpu_custom_call" not in f.read_bytes() for f in folder.glob("*.tpu.jax_export"))
    assert all(b"mosaic_gpu" not in f.read_bytes() for f in folder.glob("*.cuda.jax_export"))
    for name in PLATFORMS:
        lines = manifest["implementations"][name]
        assert lines and all(f"auto uses xla on {'gpu' if name == 'cuda' else name}" in line for line in lines), lines


def test_weights_are_those_that_programs_read(folder):
    """To the bit, under the names of the manifest; a folder holds each once."""
    params = jax.tree.leaves(Writer(hybridlm.load_run(RUN).model).prepared[1])
    found = load_file(folder / "model.safetensors")
    assert len(found) == len(params)
    key = lambda a: (a.shape, a.dtype.name, np.asarray(a).tobytes())
    assert sorted(map(key, found.values())) == sorted(map(key, params))


@pytest.mark.parametrize(
    "batch, rows, texts",
    [
        (None, "any number of rows", "TEXT"),
        (1, "1 row", "TEXT"),
        (2, "2 rows", "TEXT TEXT"),
        (9, "9 rows", "TEXT ... (9 of them)"),
    ],
)
def test_what_is_said_of_rows(batch, rows, texts, manifest, capsys):
    """As many texts as the programs take rows."""
    command._say(Path("out"), manifest | {"batch": batch})
    said = capsys.readouterr().out
    assert f", {rows} of up to 80 tokens" in said and said.endswith(f"next: python out/run.py {texts}\n")


@pytest.mark.buckets
def test_what_is_said_of_a_bucket(manifest, capsys):
    command._say(storage.as_path("s3://bucket/out"), manifest | {"batch": None})
    assert capsys.readouterr().out.endswith("next, in a copy of the folder: python run.py TEXT\n")


def test_the_page_shows_the_program(folder):
    shown = re.search(r"<!-- (\S+) -->\n```python\n(.*?)```", (ROOT / "docs/stablehlo.md").read_text(), re.DOTALL)
    code = (ROOT / shown[1]).read_text()
    assert code.partition("\n")[2] == shown[2] and (folder / "run.py").read_text() == code
    assert len([line for line in code.splitlines() if line]) <= 42
    assert not re.search(r"import (hybridlm|pallas_kernels)|from (hybridlm|pallas_kernels)", code)


# Mistakes -----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "--context 0": r"context \(0\) must be between 1 and",
    "--context 8 --prefill 9": r"prefill \(9\) must be between 1 and context \(8\)",
    "--context 8 --prefill 0": r"prefill \(0\)",
    "--context 8 --batch 0": r"batch \(0\) must be any, or between 1 and",
    "--context 8 --batch many": r"--batch \(many\) must be a whole number, or any",
    "--context 8 --platforms rocm": r"platforms \(rocm\) not one of cpu, cuda, tpu",
    "--context 8 --platforms cpu:x86": r"platforms \(cpu:x86\): expected no device behind cpu",
    "--context 8 --platforms cuda:9": r"platforms \(cuda:9\): expected a compute capability, as cuda:9\.0",
    "--context 8 --platforms cpu tpu:v9": r"platforms \(tpu:v9\): expected a generation: v2",
    "--contxt 8": r"unknown option --contxt: did you mean --context\?",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(words, tmp_path, capsys):
    assert main(["export", str(RUN), str(tmp_path / "out"), *words.split()]) == 2
    said = capsys.readouterr().err
    assert re.search(MISTAKES[words], said) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_are_wrong(tmp_path, capsys, monkeypatch):
    """Nothing is overwritten; what is neither run nor checkpoint is said."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("1")
    (tmp_path / "file").write_text("2")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_bytes((RUN / "config.json").read_bytes())
    golden = ROOT / "tests/golden/bamba"
    words = {
        (tmp_path / "begun", "out", ""): "begun has no checkpoint yet",
        (RUN, "full", ""): "is there and not empty: choose a new folder",
        (RUN, "file", ""): "is there and not empty",
        (tmp_path / "full", "out", ""): "holds neither a run (checkpoints) nor a published checkpoint (config.json)",
        (golden, "out", "--step 3"): "--step belongs to a run, but",
    }
    for (source, out, more), line in words.items():
        assert main(["export", str(source), str(tmp_path / out), "--context", "8", *more.split()]) == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1, said
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert main(["export", str(RUN), str(tmp_path / "out"), "--context", "8"]) == 2
    assert "programs are written by flatbuffers: pip install 'hybridlm[export]'" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["begun", "file", "full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"] and (tmp_path / "file").read_text() == "2"


def test_a_model_that_sees_ahead_is_refused(tmp_path):
    blocks = {"b": VARIANTS["both_ways"]}
    with pytest.raises(ConfigError, match="cannot be decoded token by token"):
        export(abstract(small("b", blocks)).model(), tmp_path / "out", context=8)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """The disk is full in the middle of it."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "lowered", lambda steps, target, *_: [Program("start", target, b"", 10, ())])
    monkeypatch.setattr(module.storage, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        export(hybridlm.load_run(RUN).model, tmp_path / "out", ["cpu"], context=8)
    assert list(tmp_path.iterdir()) == []


# Every mixer --------------------------------------------------------------------------------------------------------

D = 16
BLOCKS = {chr(0x4E00 + i): block for i, block in enumerate(VARIANTS.values()) if not sees_ahead(block)}
NAMES = dict(zip(VARIANTS, (chr(0x4E00 + i) for i in range(len(VARIANTS))), strict=True))
NUMBERED = ("moe", "moe_sinks", "depth_moe")
"""Mixtures of experts cut rows into blocks by how many there are: their programs are for a number of rows."""
ALONE = [name for name, symbol in NAMES.items() if symbol in BLOCKS and passes(BLOCKS[symbol], D)]
"""What hands something on from depth to depth: of a width of its own, in a model apart."""
TOGETHER = [name for name, symbol in NAMES.items() if symbol in BLOCKS and name not in ALONE]
GROUPS = [TOGETHER[i : i + 6] for i in range(0, len(TOGETHER), 6)] + [[name] for name in ALONE]


def check_tokens(
    model, tmp_path, rows, n_new: int = 12, batch: int | None = None, prefill: int = 8, cache: CacheTypes = AS_COMPUTED
) -> None:
    """Of the exported programs and of `generate`."""
    context = max(map(len, rows)) + n_new
    export(model, tmp_path / "out", ["cpu"], context=context, prefill=prefill, batch=batch, cache_types=cache)
    expected = np.asarray(hybridlm.generate(model, rows, n_new, prefill_chunk=prefill, cache_types=cache))
    np.testing.assert_array_equal(greedy(tmp_path / "out", rows, n_new, prefill), expected)
    if batch is None:
        np.testing.assert_array_equal(greedy(tmp_path / "out", rows[:1], n_new, prefill), expected[:1])


ROWS = [random_tokens(5, seed=1).tolist(), random_tokens(19, seed=2).tolist(), random_tokens(8, seed=3).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_every_mixer(names, tmp_path):
    """Ragged rows, over the edges of pieces and of windows; one program for three rows and for one."""
    symbols = [NAMES[name] for name in names]
    model = build(small("".join(symbols) * (2 if len(symbols) == 1 else 1), BLOCKS))
    if numbered := set(names) & set(NUMBERED):
        with pytest.raises(ConfigError, match=r"any number of rows: give batch as a number \("):
            check_tokens(model, tmp_path, ROWS)
    check_tokens(model, tmp_path, ROWS, batch=len(ROWS) if numbered else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"prefix_tokens": 3},
        {"tie_embeddings": False, "logit_softcap": 5.0},
        {"embedding_multiplier": 3.0, "pattern": "Mm*-Mm*-Mm*-w"},
    ],
    ids=str,
)
def test_models(changes, tmp_path):
    """Prefix tokens in an empty cache, heads of their own, sublayers that are run at several depths."""
    check_tokens(build(small(**{"pattern": "Mm*-aw", **changes})), tmp_path, ROWS)


@pytest.mark.slow
def test_caches_that_are_stored_smaller(tmp_path):
    """Their scales are arrays of the cache as others are."""
    types = CacheTypes("int8", "bfloat16")
    check_tokens(build(small("Mw*")), tmp_path, ROWS, batch=len(ROWS), cache=types)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["cache_types"] == {"keys": "int8", "states": "bfloat16"}
    assert {array["dtype"] for array in manifest["cache"].values()} == {"int8", "bfloat16", "float32", "int32"}
    assert all(len(array["axes"]) == len(array["shape"]) for array in manifest["cache"].values())
    with pytest.raises(ConfigError, match="any number of rows: give batch as a number"):  # blocks hang on it
        export(build(small("*")), tmp_path / "any", ["cpu"], context=8, cache_types=types)


@pytest.mark.slow
@pytest.mark.quantize
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_matrices_in_eight_bits(weights, tmp_path):
    """They are written, and read by programs, in as many bytes; fp8, which no library for safetensors reads, as its
    bits."""
    config, how = small("M*-"), QuantizeConfig(weights)
    params = quantize.parameters(config, how)(nnx.to_pure_dict(nnx.state(build(config), nnx.Param)))
    check_tokens(nnx.merge(quantize.abstract(config, how).graphdef, params), tmp_path, ROWS, batch=len(ROWS))
    kinds = {array.get("bits_of", array["dtype"]) for array in weights_of(tmp_path / "out").values()}
    assert {"int8": "int8", "fp8": "float8_e4m3fn"}[weights] in kinds
    small_bytes = {array.dtype.name for array in load_file(tmp_path / "out/model.safetensors").values()}
    assert {"int8": "int8", "fp8": "uint8"}[weights] in small_bytes


def weights_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["weights"]


@pytest.mark.slow
def test_a_number_of_rows(tmp_path):
    check_tokens(build(small("M*w")), tmp_path, ROWS, batch=3)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["batch"] == 3 and all(3 in array["shape"] for array in manifest["cache"].values())


@pytest.mark.slow
def test_bfloat16(tmp_path):
    """Matrices and embeddings are stored in it, and logits are those of the model, as far as the type goes."""
    model = build(small("M*-w", compute_dtype="bfloat16"))
    export(model, tmp_path / "out", ["cpu"], context=32, prefill=16)
    found = load_file(tmp_path / "out/model.safetensors")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {a.dtype.name for a in found.values()} == {"bfloat16", "float32"}
    assert manifest["weights"]["embedding"]["dtype"] == "bfloat16"
    prefill = read(tmp_path / "out", manifest["programs"]["cpu"]["prefill"])
    start = read(tmp_path / "out", manifest["programs"]["cpu"]["start"])
    tokens_BT, lengths_B = random_tokens(2, 16), np.array([16, 7], np.int32)
    logits_BV = prefill.call(found, start.call(found, lengths_B), tokens_BT, lengths_B)[0]
    whole_BTV = model(tokens_BT)
    expected_BV = np.stack([whole_BTV[row, n - 1] for row, n in enumerate(lengths_B)])
    check_close(logits_BV, expected_BV, dtype="bfloat16", what="y")


# Kernels ------------------------------------------------------------------------------------------------------------


def of_shapes(config, context: int) -> Steps:
    """The steps of a model that is not there."""
    graphdef, params = nnx.split(abstract(config).model())
    return Steps(graphdef_of(graphdef, params), jax.eval_shape(partial(_prepared, graphdef), params)[1], context)


def graphdef_of(graphdef, params):
    return jax.eval_shape(partial(_prepared, graphdef), params)[0]


@pytest.mark.newer
@pytest.mark.parametrize(("name", "call"), [("tpu:v5p", b"tpu_custom_call"), ("cuda:9.0", b"mosaic_gpu")])
def test_a_named_device_gets_kernels(name, call):
    """Those that `auto` takes there, and calls that JAX keeps readable; XLA alone where no device is named, in the same
    process; any number of rows is refused with what to do."""
    config = load_config("hybrid_1b", {"model.pattern": "*"}).model
    steps, (device,) = of_shapes(config, 2048), targets([name])
    programs = list(lowered(steps, device, 1, 512))
    assert any(call in program.content for program in programs)
    assert any("auto uses xla" not in line for program in programs for line in program.chosen)
    anywhere = list(lowered(steps, Target(device.platform), None, 512))
    assert all(call not in program.content for program in anywhere)
    with pytest.raises(ConfigError, match=rf"for {name} and any number of rows: give batch as a number \("):
        list(lowered(steps, device, None, 512))
