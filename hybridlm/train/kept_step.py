# SPDX-License-Identifier: Apache-2.0
"""Compiled steps on disk, found before anything is traced.

JAX's persistent cache finds a program by its lowered text. To have that, a start with kernels traces and lowers for 5
to 15 seconds, longer than all else that a start from the cache does. Here the step is found by what its text is made
from: the sources, the config, versions, flags and devices. What is in doubt is compiled, as without a file.

Only steps that XLA has just compiled are kept. What JAX has read from its own cache can lack functions when it is
written and read once more (seen on CPUs, where it fails in the first step, too late for anything else).
"""

import hashlib
import json
import logging
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import pallas_kernels
from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.tree import children, to_dict
from hybridlm.train.provenance import versions
from pallas_kernels.platform import compiled_by, platform_of

SOURCES = {"hybridlm": Path(__file__).parents[1], "pallas_kernels": Path(pallas_kernels.__file__).parent}
OURS = {*SOURCES, "builtins"}
ENVIRONMENT = ("XLA_", "JAX_", "LIBTPU_", "TPU_", "PALLAS_", "MOSAIC_", "CUDA_", "NVIDIA_")
"""Starts of the names of variables that compilers read."""
PLATFORMS = ("gpu",)
"""Where steps are kept. A CPU's start has little to trace and lower; on a TPU it was never run."""
KEPT = 8
"""Steps in the folder; of more, those that were used last."""
READING = (
    "path", "val_path", "val_fraction", "weights", "epochs", "text_key", "cache_dir", "workers", "prefetch",
)  # fmt: skip
"""Of `data`, what says where text lies and how it is read: no program hangs on it, nor on any of `run` but the seed."""
OF_OTHERS = 0o022
"""Modes by which a group or all others can write."""
HIT = "/jax/compilation_cache/cache_hits"
DIGEST = hashlib.sha256().digest_size

log = logging.getLogger(__name__)


class KeptStep:
    """The place of a config's compiled step; `load` and `store` never raise.

    What a step's file holds is run, as Python's pickles are. So folder and file are left alone unless they are this
    user's and nobody else can write there.
    """

    def __init__(self, folder: Path, key: str):
        """folder: is made for this user alone. key: see `key`."""
        self.folder, self.path = folder, folder / f"{key}.step"

    def is_there(self) -> bool:
        """Whether there is a file, whatever is in it."""
        return os.path.isfile(self.path)

    def load(self, mesh: Mesh, args: tuple):
        """The compiled step, which takes args of these shapes, types and shardings; None: it has to be compiled."""
        try:
            if not (self._is_private(self.folder) and self._is_private(self.path)):
                return None
            content = self.path.read_bytes()
        except OSError:
            return None
        try:
            if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
                raise ValueError("its bytes are not those that were written")
            step = _loaded(content[DIGEST:], mesh, args)
            os.utime(self.path)
            return step
        except Exception as error:  # whatever is wrong with it, the step can be compiled
            _warn("not used", self.path, error)
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            return None

    def store(self, step: jax.stages.Compiled) -> None:
        """Keeps a compiled step for later starts, in the place of those that were not used for longest."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_private(self.folder):
                return
            content = pickle.dumps(serialize_executable.serialize(step))
            storage.write_bytes(self.path, hashlib.sha256(content).digest() + content)
            self.path.chmod(0o600)
            steps = sorted(self.folder.glob("*.step"), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in steps[KEPT:]:
                path.unlink(missing_ok=True)
        except Exception as error:  # whatever it is, the run goes on
            _warn("not kept", self.path, error)

    @staticmethod
    def _is_private(path: Path) -> bool:
        """Whether it is this user's, and nobody else can write it. OSError where it is not there."""
        found = path.stat()
        private = found.st_uid == os.getuid() and not found.st_mode & OF_OTHERS
        if not private:
            log.info("compiled steps not kept: others can write %s", path)
        return private


def kept_step(folder: Path | None, config: Config, mesh: Mesh) -> KeptStep | None:
    """Where a config's step is kept; None where it is not: without a folder, on other platforms than PLATFORMS, with
    several processes, or with a block that is defined elsewhere, whose source is not looked at."""
    if folder is None or jax.process_count() > 1 or platform_of(mesh.devices.flat[0]) not in PLATFORMS:
        return None
    return KeptStep(folder, key(config, mesh)) if all(_is_ours(node) for node in _nodes(config)) else None


@contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Gathers an event for each program that this thread gets from JAX's own cache meanwhile."""
    thread, hits = threading.get_ident(), []

    def note(event: str, **about) -> None:
        if event == HIT and threading.get_ident() == thread:
            hits.append(event)

    monitoring.register_event_listener(note)
    try:
        yield hits
    finally:
        monitoring.unregister_event_listener(note)


def key(config: Config, mesh: Mesh) -> str:
    """Of all that the program of a step hangs on, as hexadecimal digits."""
    flags: Any = jax.config  # whose values its type does not name
    plain = {name: value for name, value in flags.values.items() if isinstance(value, (str, int, float, type(None)))}
    facts = {
        "config": of_config(config),
        "sources": _sources(),
        "python": sys.version,
        "versions": versions(),
        "flags": {name: value for name, value in plain.items() if "cache" not in name},
        "environment": {n: v for n, v in os.environ.items() if n.startswith(ENVIRONMENT) and "CACHE" not in n},
        "mesh": [list(mesh.shape.items()), [compiled_by(device) for device in mesh.devices.flat]],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def of_config(config: Config) -> dict[str, Any]:
    """What of a config the program of a step hangs on."""
    hung_on = to_dict(config) | {"run": config.run.seed, "name": None, "cluster": None, "init": None, "probe": None}
    return hung_on | {"data": {name: value for name, value in hung_on["data"].items() if name not in READING}}


def _sources() -> str:
    digest = hashlib.sha256()
    for package, root in SOURCES.items():
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _nodes(value) -> Iterator[Any]:
    yield value
    for child in value if isinstance(value, (list, tuple)) else children(value).values():
        yield from _nodes(child)


def _is_ours(value) -> bool:
    return type(value).__module__.partition(".")[0] in OURS and not callable(value)


def _loaded(content: bytes, mesh: Mesh, args: tuple) -> jax.stages.Compiled:
    """ValueError where it is the step of other arguments."""
    if any(compiled_by(device)[0] == "gpu" for device in mesh.devices.flat):
        import pallas_kernels.mosaic_gpu  # noqa: F401  by whose import JAX makes the kernels' loader known
    payload, in_tree, out_tree = pickle.loads(content)
    if in_tree != jax.tree.structure((args, {})):
        raise ValueError("it takes other arguments")
    devices = list(mesh.devices.flat)
    step = serialize_executable.deserialize_and_load(payload, in_tree, out_tree, devices[0].client, devices)
    like = [(x.shape, x.dtype) for x in jax.tree.leaves(args)]
    if like != [(x.shape, x.dtype) for x in jax.tree.leaves(step.args_info)]:
        raise ValueError("it takes arguments of other shapes")
    return step


def _warn(what: str, path: Path, error: Exception) -> None:
    said = str(error).strip().splitlines()
    log.warning("compiled step %s (%s): %s", what, path, said[0][:200] if said else type(error).__name__)
