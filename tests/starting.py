# SPDX-License-Identifier: Apache-2.0
"""How tests start Python in a process of its own that may run for long."""

import sys

FIRST = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG, kept over exec
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def python(*words: str) -> list[str]:
    """The command of Python with words that ends with the process that starts it, killed or not, in whatever session it
    runs; hangups reach it also where the tests ignore them, as under nohup."""
    return [sys.executable, "-I", "-S", "-c", FIRST, *words]
