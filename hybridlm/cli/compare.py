# SPDX-License-Identifier: Apache-2.0
"""`hybridlm compare`: several runs in one figure and on one page."""

from pathlib import Path

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.words import check_apart, check_figure
from hybridlm.errors import print_line, require


def run(words: list[str], prog: str) -> int:
    """Writes the page and the figure; see Command."""
    parser = make_parser(
        prog, "Runs over tokens, time and FLOPs: one figure, and a page with the table of differences."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or folders of such")
    parser.add_argument("--out", default="compare.html", metavar="FILE", help="the page (compare.html)")
    parser.add_argument("--figure", metavar="FILE", help="the figure alone, .png or .svg (as the page, but .png)")
    parser.add_argument("--title", default="Runs compared", help="of the page")
    parser.add_argument(
        "--config", metavar="FILE", help="config file of the runs, where that defines blocks of its own"
    )
    args = parse(parser, words)
    if args is None:
        return 0
    page = storage.as_path(args.out)
    figure = page.with_name(f"{page.name.removesuffix('.html')}.png")
    if args.figure is not None:
        check_figure(args.figure)
        check_apart({"--out": args.out, "--figure": args.figure})
        figure = storage.as_path(args.figure)
    from hybridlm.config.find import read_config
    from hybridlm.study.reading import Broken, Run, find_runs

    like = None if args.config is None else read_config(args.config)
    found = [each for text in args.runs for each in find_runs(storage.as_path(text), like)]
    for each in found:
        if isinstance(each, Broken):
            print_line(f"left out: {each.path}: {each.word}: {each.why}")
    runs = list({storage.absolute(each.path): each for each in found if isinstance(each, Run)}.values())
    require(bool(runs), f"no run in {', '.join(args.runs)}")
    write(runs, page, figure, args.title)
    print(f"{len(runs)} run{'s' * (len(runs) > 1)}: {page}, {figure}")
    return 0


COMPARE = Command("compare", (("RUN RUN ... [--out FILE]", "runs in one figure and on one page"),), run)


def write(runs: list, page: Path, figure: Path, title: str) -> None:
    """Both files, each whole or not at all."""
    from hybridlm.study.compare import as_page, comparison
    from hybridlm.study.figures import as_file

    storage.write_bytes(figure, as_file(comparison(runs, title), figure.name))
    storage.write_bytes(page, as_page(runs, title).encode("utf-8", "backslashreplace"))
