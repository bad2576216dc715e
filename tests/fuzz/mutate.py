"""Strategies that damage what Yeonma reads: the bytes of a file, the tokens of a text, the values of JSON.

They take something valid and return it with up to a few edits, perhaps none.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

MAX_BYTES = 1 << 18  # cases are small: what is slow for them would be far too slow for a real file

# fmt: off
INVISIBLE = (
    "\ufeff", "\u200b", "\u200d", "\u0085", "\u2028", "\u00a0", "\u202e", "\x1a", "\x0b", "\x0c", "\x1c",
)
NUMBERS = (
    "0", "-1", "-0", "1e999", "-1e999", "1e-999", "9" * 400, "9" * 5000, "0x" + "f" * 5000, "1_000", "NaN",
    "-Infinity", "inf", ".nan", "1:30", "0o17", "٣", "2**31", "4294967296", "1e18", "0.1",
)
# fmt: on
SPECIAL = ("<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<pad>", "<0x0A>", "▁")
TEXTS = (
    "",
    " ",
    "\n",
    "\r",
    "\u3000",
    "한글",
    "한글",  # the same decomposed
    "👩‍👩‍👧‍👦",
    "{document}",
    "{{",
    "a" * 5000,
    "\ud800",
    "\0",
    *INVISIBLE,
    *SPECIAL,
)
PIECES: tuple[bytes, ...] = (
    *(text.encode("utf-8", "surrogatepass") for text in TEXTS),
    *(number.encode() for number in NUMBERS),
    codecs.BOM_UTF8,
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_LE,
    *(b"\0", b"\0\0\0\0", b"\xff", b"\xc0\x80", b"\xf8\x88\x80\x80\x80", b"\xed\xa0\x80", b"\x80"),
    *(
        b"\r",
        b"\r\n",
        b"\n\r",
        b"\n\n",
        b"\t",
        b'"',
        b'""',
        b"'",
        b"\\",
        b"\\\\",
        b"/*",
        b"#",
        b"%",
        b"&a ",
        b"*a",
    ),
    *(b"\\ud800", b"\\udc00", b"\\ud83d\\ude00", b"\\u0000", b"\\u12", b"\\x"),
    *(b"[" * 3000, b"]" * 3000, b'{"a":' * 3000, b"- " * 3000, b"{" * 3000, b"(" * 300, b"\xff" * 40),
)
# fmt: off
ENCODINGS = (
    "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp949", "latin-1", "utf-7", "shift_jis",
)
# fmt: on

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**30,
        -(10**400),
        0.5,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *([], {}, [[]], [None], ["a", "b"], [1, "a", None], {"a": None}, {"a": {"b": [1]}}, {"": ""}),
    *([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "hi"}], {"role": "user"}),
    *TEXTS,
)


def edits(max_edits: int) -> st.SearchStrategy[int]:
    """Number of edits: often none or one, so that many cases are almost valid."""
    return st.sampled_from((0, 0, 1, 1, 1, 2, max_edits))


def position(size: int) -> st.SearchStrategy[int]:
    """A position in something of `size`: anywhere, or near one of its ends, where headers and footers are."""
    return st.integers(0, size) | st.integers(max(0, size - 64), size) | st.integers(0, min(size, 16))


@st.composite
def damaged_bytes(draw: Draw, content: bytes, others: Sequence[bytes] = (b"",), max_edits: int = 4) -> bytes:
    """`content` with up to `max_edits` edits of its bytes; pieces of `others` are spliced in."""
    for _ in range(draw(edits(max_edits))):
        edit = draw(st.sampled_from(_BYTE_EDITS))
        content = edit(draw, content, draw(st.sampled_from(tuple(others))))[:MAX_BYTES]
    return content


def _flip(draw: Draw, content: bytes, other: bytes) -> bytes:
    if not content:
        return content
    at = draw(position(len(content) - 1))
    return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]


def _overwrite(draw: Draw, content: bytes, other: bytes) -> bytes:
    at = draw(position(len(content)))
    piece: bytes = draw(st.binary(min_size=1, max_size=8))
    return content[:at] + piece + content[at + len(piece) :]


def _insert(draw: Draw, content: bytes, other: bytes) -> bytes:
    at = draw(position(len(content)))
    return content[:at] + draw(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=8)) + content[at:]


def _delete(draw: Draw, content: bytes, other: bytes) -> bytes:
    start, end = _range(draw, content)
    return content[:start] + content[end:]


def _duplicate(draw: Draw, content: bytes, other: bytes) -> bytes:
    start, end = _range(draw, content)
    return content[:end] + content[start:end] * draw(st.integers(1, 3)) + content[end:]


def _truncate(draw: Draw, content: bytes, other: bytes) -> bytes:
    return content[: draw(position(len(content)))]


def _splice(draw: Draw, content: bytes, other: bytes) -> bytes:
    start, end = _range(draw, other)
    at = draw(position(len(content)))
    return content[:at] + other[start:end] + content[at:]


def _head(draw: Draw, content: bytes, other: bytes) -> bytes:
    return bytes(draw(st.sampled_from(PIECES))) + content


def _reencode(draw: Draw, content: bytes, other: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode(draw(st.sampled_from(ENCODINGS)), "replace")


def _line_ends(draw: Draw, content: bytes, other: bytes) -> bytes:
    return content.replace(b"\n", draw(st.sampled_from((b"\r", b"\r\n", b"\n\n", b"", b"\0", b"\x85"))))


def _range(draw: Draw, content: bytes) -> tuple[int, int]:
    start = draw(position(len(content)))
    return start, min(len(content), start + draw(st.integers(1, 8) | st.integers(1, 4096)))


_BYTE_EDITS = (
    *(_flip, _overwrite, _insert, _delete, _duplicate, _truncate, _splice, _head, _reencode, _line_ends),
    *(_flip, _insert, _delete),
)

_BORDER = re.compile(r"\w+|\s+|.", re.DOTALL)


@st.composite
def damaged_text(draw: Draw, text: str, tokens: Sequence[str], max_edits: int = 4) -> str:
    """`text` with up to `max_edits` edits of whole tokens or lines; `tokens` are those of its language."""
    for _ in range(draw(edits(max_edits))):
        by_line = draw(st.integers(0, 3)) == 0
        parts = text.splitlines(keepends=True) if by_line else _BORDER.findall(text)
        at = draw(position(len(parts)))
        some = draw(st.sampled_from(tuple(tokens)) | st.sampled_from(TEXTS) | st.sampled_from(NUMBERS))
        piece = f"{some}\n" if by_line and not some.endswith("\n") else some
        end = at + draw(st.integers(0, 2) | st.integers(0, 40))
        kind = draw(st.sampled_from(("insert", "replace", "delete", "again", "move")))
        if kind == "insert":
            parts[at:at] = [piece]
        elif kind == "replace":
            parts[at:end] = [piece]
        elif kind == "delete":
            del parts[at:end]
        else:
            moved = parts[at:end]
            if kind == "move":
                del parts[at:end]
            to = draw(position(len(parts)))
            parts[to:to] = moved
        text = "".join(parts)[:MAX_BYTES]
    return text


@st.composite
def damaged_value(draw: Draw, value: Any, names: Sequence[str], max_edits: int = 3) -> Any:
    """A JSON value with up to `max_edits` of its parts changed: other types, null, lists for objects, other names.

    `dumped` adds duplicate keys.
    """
    value = json.loads(json.dumps(value))
    for _ in range(draw(edits(max_edits))):
        parents = list(containers(value))
        if not parents:
            return copy.deepcopy(draw(st.sampled_from(VALUES)))
        parent = draw(st.sampled_from(parents))
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        fresh = copy.deepcopy(draw(st.sampled_from(VALUES)))
        kind = draw(st.sampled_from(("change", "change", "drop", "wrap", "add", "rename", "swap")))
        if not keys or kind == "add":
            if isinstance(parent, dict):
                parent[draw(st.sampled_from(tuple(names)) | st.sampled_from(TEXTS))] = fresh
            else:
                parent.insert(draw(st.integers(0, len(parent))), fresh)
            continue
        key = draw(st.sampled_from(keys))
        if kind == "change":
            parent[key] = fresh
        elif kind == "drop":
            del parent[key]
        elif kind == "wrap":
            parent[key] = [parent[key]] if draw(st.booleans()) else {"a": parent[key]}
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(tuple(names)) | st.sampled_from(TEXTS))] = parent.pop(key)
        else:
            other = draw(st.sampled_from(keys))
            parent[key], parent[other] = parent[other], parent[key]
    return value


def containers(value: Any) -> list[Any]:
    """The value and everything in it that is a list or an object."""
    if not isinstance(value, (dict, list)):
        return []
    inside = value.values() if isinstance(value, dict) else value
    return [value, *(container for item in inside for container in containers(item))]


@st.composite
def dumped(draw: Draw, value: Any, indent: int | None = None) -> str:
    """A value as JSON, sometimes with a key doubled or with escapes for all that is not ASCII."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)
    if "Infinity" in text and draw(st.booleans()):
        text = text.replace("Infinity", "1e999")
    if draw(st.integers(0, 9)) == 0:
        objects = [match.start() for match in re.finditer(r"\{\s*\"", text)]
        if objects:
            at = draw(st.sampled_from(objects)) + 1
            key = re.match(r'\s*("(?:[^"\\]|\\.)*")', text[at:])
            text = f"{text[:at]}{key[1] if key else chr(34) * 2}: 1, {text[at:]}"
    return text


def file_bytes(text: str) -> bytes:
    """The bytes of a file. Half characters stay, because readers have to find them."""
    return text.encode("utf-8", "surrogatepass")


# fmt: off
JSON_TOKENS = (
    '"', "{", "}", "[", "]", ":", ",", "null", "true", "fals", '""', "\\", "\\u", "\n", "//", "'", "{}",
    "[]", '"a":1,', "\\ud83d", "\\ud83d\\ude00", "\\u0000", "-", ".", "e", "[[", "{{", "\ufeff",
)
# fmt: on


@st.composite
def damaged_json(draw: Draw, value: Any, names: Sequence[str], indent: int | None = None) -> bytes:
    """A JSON file: its values changed, then its tokens, then its bytes; mostly one of the three."""
    kinds = draw(st.sets(st.sampled_from(("values", "tokens", "bytes")), min_size=1, max_size=3))
    if "values" in kinds:
        value = draw(damaged_value(value, names))
    text = draw(dumped(value, indent))
    if "tokens" in kinds:
        text = draw(damaged_text(text, JSON_TOKENS, max_edits=3))
    content = file_bytes(text)
    return draw(damaged_bytes(content)) if "bytes" in kinds else content


def subset(mapping: Mapping[str, Any], min_size: int = 0) -> st.SearchStrategy[list[str]]:
    """Some of the keys, in order."""
    chosen = st.sets(st.sampled_from(sorted(mapping)), min_size=min_size)
    return chosen.map(lambda keys: [key for key in mapping if key in keys])
