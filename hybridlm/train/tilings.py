# SPDX-License-Identifier: Apache-2.0
"""How a GPU's matrix products are tiled, as XLA once found out: shipped, so that a first start need not search again.

XLA compiles and times dozens of tilings of each product, which is most of the time that a step compiles for. What it
finds it keeps beside JAX's compiled programs, a small file for each product, device and version of its own, and looks
there before it searches. So a start puts there what is shipped for this device and these versions. What is not among
that is searched for, as everywhere else. Only versions that agree are taken: an algorithm of cuBLAS is a number, which
another version gives to another one.

`python -m hybridlm.train.tilings FILE` writes the file of the GPU at hand: see docs/results/start.md.
"""

import argparse
import base64
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from hybridlm.config.find import load_config
from hybridlm.sharding import make_mesh
from hybridlm.train import xla
from hybridlm.train.provenance import versions
from hybridlm.train.step import make_program
from pallas_kernels.platform import device_name

SHIPPED = Path(__file__).with_name("xla_tilings")
FOLDER = "xla_gpu_per_fusion_autotune_cache_dir"
"""Where XLA looks, in JAX's folder of compiled programs; also the name by which JAX is told to have it look."""
VERSIONS = ("jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cublas")
"""Of what searches, and of what the algorithms that it finds are a part."""
STARTS = (
    ("hybrid_1b",), ("transformer_1b",), ("mamba2_1b",), ("hybrid_125m",),
    ("hybrid_125m", "--data.seq_len=4096", "--data.batch_size=16"),
)  # fmt: skip
"""Configs whose products are shipped, for one device."""

log = logging.getLogger(__name__)


def put(cache: Path | None = None) -> int:
    """Puts the tilings that are shipped for the default device into a cache of JAX's; number of files written.

    cache: None: the one in use. What is there stays. Never raises: whatever is wrong, XLA searches.
    """
    try:
        cache = cache or _in_use()
        shipped = xla.TILINGS.get(device_name())
        name = shipped and cache and shipped.get(versions()["jaxlib"])
        if not name or not cache:
            return 0
        return sum(_write(cache / FOLDER / at, content) for at, content in unpack((SHIPPED / name).read_text()).items())
    except Exception as error:  # whatever it is, the step can be compiled
        log.info("tilings not used: %s", error)
        return 0


def unpack(text: str) -> dict[str, bytes]:
    """Files by their place in XLA's folder, as `pack` wrote them; none where they are of other versions than those that
    are installed. ValueError where the text is another's or damaged."""
    record = json.loads(text)
    if record["versions"] != _versions():
        return {}
    files = {at: base64.b64decode(content, validate=True) for at, content in record["files"].items()}
    if _digest(files) != record["sha256"]:
        raise ValueError("they are not those that were written")
    return files


def pack(caches: Iterable[Path], device: str) -> str:
    """What XLA has found in caches of JAX's, as the text of a file. device: its kind. ValueError where there is
    nothing."""
    folders = [cache / FOLDER for cache in caches]
    files = {str(path.relative_to(folder)): path.read_bytes() for folder in folders for path in folder.rglob("*.pb")}
    if not files:
        raise ValueError(f"no tilings in {', '.join(map(str, folders)) or 'no folder'}: XLA writes them on GPUs alone")
    contents = {at: base64.b64encode(files[at]).decode() for at in sorted(files)}
    record = {"device": device, "versions": _versions(), "sha256": _digest(files), "files": contents}
    return json.dumps(record, indent=0) + "\n"


def find(cache: Path) -> None:
    """Compiles what the starts of STARTS compile, and their evaluation, with an empty cache of JAX's at a folder."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    for name, *words in STARTS:
        config = load_config(name, words)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            program = make_program(config, mesh)
            rows = replace(config.data, batch_size=config.data.batch_size // config.optim.accumulate)
            program.init.lower().compile()
            program.train_step.lower(program.state_like, program.batch_like(config.data)).compile()
            program.eval_step.lower(program.state_like["params"], program.batch_like(rows)).compile()
        print(f"{name} {' '.join(words)}".rstrip(), file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hybridlm.train.tilings", description="Tilings of this GPU.")
    parser.add_argument("file", type=Path, help="is written, and named in hybridlm/train/xla.py by whoever ships it")
    parser.add_argument(
        "--found", type=Path, nargs="+", help="caches of JAX's that starts have filled: nothing is compiled"
    )
    said = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        if not said.found:
            find(Path(folder))
        try:
            text = pack(said.found or [Path(folder)], device_name())
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    said.file.write_text(text)
    return 0


def _in_use() -> Path | None:
    """JAX's folder of compiled programs; None where there is none on this host, or XLA is not told to look there."""
    flags: Any = jax.config  # whose values its type does not name
    folder, looks = flags.jax_compilation_cache_dir, flags.jax_persistent_cache_enable_xla_caches or ""
    used = folder and flags.jax_enable_compilation_cache and "://" not in folder
    return Path(folder) if used and (looks == "all" or FOLDER in looks) else None


def _versions() -> dict[str, str]:
    found = versions()
    return {name: found[name] for name in VERSIONS if name in found}


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for at in sorted(files):
        digest.update(f"{at} {len(files[at])}\n".encode() + files[at])
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> bool:
    """Whether it was written; another process may write it at the same time, or read it."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    return True


if __name__ == "__main__":
    sys.exit(main())
