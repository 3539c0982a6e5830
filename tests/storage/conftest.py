# SPDX-License-Identifier: Apache-2.0
"""Real servers of S3 and of Google Cloud Storage on loopback, and buckets of them.

Where the packages for that are missing, its tests are skipped: see NEEDS in tests/conftest.py.
"""

import contextlib
import itertools
import logging
import os
from pathlib import Path

import pytest

from hybridlm import storage
from hybridlm.storage import paths
from tests.storage import gcs_server
from tests.train.conftest import one_device
from tests.train.test_run import states, stop_at

__all__ = ["one_device", "states", "stop_at"]

COUNT = itertools.count()
AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask for a kind of bucket by gRPC


@pytest.fixture(scope="session")
def server():
    """The address of an S3 server that keeps everything in memory."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def forget_clients() -> None:
    """The next use of a bucket makes its client anew, by the environment of then."""
    from etils.epath import backend

    paths._prepare.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    import fsspec

    for scheme in ("s3", "gs"):
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """The environment that leads to the server, and copies of buckets in the test's folder; the server's address."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**AWS, "AWS_ENDPOINT_URL": server, "HYBRIDLM_SCRATCH": str(tmp_path / "scratch")}.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield server
    forget_clients()


@pytest.fixture
def gs(monkeypatch, tmp_path):
    """The environment that leads to a server of Google Cloud Storage, with one empty bucket, whose address it is."""
    with gcs_server.running() as url:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(name, url)
        monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
        monkeypatch.setenv("HYBRIDLM_SCRATCH", str(tmp_path / "scratch"))
        forget_clients()
        yield f"gs://{gcs_server.BUCKET}"
    forget_clients()


@pytest.fixture
def bucket(request) -> str:
    """A new bucket's address, of S3 or, with "gs" as its parameter, of Google Cloud Storage."""
    if getattr(request, "param", "s3") == "gs":
        return request.getfixturevalue("gs")
    request.getfixturevalue("s3")
    import s3fs

    name = f"bucket-{next(COUNT)}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def upload(folder: Path, target: str) -> None:
    """Every file under a folder, under the target."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        storage.copy(file, storage.as_path(f"{target}/{file.relative_to(folder).as_posix()}"))
