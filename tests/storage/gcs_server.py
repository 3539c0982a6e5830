# SPDX-License-Identifier: Apache-2.0
"""A Google Cloud Storage server on loopback: gcp-storage-emulator, which serves one request after the other, and what
it leaves out of the protocol: writes under `ifGenerationMatch`, and the generation of an object that is read.

https://cloud.google.com/storage/docs/request-preconditions
"""

import contextlib
import logging
from http import HTTPStatus
from urllib.parse import unquote

BUCKET = "bucket"


def generation_of(request, kept) -> int:
    """Of the object that a request names; 0 where there is none."""
    params = request.params or {}
    bucket, name = params.get("bucket_name"), params.get("object_id") or request.query.get("name", [""])[0]
    with contextlib.suppress(Exception):  # the emulator's NotFound
        return int(kept.get_file_obj(bucket, unquote(name))["generation"])
    return 0


def conditional(handler):
    """A handler of the emulator that keeps to a condition, and says what it has read."""

    def handle(request, response, kept, *args, **kwargs):
        now = generation_of(request, kept)
        wanted = request.query.get("ifGenerationMatch")
        if wanted is not None and int(wanted[0]) != now:
            _ = request.data  # has to be read before the answer
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        handler(request, response, kept, *args, **kwargs)
        if now and request.method == "GET":
            response["x-goog-generation"] = str(now)

    return handle


@contextlib.contextmanager
def running():
    """The address of a server that keeps everything in memory, with one empty bucket, `BUCKET`."""
    from gcp_storage_emulator import server

    handlers = [(path, {way: conditional(h) for way, h in by_way.items()}) for path, by_way in server.HANDLERS]
    before, server.HANDLERS = server.HANDLERS, handlers
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    serving = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    try:
        serving.start()
        yield f"http://127.0.0.1:{serving._api._httpd.server_address[1]}"
    finally:
        serving.stop()
        server.HANDLERS = before
