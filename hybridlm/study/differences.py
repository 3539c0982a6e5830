# SPDX-License-Identifier: Apache-2.0
"""What differs between the configs of several runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.errors import cut

IGNORED = ("name", "run.dir", "cluster")
"""What differs between any two runs, or two starts of one."""


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted name -> its value in each of the configs (as JSON), of those that are not the same in all.

    Where a part is of another class in one of them, it stands as a whole; None where a config has no such part.
    """
    found: dict[str, list[Any]] = {}

    def visit(nodes: list, at: str) -> None:
        if at in IGNORED or all(node == nodes[0] for node in nodes):
            return
        if all(isinstance(node, Mapping) for node in nodes) and len({str(node.get("type")) for node in nodes}) == 1:
            for key in dict.fromkeys(key for node in nodes for key in node):
                visit([node.get(key) for node in nodes], f"{at}.{key}" if at else str(key))
        else:
            found[at] = nodes

    visit(list(configs), "")
    return found


def shown(value: Any, most: int = 60) -> str:
    """A value of a config in a table: `AdamW(betas=0.9 0.95, eps=1e-08)`; cut to so many characters."""
    return cut(_text(value), most)


def _text(value: Any) -> str:
    match value:
        case None:
            return "None"
        case Mapping():
            inner = ", ".join(f"{key}={_text(below)}" for key, below in value.items() if key != "type")
            return f"{value['type']}({inner})" if "type" in value else f"{{{inner}}}"
        case list() | tuple():
            return " ".join(map(_text, value))
        case float():
            return f"{value:.10g}"
    return str(value)
