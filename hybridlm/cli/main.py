# SPDX-License-Identifier: Apache-2.0
"""The command line: `hybridlm train`, `generate`, `convert`. What the user has to mend is one line and exit code 2."""

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from hybridlm.config.find import config_names, load_config, read_config
from hybridlm.config.overrides import help_text
from hybridlm.errors import ConfigError, RunError
from hybridlm.train.commands import hybridlm_command, python_command
from hybridlm.train.stop import StopRequest

USAGE = """\
usage: hybridlm train --config NAME [--section.key=value ...]    train, or go on with, a run
       hybridlm generate --run runs/NAME --prompt TEXT [...]     write text with a run's model
       hybridlm convert from-hf FOLDER RUN                       a published checkpoint as a run's folder
       hybridlm convert to-hf RUN FOLDER [...]                   a run as a published checkpoint
       hybridlm COMMAND --help                                   all options of a command
"""


def main(argv: list[str] | None = None) -> int:
    """`hybridlm ...`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    commands = {"train": _train, "generate": _generate, "convert": _convert}
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] not in commands:
        print(f"hybridlm: no command {words[0]!r}: there are {', '.join(commands)}", file=sys.stderr)
        return 2
    return _run(lambda: commands[words[0]](words[1:], f"hybridlm {words[0]}"))


def train_main(argv: list[str] | None = None) -> int:
    """`python train.py ...`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return _run(lambda: _train(words, "python train.py"))


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except ConfigError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except BrokenPipeError:  # the reader of our output, as `| head`, has gone
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (what is flushed at exit goes there)
        return 1
    except OSError as error:
        if error.strerror is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(error, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


def _train(words: list[str], prog: str) -> int:
    name, overrides = _take_config(words)
    if "-h" in overrides or "--help" in overrides:
        print(f"usage: {prog} --config NAME|FILE.py [--section.key=value ...]")
        print(f"configs: {', '.join(config_names())}")
        print(help_text(read_config(name or "hybrid_tiny"), f"{prog} --config {name or 'hybrid_tiny'}"))
        return 0
    if name is None:
        raise ConfigError(f"--config is missing; known: {', '.join(config_names())}")
    config = load_config(name, overrides)
    if config.init.hf == "":
        raise ConfigError("init.hf ('') must be the folder of a published checkpoint: give --init.hf=FOLDER")
    typed = prog.replace("python", python_command()).replace("hybridlm", hybridlm_command())
    again = [*typed.split(), "--config", name, *_without(overrides, "--run.steps")]
    with StopRequest() as stop:
        _prepare()
        from hybridlm.train.loop import train

        return train(config, shlex.join(again), stop)


def _take_config(words: list[str]) -> tuple[str | None, list[str]]:
    """(value of --config, the other words)."""
    name, rest, words = None, [], list(words)
    while words:
        word = words.pop(0)
        if word == "--config":
            if not words or words[0].startswith("-"):
                raise ConfigError(f"--config wants a name or a file; known: {', '.join(config_names())}")
            name = words.pop(0)
        elif word.startswith("--config="):
            name = word.removeprefix("--config=")
        else:
            rest.append(word)
    return name, rest


def _without(words: list[str], key: str) -> list[str]:
    """The words less an override and its value."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word.split("=")[0] == key
        if not skipping:
            kept.append(word)
    return kept


def _without_late_writes(say: Callable) -> Callable:
    """`say`, but for what the threads of a checkpoint that cannot be written say of each array, after the save itself
    has failed in one line."""

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            say(unraisable)

    return hook


def _prepare() -> None:
    """Joins a cluster where the environment announces one; keeps compiled programs between starts; quiets libraries."""
    import jax

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Sharding info not provided", category=UserWarning)
    warnings.filterwarnings("ignore", message="coroutine .*write_fragment.* was never awaited", category=RuntimeWarning)
    sys.unraisablehook = _without_late_writes(sys.unraisablehook)
    if not jax.config.jax_compilation_cache_dir:
        cache = Path("~/.cache/hybridlm/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        places = {"num_processes": os.environ.get("JAX_NUM_PROCESSES"), "process_id": os.environ.get("JAX_PROCESS_ID")}
        jax.distributed.initialize(**{name: int(value) for name, value in places.items() if value is not None})
    elif _cluster_announced():
        jax.distributed.initialize()


def _cluster_announced() -> bool:
    """More than one worker of a TPU slice, or more than one task of SLURM or Open MPI: what JAX finds its way in."""
    env = os.environ
    tasks = max(int(env.get(name, "1") or 1) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    in_task = "SLURM_PROCID" in env or "OMPI_COMM_WORLD_RANK" in env
    workers = [w for w in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if w]
    return len(workers) > 1 or (tasks > 1 and in_task)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}; see {self.prog} --help")


def _generate(words: list[str], prog: str) -> int:
    parser = _Parser(prog=prog, description="Writes text with the model of a run.", allow_abbrev=False)
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of the run, as runs/hybrid_tiny")
    parser.add_argument("--prompt", default="", help="start of the text (default: the start of a document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that hold P of the mass")
    parser.add_argument("--seed", type=int, default=0, help="of the choices (0)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (the newest)")
    try:
        args = parser.parse_args(words)
    except SystemExit as done:
        return int(done.code or 0)
    for name, low, high in (("max_new_tokens", 1, None), ("temperature", 0, None), ("top_k", 1, None), ("top_p", 0, 1)):
        value = getattr(args, name)
        if value is not None and (value < low or (high is not None and value > high)):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"--{name.replace('_', '-')} ({value:g}) must be {limit}")
    _prepare()
    import jax

    from hybridlm.train.sample import load_run, sample_text

    model, tokenizer, _ = load_run(Path(args.run), args.step)
    text = sample_text(
        model, tokenizer, args.prompt, key=jax.random.key(args.seed), max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
    )  # fmt: skip
    print(text)
    return 0


def _convert(words: list[str], prog: str) -> int:
    from hybridlm.cli.main import convert

    parser = _Parser(prog=prog, description="Published checkpoints in and out.", allow_abbrev=False)
    convert.add_arguments(parser)
    try:
        args = parser.parse_args(words)
    except SystemExit as done:
        return int(done.code or 0)
    _prepare()
    return convert.convert(args)
