# SPDX-License-Identifier: Apache-2.0
"""Probes in pages: what is in the maps is what was counted; records of any content do no harm."""

import numpy as np

from hybridlm import page
from hybridlm.page import as_svg
from hybridlm.study.figures import Grid, draw_grids
from hybridlm.study.probed import _grids, as_page, facets, map_of, of_run
from hybridlm.study.reading import each_once, read_run
from hybridlm.study.report import as_page as report_of
from tests.study.folders import WHOLE, write_run
from tests.study.test_pages import EVIL, check_self_contained

DEPTHS = {"0": [1, 4], "50": [3, 4], "100": [4, 4]}


def record(step: int, **more) -> dict:
    names = {"needle/64": step / 40, "needle/128": step / 80, "mqar/64": 0.5}
    by = {"needle/64": {"depth": DEPTHS}, "needle/128": {"depth": {"0": [0, 4], "100": [2, 4]}}}
    return {
        "kind": "probe", "step": step, **names, "chance": dict.fromkeys(names, 0.1), "by": by, "seconds": 0.25,
    } | more  # fmt: skip


def test_a_map_has_what_was_counted():
    counts = {facet: {v: {"right": r, "asked": n} for v, (r, n) in DEPTHS.items()} for facet in ("depth",)}
    grid = map_of("needle", [("64", counts), ("128", {"depth": {"50": {"right": 0, "asked": 2}}})], "tokens")
    assert grid.rows == ["0", "50", "100"] and grid.columns == ["64", "128"]
    np.testing.assert_array_equal(grid.values, [[0.25, np.nan], [0.75, 0.0], [1.0, np.nan]])
    drawn = draw_grids([grid])
    (axes, *_) = drawn.axes
    assert sorted(text.get_text() for text in axes.texts) == ["0.00", "0.25", "0.75", "1.00"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128"]
    top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
    assert top < bottom  # the first depth is at the top
    large = Grid("m", "x", "y", [str(i) for i in range(50)], ["0", "1"], np.zeros((2, 50)))
    (axes, *_) = draw_grids([large]).axes
    assert not axes.texts and len(axes.get_xticks()) <= 11
    assert "<image" not in as_svg(drawn)  # shapes, which a page need not fetch


def part_of(folder) -> str:
    """The text of a run's probes, in a page of their own."""
    return check_self_contained(page.page("", *of_run(read_run(folder))))


def test_a_runs_page(tmp_path):
    """Curves, the last map of depth and length, chance and cost; nothing where a run was not probed."""
    run = read_run(write_run(tmp_path / "a", [*WHOLE[:6], record(10), *WHOLE[6:], record(20)]))
    said = check_self_contained(report_of(run))
    for text in ("Probes", "needle, step 20", "mqar: accuracy", "0.75", "0.100", "0.5 s in all"):
        assert text in said, text
    assert not of_run(read_run(write_run(tmp_path / "b")))
    one = [record(step, by={"needle/64": {"depth": DEPTHS}}) for step in (10, 20)]
    assert "depth, percent" in part_of(write_run(tmp_path / "c", [*WHOLE, *one]))
    many = [record(step, by={"needle/64": {"depth": DEPTHS}}) for step in range(1, 132)]
    (grid,) = _grids("needle", ["needle/64"], many)
    assert len(grid.columns) == 44 and grid.columns[-3:] == ["125", "128", "131"]
    bigrams = {"kind": "probe", "step": 20, "repeated_bigrams/hits": 2.5, "repeated_bigrams/rest": None, "seconds": 1}
    bigrams["repeated_bigrams/share"] = 0.207  # of the text, which has its place in the table and not among losses
    said = part_of(write_run(tmp_path / "d", [*WHOLE, bigrams]))
    assert "repeated_bigrams: nats a token" in said and "2.500" in said
    assert "0.207" in said and said.count("repeated_bigrams/share") == 1 < said.count("repeated_bigrams/hits")


def test_records_of_any_content(tmp_path):
    odd = {"kind": "probe", "step": 20, EVIL: 0.5, "chance": [1], "by": {EVIL: {"depth": {"0": "x"}}, "x": 3}}
    records = [*WHOLE, odd, record(20, by={"needle/64": 7}, seconds=EVIL)]
    assert "Probes" in part_of(write_run(tmp_path / "a", records))


def test_a_step_that_is_probed_twice_counts_once():
    assert each_once([record(10), record(20), record(20, seconds=1.0)]) == [record(10), record(20, seconds=1.0)]


def test_the_page_and_the_text_of_a_command():
    score = lambda length, by: {
        "length": length, "accuracy": 0.5, "chance": 0.1, "fixed_state": None, "right": 6, "asked": 12, "rows": 4,
        "rows_all_right": 1, "by": by,
    }  # fmt: skip
    depth = {v: {"right": r, "asked": n} for v, (r, n) in DEPTHS.items()}
    sets = {"val": {"hits": {"loss": 1.25, "tokens": 70}, "rest": {"loss": None, "tokens": 0}}}
    found = {
        "model": EVIL, "step": 7, "compute_dtype": "float32", "state_bits": 4096,
        "tasks": {
            "needle": {"fields": {"digits": 7}, "scores": [score(64, {"depth": depth}), score(128, {"depth": {}})]},
            "repeated_bigrams": {"fields": {"frequent": 9}, "sets": sets},
        },
    }  # fmt: skip
    said = check_self_contained(as_page(found))
    for text in ("4,096 bits", "0.75", "1 of 4", "needle by depth", "1.2500", "depth, percent"):
        assert text in said, text
    ((name, facet, head, rows),) = facets(found, shades=True)
    assert (name, facet, head) == ("needle", "depth", ["length", "0", "50", "100"])
    assert rows == [["64", "0.250 ░", "0.750 ▓", "1.000 █"], ["128", "-  ", "-  ", "-  "]]
