# SPDX-License-Identifier: Apache-2.0
"""`hybridlm report`: the page of a run, written anew."""

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse


def run(words: list[str], prog: str) -> int:
    """Writes report.html into the folder of each run; see Command."""
    parser = make_parser(prog, "A run as a page: curves, speed, events, samples, config. Runs write it when they end.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, as runs/hybrid_tiny")
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    args = parse(parser, words)
    if args is None:
        return 0
    from hybridlm.config.find import read_config
    from hybridlm.study.report import write_report

    like = None if args.config is None else read_config(args.config)
    for text in args.runs:
        print(write_report(storage.as_path(text), like))
    return 0


REPORT = Command("report", (("RUN ...", "write the page of a run anew"),), run)
