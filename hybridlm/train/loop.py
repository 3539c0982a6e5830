# SPDX-License-Identifier: Apache-2.0
"""The training run: build or resume, step, evaluate, save, close."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from hybridlm import storage
from hybridlm.cluster import from_first
from hybridlm.config import Config
from hybridlm.config.mesh import check_config, repeated
from hybridlm.data import Corpus, Tokenizer
from hybridlm.data.said import answers_share, of_conversations
from hybridlm.errors import Exit, RunError, require, within
from hybridlm.model.flops import train_flops
from hybridlm.sharding import make_mesh
from hybridlm.train.base import load_base, memory_told, save_base
from hybridlm.train.batches import Batches
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.commands import hybridlm_command
from hybridlm.train.corpora import open_together
from hybridlm.train.evaluate import Validation
from hybridlm.train.feed import Feed
from hybridlm.train.health import Health
from hybridlm.train.init_run import check_init_run, params_of_run, told_of_start
from hybridlm.train.kept_step import kept_step
from hybridlm.train.last_words import failure_recorded, page_written
from hybridlm.train.meter import Meter
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.peers import Peers
from hybridlm.train.plot import plot_loss
from hybridlm.train.probing import Probes, Probing
from hybridlm.train.probing import check as check_probes
from hybridlm.train.progress import Display, clock, printable, short
from hybridlm.train.provenance import start_record
from hybridlm.train.recovery import Recovery, resumable, rollback_file, told
from hybridlm.train.report import Reports
from hybridlm.train.rollback import Rollback
from hybridlm.train.run_folder import Found, RunFolder
from hybridlm.train.sample import sample_text
from hybridlm.train.sinks import check as check_sinks
from hybridlm.train.step import Program, make_program
from hybridlm.train.steps import Steps
from hybridlm.train.stop import StopRequest
from hybridlm.train.tilings import put as put_tilings
from hybridlm.train.tokenizer_copy import keep_tokenizer, told_of_other
from hybridlm.train.trace import Trace
from hybridlm.train.watchdog import Watchdog
from pallas_kernels.platform import device_name, platform_of

SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_P = 0.95
FEED_PATIENCE = 0.8
"""Share of run.watchdog that a batch may take: what waits for one ends before the watchdog does, and saves."""


def train(
    config: Config, command: str = "python train.py --config CONFIG", stop: StopRequest | None = None,
    peers: Peers | None = None, resume: str | None = None, page: Callable[[Path], None] | None = None,
    probes: Probes | None = None, steps: Path | None = None,
) -> int:  # fmt: skip
    """Trains, or resumes, the run of the config's folder; returns the exit code.

    0: complete; 128 + signal: stopped and saved. command: what the user typed, without --run.steps, and resume: with it
    (None: the same), for the lines that say what to type next. stop: the signals, where the caller has them already.
    peers: the other processes of the run. page: writes the page of a run into its folder, when it ends; None: nothing
    does. probes: what `probe.tasks` names. steps: folder in which compiled steps are kept (`train.kept_step`); None:
    nowhere. Raises ConfigError for what the user has to change and RunError for what ended the run.
    """
    resume, peers = resume or command, peers or Peers()
    check_probes(config, probes)
    from_first(lambda: check_sinks(config.run))
    with nullcontext(stop) if stop else StopRequest() as stop:
        display = Display(config.run.steps, nobody_reads=lambda: stop.ask(signal.SIGHUP))
        with RunFolder(config, owner=jax.process_index() == 0) as folder:
            found = folder.look()
            if found.complete:
                display.say(f"{folder.path} is complete: {found.steps[-1]} steps")
                display.say(_next_lines(config, folder, found.steps[-1], command))
                return Exit.COMPLETE
            if not found.steps or found.back_to == 0:
                from_first(lambda: check_init_run(config))
            mesh = make_mesh(config.mesh)
            check_config(config, mesh)
            put_tilings()
            stacks = storage.local("stacks", folder.path) / f"stacks-{jax.process_index()}.txt"
            watchdog = Watchdog(config.run.watchdog, stacks, resume)
            with page_written(folder, page), jax.set_mesh(mesh), watchdog, _memory_explained():
                step, reached = _run(config, folder, found, mesh, display, stop, peers, watchdog, resume, probes, steps)
            if reached is None:
                display.say(_stopped(config, step, resume))
                return 128 + (stop.signum or 0)
            display.say(reached)
            written = [folder.plot, folder.metrics, folder.checkpoints]
            written += [folder.report] if page and config.run.report else []
            display.say(f"files: {', '.join(map(str, written))}")
            display.say(_next_lines(config, folder, step, command))
            return Exit.COMPLETE


def _run(
    config: Config, folder: RunFolder, found: Found, mesh: Mesh, display: Display, stop: StopRequest, peers: Peers,
    watchdog: Watchdog, resume: str, probes: Probes | None, kept: Path | None,
) -> tuple[int, str | None]:  # fmt: skip
    """Opens, restores, steps to the end, closes: (last step, what was reached or None where a signal stopped it)."""
    run, began = config.run, time.monotonic()

    def may_write() -> None:
        peers.check()
        folder.check_there()

    with ExitStack() as opened:
        opened.callback(display.stop)
        corpus = open_together(config.data)
        _check_vocabulary(config, corpus, display)
        program = make_program(config, mesh)
        batches, held_out = _open_batches(config, corpus, program, opened)
        probe = probes.open(config, mesh, program, corpus, held_out) if probes and config.probe.tasks else None
        bytes_per_token = corpus.stats["train"]["bytes_per_pair"]
        meter = Meter(config, mesh, bytes_per_token, tokens_before=batches.loader.tokens_before)
        health = Health(config)
        from_first(lambda: keep_tokenizer(config.data, folder.path))

        if peers.count == 1:  # processes compile together, in one order
            like = program.state_like, program.batch_like(config.data)
            program.train_step.prepare(mesh, *like, kept_step(kept, config, mesh))
        first = partial(_first_state, config, program, mesh, folder, corpus.tokenizer, display)
        new = None if found.steps else first()
        keep = {"keep": run.keep, "every": run.keep_every, "best": run.keep_best, "may_finish": peers.check}
        checkpoints = opened.enter_context(closing(Checkpoints(folder.checkpoints, **keep)))
        restored = _restored(config, program, folder, found, checkpoints, batches, meter, health, display)
        step, state, origin = restored or new or first()
        if program.base.like is not None:
            _with_base(config, program, folder, state, restored is None, peers, display)
        log = opened.enter_context(closing(folder.open_log(after=step, may_write=may_write)))
        opened.enter_context(failure_recorded(log, peers.settle))
        _record_start(config, mesh, corpus, folder, log, display, resume, step, origin)
        if batches.loader.changed:
            display.say(f"other batches from step {step} on: {batches.loader.changed}")
            log.write("data", step, {"changed": batches.loader.changed})
            health.other_data()
        checkpoints.on_saved = lambda at, seconds: log.write("save", at, {"seconds": round(seconds, 2)})
        for at, loss in log.values("val", "loss").items():
            checkpoints.rate(at, loss)
        reports = opened.enter_context(closing(Reports(config, display, log, meter, health, program.train_step.writes)))
        trace = opened.enter_context(closing(Trace(run.profile_steps, folder.profile)))
        feed = opened.enter_context(closing(_open_feed(batches, run.watchdog, stop, peers, display)))
        between = lambda: (watchdog.progress(), stop.agreed())[1]
        validation = Validation(config, corpus, program.eval_step, held_out, log, display, between)
        recovery = Recovery(
            config, program.state_like, folder.path, checkpoints, feed, meter, health, validation, log, display.say,
            may_write, resume,
        )  # fmt: skip
        steps = Steps(
            config, program, feed, meter, health, recovery, checkpoints, validation, reports, log, trace, stop,
            watchdog, display, Probing(config, probe, log, display, between),
            lambda: (may_write(), log.flush()), tokenizer=corpus.tokenizer.fingerprint, single=peers.count == 1,
        )  # fmt: skip
        _introduce(config, program, mesh, corpus, folder, display)
        if config.data.packing != "split":
            display.say(f"rows are {batches.loader.fill:.2%} full")
        display.start(step)

        step, state, stopping = steps.take(step, state, began)
        if stopping or not steps.evaluate(step, state):
            with watchdog.during("saving"):
                checkpoints.wait()
                log.write("stop", step, {"signal": stop.signum})
                log.flush()
            feed.leave_if_stuck(128 + (stop.signum or 0), _stopped(config, step, resume), sys.stdout)
            return step, None
        watchdog.rest()
        log.flush()
        counts, beside = _draw(config, corpus, folder)
        _sample(config, program, corpus, folder, state, step, display)
        with watchdog.during("saving"):
            checkpoints.wait()
        seconds = time.monotonic() - began
        log.write("end", step, {"seconds": round(seconds, 1), **counts})
        return step, "; ".join(filter(None, [f"done: {step} steps in {clock(seconds)}", beside, validation.result]))


def _open_batches(
    config: Config, corpus: Corpus, program: Program, opened: ExitStack
) -> tuple[Batches, dict[str, Batches]]:
    """Those of the training text, and of the held-out sets by name where the run ever reads them."""
    n_rows, at = config.data.batch_size, program.batch_sharding
    batches = opened.enter_context(Batches(config, corpus, "train", n_rows, at))
    held_out = {}
    for name, of_set in corpus.held_out.items() if config.run.eval_every >= 0 else ():
        with within(f"set {name}: " if len(corpus.held_out) > 1 else ""):
            read = Batches(config, of_set, "val", n_rows // config.optim.accumulate, at)
        held_out[name] = opened.enter_context(read)
    return batches, held_out


def _open_feed(batches: Batches, watchdog: float, stop: StopRequest, peers: Peers, display: Display) -> Feed:
    """The batches as the loop takes them. One process of several stops where all do, not where it waits for text."""
    stopped = lambda: peers.count == 1 and stop.signum is not None
    return Feed(batches, FEED_PATIENCE * watchdog, stopped, display.say)


def _restored(
    config: Config, program: Program, folder: RunFolder, found: Found, checkpoints: Checkpoints, batches: Batches,
    meter: Meter, health: Health, display: Display,
) -> tuple[int, dict, dict | None] | None:  # fmt: skip
    """(step, state, None) of the checkpoint to go on from, with batches, meter and health set to it; None where there
    is none.

    Where the user asked to go back, or the run was about to, checkpoints of later steps are moved away. What the run
    left out when it went back to this checkpoint is left out again.
    """

    def check(record: dict) -> None:
        resumable(meter, health, record)
        batches.loader.set_state(record["data"])

    back_to = found.back_to
    rollback = _rollback(config, folder, found)
    steps = [step for step in found.steps if back_to in (None, step)]
    if rollback is not None and not rollback.done:
        back_to = rollback.to
        steps = [step for step in steps if step <= back_to]
    restored = checkpoints.restore_latest(program.state_like, steps, check)
    if back_to is not None and (later := checkpoints.supersede(after=back_to)):
        display.say(f"checkpoints of step {', '.join(map(str, later))} are now in {folder.superseded}")
    step = 0 if restored is None else restored[0]
    if restored is not None:
        display.say(f"{folder.path}: going on from the checkpoint of step {step}")
    if rollback is not None and not rollback.done:
        from_first(lambda: rollback._replace(done=True).write(rollback_file(folder.path)))
    if rollback is not None and rollback.to == step and rollback.left_out:
        batches.loader.skip(rollback.left_out)
        display.say(f"without the next {rollback.left_out} batches, which it went back for")
    return None if restored is None else (*restored[:2], None)


def _rollback(config: Config, folder: RunFolder, found: Found) -> Rollback | None:
    """What the run went back to by itself. Where the user goes back now, that is no more."""
    file = rollback_file(folder.path)
    values = from_first(lambda: Rollback.read(file))
    rollback = None if values is None else Rollback(*values)
    if rollback is None or found.back_to is None or rollback.from_step == config.run.from_step:
        return rollback
    from_first(lambda: storage.remove(file))
    return None


def _first_state(
    config: Config, program: Program, mesh: Mesh, folder: RunFolder, tokenizer: Tokenizer, display: Display
) -> tuple[int, dict, dict | None]:
    """(0, state, where its parameters come from or None): drawn from the seed, or those of another run, or those of a
    published checkpoint, whose small files the run keeps."""
    if config.init.run is not None:
        params, step = params_of_run(config, program.base.like or program.state_like["params"])
        display.say(told_of_start(config, step))
        return 0, program.init_from(params), {"run": config.init.run, "step": step}
    if config.init.hf is None:
        if platform_of(mesh.devices.flat[0]) == "gpu":
            program.train_step.wait_until_lowered()
        state = program.init()  # on CPUs it is compiled while the step is traced, and what comes then is behind that
        program.train_step.wait_until_lowered()
        return 0, state, None
    from hybridlm.hf.load import load_params  # reads files with an extra
    from hybridlm.hf.save import copy_small_files

    source = storage.as_path(config.init.hf)
    params = load_params(source, config.model, mesh)
    if folder.owner:
        copy_small_files(source, folder.published)
    display.say(f"parameters of {source}")
    if other := told_of_other(tokenizer, source):
        display.say(other)
    return 0, program.init_from(params), {"hf": str(source)}


def _with_base(
    config: Config, program: Program, folder: RunFolder, state: dict, is_new: bool, peers: Peers, display: Display
) -> None:
    """Keeps the parameters that a new run with adapters does not train, or reads what it has kept."""
    if is_new:
        save_base(folder.path, program.base.params, config, peers.check)
    else:
        program.base.params = load_base(folder.path, program.base.like)
    display.say(memory_told(config, state, program.base.params))


def _record_start(
    config: Config, mesh: Mesh, corpus: Corpus, folder: RunFolder, log: MetricsLog, display: Display, command: str,
    step: int, origin: dict | None,
) -> None:  # fmt: skip
    """What this start is, and what it changes in the run, in its records."""
    changed = folder.changed(step)
    folder.write_config()
    folder.write_history(step, changed)
    if folder.owner:
        of_text = {"flops_per_token": train_flops(config.model, config.data.seq_len)}
        if (share := answers_share(corpus)) is not None:
            of_text["answers_share"] = share
        log.write("start", step, start_record(command, mesh) | of_text | ({"init": origin} if origin else {}))
    if step == 0 and log.n_dropped:
        display.say(
            f"no checkpoint yet: starts again; the {log.n_dropped} records of before are in {folder.superseded}"
        )
    if changed:
        log.write("config", step, {"changed": changed})
        shown = [f"{key} {a} -> {b}" for key, (a, b) in changed.items()]
        display.say(f"changed since step {step}: {', '.join(shown[:6])}{', ...' if len(shown) > 6 else ''}")


def _introduce(
    config: Config, program: Program, mesh: Mesh, corpus: Corpus, folder: RunFolder, display: Display
) -> None:
    n_params = sum(x.size for x in jax.tree.leaves(program.base.like or program.state_like["params"]))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    display.say(
        f"{config.name}: {short(n_params)} parameters on {device_name()} ({axes}), "
        f"{short(corpus.stats['train']['bytes'])}B of text, {config.run.steps} steps of "
        f"{short(config.data.batch_size * config.data.seq_len)} tokens, in {folder.path}"
    )
    for line in (repeated(config, mesh), of_conversations(corpus, config.data, config.model.prefix_tokens)):
        if line:
            display.say(line)


def _draw(config: Config, corpus: Corpus, folder: RunFolder) -> tuple[dict[str, int], str]:
    """The figure of the run; how often it diverged, in numbers and in words."""
    if not folder.owner:
        return {}, ""
    records = read_metrics(folder.metrics)
    plot_loss(records, corpus.stats["bigram_bits_per_byte"], config.name, folder.plot)
    return told(records)


def _sample(
    config: Config, program: Program, corpus: Corpus, folder: RunFolder, state: dict, step: int, display: Display
) -> None:
    """Text from the trained model, in sample.txt and on the screen."""
    run = config.run
    if not run.sample_tokens:
        return
    model = program.model(state["params"])
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), step)
    text = sample_text(
        model, corpus.tokenizer, run.sample_prompt, key=key, max_new_tokens=run.sample_tokens,
        temperature=SAMPLE_TEMPERATURE, top_k=None, top_p=SAMPLE_TOP_P,
    )  # fmt: skip
    if folder.owner:
        storage.write_text(folder.sample, text + "\n")
    display.say(f"sample ({folder.sample}):")
    display.say("\n".join("    " + printable(line) for line in text.splitlines()))


def _stopped(config: Config, step: int, resume: str) -> str:
    saved = "stopped and saved" if config.run.save_every >= 0 else "stopped, unsaved (run.save_every=-1),"
    return f"{saved} at step {step} of {config.run.steps}; to resume: {resume}"


def _next_lines(config: Config, folder: RunFolder, step: int, command: str) -> str:
    train_on = f"{command} --run.steps={2 * step}"
    if config.model.sees_ahead:
        return f"train on: {train_on}"
    of_prompt = "" if config.data.format == "chat" else " --prompt 'def '"
    write = f"{'generate' if of_prompt else 'chat'} --run {folder.path}{of_prompt}"
    return f"next: {hybridlm_command()} {write}\nor train on: {train_on}"


def _check_vocabulary(config: Config, corpus: Corpus, display: Display) -> None:
    tokenizer, rows = corpus.tokenizer, config.model.vocab_size
    require(
        tokenizer.vocab_size <= rows,
        f"model.vocab_size ({rows}) is smaller than the vocabulary of data.tokenizer {tokenizer.name} "
        f"({tokenizer.vocab_size})",
    )
    if not config.data.path and rows > 8 * tokenizer.vocab_size:
        display.say(
            "note: this is the embedded corpus (Python's standard library) in bytes; real training of this model wants "
            "--data.path='texts/*.jsonl' and --data.tokenizer=tokenizer.json"
        )


@contextmanager
def _memory_explained() -> Iterator[None]:
    """RunError, with what may help, where the device's memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            "out of device memory: raise --optim.accumulate or --mesh.fsdp, set --model.remat=full, or lower "
            f"--data.batch_size or --data.seq_len ({str(error).strip().splitlines()[0][:200]})"
        ) from error
