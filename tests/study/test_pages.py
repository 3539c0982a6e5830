# SPDX-License-Identifier: Apache-2.0
"""Differences, curves, figures and pages: against what is counted here, and with any text in them."""

import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hybridlm import page as html
from hybridlm.cli import main
from hybridlm.config.overrides import override
from hybridlm.model.flops import train_flops
from hybridlm.page import as_svg
from hybridlm.study.compare import as_page, measure
from hybridlm.study.curves import train_curve, val_curve
from hybridlm.study.differences import differences
from hybridlm.study.figures import POINTS, Line, Panel, as_png, draw
from hybridlm.study.reading import read_run
from hybridlm.study.report import as_page as report_of
from hybridlm.study.report import write_report
from hybridlm.study.survey import labels
from tests.study.folders import TINY, WHOLE, start, train, val, write_run

EVIL = "<script>alert(1)</script> & $x_1$ \"' \x1b[31m\x00\udcff\ufffe _é"


class Reader(HTMLParser):
    """What a browser makes of a page: its text, and what it would fetch or run."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.reaches = [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset") or name.startswith("on"):
                self.reaches.append((name, value))
            self.reaches += [("url", found) for found in re.findall(r"url\((.*?)\)", value or "")]

    def handle_data(self, data):
        self.text.append(data)


def check_self_contained(text: str) -> str:
    """The text of a page that needs nothing else."""
    text.encode("utf-8")
    found = Reader(text)
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    assert all(value.startswith("#") for _, value in found.reaches), found.reaches
    assert html.POLICY.startswith("default-src 'none'") and html.POLICY in text
    return "".join(found.text)


@given(st.text(), st.text())
def test_any_text_in_a_page_is_text(one, two):
    """It comes back as it was, but for what cannot be shown; tags and entities in it are letters."""
    page = html.page(
        one, html.paragraph(two), html.table([one], [[two]], numbers=[0]), html.folded(one, html.preformatted(two))
    )
    said = check_self_contained(page)
    assert said.count(html.visible(two)) >= 2 and html.visible(one) in said
    seen = html.visible(two)
    assert html.visible(seen) == seen and len(seen) >= len(two)


def test_signs_for_what_cannot_be_shown():
    assert html.visible("a\tb\nc\x00\x1b\x7f\udcff\u202e\ufffe") == "a\tb\nc␀␛␡\\udcff��"
    assert html.text(html.Markup("<b>")) == "<b>" and html.text("<b>") == "&lt;b&gt;"


def leaves(node, at=""):
    if isinstance(node, dict):
        for key, below in node.items():
            yield from leaves(below, f"{at}.{key}" if at else key)
    else:
        yield at, node


TREES = st.recursive(
    st.one_of(st.none(), st.integers(0, 2)), lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3)
)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), TREES, max_size=3), min_size=1, max_size=3))
def test_differences(trees):
    """Everything that differs lies at or under a key that is told, nothing that is the same is told, values are those
    of the trees."""
    found = differences(trees)
    flat = [dict(leaves(tree)) for tree in trees]
    for key in {key for tree in flat for key in tree}:
        differs = any(tree.get(key, "-") != flat[0].get(key, "-") for tree in flat)
        told = any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in found)
        if differs and any(tree.get(key) is not None for tree in flat):
            assert told, (key, found)
    for name, values in found.items():
        assert len(values) == len(trees) and any(value != values[0] for value in values)
        for tree, value in zip(trees, values):
            for part in name.split("."):
                tree = (tree or {}).get(part)
            assert tree == value


def test_a_part_of_another_class_differs_as_a_whole():
    one, two = {"r": {"type": "A", "x": 1}, "name": "p"}, {"r": {"type": "B", "x": 1, "y": 2}, "name": "q"}
    assert differences([one, two]) == {"r": [one["r"], two["r"]]}
    assert differences([one, {"r": {"type": "A", "x": 3}}]) == {"r.x": [1, 3]}


def test_curves_over_tokens_time_and_flops(tmp_path):
    """A run whose batch and rows were changed on the way: sums over its intervals, counted one by one."""
    records = [
        start(0, flops_per_token=10.0), train(1, tokens=64, tokens_per_second=None), train(2, tokens=128),
        start(2, flops_per_token=30.0), train(3, tokens=328, tokens_per_second=100.0), val(3, 1.0),
        train(4, tokens=528, loss=None),
    ]  # fmt: skip
    run = read_run(write_run(tmp_path / "run", records, []))
    curve = train_curve(run)
    assert curve.tokens.tolist() == [64, 128, 328, 528]
    assert curve.seconds == pytest.approx([2, 4, 6, 6 + 200 / 32])
    assert curve.flops == pytest.approx([640, 1280, 1280 + 6000, 1280 + 12000])
    assert curve.over("step", "loss")[0].tolist() == [1, 2, 3]  # one interval has no loss
    at = val_curve(run)
    assert (at.tokens[0], at.seconds[0], at.flops[0]) == pytest.approx((328, 6, 7280))
    old = read_run(write_run(tmp_path / "old", [start(), {"kind": "train", "step": 2, "loss": 1.0}], []))
    flops = train_flops(TINY.model, TINY.data.seq_len)
    assert train_curve(old).tokens.tolist() == [128] and train_curve(old).flops[0] == pytest.approx(128 * flops)
    none = read_run(write_run(tmp_path / "none", [val(1, 1.0)], []))
    assert len(train_curve(none).step) == 0 and len(val_curve(none).over("tokens", "loss")[0]) == 0


def test_figures_of_any_label():
    """SVG is XML with the labels as they are, the same each time; long curves keep their mean."""
    x = np.arange(1.0, 10_001)
    y = np.sin(x / 500) + 2
    lines = [Line(x, y, EVIL, 0), Line(x, y + 1, "_under", 11), Line(x[:0], y[:0], "none", 2)]
    panels = [Panel(EVIL, "$y", lines, marks=[3]), Panel("log", "y", lines, log=True), Panel("empty", "y", [])]
    figure = draw(panels, title=EVIL)
    svg = as_svg(figure)
    assert as_svg(draw(panels, title=EVIL)) == svg and as_png(figure).startswith(b"\x89PNG") and len(svg) < 250_000
    said = [text.text for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert html.visible(EVIL) in said and " _under" in said and "$y" in said and "no record" in said
    check_self_contained(html.page("t", html.figure(svg, EVIL)))
    drawn = figure.axes[0].get_lines()[0].get_xydata()
    assert len(drawn) == POINTS and drawn[:, 1].mean() == pytest.approx(y.mean(), rel=1e-3)
    assert np.all(np.diff(drawn[:, 0]) > 0)


def test_names_on_logarithmic_axes_do_not_touch():
    """Whatever part of a decade, or how many, an axis shows, and there are such."""
    ends = [
        (start, start * 10**decades) for start in (1.7e-2, 4.9e2, 6e8) for decades in (0.2, 0.45, 0.8, 1.3, 1.75, 4)
    ]
    figure = draw([Panel("x", "y", [Line(x, [1, 2])], log=True) for x in ends])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes, (low, high) in zip(figure.axes, ends, strict=True):
        names = [n for n in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)) if n.get_text()]
        left, right = axes.get_xlim()
        boxes = [n.get_window_extent(renderer) for n in names if left <= n.get_position()[0] <= right]
        boxes.sort(key=lambda box: box.x0)
        assert len(boxes) >= (1 if high < 4 * low else 2), (low, high)
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes)), (low, high, [n.get_text() for n in names])


def test_comparison(tmp_path, capsys):
    """The page and the figure of runs, one of them hostile; each step once."""
    write_run(tmp_path / "runs" / "a")
    other = override(TINY, ["optim.lr=0.5", "optim.rule=Muon"])
    twice = [start(), train(2, loss=9.0), train(4, loss=9.0), start(2), train(4, loss=7.0), val(4, 6.5)]
    write_run(tmp_path / "runs" / EVIL.replace("/", "").replace("\x00", ""), twice, [], other)
    (tmp_path / "runs" / "empty").mkdir()
    out, figure = tmp_path / "out" / "page.html", tmp_path / "figure.svg"
    out.parent.mkdir()
    assert main(["compare", str(tmp_path / "runs"), str(tmp_path / "runs" / "a"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "2 runs: " in said.out and said.err == f"left out: {tmp_path}/runs/empty: no run: it is empty\n"
    text = check_self_contained(out.read_text())
    assert (out.parent / "page.png").read_bytes().startswith(b"\x89PNG")
    for part in ("optim.lr", "0.5", "0.0003", "Muon(", "4/20", "7.0000", "6.5000", "0.2500", "alert(1)"):
        assert part in text, part
    assert "9.0000" not in text and "model.d_model" not in text
    words = ["compare", str(tmp_path / "runs"), "--out", str(out), "--figure", str(figure), "--title", EVIL]
    assert main(words) == 0 and ET.fromstring(figure.read_text()) is not None
    assert main(["compare", str(tmp_path / "runs"), "--figure", "x.gif"]) == 2
    assert "--figure (x.gif) must end in .png or .svg" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "runs"), "--out", "x.svg", "--figure", "./x.svg"]) == 2
    assert "--out and --figure (./x.svg) are one file: name two" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "runs" / "empty"), "--out", str(out)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_runs_of_different_tokens_are_compared_by_bytes(tmp_path):
    one = read_run(write_run(tmp_path / "one"))
    two = read_run(write_run(tmp_path / "two", config=override(TINY, ["model.vocab_size=320"])))
    assert measure([one, one]) == "loss" and measure([one, two]) == "bits_per_byte"
    assert "bits per byte" in as_page([one, two]) and "nats" not in as_page([one, two])


def test_held_out_sets_by_name(tmp_path):
    """Where evaluations have several sets, each is drawn in the report, and its last value stands on both pages."""
    sets = val(20, 0.3) | {"loss/web": 0.4, "bits_per_byte/web": 0.2, "loss/co<de": 0.1234, "bits_per_byte/co<de": 0.05}
    one, two = write_run(tmp_path / "one", [*WHOLE, sets]), write_run(tmp_path / "two")
    text = check_self_contained(as_page([read_run(one), read_run(two)]))
    assert "By held-out set" in text and "loss/co<de" in text and "0.1234" in text
    assert "By held-out set" not in as_page([read_run(two)])
    drawn = ET.fromstring(re.search(r"<svg.*</svg>", report_of(read_run(one)), re.DOTALL)[0])
    said = [part.text for part in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "web" in said and "co<de" in said and "validation" in said


def test_labels(tmp_path):
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert labels([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert labels([tmp_path, tmp_path]) == [tmp_path.name] * 2


def test_report_of_a_run_with_anything_in_it(tmp_path, capsys):
    events = [
        *({"kind": "skipped", "step": 2, "n": i} for i in range(300)),
        {"kind": "config", "step": 2, "changed": {"optim.lr": [0.1, 0.2], EVIL: [EVIL, None]}},
        {"kind": "rollback", "step": 2, "why": EVIL, "failed_at": 4}, {"kind": "spike", "step": 3, "loss": 1e300},
        {"kind": EVIL, "step": 4, "x": {"y": [EVIL]}}, {"kind": "save", "step": 4, "seconds": 0.5},
    ]  # fmt: skip
    sample = EVIL.encode("utf-8", "surrogateescape") + bytes(range(256))
    run = write_run(tmp_path / "run", [start(command=EVIL), train(2), *events, *WHOLE[1:]], [20], sample=sample)
    assert main(["report", str(run)]) == 0 and capsys.readouterr().out == f"{run}/report.html\n"
    text = check_self_contained((run / "report.html").read_text())
    for part in (
        "tiny: complete",
        "20/20",
        "checkpoints written: 1, 0.50 s each",
        "the last 200 of",
        "optim.lr 0.1 -> 0.2",
    ):
        assert part in text, part
    assert html.visible(sample.decode("utf-8", "replace")) in text and '"d_model": 32' in text
    assert len(text) < 100_000
    first = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == first and not list(run.glob("*.part"))
    assert main(["report", str(tmp_path)]) == 2 and "holds no run" in capsys.readouterr().err
    (run / "sample.txt").write_bytes(b"z" * 200_000)
    assert write_report(run).stat().st_size < len(first) + 150_000
