# SPDX-License-Identifier: Apache-2.0
"""The shell loop of docs/reliability.md, run with a stand-in for `train.py` that ends as it is told."""

import re
import subprocess
import sys

import pytest

from tests.faults.runs import ROOT

ENDS = """
import sys
from pathlib import Path

codes = Path("codes").read_text().split()
Path("codes").write_text(" ".join(codes[1:]))
sys.exit(int(codes[0]))
"""


@pytest.mark.parametrize(
    ("ends", "code", "left"),
    [("0", 0, ""), ("75 143 129 0", 0, ""), ("75 1 0", 1, "0"), ("2 0", 2, "0"), ("130 0", 130, "0")],
)
def test_the_loop_starts_again_what_can_go_on(tmp_path, ends, code, left):
    page = (ROOT / "docs" / "reliability.md").read_text()
    loop = re.search(r"```text\n(until python train.py .*?)```", page, re.DOTALL)[1]
    (tmp_path / "train.py").write_text(ENDS)
    (tmp_path / "codes").write_text(ends)
    script = loop.replace("sleep 30", "sleep 0").replace("until python", f"until {sys.executable}")
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, timeout=30)
    assert done.returncode == code and (tmp_path / "codes").read_text() == left
