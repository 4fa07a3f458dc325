"""Where in a YAML text a key stands, and which keys stand there twice: the parser itself takes the last of them without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def node_of(text: str) -> Any:
    """Return the tree of `text`, with marks; None of an empty one. Raises `yaml.YAMLError`."""
    untyped: Any = yaml
    return untyped.compose(text, Loader=yaml.SafeLoader)


def line_of(node: Any, keys: Sequence[int | str]) -> int:
    """Return the line, from 1, of what `keys` lead to; where there is no such thing, of what it would be in."""
    if node is None:
        return 1
    line: int = node.start_mark.line
    for key in keys:
        if node.id == "mapping":
            found: list[Any] = [pair for pair in node.value if str(pair[0].value) == str(key)]
            if not found:
                break
            line, node = found[-1][0].start_mark.line, found[-1][1]
        elif node.id == "sequence" and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line
        else:
            break
    return line + 1


def repeated(node: Any) -> list[tuple[int, str, int]]:
    """Return each key that is in its mapping already: its line, the path to it, and the line of the first."""
    found: list[tuple[int, str, int]] = []
    seen: set[int] = set()
    left: list[tuple[Any, str]] = [(node, "")]
    while left:
        node, path = left.pop()
        if node is None or id(node) in seen:  # an alias leads to the same node again
            continue
        seen.add(id(node))
        if node.id == "mapping":
            first: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), int(key.start_mark.line) + 1
                if name in first:
                    found.append((line, f"{path}{name}", first[name]))
                first.setdefault(name, line)
                left.append((value, f"{path}{name}."))
        elif node.id == "sequence":
            left += [(one, f"{path}{index}.") for index, one in enumerate(node.value)]
    return sorted(found)
