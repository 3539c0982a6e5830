# SPDX-License-Identifier: Apache-2.0
"""What a run leaves when it ends, however it ends: a record of why, and a page."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hybridlm import storage
from hybridlm.errors import ConfigError, RunError
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.run_folder import RunFolder

log = logging.getLogger(__name__)


@contextmanager
def failure_recorded(records: MetricsLog, settle: Callable[[BaseException], None]) -> Iterator[None]:
    """What is raised inside is in the run's records, where those can still be written. settle: ends a process that must
    not write any more, see Peers."""
    try:
        yield
    except Exception as error:
        settle(error)
        why = " ".join(str(error).split())[:300]
        ours = isinstance(error, ConfigError | RunError)
        with suppress(Exception):
            records.write("failed", records.newest, {"why": why if ours else f"{type(error).__name__}: {why}"})
            records.flush()
        raise


@contextmanager
def page_written(folder: RunFolder, write: Callable[[Path], None] | None) -> Iterator[None]:
    """Writes the page of a run when the block ends, from what lies in its folder by then.

    write: given the run's folder; None: there is no page. It is not worth a run: where it fails, a warning says so.
    """
    try:
        yield
    finally:
        if write is not None and folder.owner and folder.config.run.report:
            try:
                folder.check_there()
                if storage.exists(folder.metrics):
                    write(folder.path)
            except Exception as error:
                log.warning("no page of %s: %s", folder.path, " ".join(str(error).split())[:200])
