# SPDX-License-Identifier: Apache-2.0
"""A small object that several processes write by compare-and-swap, and how TensorStore is told where things lie."""

import errno
import os
from pathlib import Path
from typing import Any

from hybridlm.storage.paths import bucket_of, scheme_of

RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "8s"}
"""Of a request that fails for want of an answer; TensorStore's own 32 take a quarter of an hour."""


def kvstore_spec(path: Path) -> dict[str, Any]:
    """TensorStore's specification of a key-value store at a path, in a folder or a bucket.

    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION and AWS_DEFAULT_REGION mean what they mean to other clients of S3.
    """
    scheme = scheme_of(path)
    if scheme is None:
        return {"driver": "file", "path": os.fspath(path)}
    bucket, key = bucket_of(path)
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key, "gcs_request_retries": RETRIES}
    spec = {"driver": "s3", "bucket": bucket, "path": key, "s3_request_retries": RETRIES}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else TensorStore looks into files first, and logs those that are missing
        spec["aws_credentials"] = {"type": "environment"}
    return spec | ({"endpoint": endpoint} if endpoint else {}) | ({"aws_region": region} if region else {})


class Cell:
    """One object; every change names the state that it changes. OSError, one line, where the store does not answer."""

    def __init__(self, path: Path):
        self._path = path
        self._store = None

    def read(self) -> tuple[bytes | None, bytes]:
        """(content, None where there is none; the state that `swap` and `clear` ask for)."""
        found = self._do(lambda store: store.read(""))
        return (found.value if found.state == "value" else None), found.stamp.generation

    def swap(self, state: bytes, content: bytes) -> bytes | None:
        """Writes the content where the state is still this one: the new state; None where it is another."""
        return self._do(lambda store: store.write("", content, if_equal=state)).generation or None

    def clear(self, state: bytes) -> None:
        """Removes the object where the state is still this one."""
        self._do(lambda store: store.write("", None, if_equal=state))

    def _do(self, action):
        try:
            if self._store is None:
                import tensorstore

                self._store = tensorstore.KvStore.open(kvstore_spec(self._path)).result()
            return action(self._store).result()
        except ValueError as error:  # what TensorStore raises, whatever has happened
            text = " ".join(str(error).split())[:200]
            raise OSError(errno.EIO, text, os.fspath(self._path)) from error
