# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study NAME`: questions that are answered by training or by taking apart models; a table of them.

A new one is a file with its Command, whose uses and words are those behind its name, and a word in STUDIES.
"""

from hybridlm.cli.command import Command
from hybridlm.cli.study_layers import LAYERS
from hybridlm.cli.study_length import LENGTH
from hybridlm.cli.study_ratio import RATIO
from hybridlm.errors import Exit, require

STUDIES = (RATIO, LAYERS, LENGTH)


def run(words: list[str], prog: str) -> int:
    """Runs the study that the first word names."""
    studies = {study.name: study for study in STUDIES}
    lines = [f"{prog} {study.name} {use}" for study in STUDIES for use, _ in study.uses]
    if words and words[0] in ("-h", "--help"):
        print("usage: " + "\n       ".join(lines))
        for study in STUDIES:
            print()
            study.run(["--help"], f"{prog} {study.name}")
        return Exit.COMPLETE
    named = words[0] if words else ""
    require(named in studies, f"study ({named}): name one of {', '.join(studies)}; see {prog} --help")
    return studies[named].run(words[1:], f"{prog} {named}")


STUDY = Command(
    "study", tuple((f"{study.name} {use}", what) for study in STUDIES for use, what in study.uses), run
)  # fmt: skip
