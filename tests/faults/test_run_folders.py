# SPDX-License-Identifier: Apache-2.0
"""Run folders that were altered: what is refused is one line, what is damaged is kept, no read ends in a traceback."""

import json
import logging
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridlm.config import Config, DataConfig, ModelConfig
from hybridlm.config.tree import to_dict
from hybridlm.errors import ConfigError, RunError
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.plot import plot_loss
from hybridlm.train.run_folder import RunFolder, stored_config
from hybridlm.train.tokenizer_copy import IDENTITY, check_tokenizer, keep_tokenizer, kept_tokenizer
from tests.faults.mutations import with_another_value
from tests.faults.test_checkpoints import like, make_state, record

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = Config(name="small", model=ModelConfig(d_model=64))
LINES = [{"kind": "train", "step": step, "loss": 1.0, "bits_per_byte": 3.0 - step} for step in (1, 2)]


def config_in(folder: Path, **run) -> Config:
    return replace(CONFIG, run=replace(CONFIG.run, dir=str(folder), tensorboard=False, report=False, **run))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run with checkpoints of steps 1 and 2, of a few arrays in the place of the model's."""
    path = tmp_path_factory.mktemp("made") / "run"
    config = config_in(path)
    with RunFolder(config) as folder:
        assert folder.look().steps == []
        assert sorted(f.name for f in path.iterdir()) == ["config.json", "lock"]  # the first things written
        log = folder.open_log(after=0)
        checkpoints = Checkpoints(folder.checkpoints, keep=3)
        checkpoints.on_saved = lambda step, seconds: log.write("save", step, {"seconds": seconds})
        for line in LINES:
            log.write(line["kind"], line["step"], line)
            checkpoints.save(line["step"], make_state(line["step"]), to_dict(config), record(line["step"]))
        checkpoints.wait()
        checkpoints.close()
        log.close()
    return path


@pytest.fixture
def run(made, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def resume(path: Path, **options) -> tuple[list[int], int | None]:
    """(steps found, step restored) of a start in a folder, but for what it computes."""
    with RunFolder(config_in(path, **options)) as folder:
        found = folder.look()
        steps = [step for step in found.steps if found.back_to in (None, step)]
        checkpoints = Checkpoints(folder.checkpoints, keep=3)
        try:
            restored = checkpoints.restore_latest(like(make_state(0)), steps, check=lambda r: r["data"]["step"])
            if found.back_to is not None:
                checkpoints.supersede(found.back_to)
        finally:
            checkpoints.close()
        step = restored[0] if restored else 0
        log = folder.open_log(after=step)
        changed = folder.changed(step)
        folder.write_config()
        folder.write_history(step, changed)
        log.close()
        return found.steps, step


def content(path: Path) -> dict[str, bytes]:
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


# Parts that are gone -------------------------------------------------------------------------------------------------


def test_a_whole_folder(run):
    assert resume(run) == ([1, 2], 2)
    history = [json.loads(line) for line in (run / "config_history.jsonl").read_text().splitlines()]
    assert [line["config"]["name"] for line in history] == ["small"]
    assert resume(run) == ([1, 2], 2)
    assert len((run / "config_history.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("gone", ["missing", "cut", "empty", "other types"])
def test_config_json_is_gone_but_checkpoints_hold_it(run, gone, caplog):
    file = run / "config.json"
    text = {"cut": file.read_text()[:50], "empty": "", "other types": '{"model": {"d_model": "x"}}'}
    file.write_text(text[gone]) if gone in text else file.unlink()
    with caplog.at_level(logging.WARNING, "hybridlm"):
        assert stored_config(run).model == CONFIG.model
    assert "the config in" in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert resume(run) == ([1, 2], 2)
    assert json.loads(file.read_text())["name"] == "small"
    if gone in text:  # what was there is kept
        assert [f.read_text() for f in (run / "broken").iterdir()] == [text[gone]]


@pytest.mark.parametrize("gone", ["missing", "empty"])
def test_checkpoints_are_gone(run, gone):
    shutil.rmtree(run / "checkpoints")
    if gone == "empty":
        (run / "checkpoints").mkdir()
    before = content(run)
    with pytest.raises(ConfigError) as error:
        resume(run)
    text = str(error.value)
    assert "checkpoints are gone" in text and "config.json, metrics.jsonl" in text and "--run.from_step=0" in text
    assert content(run) | {"lock": b""} == before | {"lock": b""}
    assert resume(run, from_step=0) == ([], 0)
    lines = (run / "superseded" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 1, 2] and read_metrics(run / "metrics.jsonl") == []
    assert resume(run, from_step=0) == ([], 0)


def test_checkpoints_of_a_run_of_before_are_gone(run):
    """Its records do not say that it saved, but its config does."""
    shutil.rmtree(run / "checkpoints")
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in range(10, 1500, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="one of step 1000"):
        resume(run)
    (run / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")  # killed before the first save
    assert resume(run) == ([], 0)
    assert len((run / "superseded" / "metrics.jsonl").read_text().splitlines()) == 1


def test_config_and_checkpoints_are_gone(run):
    (run / "checkpoints").rename(run.parent / "kept")
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has files but no run .*there is metrics.jsonl\): choose --run.dir=NEW"):
        resume(run)
    with pytest.raises(ConfigError, match="holds no run"):
        stored_config(run)
    (run.parent / "kept").rename(run / "checkpoints")
    assert resume(run) == ([1, 2], 2)  # who was refused holds no lock


def test_what_a_stopped_start_of_before_left_is_no_obstacle(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "lock").write_text("process 1 on x")
    (tmp_path / "run" / "config.json.part").write_text("{")
    assert resume(tmp_path / "run") == ([], 0)
    assert stored_config(tmp_path / "run").name == "small"


# Going back ----------------------------------------------------------------------------------------------------------


def test_going_back_once(run):
    with pytest.raises(ConfigError, match=r"run.from_step \(7\) has no checkpoint in .*: there are 1, 2"):
        resume(run, from_step=7)
    assert resume(run, from_step=1) == ([1, 2], 1)
    assert [f.name.split("-")[0] for f in (run / "superseded").iterdir() if f.is_dir()] == ["2"]
    checkpoints = Checkpoints(run / "checkpoints", keep=3)
    checkpoints.save(2, make_state(2), to_dict(config_in(run, from_step=1)), record(2))
    checkpoints.close()
    assert resume(run, from_step=1) == ([1, 2], 2)  # the same command again goes on
    assert resume(run) == ([1, 2], 2)


def test_beginning_again(run):
    assert resume(run, from_step=0) == ([1, 2], 0)
    moved = [f.name.split("-")[0] for f in (run / "superseded").iterdir() if f.is_dir()]
    assert sorted(moved) == ["1", "2"]


# Two in one folder ---------------------------------------------------------------------------------------------------


def test_the_lock_outlives_its_file(run):
    with RunFolder(config_in(run)):
        (run / "lock").unlink()
        with pytest.raises(RunError, match="is in use by another process"), RunFolder(config_in(run)):
            pass
    with RunFolder(config_in(run)):
        pass


def test_two_in_the_same_second(tmp_path):
    """However far the first came, the second one hears that it is there."""
    config = config_in(tmp_path / "run")
    for stage in range(3):
        with RunFolder(config) as first:
            if stage:
                first.look()
            if stage == 2:
                Checkpoints(first.checkpoints, keep=1).close()
            with pytest.raises(RunError, match="is in use by process"), RunFolder(config):
                pass
        shutil.rmtree(tmp_path / "run")


# Records -------------------------------------------------------------------------------------------------------------

NO_RECORDS = [
    b"\xff\xfe", b"5", b"[]", b"null", b'"x"', b"{}", b'{"kind": "train"}', b'{"step": 3}',
    b'{"kind": "train", "step": "3"}', b'{"kind": "train", "step": null}', b'{"kind": 3, "step": 3}',
    b'{"kind": "train", "step": true}', b"[" * 200_000, b'{"kind": "train", "step": -1}',
    b'{"kind": "train", "step": 1.5}', b"\0" * 100, b'{"kind": "tr', b'{"a":' * 100_000,
]  # fmt: skip


def test_a_line_that_is_no_record_is_left_out_and_kept_elsewhere(run, caplog):
    good = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(good + b"\n".join(NO_RECORDS) + b"\n" + good)
    assert len(read_metrics(run / "metrics.jsonl")) == 2 * len(good.splitlines())
    assert "left out line 5 and 17 more" in caplog.text
    assert resume(run) == ([1, 2], 2)
    assert (run / "metrics.jsonl").read_bytes() == good + good
    assert (run / "superseded" / "metrics.jsonl").read_bytes() == b"\n".join(NO_RECORDS) + b"\n"


def test_a_number_that_is_none(tmp_path):
    """NaN is null in the file, as JSON has it, and a gap in the figure; those of before are read."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    values = {1: 3.0, 2: float("nan"), 3: float("inf"), 4: 2.0}
    for step, value in values.items():
        log.write("train", step, {"bits_per_byte": value})
    log.write("val", 4, {"bits_per_byte": float("nan")})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    numbers = [r["bits_per_byte"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert numbers == [3.0, None, None, 2.0, None]
    of_before = [{"kind": "train", "step": 9, "bits_per_byte": float("nan")}, {"kind": "train", "step": 10}]
    plot_loss(read_metrics(tmp_path / "metrics.jsonl") + of_before, 5.0, "t", tmp_path / "loss.png")
    plot_loss(of_before, None, "t", tmp_path / "nothing.png")
    assert (tmp_path / "loss.png").exists() and (tmp_path / "nothing.png").exists()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (closed by the log)
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left"):
        log.write("train", 1, {"loss": 1.0})
    log.close()


# The tokenizer -------------------------------------------------------------------------------------------------------


def write_tokenizer(file: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?")).save(str(file))


def test_the_tokenizer_of_a_run_is_its_own(tmp_path):
    file, run = tmp_path / "tokenizer.json", tmp_path / "run"
    run.mkdir()
    write_tokenizer(file, ["a", "b"])
    data = DataConfig(tokenizer=str(file))
    identity = check_tokenizer(data, None, run).fingerprint
    keep_tokenizer(data, run)
    write_tokenizer(file, ["b", "a"])  # swapped after the training
    keep_tokenizer(data, run)
    assert kept_tokenizer(data, run, identity).encode("a").tolist() == [1]
    told = f"is not the tokenizer that the run in .* was trained with .*{identity}.*give .*/run/tokenizer$"
    with pytest.raises(ConfigError, match=told):
        check_tokenizer(data, identity, run)
    write_tokenizer(run / "tokenizer" / "tokenizer.json", ["b", "a"])
    with pytest.raises(ConfigError, match=r"is not the tokenizer .*: give that one$"):
        kept_tokenizer(data, run, identity)
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(ConfigError, match="is not the tokenizer"):
        kept_tokenizer(data, run, identity)
    assert kept_tokenizer(data, run, None).encode("a").tolist() == [2]  # a run of before said nothing


def test_another_tokenizer_is_refused_before_anything_is_tokenised(run):
    checkpoints = Checkpoints(run / "checkpoints", keep=3)
    checkpoints.save(3, make_state(3), to_dict(CONFIG), record(3) | {IDENTITY: "another"})
    checkpoints.close()
    with pytest.raises(ConfigError, match=r"data.tokenizer \(byte\) is not the tokenizer"):
        resume(run)


# Anything else -------------------------------------------------------------------------------------------------------


def alter(path: Path, rng) -> str:
    """Damages a file in one of many ways; which, in a word."""
    raw = path.read_bytes()
    at = int(rng.integers(len(raw) + 1))
    kinds = {
        "flipped": raw[:at] + bytes(b ^ 1 << int(rng.integers(8)) for b in raw[at : at + 1]) + raw[at + 1 :],
        "cut": raw[:at],
        "empty": b"",
        "random": rng.bytes(50),
        "inserted": raw[:at] + rng.bytes(3) + raw[at:],
        "nested": b"[" * 50_000,
        "zeros": raw[:at] + b"\0" * 30 + raw[at:],
        "a folder": None,
        "gone": None,
        "value": None,
    }
    names = list(kinds)
    kind = names[rng.integers(len(names))] if rng.random() < 0.5 else "value"
    if kind == "value":
        lines = raw.split(b"\n")
        index = int(rng.integers(len(lines)))
        text = raw if path.name != "metrics.jsonl" else lines[index]
        try:
            changed = json.dumps(with_another_value(json.loads(text), rng)).encode()
        except ValueError:
            changed = b"{}"
        lines[index] = changed
        path.write_bytes(b"\n".join(lines) if path.name == "metrics.jsonl" else changed)
    elif kind in ("a folder", "gone"):
        path.unlink()
        path.mkdir() if kind == "a folder" else None
    else:
        path.write_bytes(kinds[kind])
    return kind


ALTERED = [
    "config.json", "metrics.jsonl", "lock", "checkpoints/2/loop/metadata", "checkpoints/2/config/metadata",
    "checkpoints/1/config/metadata", "checkpoints/2/manifest.json", "checkpoints/2/_CHECKPOINT_METADATA",
]  # fmt: skip


def try_altered(made: Path, folder: Path, seed: int) -> None:
    """A copy with one to three altered files: a start goes on, or says one line; so does a read of the config."""
    rng = np.random.default_rng(seed)
    shutil.copytree(made, folder)
    if rng.random() < 0.3:  # as of before there were manifests: nothing but the values themselves can tell
        (folder / "checkpoints" / "2" / "manifest.json").unlink()
    done = []
    for name in rng.choice(ALTERED, int(rng.integers(1, 4)), replace=False):
        if (folder / name).exists():
            done.append((str(name), alter(folder / name, rng)))
    for action in (lambda: stored_config(folder), lambda: resume(folder)):
        try:
            action()
        except (ConfigError, RunError) as error:
            assert "\n" not in str(error) and str(error).strip(), (seed, done)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {done}: {type(error).__name__}: {error}") from error
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | stat.S_IRWXU)
    shutil.rmtree(folder)


def test_altered_folders_end_in_a_line_or_go_on(made, tmp_path):
    for seed in range(25):
        try_altered(made, tmp_path / "run", seed)


@pytest.mark.slow
def test_altered_folders_end_in_a_line_or_go_on_300(made, tmp_path):
    for seed in range(1000, 1300):
        try_altered(made, tmp_path / "run", seed)
