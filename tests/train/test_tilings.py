# SPDX-License-Identifier: Apache-2.0
"""Tilings that are shipped are put where XLA looks, on the device and with the versions that they were found with, and
nowhere else; whatever is wrong with them, a start goes on."""

import json
import re
from pathlib import Path

import jax
import pytest

from hybridlm.train import tilings, xla
from hybridlm.train.tilings import FOLDER, SHIPPED, main, put, unpack

KIND = "A card"
INSTALLED = {"jaxlib": "9.8.7", "nvidia-cublas": "13.1"}
FOUND = {"0123456789abcdef/aa.pb": b"\x08\x01tiles", "0123456789abcdef/bb.pb": b""}


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """Versions, on a device of KIND."""
    found = dict(INSTALLED)
    monkeypatch.setattr(tilings, "versions", lambda: found | {"numpy": "2"})
    monkeypatch.setattr(tilings, "device_name", lambda: KIND)
    return found


@pytest.fixture
def shipped(installed, tmp_path, monkeypatch) -> Path:
    """File that is shipped for KIND, of what XLA has found in a cache."""
    for at, content in FOUND.items():
        path = tmp_path / "found" / FOLDER / at
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(tilings, "SHIPPED", folder)
    monkeypatch.setattr(xla, "TILINGS", {KIND: {INSTALLED["jaxlib"]: "card.json"}})
    assert main([str(folder / "card.json"), "--found", str(tmp_path / "found")]) == 0
    return folder / "card.json"


def files(cache: Path) -> dict[str, bytes]:
    folder = cache / FOLDER
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_are_put_where_xla_looks(shipped, tmp_path):
    cache = tmp_path / "new" / "cache"
    assert put(cache) == len(FOUND)
    assert files(cache) == FOUND


def test_what_is_there_stays(shipped, tmp_path):
    """XLA found it here, on this very card."""
    cache = tmp_path / "cache"
    assert put(cache) == len(FOUND)
    first = cache / FOLDER / next(iter(FOUND))
    first.write_bytes(b"own")
    assert put(cache) == 0
    assert first.read_bytes() == b"own"
    first.unlink()
    assert put(cache) == 1
    assert files(cache) == FOUND


def test_of_another_device_or_version_are_left(shipped, installed, tmp_path, monkeypatch):
    """A number of cuBLAS's algorithms is another one's in another version; a card of another clock wants others."""
    cache = tmp_path / "cache"
    for name, version in (("jaxlib", "9.8.8"), ("nvidia-cublas", "13.2")):
        was = installed[name]
        installed[name] = version
        assert put(cache) == 0
        installed[name] = was
    del installed["nvidia-cublas"]  # that of the system, whatever its version
    assert put(cache) == 0
    installed["nvidia-cublas"] = INSTALLED["nvidia-cublas"]
    monkeypatch.setattr(tilings, "device_name", lambda: "Another card")
    assert put(cache) == 0
    assert not cache.exists()
    monkeypatch.setattr(tilings, "device_name", lambda: KIND)
    assert put(cache) == len(FOUND)


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "empty", "list", "flipped", "swapped"])
def test_a_damaged_file_stops_no_start(shipped, tmp_path, damage):
    text = shipped.read_text()
    record = json.loads(text)
    first, second = record["files"]
    damaged = {
        "cut": text[:-20],
        "other": "\0\1\2",
        "empty": "{}",
        "list": "[]",
        "flipped": json.dumps(record | {"files": record["files"] | {first: "AAAA"}}),
        "swapped": json.dumps(record | {"files": {first: record["files"][second], second: record["files"][first]}}),
    }
    shipped.unlink() if damage == "missing" else shipped.write_text(damaged[damage])
    assert put(tmp_path / "cache") == 0
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_stops_no_start(shipped, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / FOLDER).write_text("no folder")
    assert put(cache) == 0


def test_the_cache_in_use_is_taken(shipped, tmp_path):
    """And none where JAX keeps nothing, keeps it elsewhere, or does not have XLA look."""
    before = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches", "jax_enable_compilation_cache",
        )
    }  # fmt: skip
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert put() == 0
        jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
        assert put() == 0
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        assert put() == 0
        jax.config.update("jax_persistent_cache_enable_xla_caches", "all")
        jax.config.update("jax_enable_compilation_cache", False)
        assert put() == 0
        jax.config.update("jax_enable_compilation_cache", True)
        assert put() == len(FOUND)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_jax_has_xla_look_in_that_folder(tmp_path):
    """Its name and that of the flag are JAX's; without them, nothing would be found there."""
    flag = jax.config.values["jax_persistent_cache_enable_xla_caches"]
    assert flag == FOLDER


def test_nothing_found_is_one_line(installed, tmp_path, capsys):
    assert main([str(tmp_path / "card.json"), "--found", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: no tilings in {tmp_path / FOLDER}")
    assert not (tmp_path / "card.json").exists()


def test_what_is_shipped_is_whole(monkeypatch):
    """Every file that the table names is there, of the version that it says, undamaged and small; none is left over."""
    named = {name: (kind, version) for kind, row in xla.TILINGS.items() for version, name in row.items()}
    assert {path.name for path in SHIPPED.glob("*")} == set(named)
    for name, (kind, version) in named.items():
        text = (SHIPPED / name).read_text()
        record = json.loads(text)
        assert (record["device"], record["versions"]["jaxlib"]) == (kind, version)
        assert set(record["versions"]) == set(tilings.VERSIONS)
        monkeypatch.setattr(tilings, "versions", lambda record=record: record["versions"])
        found = unpack(text)
        assert found and all(re.fullmatch(r"[0-9a-f]{16}/[0-9a-f]{32}\.pb", at) for at in found)
        assert len(text) < 300_000
