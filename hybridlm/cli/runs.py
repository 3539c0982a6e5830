# SPDX-License-Identifier: Apache-2.0
"""`hybridlm runs`: the runs of a folder in a table."""

import json

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse


def run(words: list[str], prog: str) -> int:
    """Prints a row for each run; see Command."""
    parser = make_parser(prog, "The runs under a folder: what each has reached, and in what their configs differ.")
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="of runs, or of one (runs)")
    parser.add_argument("--json", action="store_true", help="as JSON, with all that differs")
    parser.add_argument(
        "--config", metavar="FILE", help="config file of the runs, where that defines blocks of its own"
    )
    args = parse(parser, words)
    if args is None:
        return 0
    from hybridlm.config.find import read_config
    from hybridlm.study.reading import find_runs
    from hybridlm.study.survey import as_json, as_text
    from hybridlm.train.progress import printable

    folder = storage.as_path(args.folder)
    found = find_runs(folder, None if args.config is None else read_config(args.config))
    if args.json:
        print(json.dumps(as_json(found), indent=2))
        return 0
    text = as_text(found) if found else f"{folder}: no runs"
    print("\n".join(printable(line) for line in text.split("\n")))
    return 0


RUNS = Command("runs", (("[FOLDER]", "list runs: state, steps, loss, and in what they differ"),), run)
