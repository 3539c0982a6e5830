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
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.commands import hybridlm_command
from hybridlm.train.corpora import open_together
from hybridlm.train.evaluate import Validation
from hybridlm.train.meter import Meter
from hybridlm.train.metrics_log import read_metrics
from hybridlm.train.plot import plot_loss
from hybridlm.train.progress import Display, clock, printable, short
from hybridlm.train.report import Reports
from hybridlm.train.run_folder import RunFolder
from hybridlm.train.sample import sample_text
from hybridlm.train.step import Program, make_program
from hybridlm.train.stop import StopRequest
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
        saved = finished_steps(folder.checkpoints)
        folder.check_config(has_checkpoint=bool(saved))
        if saved and saved[-1] >= last and folder.is_closed(saved[-1]):
            display.say(f"{folder.path} is complete: {saved[-1]} steps")
            display.say(_next_lines(folder, saved[-1], command))
            return 0
        mesh = make_mesh(config.mesh)
        check_config(config, mesh)
        with jax.set_mesh(mesh), nullcontext(stop) if stop else StopRequest() as stop, _memory_explained():
            step, reached = _run(config, folder, mesh, display, stop)
            if reached is None:
                display.say(f"stopped and saved at step {step} of {last}; to resume: {command}")
                return 128 + (stop.signum or 0)
            display.say(reached)
            display.say(f"files: {folder.plot}, {folder.metrics}, {folder.checkpoints}")
            display.say(_next_lines(folder, step, command))
            return 0


def _run(config: Config, folder: RunFolder, mesh: Mesh, display: Display, stop: StopRequest) -> tuple[int, str | None]:
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
        checkpoints = opened.enter_context(closing(Checkpoints(folder.checkpoints, run.keep)))
        meter = Meter(config, mesh, corpus.stats["train"]["bytes_per_pair"])

        found = checkpoints.restore_latest(program.state_like)
        if found is None:
            step, state = 0, _first_state(config, program, mesh, folder, display)
        else:
            step, state, record = found
            batches.loader.set_state(record["data"])
            meter.set_state(record["meter"])
            display.say(f"{folder.path}: going on from the checkpoint of step {step}")
        folder.write_config()
        log = opened.enter_context(closing(folder.open_log(after=step)))
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
            saving = _due(run.save_every, step) or step == run.steps or stopping
            if evaluating or saving or trace.turns(step):
                reports.flush()
                trace.turn(step)
                if evaluating:
                    stopping = not validation.read(step, state["params"])
                if saving or stopping:
                    loop = {"data": batches.loader.get_state(), "meter": meter.state()}
                    checkpoints.save(step, state, to_dict(config), loop)
                meter.resume()

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


def _first_state(config: Config, program: Program, mesh: Mesh, folder: RunFolder, display: Display) -> dict:
    """Parameters drawn from the seed, or those of a published checkpoint, whose small files the run keeps."""
    if config.init.hf is None:
        return program.init()
    from hybridlm.hf.load import load_params  # reads files with an extra
    from hybridlm.hf.save import copy_small_files

    source = Path(config.init.hf).expanduser()
    params = load_params(source, config.model, mesh)
    if folder.owner:
        copy_small_files(source, folder.published)
    display.say(f"parameters of {source}")
    return program.init_from(params)


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
