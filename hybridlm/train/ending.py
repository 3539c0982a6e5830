# SPDX-License-Identifier: Apache-2.0
"""Ends the process at once, from any thread."""

import os
import sys
import threading
from typing import NoReturn, TextIO

from hybridlm.errors import print_line

_first = threading.Lock()


def leave(code: int, line: str, stream: TextIO | None = None) -> NoReturn:
    """Says the line, on standard error unless told otherwise, and ends with the exit code.

    No handler runs and no thread is waited for, so this works while others hang. Where several threads have a reason to
    end, the first one says it.
    """
    _first.acquire()
    if sys.stdout is not None and sys.stdout.isatty():
        print_line("\x1b[?25h", sys.stdout)  # the live line hides the cursor
    print_line(line, stream)
    os._exit(code)
