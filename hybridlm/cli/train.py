# SPDX-License-Identifier: Apache-2.0
"""`hybridlm train`, which is `python train.py`: trains a config, or resumes its run."""

from __future__ import annotations

import shlex
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.cli.command import Command
from hybridlm.cli.ending import ended_together
from hybridlm.cli.side_by_side import end_with_parent
from hybridlm.cli.start import kept_steps, start
from hybridlm.errors import ConfigError, importing
from hybridlm.lazy import no_collections

if TYPE_CHECKING:
    from hybridlm.config import Config
    from hybridlm.train.probing import Probes


def run(words: list[str], prog: str) -> int:
    """Trains; see Command."""
    with no_collections(freeze=True), importing():
        from hybridlm.config.find import load_to_train

    name, overrides = _take_config(words)
    if "-h" in overrides or "--help" in overrides:
        _print_help(name or "hybrid_tiny", [word for word in overrides if word not in ("-h", "--help")], prog)
        return 0
    if name is None:
        raise ConfigError(f"--config is missing: {_known()}")
    config = load_to_train(name, overrides)
    from hybridlm.train.stop import StopRequest

    typed = _typed(prog)
    again = f"{typed} {shlex.join(['--config', name, *overrides])}"
    longer = f"{typed} {shlex.join(['--config', name, *_without(overrides, '--run.steps')])}"
    with StopRequest() as stop:
        end_with_parent()
        from hybridlm.train.peers import Peers
        from hybridlm.train.xla import tell_process

        tell_process()
        peers = Peers(config.run.heartbeat, again)
        start(config.cluster, peers.joining)
        stop.join(peers)
        if peers.count == 1:  # processes find their devices together
            threading.Thread(target=_find_devices, name="devices").start()
        with ended_together(peers):
            with no_collections(freeze=True):
                from hybridlm.train.loop import train

            code = train(config, longer, stop, peers, again, partial(_page, config), _probes(config), kept_steps())
            peers.close(code)
            return code


TRAIN = Command("train", (("--config NAME [--section.key=value ...]", "train, or resume, a run"),), run)


def _page(config: Config, folder: Path) -> None:
    """Writes the page of a run into its folder."""
    from hybridlm.study.report import write_report

    write_report(folder, like=config, ours=True)


def _probes(config: Config) -> Probes | None:
    """What the config's probes are made by; None where it has none."""
    if not config.probe.tasks:
        return None
    from hybridlm.probes.in_training import IN_TRAINING

    return IN_TRAINING


def _find_devices() -> None:
    """Has JAX open the devices, beside all that is imported yet."""
    import jax

    with suppress(Exception):  # the main thread asks once more, and raises what that raises
        jax.devices()


def _typed(prog: str) -> str:
    """The program as it has to be typed here."""
    from hybridlm.train.commands import hybridlm_command, python_command

    first, _, rest = prog.partition(" ")
    return f"{python_command() if first == 'python' else hybridlm_command()} {rest}"


def _print_help(name: str, words: list[str], prog: str) -> None:
    """What can be set, with the values that the words give it; words that give no config are told behind it."""
    from hybridlm.config.find import load_config, read_config
    from hybridlm.config.help import help_text, names_in_columns

    config, wrong = read_config(name), None
    for end in range(len(words), -1, -1):  # as much of an unfinished line as can be shown
        try:
            config = load_config(name, words[:end])
            break
        except ConfigError as error:
            wrong = wrong or error
    print(f"usage: {prog} --config NAME|FILE.py [--section.key=value ...]")
    print(names_in_columns())
    print(help_text(config, f"{prog} --config {name}"), end="")
    if wrong is not None:
        print(f"\nas it stands, this line would not start: {wrong}")


def _known() -> str:
    from hybridlm.config.find import config_families

    single = [name for name, sizes in config_families().items() if not sizes]
    return f"give a name, as {', '.join(single)}, or FILE.py; --help lists all"


def _take_config(words: list[str]) -> tuple[str | None, list[str]]:
    """(value of --config, the other words)."""
    name, rest, words = None, [], list(words)
    while words:
        word = words.pop(0)
        if word == "--config":
            if not words or words[0].startswith("-"):
                raise ConfigError(f"--config wants a name or a file: {_known()}")
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
