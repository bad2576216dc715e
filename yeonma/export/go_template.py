"""The part of Go's text/template that Modelfiles get: literals as Go reads them, and templates carried out here.

Reference: https://pkg.go.dev/text/template. A test compares `execute` with Go itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]
"""What a template reads as `.Name`: texts, and lists of such mappings."""

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_WORD = re.compile(
    r'\s*("(?:\\.|[^"\\])*"|`[^`]*`|\$\w*(?:\.\w+)?|\.\w+|:=|[=,()]|\d+|\w+)', re.ASCII | re.DOTALL
)
_LINE_BLANKS = " \t\r\n"


class GoTemplateError(Exception):
    """The template refuses its values, or uses what is not carried out here."""


def literal(text: str) -> str:
    """Escapes text for a template between the triple quotes of a Modelfile.

    A brace would begin an action, and three quotes would end the text. Ollama drops characters of a Modelfile that it
    takes for unprintable, wide and zero-width blanks among them.
    """
    text = text.replace("{", "{{ `{` }}")
    if '""' in text or text[:1] == '"':
        text = text.replace('"', '{{ `"` }}')
    return "".join(
        character
        if character.isprintable() or character in _LINE_BLANKS
        else f"{{{{ {quoted(character)} }}}}"
        for character in text
    )


def quoted(text: str) -> str:
    """A text as an interpreted string of Go, in ASCII."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if " " <= character <= "~":
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@dataclass
class _IfNode:
    branches: list[tuple[list[str], list[_Node]]]
    """Condition and body of each; no condition for the last, if it is an `else`."""


@dataclass
class _RangeNode:
    names: list[str]
    words: list[str]
    body: list[_Node]


@dataclass
class _Pipeline:
    words: list[str]


_Node = str | _IfNode | _RangeNode | _Pipeline


@dataclass
class _Scope:
    dot: Any
    root: Values
    variables: dict[str, Any] = field(default_factory=dict)


def execute(template: str, values: Values) -> str:
    """The text that the template makes of `values`. Raises GoTemplateError."""
    parts = _ACTION.split(template)
    nodes, rest = _parse(parts, 0)
    if rest < len(parts):
        raise GoTemplateError("an end without a beginning")
    out: list[str] = []
    _run(nodes, _Scope(values, values), out)
    return "".join(out)


def _parse(parts: Sequence[str], start: int) -> tuple[list[_Node], int]:
    """The nodes from part `start` on, and the part after them: an `else`, an `end`, or past the last."""
    nodes: list[_Node] = []
    position = start
    while position < len(parts):
        if position % 2 == 0:
            nodes.append(parts[position])
            position += 1
            continue
        words = _words(parts[position])
        if words[0] in ("else", "end"):
            return nodes, position
        if words[0] == "if":
            node, position = _parse_if(parts, position, words[1:])
            nodes.append(node)
        elif words[0] == "range":
            names = [word for word in words[1 : words.index(":=")] if word != ","] if ":=" in words else []
            body, end = _parse(parts, position + 1)
            _expect_end(parts, end)
            nodes.append(_RangeNode(names, words[words.index(":=") + 1 :] if names else words[1:], body))
            position = end + 1
        else:
            nodes.append(_Pipeline(words))
            position += 1
    return nodes, position


def _parse_if(parts: Sequence[str], position: int, condition: list[str]) -> tuple[_IfNode, int]:
    branches: list[tuple[list[str], list[_Node]]] = []
    while True:
        body, position = _parse(parts, position + 1)
        branches.append((condition, body))
        words = _words(parts[position]) if position < len(parts) else []
        if words == ["end"]:
            return _IfNode(branches), position + 1
        if words[:1] != ["else"]:
            raise GoTemplateError("an if without an end")
        condition = words[2:]


def _expect_end(parts: Sequence[str], position: int) -> None:
    if position >= len(parts) or _words(parts[position]) != ["end"]:
        raise GoTemplateError("a range without an end")


def _words(action: str) -> list[str]:
    words: list[str] = []
    position, action = 0, action.rstrip()
    while position < len(action):
        word = _WORD.match(action, position)
        if word is None:
            raise GoTemplateError(f"{action[position:]!r} is not carried out here")
        words.append(word[1])
        position = word.end()
    if not words:
        raise GoTemplateError("an action without a word")
    return words


def _run(nodes: Sequence[_Node], scope: _Scope, out: list[str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
        elif isinstance(node, _IfNode):
            for condition, body in node.branches:
                if not condition or _value(condition, scope):
                    _run(body, scope, out)
                    break
        elif isinstance(node, _RangeNode):
            outer = scope.dot
            for index, item in enumerate(_value(node.words, scope)):
                scope.dot = item
                scope.variables |= dict(zip(node.names, (index, item), strict=False))
                _run(node.body, scope, out)
            scope.dot = outer
        elif len(node.words) > 1 and node.words[1] in ("=", ":="):
            scope.variables[node.words[0]] = _value(node.words[2:], scope)
        else:
            out.append(str(_value(node.words, scope)))


def _value(words: Sequence[str], scope: _Scope) -> Any:
    value, rest = _command(list(words), scope)
    if rest:
        raise GoTemplateError(f"{rest[0]} is not carried out here")
    return value


def _command(words: list[str], scope: _Scope) -> tuple[Any, list[str]]:
    """The value of a function with its operands, or of one operand; and the words after it."""
    function = _FUNCTIONS.get(words[0])
    if function is None:
        return _operand(words, scope)
    operands, words = [], words[1:]
    while words and words[0] != ")":
        operand, words = _operand(words, scope)
        operands.append(operand)
    return function(operands), words


def _operand(words: list[str], scope: _Scope) -> tuple[Any, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _command(rest, scope)
        if rest[:1] != [")"]:
            raise GoTemplateError("a parenthesis is open")
        return value, rest[1:]
    if word[0] == "`":
        return word[1:-1], rest
    if word[0] == '"':
        return _unescaped(word[1:-1]), rest
    if word.isdigit():
        return int(word), rest
    name, _, key = word.partition(".")
    if not name and key:
        return scope.dot.get(key, ""), rest
    if name[:1] == "$":
        value = scope.root if name == "$" else scope.variables[name]
        return (value.get(key, "") if key else value), rest
    raise GoTemplateError(f"{word} is not carried out here")


def _unescaped(text: str) -> str:
    def character(escape: re.Match[str]) -> str:
        code = escape[1]
        return chr(int(code[1:], 16)) if code[0] in "uU" and len(code) > 1 else code

    return re.sub(r"\\(u[0-9a-f]{4}|U[0-9a-f]{8}|.)", character, text)


def _equal(operands: Sequence[Any]) -> bool:
    """Whether the first operand is one of the others."""
    return operands[0] in operands[1:]


def _and(operands: Sequence[Any]) -> Any:
    return next((operand for operand in operands if not operand), operands[-1])


def _call(operands: Sequence[Any]) -> Any:
    """Go fails to call a text, and says the text."""
    raise GoTemplateError(str(operands[0]))


_FUNCTIONS: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "eq": _equal,
    "and": _and,
    "len": lambda operands: len(operands[0]),
    "slice": lambda operands: operands[0][operands[1] :],
    "call": _call,
}
