# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages from plain functions: `page(title, heading(...), table(...), figure(svg))`.

A page needs nothing but itself: styles and figures are in it, and its policy lets a browser fetch nothing. Every text
is escaped where it enters, whatever bytes it came from; what has been made here is Markup and goes in as it is.
"""

import contextlib
import html
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light; --line: #d8dee4; --soft: #57606a; }
body { font: 14px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
p.note, figcaption { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td { overflow-wrap: break-word; max-width: 34rem; }
th.number, td.number { text-align: right; white-space: nowrap; }
pre { background: #f6f8fa; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
summary { cursor: pointer; margin: .6rem 0; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .45em; border-radius: 2px; }
""".strip()


class Markup(str):
    """HTML: what the functions of this module give and take as it is."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Any value as text: escaped, control characters and lone surrogates as signs that can be seen."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(visible(str(value))))


def visible(value: str) -> str:
    """A text without what is none in HTML or XML.

    Control characters but tab and line feed become U+2400 and on; a byte that was no text is spelled, as \\udcff; what
    has no character or turns the direction of writing is U+FFFD.
    """
    return _UNSEEN.sub(lambda found: _sign(ord(found[0])), value)


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\u{code:04x}" if 0xD800 <= code <= 0xDFFF else "\ufffd"


def page(title: str, *parts: Markup) -> str:
    """The whole page; its first line of text is the title."""
    body = "\n".join(text(part) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{text(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def heading(value: Any) -> Markup:
    """Of a part."""
    return Markup(f"<h2>{text(value)}</h2>")


def paragraph(value: Any, note: bool = False) -> Markup:
    """note: in a softer colour."""
    return Markup(f"<p{' class=note' if note else ''}>{text(value)}</p>")


def preformatted(value: Any) -> Markup:
    """Lines as they are."""
    return Markup(f"<pre>{text(value)}</pre>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> Markup:
    """head: may be empty; numbers: the columns that are set flush right."""
    right = set(numbers)
    side = lambda i: " class=number" if i in right else ""
    top = "".join(f"<th{side(i)}>{text(cell)}</th>" for i, cell in enumerate(head))
    top = f"<tr>{top}</tr>\n" if top else ""
    lines = ["<tr>" + "".join(f"<td{side(i)}>{text(c)}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows]
    return Markup(f'<div class="wide"><table>\n{top}' + "\n".join(lines) + "\n</table></div>")


def figure(svg: str, caption: Any = "") -> Markup:
    """A drawing that `as_svg` made, in the page itself; a caption below it."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Markup(f"<figure>{svg}{below}</figure>")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Signs that the font does not have are drawn as boxes, which needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def as_svg(figure) -> str:
    """The `<svg>` element, with nothing in it that names another place."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hybridlm"}), quiet():
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL).strip()


def folded(summary: Any, *parts: Markup) -> Markup:
    """Parts that show when the summary is clicked."""
    inner = "\n".join(text(part) for part in parts)
    return Markup(f"<details><summary>{text(summary)}</summary>\n{inner}\n</details>")


def key(colour: str, label: Any) -> Markup:
    """A label behind a square of a colour, #rrggbb."""
    return Markup(f'<span class=key style="background:{text(colour)}"></span>{text(label)}')


def config_part(config: Any) -> Markup:
    """A config as JSON, folded."""
    return folded("as JSON", preformatted(json.dumps(config, indent=2, ensure_ascii=False)))
