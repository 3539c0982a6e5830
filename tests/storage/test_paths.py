# SPDX-License-Identifier: Apache-2.0
"""What a path is, without any bucket: file://, ~, and one line for what is none."""

import errno
import sys
from pathlib import Path

import pytest

from hybridlm import storage
from hybridlm.errors import ConfigError
from hybridlm.storage import paths


@pytest.mark.parametrize(
    "text, expected",
    [
        ("runs/a", Path("runs/a")),
        ("/data/a b", Path("/data/a b")),
        ("file:///data/a", Path("/data/a")),
        ("file:///data/a%20b", Path("/data/a b")),
        ("~/a", Path.home() / "a"),
        ("s3:/no-scheme", Path("s3:/no-scheme")),
    ],
)
def test_paths_of_this_machine(text, expected):
    path = storage.as_path(text)
    assert path == expected and type(path) is type(Path()) and not storage.in_bucket(path)
    assert storage.as_path(path) == path


@pytest.mark.parametrize(
    "text, told",
    [
        ("ftp://host/a", "are not known"),
        ("https://host/a", "are not known"),
        ("file://host/a", "names a host"),
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("gs://*/key", "names no bucket"),
    ],
)
def test_what_is_no_path_is_one_line(text, told):
    with pytest.raises(ConfigError, match=told) as caught:
        storage.as_path(text)
    assert text in str(caught.value)


@pytest.mark.parametrize("scheme, module", [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_client_names_the_extra(monkeypatch, scheme, module):
    monkeypatch.setitem(sys.modules, module, None)
    paths._prepare.cache_clear()
    with pytest.raises(ConfigError, match=rf"{scheme}:// need {module} .*pip install 'hybridlm\[{scheme}\]'"):
        storage.as_path(f"{scheme}://bucket/folder")


def test_a_file_is_written_whole_or_stays(tmp_path):
    file = tmp_path / "file"
    storage.write_text(file, "before")
    with pytest.raises(ValueError, match="half"), storage.writing(file) as written:
        written.write(b"after")
        raise ValueError("half")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_errors_of_this_machine_stay_as_they_are(tmp_path):
    """A full disk on the way from a bucket is the disk's, not the bucket's."""
    with pytest.raises(OSError, match="No space") as caught, storage.told(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
