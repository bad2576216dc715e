"""Strict JSON: parses one value from a text and repairs nothing silently.

The standard library's decoder accepts duplicate keys, NaN and half a surrogate pair. Here they are faults, and every
fault has a position.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from yeonma.errors import brief
from yeonma.messages import later, tr

SPACE = " \t\r\n"


class Fault(Exception):
    """A problem at position `at` of a JSON text. `cut`: the text may just be incomplete."""

    def __init__(self, problem: str, at: int, cure: str = "", *, cut: bool = False) -> None:
        super().__init__(problem)
        self.problem, self.at, self.cure, self.cut = problem, at, cure, cut


class _DuplicateKey(Exception):
    pass


class _NotANumber(Exception):
    pass


class _TooLarge(Exception):
    pass


def parse(text: str, at: int) -> tuple[object, int]:
    """The value that starts at position `at`, and the position after it. Raises Fault."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise Fault(_problem(error), error.pos, _cure(error), cut=_at_the_end(text, error)) from None
    except _DuplicateKey:
        key, second = _second_key(text, at)
        raise Fault(
            tr('the key "{key}" appears twice in one object', key=brief(key)), second, tr("keep one")
        ) from None
    except _NotANumber as constant:
        position = next(token.start() for token in _TOKEN.finditer(text, at) if token[0] == str(constant))
        raise Fault(
            tr("{constant} is not JSON", constant=constant), position, tr("write null or a number")
        ) from None
    except _TooLarge as number:
        position = next(token.start() for token in _TOKEN.finditer(text, at) if token[0] == str(number))
        raise Fault(
            tr("{number} is too large a number", number=brief(str(number))), position, tr("write it as text")
        ) from None
    except RecursionError:
        raise Fault(tr("too deeply nested"), at, tr("nest it less deeply")) from None
    except ValueError:  # Python reads whole numbers of up to 4300 digits
        raise Fault(tr("a number with too many digits"), at, tr("write it as text, in quotes")) from None
    if text.find("\\u", at, end) >= 0:
        _check_escapes(text, at, end)
    return value, end


def kind_of(value: object) -> str:
    """The kind of a value for messages: `a number`, `null`, ..."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return tr("true or false")
    named = (
        (str, tr("text")),
        ((int, float), tr("a number")),
        (Mapping, tr("an object")),
        ((list, tuple), tr("a list")),
    )
    other = tr("a {type}", type=type(value).__name__)
    return next((kind for types, kind in named if isinstance(value, types)), other)


def described(value: object) -> str:
    """Like `kind_of`, but with the value of numbers: `a number (3)`, `null`, `a list`."""
    if isinstance(value, bool):
        return tr("true or false ({value})", value=value)
    return tr("a number ({value})", value=value) if isinstance(value, (int, float)) else kind_of(value)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _DuplicateKey
    return values


def _refuse(constant: str) -> object:
    raise _NotANumber(constant)


# The beginning of a message of the decoder -> how to cure it.
_CURES = {
    "Expecting value": tr("write text in double quotes, a number, true, false, null, [...] or {{...}}"),
    "Expecting ',' delimiter": tr('put a comma between two entries, and write " inside text as \\"'),
    "Expecting ':' delimiter": tr('write "column": "value"'),
    "Expecting property name": tr(
        'write "column": "value", in double quotes, and no comma after the last one'
    ),
    "Illegal trailing comma": tr("remove the comma"),
    "Invalid control character": tr("write line breaks and tabs inside text as \\n and \\t"),
    "Invalid \\escape": tr("write the backslash itself as \\\\"),
    "Invalid \\u": tr("write four hexadecimal digits after \\u"),
    "Unterminated string": tr("close the text with a double quote"),
}


_PROBLEMS = (
    later("not JSON: expecting value"),
    later("not JSON: expecting ',' delimiter"),
    later("not JSON: expecting ':' delimiter"),
    later("not JSON: expecting property name enclosed in double quotes"),
    later("not JSON: illegal trailing comma before end of object"),
    later("not JSON: illegal trailing comma before end of array"),
    later("not JSON: invalid control character at"),
    later("not JSON: invalid \\escape"),
    later("not JSON: unterminated string starting at"),
)


def _problem(error: json.JSONDecodeError) -> str:
    problem = f"not JSON: {error.msg[0].lower()}{error.msg[1:]}"
    return tr(problem) if problem in _PROBLEMS else problem


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999
        raise _TooLarge(text)
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|-?Infinity|NaN|-?\d[-+.\deE]*', re.DOTALL)
_COLON = re.compile(r"[ \t\r\n]*:")
# A NUL, or a surrogate with the low half that may follow it.
_SUSPECT_ESCAPE = re.compile(
    r"\\u(?:0000|[dD][89a-fA-F]..(?:(?<=[dD][89abAB]..)(?P<low>\\u[dD][c-fC-F]..))?)"
)
_CUT_LITERAL = re.compile(r"(?:t|tr|tru|f|fa|fal|fals|n|nu|nul|-?I[nfity]*|N|Na|-|\.|[eE][+-]?)\Z")


def _cure(error: json.JSONDecodeError) -> str:
    cures = (cure for beginning, cure in _CURES.items() if error.msg.startswith(beginning))
    return next(cures, tr("write it as JSON"))


def _at_the_end(text: str, error: json.JSONDecodeError) -> bool:
    """Whether the error may be due to text that is missing at the end."""
    if error.msg.startswith("Unterminated string"):
        return True
    following = text[error.pos : error.pos + 1000].strip(SPACE)
    if error.msg.startswith("Invalid \\u"):
        return len(following) < 8
    return not following or bool(_CUT_LITERAL.match(following))


def _second_key(text: str, at: int) -> tuple[str, int]:
    """The first key that appears a second time in its object, and its position."""
    keys: list[set[str]] = []
    for match in _TOKEN.finditer(text, at):
        token = match[0]
        if token in "{[":
            keys.append(set())
        elif token in "}]":
            keys.pop()
        elif token[0] == '"' and _COLON.match(text, match.end()):
            key = json.loads(token)
            if key in keys[-1]:
                return key, match.start()
            keys[-1].add(key)
    raise AssertionError("no key appears twice")


def _check_escapes(text: str, at: int, end: int) -> None:
    """Raises Fault for an escaped NUL or half a surrogate pair between `at` and `end`."""
    for match in _SUSPECT_ESCAPE.finditer(text, at, end):
        start = backslashes = match.start()
        while text[backslashes - 1] == "\\":
            backslashes -= 1
        if (start - backslashes) % 2:  # the backslash is itself escaped, so this is no escape
            if match["low"]:
                raise _lone_surrogate(text, match.start("low"))
        elif text[start : match.end()] == "\\u0000":
            raise Fault(tr("a NUL character (\\u0000)"), start, tr("remove it"))
        elif not match["low"]:
            raise _lone_surrogate(text, start)


def _lone_surrogate(text: str, at: int) -> Fault:
    return Fault(
        tr("half a character: {text} is a lone surrogate", text=text[at : at + 6]), at, tr("remove it")
    )
