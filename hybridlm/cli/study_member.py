# SPDX-License-Identifier: Apache-2.0
"""A process of its own that trains one model of a study, or some that are alike, on the devices that it sees.

`python -m hybridlm.cli.study_member FOLDER [...]` reads what is asked from each model's folder, and writes the result
there.
"""

import sys
from collections.abc import Sequence

from hybridlm import storage
from hybridlm.cli.ending import exit_code
from hybridlm.cli.side_by_side import end_with_parent
from hybridlm.cli.start import start
from hybridlm.errors import Exit


def main(*folders: str) -> int:
    """The exit code; what the user has to mend is one line."""
    return exit_code(lambda: _train(folders))


def _train(folders: Sequence[str]) -> int:
    end_with_parent()  # else the study's next start would train the same model beside it
    start()
    from hybridlm.study.ratio import train_member, train_members

    paths = [storage.as_path(folder) for folder in folders]
    results = [train_member(paths[0])] if len(paths) == 1 else train_members(paths)
    for path, found in zip(paths, results):
        told = ", ".join(f"{score['accuracy']:.3f} at {score['length']} tokens" for score in found["scores"])
        name = f"{path.name}: " if len(paths) > 1 else ""
        print(f"{name}accuracy {told}; loss {found['losses'][-1][1]:.4f} after {found['seconds']:.0f} s")
    return Exit.COMPLETE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
