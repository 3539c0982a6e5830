# SPDX-License-Identifier: Apache-2.0
"""Commands as they have to be typed here, for the lines that say what to type next."""

import os
import shutil
import sys
from pathlib import Path


def python_command() -> str:
    """`python` where that is the interpreter running now, else its path: `.venv/bin/python`."""
    found = shutil.which("python")
    if found and os.path.abspath(found) == os.path.abspath(sys.executable):
        return "python"
    here = os.path.relpath(sys.executable)
    return sys.executable if here.startswith("..") else here


def hybridlm_command() -> str:
    """`hybridlm` where typing that starts this installation, else `PYTHON -m hybridlm`."""
    found = shutil.which("hybridlm")
    if found and Path(found).parent.absolute() == Path(sys.executable).parent.absolute():
        return "hybridlm"
    return f"{python_command()} -m hybridlm"
