# SPDX-License-Identifier: Apache-2.0
"""What takes the numbers of records besides metrics.jsonl holds what stands there, over stops and returns."""

import json
import logging
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.cli import train_main
from hybridlm.config.resume import refused
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError
from hybridlm.train import sinks
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.sinks import Opening, TensorBoard, check
from tests.train.conftest import small_config
from tests.train.test_run import stop_at

__all__ = ["stop_at"]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of event files: the last value of each tag and step; a file's start takes away later steps
    of those before it. Read by the layout of TFRecord: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: dict[tuple[str, int], float] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            if event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            shown |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return shown


def numbers(path: Path) -> dict[tuple[str, int], float]:
    """The same of a metrics.jsonl."""
    return {
        (f"{record['kind']}/{name}", record["step"]): value
        for record in read_metrics(path)
        for name, value in record.items()
        if name not in ("kind", "step") and isinstance(value, int | float)
    }


def test_tensorboard_shows_what_the_records_hold(tmp_path):
    """Through a return, and a start that goes on from an earlier step."""
    config = small_config()

    def open_log(after):
        sink = TensorBoard(Opening(config, tmp_path, after))
        return MetricsLog(tmp_path / "metrics.jsonl", after, True, [sink])

    log = open_log(0)
    for step in range(1, 9):
        log.write("train", step, {"loss": step / 4, "text": "x", "none": None})
    log.rewind(5)
    log.write("rollback", 5, {"in_row": 1})
    log.write("train", 6, {"loss": 9.0})
    log.write("train", 7, {"loss": 9.5})
    log.close()
    log = open_log(6)
    log.write("train", 7, {"loss": 1.5})
    log.flush()
    log.close()
    assert scalars(tmp_path / "tensorboard") == numbers(tmp_path / "metrics.jsonl")
    assert numbers(tmp_path / "metrics.jsonl")["train/loss", 7] == 1.5


def test_a_process_that_does_not_write_gives_no_sink_anything(tmp_path):
    class Fails:
        def __getattr__(self, name):
            raise AssertionError(name)

    log = MetricsLog(tmp_path / "metrics.jsonl", 0, False, [Fails()])
    log.write("train", 1, {"loss": 1.0})
    log.rewind(0)
    log.flush()
    log.close()


def test_a_missing_package_is_one_line_before_anything_is_there(mini, capsys, monkeypatch, caplog):
    monkeypatch.setattr(sinks, "_is_there", lambda package: False)
    assert train_main(["--config", str(mini), "--run.wandb=mine"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == "" and not (mini.parent / "run").exists()
    assert "run.wandb (mine) needs the package wandb: pip install 'hybridlm[wandb]'" in said.err
    with caplog.at_level(logging.WARNING):
        check(RunConfig())  # on by default: the run goes on without
    assert "run.tensorboard needs the package tensorboardX: pip install tensorboardX; it is left out" in caplog.text
    assert sinks.open_sinks(Opening(small_config(), mini.parent, 0)) == []


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_like").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not sinks._is_there("wandb_like") and sinks._is_there("json")


def test_projects_and_resume():
    for good in ("", "mine", "us/mine"):
        RunConfig(wandb=good)
    for bad in ("a/b/c", "us/", "a:b", "a#b"):
        with pytest.raises(ConfigError, match=r"run\.wandb"):
            RunConfig(wandb=bad)
    config = small_config()
    for change in ({"wandb": "mine"}, {"tensorboard": False}, {"report": False}):
        assert refused(config, replace(config, run=replace(config.run, **change))) == {}


def histories(run: Path, n_rows: int) -> list[tuple[str, list[dict]]]:
    """What is there once its own process, which writes for a moment longer than the run, has written so many rows."""
    until = time.monotonic() + 60
    while len([row for _, rows in _histories(run) for row in rows]) < n_rows:
        assert time.monotonic() < until, _histories(run)
        time.sleep(0.1)
    return _histories(run)


def _histories(run: Path) -> list[tuple[str, list[dict]]]:
    """(id, logged rows) of each offline run of Weights & Biases, oldest first; a file is a log of LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        content, at, part, rows, name = file.read_bytes(), 7, b"", [], ""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack_from("<HB", content, at + 4)
            if at + 7 + length > len(content):  # is being written
                break
            part += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record, part = Record.FromString(part), b""
                name = record.run.run_id or name
                if record.WhichOneof("record_type") == "history":
                    rows.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item})
        found.append((name, rows))
    return found


@pytest.mark.wandb
@pytest.mark.usefixtures("one_device")
def test_weights_and_biases_offline(mini, stop_at, monkeypatch):
    """A run that is stopped goes on as the same run there; what is logged is what the records hold."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = mini.parent / "run"
    words = ["--config", str(mini), "--run.sample_tokens=0"]
    stop_at(8)
    assert train_main([*words, "--run.wandb=us/mine"]) == 130
    stop_at(None)
    assert train_main([*words, "--run.wandb=us/mine"]) == 0
    expected = numbers(run / "metrics.jsonl")
    n_records = len({(key.partition("/")[0], step) for key, step in expected})
    (first, before), (second, after) = histories(run, n_records)
    assert first == second == json.loads((run / "wandb.json").read_text())["id"]
    logged = {
        (key, row["step"]): value
        for row in [*before, *after]
        for key, value in row.items()
        if "/" in key and not key.startswith("_")
    }
    assert logged == pytest.approx(expected)
    assert {step for key, step in logged if key == "train/loss"} == {3, 6, 9, 12, 15, 18, 20}


@pytest.mark.wandb
def test_weights_and_biases_that_cannot_be_reached(mini, monkeypatch, capsys, tmp_path, caplog):
    """No key is one line before anything is there; a service that does not answer is a warning, and nothing is lost."""
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    assert train_main(["--config", str(mini), "--run.wandb=mine"]) == 2
    assert "run.wandb (mine) has no API key: run wandb login" in capsys.readouterr().err
    assert not (mini.parent / "run").exists()

    init = wandb.init

    def unreachable(**options):
        if options.get("mode") != "offline":
            raise wandb.errors.CommError("no\nanswer")
        return init(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    config = small_config("--run.wandb=mine", "--run.tensorboard=False")
    (sink,) = sinks.open_sinks(Opening(config, tmp_path, 0))
    assert "cannot be reached (no answer)" in caplog.text
    sink.add("train", 1, {"loss": 2.0})
    sink.add("stop", 1, {})
    sink.close()
    ((_, rows),) = histories(tmp_path, 1)
    assert [(row["train/loss"], row["step"]) for row in rows] == [(2.0, 1)]
    sink.add("train", 2, {"loss": 1.0})  # behind its end: a warning, no error
