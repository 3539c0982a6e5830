# SPDX-License-Identifier: Apache-2.0
"""Folders and buckets: one kind of path for both, and what a bucket does differently.

A path is `pathlib.Path` for `/folder`, `~/folder` and `file:///folder`, `etils.epath.Path` for `gs://bucket/key` and
`s3://bucket/key`; both have the names of pathlib. A bucket has objects, not files: one is written whole or not at all
and never appended to, nothing is renamed or locked, and a folder exists as long as an object lies in it. Where that
matters, code calls a function of this module. Credentials are those that the clients find (AWS_*, ~/.aws, Google's
application default credentials); AWS_ENDPOINT_URL points S3 elsewhere.

Errors: OSError with a text of one line, whatever the client of the bucket raises; `check` gives a ConfigError.
"""

from hybridlm.storage.copies import fetch, is_published, local, mirror, publish, scratch
from hybridlm.storage.files import (
    append,
    check,
    copy,
    exists,
    find,
    listing,
    make_folder,
    names,
    open_file,
    read_bytes,
    read_range,
    reading,
    remove,
    size,
    version,
    versions,
    write_bytes,
    write_text,
    writing,
)
from hybridlm.storage.paths import absolute, as_path, bucket_of, in_bucket, reason, scheme_of, told

__all__ = [
    "absolute", "append", "as_path", "bucket_of", "check", "copy", "exists", "fetch", "find", "in_bucket",
    "is_published", "listing", "local", "make_folder", "mirror", "names", "open_file", "publish", "read_bytes",
    "read_range", "reading", "reason", "remove", "scheme_of", "scratch", "size", "told", "version", "versions",
    "write_bytes", "write_text", "writing",
]  # fmt: skip
