# SPDX-License-Identifier: Apache-2.0
"""`hybridlm profile`: where the time of a traced run's steps went."""

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse


def run(words: list[str], prog: str) -> int:
    """Prints the tables and writes them as a page; see Command."""
    parser = make_parser(prog, "Where the time of the steps went that --run.profile_steps traced.")
    parser.add_argument("run", metavar="RUN", help="folder of the run, as runs/hybrid_1b")
    parser.add_argument("--html", metavar="FILE", help="page to write (profile.html in the run's folder)")
    args = parse(parser, words)
    if args is None:
        return 0
    from hybridlm.plan.profile import as_html, as_text, profile
    from hybridlm.train.run_folder import stored_config

    folder = here = storage.as_path(args.run)
    config = stored_config(folder)
    if storage.in_bucket(folder):
        here = storage.mirror(folder, [f"profile/{name}" for name in storage.listing(folder / "profile")])
    found = profile(here, config)
    page = folder / "profile.html" if args.html is None else storage.as_path(args.html)
    storage.write_text(page, as_html(found))
    print(as_text(found))
    print(f"\nas a page: {page}")
    return 0


PROFILE = Command("profile", (("RUN", "where the time of a traced run's steps went"),), run)
