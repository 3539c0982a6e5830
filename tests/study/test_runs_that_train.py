# SPDX-License-Identifier: Apache-2.0
"""What training leaves for the commands that read runs: why it ended, what it cost, its page."""

import pytest

from hybridlm.cli import train_main
from hybridlm.config.overrides import override
from hybridlm.errors import RunError
from hybridlm.model.flops import train_flops
from hybridlm.study.reading import read_run
from hybridlm.train import loop
from hybridlm.train.last_words import page_written
from hybridlm.train.run_folder import RunFolder
from tests.study.folders import TINY, write_run


@pytest.mark.usefixtures("one_device")
def test_a_run_that_is_stopped_fails_and_is_complete(mini, stop_at, capsys, monkeypatch):
    """Its records say how each start ended, and its page is as new as they are."""
    run = mini.parent / "run"
    words = ["--config", str(mini), "--run.report=True"]
    stop_at(8)
    assert train_main(words) == 130
    assert read_run(run).state == ("stopped", "at step 8, the newest checkpoint is of step 8")
    assert "mini: stopped" in (run / "report.html").read_text()

    def broken(*args):
        raise RunError("no evaluation today")

    stop_at(None)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Validation, "read", broken)
        assert train_main(words) == 1
    assert read_run(run).state == ("failed", "no evaluation today")
    page = (run / "report.html").read_text()
    assert "mini: failed" in page and "no evaluation today" in page and "going on" not in page

    capsys.readouterr()
    assert train_main(words) == 0
    assert f"{run}/report.html" in capsys.readouterr().out
    found = read_run(run)
    assert found.state == ("complete", "") and found.steps == 20
    flops = train_flops(found.parsed.model, found.parsed.data.seq_len)
    assert {start["flops_per_token"] for start in found.of_kind("start")} == {flops}
    assert [r["signal"] for r in found.of_kind("stop")] == [2]
    page = (run / "report.html").read_text()
    assert "mini: complete" in page and "tokens a second" in page and (run / "sample.txt").read_text().strip() in page

    written = (run / "report.html").stat().st_mtime_ns
    assert train_main(words) == 0 and (run / "report.html").stat().st_mtime_ns == written  # nothing was trained


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
