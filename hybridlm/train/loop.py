# SPDX-License-Identifier: Apache-2.0
"""The training run: build or resume, step, evaluate, save, close."""

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import jax
from flax import nnx

from hybridlm.config import Config
from hybridlm.config.mesh import check_config
from hybridlm.config.tree import to_dict
from hybridlm.data import make_loader, open_corpus
from hybridlm.errors import RunError, require
from hybridlm.sharding import make_mesh
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.commands import hybridlm_command
from hybridlm.train.evaluate import bits_per_byte, evaluate
from hybridlm.train.meter import Meter
from hybridlm.train.plot import plot_loss
from hybridlm.train.progress import Display, clock, printable, short
from hybridlm.train.run_folder import MetricsLog, RunFolder, read_metrics
from hybridlm.train.sample import sample_text
from hybridlm.train.step import make_program
from hybridlm.train.stop import StopRequest

SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_P = 0.95


def train(config: Config, command: str = "python train.py --config CONFIG", stop: StopRequest | None = None) -> int:
    """Trains, or goes on with, the run of the config's folder; returns the exit code.

    0: complete; 128 + signal: stopped and saved. command: what the user typed, without --run.steps, for the lines that
    say what to type next. stop: the signals, where the caller has them already. Raises ConfigError for what the user
    has to change and RunError for what ended the run.
    """
    display = Display(config.run.steps)
    with RunFolder(config, owner=jax.process_index() == 0) as folder:
        steps = finished_steps(folder.checkpoints)
        folder.check_config(has_checkpoint=bool(steps))
        if steps and steps[-1] >= config.run.steps and _is_closed(folder, steps[-1]):
            display.say(f"{folder.path} is complete: {steps[-1]} steps")
            display.say(_next_lines(folder, steps[-1], command))
            return 0
        mesh = make_mesh(config.mesh)
        check_config(config, mesh)
        with jax.set_mesh(mesh), nullcontext(stop) if stop else StopRequest() as stop:
            with ExitStack() as opened:
                opened.callback(display.stop)
                run = Run(config, folder, mesh, display, stop, opened)
                try:
                    stopped = run.loop() or run.finish()
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    raise _out_of_memory(error) from error
            if stopped:
                display.say(f"stopped and saved at step {run.step} of {config.run.steps}; to resume: {command}")
                return 128 + (stop.signum or 0)
            run.summary()
            display.say(_next_lines(folder, run.step, command))
            return 0


class Run:
    """A run in progress: the train state, the data, and everything that watches them."""

    def __init__(self, config: Config, folder: RunFolder, mesh, display: Display, stop: StopRequest, opened: ExitStack):
        """Opens the data, builds the program, and restores the newest checkpoint or makes the first state.

        opened: takes what has to be closed at the end: threads, files, a save under way.
        """
        self.config, self.folder, self.mesh, self.display, self.stop = config, folder, mesh, display, stop
        self.began = time.monotonic()
        self.corpus = open_corpus(config.data)
        _check_vocabulary(config, self.corpus, display)
        self.program = make_program(config, mesh)
        self.loader = opened.enter_context(self._loader("train", config.data.batch_size))
        self.val_loader = None
        if config.run.eval_every >= 0:
            n_rows = config.data.batch_size // config.optim.accumulate
            self.val_loader = opened.enter_context(self._loader("val", n_rows))
        self.checkpoints = Checkpoints(folder.checkpoints, config.run.keep)
        opened.callback(self.checkpoints.close)
        self.meter = Meter(config, mesh, self.corpus.stats["train"]["bytes_per_pair"])
        self.step, self.val_bits, self.saved, self.tracing = 0, None, None, False
        opened.callback(self._end_trace)
        self._restore()
        folder.write_config()
        self.log = MetricsLog(folder, self.step, config.run.tensorboard)
        opened.callback(self.log.close)
        self._introduce(mesh)

    def _loader(self, split: str, batch_size: int):
        """Batches of the rows that this process's devices hold."""
        shape = (batch_size, self.config.data.seq_len)
        slices = [index[0] for index in self.program.batch_sharding.addressable_devices_indices_map(shape).values()]
        rows = (min(s.start or 0 for s in slices), max(s.stop or batch_size for s in slices))
        return make_loader(
            self.config.data,
            seed=self.config.run.seed,
            split=split,
            batch_size=batch_size,
            rows=rows,
            corpus=self.corpus,
        )

    def _restore(self) -> None:
        found = self.checkpoints.restore_latest(self.program.state_like)
        if found is None:
            self.state = self.program.init() if self.config.init.hf is None else self._published()
            return
        self.step, self.state, record = found
        self.saved = self.step
        self.loader.set_state(record["data"])
        self.meter.set_state(record["meter"])
        self.display.say(f"{self.folder.path}: going on from the checkpoint of step {self.step}")

    def _published(self) -> dict:
        """The first state with the parameters of the published checkpoint, whose small files the run keeps."""
        from hybridlm.hf.load import load_params
        from hybridlm.hf.save import copy_small_files

        source = Path(self.config.init.hf).expanduser()
        params = load_params(source, self.config.model, self.mesh)
        if self.folder.owner:
            copy_small_files(source, self.folder.published)
        self.display.say(f"parameters of {source}")
        return self.program.init_from(params)

    def _introduce(self, mesh) -> None:
        n_params = sum(x.size for x in jax.tree.leaves(self.program.state_like["params"]))
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
        train_bytes = self.corpus.stats["train"]["bytes"]
        self.display.say(
            f"{self.config.name}: {short(n_params)} parameters on {jax.devices()[0].device_kind} ({axes}), "
            f"{short(train_bytes)}B of text, {self.config.run.steps} steps of "
            f"{short(self.config.data.batch_size * self.config.data.seq_len)} tokens, in {self.folder.path}"
        )

    def loop(self) -> bool:
        """Steps to the end; true where a signal stopped it, after saving.

        A step is dispatched before the metrics of the one before it are read: the device never waits for this.
        """
        run, pending = self.config.run, None
        first = self.step + 1
        self.display.start(self.step)
        if self._evaluates(self.step) and not self.log.has("val", self.step) and not self._evaluate():
            return True  # stopped before the evaluation that the former start was stopped before
        while self.step < run.steps:
            self._profile(self.step + 1)
            began = time.monotonic()
            batch = self._put(next(self.loader), self.config.data.batch_size)
            self.state, metrics = self.program.train_step(self.state, batch)
            self.step += 1
            if self.step == first:
                self._report_start(time.monotonic() - began)
                self.stop.arm()
            if pending is not None:
                self._report(*pending)
            pending = (self.step, metrics)
            stopping, last = self.stop.agreed(self.step, run.log_every), self.step == run.steps
            evaluating = self._evaluates(self.step)
            saving = (run.save_every > 0 and self.step % run.save_every == 0) or stopping or last
            if evaluating or saving:
                self._report(*pending)
                pending = None
                if evaluating and not stopping:
                    stopping = not self._evaluate()
                if saving or stopping:
                    self._save()
                self.meter.resume()
            if stopping:
                self.checkpoints.wait()
                return True
        return False

    def finish(self) -> bool:
        """The end of a run: last evaluation, figure, text; true where a signal cut it short."""
        if self.val_loader is not None and not self._evaluate():
            return True
        if self.folder.owner:
            plot_loss(
                read_metrics(self.folder.metrics), self.corpus.stats["bigram_bits_per_byte"], self.config.name,
                self.folder.plot,
            )  # fmt: skip
        self._sample()
        self.checkpoints.wait()
        self.log.write("end", self.step, {"seconds": round(time.monotonic() - self.began, 1)})
        return False

    def summary(self) -> None:
        """What the run reached and where its files are."""
        reached = f"done: {self.step} steps in {clock(time.monotonic() - self.began)}"
        if self.val_bits is not None:
            reached += f"; validation {self._beside_bigram(self.val_bits)}"
        self.display.say(reached)
        self.display.say(f"files: {self.folder.plot}, {self.folder.metrics}, {self.folder.checkpoints}")

    def _put(self, batch: dict, n_rows: int) -> dict:
        """The batch on the devices; this process gives the rows that its devices hold."""
        at = self.program.batch_sharding
        return {k: jax.make_array_from_process_local_data(at, v, (n_rows, v.shape[1])) for k, v in batch.items()}

    def _report_start(self, compile_seconds: float) -> None:
        total = time.monotonic() - self.began
        self.display.say(f"first step after {total:.1f} s, {compile_seconds:.1f} s of them compilation")
        self.meter.resume()

    def _report(self, step: int, metrics: dict) -> None:
        """Reads a step's metrics, which waits for the step, and shows and records them."""
        metrics = jax.device_get(metrics)
        self.meter.add(metrics)
        in_row = int(metrics["skipped_in_row"])
        if in_row:
            self.display.say(f"step {step}: loss or gradient not finite: skipped ({in_row} in a row)")
        if in_row >= self.config.optim.max_skipped:
            at = "there is no checkpoint" if self.saved is None else f"the last checkpoint is of step {self.saved}"
            raise RunError(
                f"step {step}: loss or gradient not finite {in_row} times in a row (optim.max_skipped), none applied; "
                f"{at}; a lower --optim.lr or --optim.clip_norm may help"
            )
        log = step % self.config.run.log_every == 0 or step == self.config.run.steps
        values = self.meter.values(step)
        self.display.update(step, values, log)
        if log:
            self.log.write("train", step, values)
            self.meter.restart()

    def _evaluate(self) -> bool:
        """Validation loss, shown and recorded; False where a signal cut it short."""
        n_rows = self.config.data.batch_size // self.config.optim.accumulate
        self.val_loader.reset()
        batches = (self._put(batch, n_rows) for batch in self.val_loader)
        interrupted = (lambda: self.stop.signum is not None) if jax.process_count() == 1 else (lambda: False)
        began = time.monotonic()
        loss = evaluate(
            self.program.eval_step, self.state["params"], batches, self.config.run.eval_batches, interrupted
        )
        if loss is None:
            return False
        self.val_bits = bits_per_byte(loss, self.corpus.stats["val"]["bytes_per_pair"])
        self.log.write("val", self.step, {"loss": loss, "bits_per_byte": self.val_bits})
        self.display.say(
            f"step {self.step}: validation {self._beside_bigram(self.val_bits)}, loss {loss:.4f}, "
            f"{time.monotonic() - began:.1f} s"
        )
        return True

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation follows this step; the one after the last step belongs to finish()."""
        every = self.config.run.eval_every
        return every > 0 and step > 0 and step % every == 0 and step < self.config.run.steps

    def _beside_bigram(self, bits: float) -> str:
        bigram = self.corpus.stats["bigram_bits_per_byte"]
        return f"{bits:.3f} bits per byte" + (f" (byte bigram: {bigram:.3f})" if bigram is not None else "")

    def _save(self) -> None:
        record = {"data": self.loader.get_state(), "meter": self.meter.state()}
        self.checkpoints.save(self.step, self.state, to_dict(self.config), record)
        self.saved = self.step

    def _sample(self) -> None:
        """Text from the trained model, in sample.txt and on the screen."""
        run = self.config.run
        if not run.sample_tokens:
            return
        model = nnx.merge(self.program.graphdef, self.state["params"])
        key = jax.random.fold_in(jax.random.wrap_key_data(self.state["key"]), self.step)
        text = sample_text(
            model, self.corpus.tokenizer, run.sample_prompt, key=key, max_new_tokens=run.sample_tokens,
            temperature=SAMPLE_TEMPERATURE, top_k=None, top_p=SAMPLE_TOP_P,
        )  # fmt: skip
        if self.folder.owner:
            self.folder.sample.write_text(text + "\n", encoding="utf-8")
        self.display.say(f"sample ({self.folder.sample}):")
        self.display.say("\n".join("    " + printable(line) for line in text.splitlines()))

    def _profile(self, step: int) -> None:
        """Starts a trace before the first of run.profile_steps, ends it after the last."""
        first, last = self.config.run.profile_steps or (0, 0)
        if step == first:
            jax.profiler.start_trace(str(self.folder.path / "profile"))
            self.tracing = True
        elif step > last:
            self._end_trace()

    def _end_trace(self) -> None:
        if self.tracing:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.tracing = False


def _is_closed(folder: RunFolder, step: int) -> bool:
    """Whether the end of the run was written: a crash may come after the last save."""
    return any(r["kind"] == "end" and r["step"] >= step for r in read_metrics(folder.metrics))


def _next_lines(folder: RunFolder, step: int, command: str) -> str:
    return (
        f"next: {hybridlm_command()} generate --run {folder.path} --prompt 'def '\n"
        f"or train on: {command} --run.steps={2 * step}"
    )


def _check_vocabulary(config: Config, corpus, display: Display) -> None:
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


def _out_of_memory(error: Exception) -> RunError:
    return RunError(
        "out of device memory: raise --optim.accumulate or --mesh.fsdp, set --model.remat=full, or lower "
        f"--data.batch_size or --data.seq_len ({str(error).strip().splitlines()[0][:200]})"
    )
