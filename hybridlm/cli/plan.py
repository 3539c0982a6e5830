# SPDX-License-Identifier: Apache-2.0
"""`hybridlm plan`: whether a run fits its devices, what bounds it and what it costs, before there are any."""

import argparse
import atexit
import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.words import check_apart, split_overrides
from hybridlm.errors import ConfigError, importing, require

STAGES = ("counted", "lowered", "compiled")
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def run(words: list[str], prog: str) -> int:
    """Prints what each stage finds, and writes all of it; see Command."""
    mine, overrides = split_overrides(words)
    args = parse(_parser(prog), mine)
    if args is None:
        return 0
    tokens = None if args.tokens is None else count(args.tokens)
    for name, least in (("fit", 0), ("best", 1)):
        require(getattr(args, name) >= least, f"--{name} ({getattr(args, name)}) must be at least {least}")
    require(args.price is None or 0 < args.price < math.inf, f"--price ({args.price}) must be a positive number")
    require(args.price is None or tokens is not None, "--price is of a whole training: give its --tokens, too, as 1T")
    check_apart({f"--{name}": getattr(args, name) for name in ("search", "budget", "json", "html")})
    topology = args.topology or _pod_of(args.config)
    with importing():
        _be_alone(topology)
        from hybridlm.config.find import load_config
        from hybridlm.plan.plan import Plan
        from hybridlm.plan.slices import read_devices
        from hybridlm.plan.tables import show

    devices = read_devices(topology)
    plan = Plan(args.config, load_config(args.config, overrides), devices, tokens, args.price)
    show(plan, "head")
    try:
        return stoppable(lambda: _search(plan, args) if args.search else _stages(plan, args))
    except KeyboardInterrupt:
        if args.search and Path(args.search).exists():
            print(f"{args.search} has what was compiled: the same command goes on from there", flush=True)
        raise


def _stages(plan, args: argparse.Namespace) -> int:
    """Prints and writes each when it is known, then changes that fit."""
    from hybridlm.plan.tables import show

    for stage in plan.run(args.stage):
        show(plan, stage)
        _write(plan, args)
    if args.stage == "compiled" and plan.fits is False and args.fit:
        _fit(plan, args)
    return 0


def stoppable(work: Callable[[], int]) -> int:
    """What work gives, done in a thread of its own: a compiler hears no Ctrl-C, for minutes, so that this thread does.
    KeyboardInterrupt comes at once; the process then ends without waiting for the compiler, which nothing can stop."""
    done: Future[int] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it is, it is the caller's
            done.set_exception(error)

    thread = threading.Thread(target=do, name="plan", daemon=True)
    thread.start()
    try:
        return done.result()
    except KeyboardInterrupt:
        atexit.register(_leave, thread)
        raise


def _leave(thread: threading.Thread) -> None:
    """Ends the process where the compiler still runs, before anything that it uses is taken down."""
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)


def _fit(plan, args: argparse.Namespace) -> None:
    """Compiles changes until one fits."""
    from hybridlm.plan.search import Book, compiled, fitting
    from hybridlm.plan.sections import compared
    from hybridlm.plan.tables import show_section

    results = list(fitting(plan, args.fit, Book(), compiled(plan.name, plan.devices)))
    show_section(compared(results, "Changes that were compiled, the smallest first"))
    if not any(result.fits for result in results):
        print("none of them fits: --fit N tries more of them")


def _search(plan, args: argparse.Namespace) -> int:
    """Ranks ways to run the config; what was compiled before is read from the file."""
    from hybridlm.plan.search import Book, compiled, order, search
    from hybridlm.plan.sections import compared
    from hybridlm.plan.tables import show_section

    book, results, seem = Book(Path(args.search)), [], 0
    print(f"\n{args.search}: a line for each that is compiled, minutes for large models", flush=True)
    for n, seem, result in search(plan.config, plan.devices, args.best, book, compiled(plan.name, plan.devices)):
        said = "fits" if result.fits else result.why or "does not fit"
        print(f"{n} of {seem:,}: {result.words or 'as it is'}: {said}", flush=True)
        results.append(result)
    show_section(compared(order(results), f"Compiled of {seem:,} that seem to fit, the best first"))
    return 0


PLAN = Command(
    "plan",
    (("--config NAME --topology SLICE [--section.key=value ...]", "will it fit, what bounds it, what does it cost"),),
    run,
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(
        prog,
        "Whether a run fits devices that are not there, what bounds it and what it costs. Options of the config, as "
        "--mesh.fsdp=128, stand beside these.",
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a config, as hybrid_8b or hybrid_8b:v5p:8x8x16"
    )
    parser.add_argument("--topology", metavar="SLICE", help="v5p:8x8x16, 2xv5e:16x16, h100:8, cpu:8 (the config's pod)")
    parser.add_argument(
        "--stage", choices=STAGES, default="compiled",
        help="the last one: counted takes a second, lowered 20, compiled minutes (compiled)",
    )  # fmt: skip
    parser.add_argument("--tokens", metavar="N", help="of the training, as 300B or 1T: days, chip hours, money")
    parser.add_argument("--price", type=float, metavar="X", help="of a chip and an hour")
    parser.add_argument(
        "--fit", type=int, default=3, metavar="N",
        help="if it does not fit, compile up to N changes until one does (3)",
    )  # fmt: skip
    parser.add_argument(
        "--search", metavar="FILE",
        help="rank meshes, remat and microbatches; results are kept in the file, and found there again",
    )  # fmt: skip
    parser.add_argument("--best", type=int, default=3, metavar="K", help="of them compiled by --search (3)")
    parser.add_argument("--budget", metavar="FILE", help="write the figures that a test can compare, beside others")
    parser.add_argument("--json", metavar="FILE", help="write all that is known, after every stage")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots, after every stage")
    return parser


def count(words: str) -> float:
    """A number of tokens: 1T, 2.5B, 300e9. ConfigError for other words."""
    unit = words[-1:].upper() if words[-1:].upper() in UNITS else ""
    try:
        value = float(words[: len(words) - len(unit)]) * UNITS[unit]
    except ValueError:
        value = 0.0
    require(0 < value < 1e30, f"--tokens ({words!r}) must be a positive number, as 1T, 2.5B or 300e9")
    return value


def _pod_of(config: str) -> str:
    """The slice behind a config's name, hybrid_8b:v5p:8x8x16."""
    parts = config.split(":")
    if len(parts) < 3:
        raise ConfigError(
            "--topology is missing: give it, as --topology v5p:8x8x16 or h100:8, or a config with a pod, as "
            "hybrid_8b:v5p:8x8x16"
        )
    return ":".join(parts[-2:])


def _be_alone(topology: str) -> None:
    """Nothing is asked of devices that are there: programs are compiled for described ones on this host's CPU."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
    ):
        os.environ.setdefault(name, value)
    import jax

    from hybridlm.plan.slices import MOST_CPUS

    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    family, _, n = topology.partition(":")
    if family == "cpu" and n.isdigit() and 0 < int(n) <= MOST_CPUS:
        with contextlib.suppress(RuntimeError):  # JAX has computed already
            jax.config.update("jax_num_cpu_devices", max(int(n), jax.config.jax_num_cpu_devices))


def _write(plan, args: argparse.Namespace) -> None:
    from hybridlm.plan.search import path_of

    if args.json:
        with path_of("--json", args.json):
            storage.write_text(storage.as_path(args.json), plan.as_json())
    if args.budget:
        from hybridlm.plan import budget

        with path_of("--budget", args.budget):
            budget.write(Path(args.budget), plan.name, budget.of_plan(plan))
    if args.html:
        from hybridlm.plan.page import as_html

        with path_of("--html", args.html):
            storage.write_text(storage.as_path(args.html), as_html(plan))
