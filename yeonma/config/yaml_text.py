"""Plain YAML: scalars, lists and mappings. Every error names its line.

Uses PyYAML's safe loader, but refuses equal keys in one mapping. That loader silently takes the last of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from yeonma.errors import UserError
from yeonma.messages import later, tr, translated
from yeonma.shown import has_hidden, many_lines

MAX_FRONT_CHARACTERS = 1 << 20
"""Of a Markdown file, for the data at its head."""
MAX_VALUES = 10_000
"""Limit on the values of a text with its aliases expanded: ten short lines of them can stand for billions of values."""


def read_items(text: str, name: str) -> Iterator[tuple[object, object, int]]:
    """Key, value and line of the entries of one YAML mapping; none for an empty text.

    Messages call the text `name`. Raises UserError for anything but one mapping, for equal keys in a mapping at
    any depth, for tags beyond YAML's own, such as `!!python/object`, and for aliases that contain themselves or expand
    to more than MAX_VALUES values.
    """
    with _yaml_errors_as_user_errors(name):
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None or root.tag == "tag:yaml.org,2002:null":
            return
        if not isinstance(root, yaml.MappingNode):
            raise UserError(tr("not a mapping"), place=name, cure=tr("write one `setting: value` a line"))
        _refuse_equal_keys_and_tags(root, name, set())
        _count_values(root, name, {})
        for key_node, value_node in root.value:
            key = loader.construct_object(key_node, deep=True)
            yield key, loader.construct_object(value_node, deep=True), key_node.start_mark.line + 1


def read_value(text: str, name: str) -> object:
    """The value of a YAML text, None for an empty one. Raises UserError as `read_items` does."""
    with _yaml_errors_as_user_errors(name):
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_equal_keys_and_tags(root, name, set())
        _count_values(root, name, {})
        return loader.construct_document(root)


def write_item(name: str, value: object) -> str:
    """One entry of a mapping as YAML. Text of several lines becomes a block."""
    # PyYAML writes these unescaped, and reads some of them, which are line breaks, back as spaces.
    has_invisible = has_hidden(json.dumps(value, ensure_ascii=False))
    options = {"allow_unicode": True, "width": 10**9}
    if isinstance(value, str) and has_invisible:  # all of YAML's escapes are those of `many_lines`
        return f"{name}: {many_lines(yaml.safe_dump(value, default_style=chr(34), **options))}"
    options["allow_unicode"] = not has_invisible
    if isinstance(value, str) and "\n" in value:
        block = yaml.safe_dump(value, default_style="|", **options)
        return f"{name}: " + re.sub(r"\n\.\.\.\n\Z", "\n", block)  # without the end-of-document mark
    if isinstance(value, list | dict):
        return f"{name}: {yaml.safe_dump(value, default_flow_style=True, **options)}"
    return str(yaml.safe_dump({name: value}, **options))


def front_matter(items: Mapping[str, object]) -> list[str]:
    """The lines of a card's own data at the head of a Markdown file."""
    return ["---", *(write_item(key, value).rstrip("\n") for key, value in items.items()), "---", ""]


def read_front_matter(path: Path) -> str | None:
    """The text of the data at the head of a Markdown file; None if it has none, or cannot be read."""
    try:
        text = path.read_text("utf-8")[:MAX_FRONT_CHARACTERS]
    except (OSError, ValueError):
        return None
    front = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    return front and front[1]


@contextmanager
def _yaml_errors_as_user_errors(name: str) -> Iterator[None]:
    """Raise PyYAML's errors as UserError with line and column."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(tr("not YAML: {error}", error=_translated_fault(error)), place=place) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(tr("not YAML: {error}", error=" ".join(str(error).split())), place=name) from None
    except (AttributeError, LookupError):  # PyYAML at `!!timestamp x`, `!!bool x`, `!!int ""`
        problem = tr("not YAML: a value does not match its tag")
        raise UserError(problem, place=name, cure=tr("write values without tags")) from None


_FAULTS = (
    later("expected ',' or ']', but got {token}"),
    later("expected ',' or '}}', but got {token}"),
    later("expected <block end>, but found {token}"),
    later("but found another document"),
    later("expected '<document start>', but found {token}"),
    later("could not find expected ':'"),
    later("mapping values are not allowed here"),
    later("found character {character} that cannot start any token"),
    later("found unexpected end of stream"),
    later("found unknown escape character {character}"),
    later("found undefined alias {name}"),
)
"""What PyYAML says of the usual faults."""


def _translated_fault(error: yaml.MarkedYAMLError) -> str:
    return translated(str(error.problem or error.context))


def _refuse_equal_keys_and_tags(node: yaml.Node, name: str, seen: set[int]) -> None:
    """Raise UserError for equal keys in one mapping, and for tags beyond YAML's own, at any depth."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        place = f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(tr("the tag {tag} is refused", tag=tag), place=place, cure=tr("write a plain value"))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                problem = tr(
                    '"{key}" is given twice, first in line {lines}', key=key.value, lines=lines[key.value]
                )
                raise UserError(problem, place=f"{name}:{line}", cure=tr("remove one of them"))
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
            _refuse_equal_keys_and_tags(key, name, seen)
            _refuse_equal_keys_and_tags(value, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_equal_keys_and_tags(item, name, seen)


def _count_values(node: yaml.Node, name: str, counts: dict[int, int]) -> int:
    """The number of values in a node, itself included, with aliases expanded.

    `counts`: id of a node -> its number of values; 0 while it is being counted. Raises UserError for more than
    MAX_VALUES values because of aliases, and for a node within itself, as PyYAML does for most.
    """
    place = f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if id(node) not in counts:
        counts[id(node)] = 0
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        counts[id(node)] = 1 + sum(_count_values(part, name, counts) for part in parts)
    if counts[id(node)] == 0:
        raise UserError(tr("not YAML: found unconstructable recursive node"), place=place)
    if counts[id(node)] > max(MAX_VALUES, len(counts)):  # only aliases make more values than nodes
        problem = tr("its aliases expand to more than {max_values:,} values", max_values=MAX_VALUES)
        raise UserError(problem, place=place, cure=tr("write plain values"))
    return counts[id(node)]
