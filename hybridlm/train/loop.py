# SPDX-License-Identifier: Apache-2.0
"""The training run: build or resume, step, evaluate, save, close."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.config.mesh import check_config, repeated
from hybridlm.config.tree import to_dict
from hybridlm.data import Corpus
from hybridlm.errors import RunError, require
from hybridlm.sharding import make_mesh
from hybridlm.train.batches import Batches
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.commands import hybridlm_command
from hybridlm.train.corpora import open_together
from hybridlm.train.evaluate import Validation
from hybridlm.train.init_run import check_init_run, params_of_run
from hybridlm.train.meter import Meter
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.plot import plot_loss
from hybridlm.train.progress import Display, clock, printable, short
from hybridlm.train.provenance import start_record
from hybridlm.train.report import Reports
from hybridlm.train.run_folder import Found, RunFolder
from hybridlm.train.sample import sample_text
from hybridlm.train.step import Program, make_program
from hybridlm.train.stop import StopRequest
from hybridlm.train.together import from_first
from hybridlm.train.tokenizer_copy import IDENTITY, keep_tokenizer
from hybridlm.train.trace import Trace
from pallas_kernels.platform import device_name

SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_P = 0.95


def train(config: Config, command: str = "python train.py --config CONFIG", stop: StopRequest | None = None) -> int:
    """Trains, or resumes, the run of the config's folder; returns the exit code.

    0: complete; 128 + signal: stopped and saved. command: what the user typed, without --run.steps, for the lines that
    say what to type next. stop: the signals, where the caller has them already. Raises ConfigError for what the user
    has to change and RunError for what ended the run.
    """
    display, last = Display(config.run.steps), config.run.steps
    with RunFolder(config, owner=jax.process_index() == 0) as folder:
        found = folder.look()
        if found.complete:
            display.say(f"{folder.path} is complete: {found.steps[-1]} steps")
            display.say(_next_lines(folder, found.steps[-1], command))
            return 0
        if not found.steps or found.back_to == 0:
            from_first(lambda: check_init_run(config))
        mesh = make_mesh(config.mesh)
        check_config(config, mesh)
        with jax.set_mesh(mesh), nullcontext(stop) if stop else StopRequest() as stop, _memory_explained():
            step, reached = _run(config, folder, found, mesh, display, stop, command)
            if reached is None:
                saved = "stopped and saved" if config.run.save_every >= 0 else "stopped, unsaved (run.save_every=-1),"
                display.say(f"{saved} at step {step} of {last}; to resume: {command}")
                return 128 + (stop.signum or 0)
            display.say(reached)
            display.say(f"files: {folder.plot}, {folder.metrics}, {folder.checkpoints}")
            display.say(_next_lines(folder, step, command))
            return 0


def _run(
    config: Config, folder: RunFolder, found: Found, mesh: Mesh, display: Display, stop: StopRequest, command: str
) -> tuple[int, str | None]:
    """Opens, restores, steps to the end, closes: (the last step, what was reached or None where a signal stopped it).

    A step is dispatched before the metrics of the one before it are read: the device never waits for this loop, but
    for evaluations and saves.
    """
    run, began = config.run, time.monotonic()
    with ExitStack() as opened:
        opened.callback(display.stop)
        corpus = open_together(config.data)
        _check_vocabulary(config, corpus, display)
        program = make_program(config, mesh)
        batches, held_out = _open_batches(config, corpus, program, opened)
        keep = {"keep": run.keep, "every": run.keep_every, "best": run.keep_best}
        checkpoints = opened.enter_context(closing(Checkpoints(folder.checkpoints, **keep)))
        meter = Meter(config, mesh, corpus.stats["train"]["bytes_per_pair"])
        from_first(lambda: keep_tokenizer(config.data, folder.path))

        restored = _restored(program, folder, found, checkpoints, batches, meter, display)
        step, state, origin = restored or _first_state(config, program, mesh, folder, display)
        log = opened.enter_context(closing(folder.open_log(after=step)))
        _record_start(config, mesh, folder, log, display, command, step, origin)
        checkpoints.on_saved = lambda at, seconds: log.write("save", at, {"seconds": round(seconds, 2)})
        for at, loss in log.values("val", "loss").items():
            checkpoints.rate(at, loss)
        reports = opened.enter_context(closing(Reports(config, display, log, meter, checkpoints)))
        trace = opened.enter_context(closing(Trace(run.profile_steps, folder.profile)))
        validation = Validation(config, corpus.stats, program.eval_step, held_out, log, display, stop)
        _introduce(config, program, mesh, corpus, folder, display)

        first = step + 1
        display.start(step)
        stopping = validation.missed(step) and not validation.read(step, state["params"])
        trace.turn(step)
        while step < run.steps and not stopping:
            fetched = time.monotonic()
            state, metrics = program.train_step(state, next(batches))
            step += 1
            if step == first:
                now = time.monotonic()
                display.say(f"first step after {now - began:.1f} s, {now - fetched:.1f} s of them compilation")
                stop.arm()
            reports.add(step, metrics)
            stopping = stop.agreed(step, run.log_every)
            evaluating = validation.due(step) and not stopping
            saving = run.save_every >= 0 and (_due(run.save_every, step) or step == run.steps or stopping)
            if evaluating or saving or trace.turns(step):
                reports.flush()
                trace.turn(step)
                if evaluating:
                    stopping = not validation.read(step, state["params"])
                if saving or (stopping and run.save_every >= 0):
                    for at, loss in validation.losses.items():
                        checkpoints.rate(at, loss)
                    loop = {"data": batches.loader.get_state(), "meter": meter.state()}
                    loop |= {IDENTITY: corpus.tokenizer.fingerprint, "val_loss": validation.losses.get(step)}
                    checkpoints.save(step, state, to_dict(config), loop)
                meter.resume()

        reports.flush()
        if stopping or not validation.read(step, state["params"]):
            checkpoints.wait()
            return step, None
        _draw(config, corpus, folder)
        _sample(config, program, corpus, folder, state, step, display)
        checkpoints.wait()
        seconds = time.monotonic() - began
        log.write("end", step, {"seconds": round(seconds, 1)})
        return step, f"done: {step} steps in {clock(seconds)}" + (f"; {validation.result}" if validation.result else "")


def _due(every: int, step: int) -> bool:
    """Whether what comes every so many steps (0: never) follows this step."""
    return every > 0 and step % every == 0


def _open_batches(
    config: Config, corpus: Corpus, program: Program, opened: ExitStack
) -> tuple[Batches, Batches | None]:
    """Those of the training text, and of the validation text where the run ever reads it."""
    n_rows, at = config.data.batch_size, program.batch_sharding
    batches = opened.enter_context(Batches(config, corpus, "train", n_rows, at))
    if config.run.eval_every < 0:
        return batches, None
    return batches, opened.enter_context(Batches(config, corpus, "val", n_rows // config.optim.accumulate, at))


def _restored(
    program: Program, folder: RunFolder, found: Found, checkpoints: Checkpoints, batches: Batches, meter: Meter,
    display: Display,
) -> tuple[int, dict, dict | None] | None:  # fmt: skip
    """(step, state, None) of the checkpoint to go on from, with batches and meter set to it; None where there is none.

    Where the user asked to go back, checkpoints of later steps are moved away.
    """

    def resumable(record: dict) -> None:
        meter.set_state(record["meter"])
        batches.loader.set_state(record["data"])

    steps = [step for step in found.steps if found.back_to in (None, step)]
    restored = checkpoints.restore_latest(program.state_like, steps, resumable)
    if found.back_to is not None and (later := checkpoints.supersede(after=found.back_to)):
        display.say(f"checkpoints of step {', '.join(map(str, later))} are now in {folder.superseded}")
    if restored is None:
        return None
    display.say(f"{folder.path}: going on from the checkpoint of step {restored[0]}")
    return *restored[:2], None


def _first_state(
    config: Config, program: Program, mesh: Mesh, folder: RunFolder, display: Display
) -> tuple[int, dict, dict | None]:
    """(0, state, where its parameters come from or None): drawn from the seed, or those of another run, or those of a
    published checkpoint, whose small files the run keeps."""
    if config.init.run is not None:
        params, step = params_of_run(config, program.state_like["params"])
        display.say(f"parameters of step {step} of {config.init.run}")
        return 0, program.init_from(params), {"run": config.init.run, "step": step}
    if config.init.hf is None:
        return 0, program.init(), None
    from hybridlm.hf.load import load_params  # reads files with an extra
    from hybridlm.hf.save import copy_small_files

    source = Path(config.init.hf).expanduser()
    params = load_params(source, config.model, mesh)
    if folder.owner:
        copy_small_files(source, folder.published)
    display.say(f"parameters of {source}")
    return 0, program.init_from(params), {"hf": str(source)}


def _record_start(
    config: Config, mesh: Mesh, folder: RunFolder, log: MetricsLog, display: Display, command: str, step: int,
    origin: dict | None,
) -> None:  # fmt: skip
    """What this start is, and what it changes in the run, in its records."""
    changed = folder.changed(step)
    folder.write_config()
    folder.write_history(step, changed)
    if folder.owner:
        log.write("start", step, start_record(command, mesh) | ({"init": origin} if origin else {}))
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
    n_params = sum(x.size for x in jax.tree.leaves(program.state_like["params"]))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    display.say(
        f"{config.name}: {short(n_params)} parameters on {device_name()} ({axes}), "
        f"{short(corpus.stats['train']['bytes'])}B of text, {config.run.steps} steps of "
        f"{short(config.data.batch_size * config.data.seq_len)} tokens, in {folder.path}"
    )
    whole = repeated(config, mesh)
    if whole:
        display.say(whole)


def _draw(config: Config, corpus: Corpus, folder: RunFolder) -> None:
    """The figure of the run."""
    if folder.owner:
        plot_loss(read_metrics(folder.metrics), corpus.stats["bigram_bits_per_byte"], config.name, folder.plot)


def _sample(
    config: Config, program: Program, corpus: Corpus, folder: RunFolder, state: dict, step: int, display: Display
) -> None:
    """Text from the trained model, in sample.txt and on the screen."""
    run = config.run
    if not run.sample_tokens:
        return
    model = nnx.merge(program.graphdef, state["params"])
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), step)
    text = sample_text(
        model, corpus.tokenizer, run.sample_prompt, key=key, max_new_tokens=run.sample_tokens,
        temperature=SAMPLE_TEMPERATURE, top_k=None, top_p=SAMPLE_TOP_P,
    )  # fmt: skip
    if folder.owner:
        folder.sample.write_text(text + "\n", encoding="utf-8")
    display.say(f"sample ({folder.sample}):")
    display.say("\n".join("    " + printable(line) for line in text.splitlines()))


def _next_lines(folder: RunFolder, step: int, command: str) -> str:
    return (
        f"next: {hybridlm_command()} generate --run {folder.path} --prompt 'def '\n"
        f"or train on: {command} --run.steps={2 * step}"
    )


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
