# SPDX-License-Identifier: Apache-2.0
"""What a run leaves however it ends: why, in its records, and its page."""

import pytest

from hybridlm.config.overrides import override
from hybridlm.errors import RunError
from hybridlm.study.reading import read_run
from hybridlm.train.last_words import failure_recorded, page_written
from hybridlm.train.metrics_log import MetricsLog, read_metrics
from hybridlm.train.peers import Peers
from hybridlm.train.run_folder import RunFolder
from tests.study.folders import TINY, start, train, write_run


@pytest.mark.parametrize(
    "error, why",
    [(RunError("disk\nfull"), "disk full"), (ZeroDivisionError("x"), "ZeroDivisionError: x"), (KeyError, None)],
)
def test_a_failure_is_in_the_records(tmp_path, error, why):
    """Of the step that was recorded last; where it cannot be written, the failure itself is what is raised."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 3)
    log.write("train", 7, {"loss": 1.0})
    if why is None:
        log.close()
        error = KeyError("y")
    with pytest.raises(type(error)), failure_recorded(log, Peers().settle):
        raise error
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "failed"]
    assert records == ([] if why is None else [{"kind": "failed", "step": 7, "why": why}])
    run = write_run(tmp_path / "run", [start(), train(7), *records], [7])
    assert read_run(run).state == (
        ("failed", why) if why else ("stopped", "at step 7, the newest checkpoint is of step 7")
    )


def test_a_process_that_must_not_write_records_no_failure(tmp_path):
    """What ends it does so first: another process may have gone on with the run."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 3)

    def ended(error):
        raise SystemExit(75)

    with pytest.raises(SystemExit), failure_recorded(log, ended):
        raise RunError("a peer was lost")
    log.flush()
    assert not [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "failed"]


def test_a_page_is_no_matter_of_the_run(tmp_path, caplog):
    """It is written when the block ends, however that is; where it cannot be, a warning says so and nothing else."""
    run, written = write_run(tmp_path / "run"), []
    config = override(TINY, [f"--run.dir={run}"])

    def fails(folder):
        raise ZeroDivisionError("no page")

    with RunFolder(config) as folder:
        with pytest.raises(RunError, match="the run"), page_written(folder, written.append):
            raise RunError("the run")
        assert written == [run]
        with pytest.raises(RunError, match="the run"), page_written(folder, fails):
            raise RunError("the run")
        assert "no page of" in caplog.text and caplog.text.count("\n") == 1
        for other in (override(config, ["--run.report=False"]), config):
            folder.config = other
            with page_written(folder, written.append if other is not config else None):
                pass
        folder.owner = False
        with page_written(folder, written.append):
            pass
    assert written == [run]
