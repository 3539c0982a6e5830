# SPDX-License-Identifier: Apache-2.0
"""Real `train.py` processes on a run of seconds, alone or as a cluster over loopback, to be ended in every way."""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from hybridlm.train.checkpoint import finished_steps
from hybridlm.train.metrics_log import read_metrics
from tests.starting import python

ROOT = Path(__file__).resolve().parents[2]
HEARTBEAT = 6
"""Seconds: a process is lost after about 1.3 of them. Not less: the machine may be busy."""
CONFIG = """
from hybridlm.config import *

def config():
    return Config(
        name="nano",
        model=ModelConfig(
            vocab_size=264, d_model=16, pattern="*-", compute_dtype="float32",
            blocks={{"*": Attention(n_heads=2, n_kv_heads=1, d_head=8), "-": MLP(d_ff=16)}},
        ),
        data=DataConfig(
            path=("{folder}/train-*.txt",), val_path=("{folder}/val.txt",), cache_dir="{folder}/cache", seq_len=16,
            batch_size=12, prefetch=2,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, schedule="constant"),
        run=RunConfig(
            steps=40, log_every=1, eval_every=-1, save_every=0, dir="{folder}/run", tensorboard=False, report=False,
            heartbeat={heartbeat},
        ),
    )
"""


def write_config(folder: Path) -> Path:
    """A config file whose data and run lie in the folder."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 6))) for _ in range(40)]
    for name in [f"train-{i}" for i in range(8)] + ["val"]:
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(words, 120)))
    file = folder / "nano.py"
    file.write_text(CONFIG.format(folder=folder, heartbeat=HEARTBEAT))
    return file


class Processes:
    """The processes of one start of a run; a context manager that kills what is left of them."""

    def __init__(self, config: Path, *overrides: str, count: int = 1):
        """count: processes with a device each. Their output goes to files beside the config."""
        common = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_"))}
        common |= {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "PYTHONUNBUFFERED": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "2", "NPROC": "2",
        }  # fmt: skip
        if count > 1:
            common |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count),
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            }  # fmt: skip
        words = python(str(ROOT / "train.py"), "--config", str(config), *overrides)
        started = len(list(config.parent.glob("out-*-0")))
        self.outputs = [config.parent / f"out-{started}-{i}" for i in range(count)]
        self.all = []
        for i, output in enumerate(self.outputs):
            with open(output, "w") as file:
                place = {"JAX_PROCESS_ID": str(i)} if count > 1 else {}
                process = subprocess.Popen(
                    words, env=common | place, cwd=config.parent, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            self.all.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with ExitStack() as waits:
            for process in self.all:
                process.kill()
                waits.callback(process.wait)

    def text(self, i: int = 0) -> str:
        """What a process has said."""
        return self.outputs[i].read_text(errors="replace")

    def step(self) -> int:
        """The last step that was shown."""
        found = re.findall(r"^step (\d+)/", self.text(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def wait_for(self, words: str, seconds: float = 120) -> None:
        """Until the first process has said the words."""
        self._until(lambda: words in self.text(), seconds, words)

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until the step was shown."""
        self._until(lambda: self.step() >= step, seconds, f"step {step}")

    def _until(self, there, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not there():
            ended = any(process.poll() is not None for process in self.all)
            assert time.monotonic() < end and (not ended or there()), f"no {what!r} in: {self.said()}"
            time.sleep(0.02)

    def send(self, signum: int, *which: int) -> None:
        """A signal to some of the processes, or to all."""
        for i in which or range(len(self.all)):
            self.all[i].send_signal(signum)

    def ends(self, seconds: float = 60) -> list[int]:
        """Exit codes of all, which end within the seconds."""
        end = time.monotonic() + seconds
        for process in self.all:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still there after {seconds} s: {self.said()}") from None
        return [process.returncode for process in self.all]

    def said(self) -> str:
        """All that all have said."""
        return "".join(f"\n-- process {i}, {p.poll()}:\n{self.text(i)[-3000:]}" for i, p in enumerate(self.all))


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of a run's records."""
    return {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"}


def newest(run: Path) -> int:
    """Step of the newest checkpoint; 0: none."""
    return max(finished_steps(run / "checkpoints"), default=0)


def clean(text: str) -> bool:
    """Whether what a process said holds neither a Python traceback nor a native stack."""
    return not any(
        words in text for words in ("Traceback", "Check failure", "Fatal Python error", "    @  ", "terminate called")
    )


STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
"""Signal -> exit code of a run that it stopped."""
