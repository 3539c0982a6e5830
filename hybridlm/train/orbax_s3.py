# SPDX-License-Identifier: Apache-2.0
"""Orbax on s3://.

Orbax reaches small files through etils, which knows s3://, and arrays through TensorStore, which has a driver for S3.
Between them stands one function that names arrays to TensorStore: it knows gs:// and folders, and refuses s3://. Here
it learns the third scheme, from what it says of a folder; all else of Orbax is as on gs://. Where a later Orbax knows
s3:// itself, nothing is changed.
"""

import functools
import re
from typing import Any

from hybridlm import storage
from hybridlm.errors import ConfigError
from hybridlm.storage.cell import kvstore_spec

_FOLDER = "/s3-bucket/"
"""What an S3 path is called while Orbax takes it for a folder."""


@functools.cache
def teach_s3() -> None:
    """Makes Orbax write and read arrays at s3://. ConfigError where this version of Orbax cannot be taught."""
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils as names

        ask = names.build_kvstore_tspec
        try:
            spec = ask("s3://bucket/folder")
        except ValueError:  # it is no absolute path of a folder
            names.build_kvstore_tspec = functools.wraps(ask)(functools.partial(_build, ask))
            spec = names.build_kvstore_tspec("s3://bucket/folder")
    except (ImportError, AttributeError, TypeError):
        spec = {}
    while "base" in spec:
        spec = spec["base"]
    if spec.get("driver") != "s3":
        raise ConfigError(
            "run.dir on s3:// does not work with this version of Orbax: pip install 'orbax-checkpoint<0.13'"
        )


def _build(ask, directory: str, *args, **options) -> dict[str, Any]:
    """What Orbax says of a folder or of gs://; of s3://, what it says of a folder, said of the bucket."""
    found = re.match(r"s3:/+(.*)", directory)
    return ask(directory, *args, **options) if found is None else _on_s3(ask(_FOLDER + found[1], *args, **options))


def _on_s3(spec: Any) -> Any:
    """A specification with each of its folders as the bucket that it stands for."""
    if isinstance(spec, list):
        return [_on_s3(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    path = spec.get("path")
    if spec.get("driver") == "file" and isinstance(path, str) and path.startswith(_FOLDER):
        far = kvstore_spec(storage.as_path(f"s3://{path.removeprefix(_FOLDER)}"))
        return {**far, "path": far["path"] + "/" * path.endswith("/")}
    # the manifest of a folder is named apart, to be written by a rename: an object is whole anyhow
    return {name: _on_s3(part) for name, part in spec.items() if (name, spec.get("driver")) != ("manifest", "ocdbt")}
