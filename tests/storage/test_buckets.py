# SPDX-License-Identifier: Apache-2.0
"""Objects of a real S3 server: read, written, found, copied; and one line for each way that a bucket can fail."""

import socket
import time

import numpy as np
import pytest

from hybridlm import storage
from hybridlm.data.formats import open_source
from hybridlm.errors import ConfigError
from hybridlm.storage import files
from tests.storage.conftest import forget_clients, upload

pytestmark = pytest.mark.buckets
CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


def test_ranges_are_slices(bucket, monkeypatch):
    """Small ones by one request, large ones by several at once."""
    monkeypatch.setattr(files, "PART_BYTES", 7_000)
    path = storage.as_path(f"{bucket}/deep/file")
    storage.write_bytes(path, CONTENT)
    assert storage.read_bytes(path) == CONTENT and storage.size(path) == len(CONTENT)
    rng = np.random.default_rng(1)
    pairs = np.sort(rng.integers(0, len(CONTENT) + 1, (20, 2)), axis=1).tolist()
    for start, stop in [*pairs, (0, 8), (0, len(CONTENT)), (7_000, 14_000), (5, 5)]:
        assert storage.read_range(path, start, stop) == CONTENT[start:stop]
    with storage.reading(path) as file:
        assert file.read(10) == CONTENT[:10] and file.seek(-10, 2) and file.read() == CONTENT[-10:]


def test_an_object_is_written_whole_or_stays(bucket):
    """Also one so large that it is sent in parts: of a write that fails, no part stays either."""
    path = storage.as_path(f"{bucket}/object")
    storage.write_bytes(path, b"before")
    for large in (10, 12 << 20):
        with pytest.raises(ValueError, match="half"), storage.writing(path) as written:
            written.write(bytes(large))
            raise ValueError("half")
        assert storage.read_bytes(path) == b"before"
    listed = storage.paths.files_of(path).call_s3("list_multipart_uploads", Bucket=storage.bucket_of(path)[0])
    assert not listed.get("Uploads")
    with storage.writing(path) as written:
        for _ in range(3):
            written.write(CONTENT)
    assert storage.read_bytes(path) == 3 * CONTENT
    with storage.writing(path):
        pass
    assert storage.read_bytes(path) == b""


def test_a_version_changes_with_the_content(bucket):
    path = storage.as_path(f"{bucket}/object")
    seen = []
    for content in (b"one", b"two", b"one"):
        storage.write_bytes(path, content)
        seen.append(storage.version(path))
    assert seen[0] == seen[2] != seen[1] and {size for size, _ in seen} == {3}


@pytest.mark.parametrize("pattern", ["", "/*.txt", "/**/*.txt", "/a/*", "/a/[bc].txt", "/b.txt", "/a"])
def test_patterns_find_what_they_find_on_a_disk(bucket, tmp_path, pattern):
    """Documents, their ids and their order, of the same files in a folder and in a bucket."""
    folder = tmp_path / "texts"
    for name in ("a.txt", "b.txt", "a/b.txt", "a/c.txt", "a/d/e.txt", ".hidden.txt", "a/.hidden/f.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    upload(folder, f"{bucket}/texts")
    expected = list(open_source(f"{folder}{pattern}"))
    assert list(open_source(f"{bucket}/texts{pattern}")) == expected != []


def test_patterns_that_match_nothing(bucket):
    with pytest.raises(ConfigError, match=r"data.path .*no file matches"):
        open_source(f"{bucket}/none/*.txt")


def test_a_folder_is_published_whole(bucket, tmp_path):
    folder, target = tmp_path / "folder", storage.as_path(f"{bucket}/entry")
    folder.mkdir()
    for name, content in {"a": CONTENT, "b": b"", "c": b"text"}.items():
        (folder / name).write_bytes(content)
    copied = tmp_path / "copied"
    copied.mkdir()
    assert not storage.is_published(target) and not storage.fetch(target, copied)
    storage.publish(folder, target)
    assert storage.is_published(target) and storage.fetch(target, copied)
    assert {f.name: f.read_bytes() for f in copied.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("damage", ["flipped", "cut", "other size"])
def test_a_damaged_copy_is_not_used(bucket, tmp_path, damage, caplog):
    folder, target = tmp_path / "folder", storage.as_path(f"{bucket}/entry")
    folder.mkdir()
    (folder / "tokens").write_bytes(CONTENT)
    storage.publish(folder, target)
    changed = {"flipped": CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), "cut": CONTENT[:-1], "other size": CONTENT + b"0"}
    storage.write_bytes(target / "tokens", changed[damage])
    assert not storage.fetch(target, tmp_path) and list(tmp_path.iterdir()) == [folder]
    assert "tokens is damaged" in caplog.text


def test_copies_of_two_buckets_lie_apart(s3):
    places = {storage.scratch("tokens", storage.as_path(f"s3://{name}")) for name in ("a/b", "a_b", "a/b/c", "b/a")}
    assert len(places) == 4


# One line ------------------------------------------------------------------------------------------------------------


def failure(path: str, write: bool = False) -> str:
    """What `check` says, which is one line with argument and path."""
    with pytest.raises(ConfigError) as caught:
        storage.check(storage.as_path(path), "run.dir", write=write)
    assert str(caught.value).startswith(f"run.dir ({path}): ") and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("write", [False, True])
def test_a_bucket_that_is_there_passes(bucket, write):
    path = storage.as_path(f"{bucket}/runs/a")
    storage.check(path, "run.dir", write=write)
    assert storage.find(bucket)[1] == []  # nothing stays


@pytest.mark.parametrize("write", [False, True])
def test_a_missing_bucket(s3, write):
    assert "there is no bucket s3://no-such-bucket" in failure("s3://no-such-bucket/runs", write)


def test_wrong_credentials(bucket, server, monkeypatch):
    import requests

    requests.post(f"{server}/moto-api/reset-auth", data="0", timeout=10)
    try:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        forget_clients()
        told = failure(f"{bucket}/runs")
    finally:
        requests.post(f"{server}/moto-api/reset-auth", data="inf", timeout=10)
    assert "access denied" in told and "AWS_ACCESS_KEY_ID" in told


def test_no_credentials(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    forget_clients()
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in failure(f"{bucket}/runs")


@pytest.mark.parametrize("listening", [True, False], ids=["silent", "closed"])
def test_a_server_that_does_not_answer(bucket, monkeypatch, listening):
    """One that takes connections and says nothing, and one that is not there: bounded in time."""
    monkeypatch.setattr(files, "CHECK_SECONDS", 1.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        forget_clients()
        began = time.monotonic()
        told = failure(f"{bucket}/runs")
    assert time.monotonic() - began < 10
    assert "does not answer" in told or "Could not connect" in told
