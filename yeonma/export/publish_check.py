"""Reads a file that is about to be published as its readers would, and says what should stay private in it."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from yeonma.errors import Problem
from yeonma.export.private_paths import homes_in, names_in, paths_in, replace_name, without_private
from yeonma.export.secret_scan import find_secrets, plain_readings
from yeonma.messages import tr

HIDE = tr("remove it, or hide it with --hide_paths true")
REVOKE = tr("remove it, and revoke it where it is used")


@dataclass(frozen=True)
class Private:
    """What is private besides secrets.

    names: of this machine's user and host. paths: whether every absolute path is reported, or only home directories.
    homes_of_names: whether of the home directories only those of `names`, where any text may resemble a path.
    words: whether names are searched for as words. cure: what to do about a path or name.
    """

    names: Collection[str] = ()
    paths: bool = True
    homes_of_names: bool = False
    words: bool = True
    cure: str = HIDE


def find_problems(
    name: str, text: str, environment: Mapping[str, str], private: Private = Private()
) -> list[Problem]:
    """Secrets, paths and names in a text file called `name`. Messages never repeat a secret.

    It is searched as it is, and as it is read: without escapes, and JSON string by string.
    """
    parsed = _parsed(text) if name.endswith(".json") else text
    is_json = not isinstance(parsed, str)
    found: dict[bytes, Problem] = {}
    for secret in find_secrets(text, environment):
        line = text.encode("utf-8", "surrogatepass").count(b"\n", 0, secret.at) + 1
        found[secret.value] = Problem(tr("contains {secret}", secret=secret.name), f"{name}:{line}", REVOKE)
    decoded = "\n".join(_lines(parsed)) if is_json else text
    readings = plain_readings(decoded)
    for plain in readings if readings or not is_json else [decoded]:
        data = plain.encode("utf-8", "surrogatepass")
        has_same_lines = plain.count("\n") == decoded.count("\n")
        for secret in find_secrets(data, environment):
            line = data.count(b"\n", 0, secret.at)
            place = f"{name}:{line + 1}"
            if is_json or not has_same_lines:
                where = next(islice(_strings(parsed, ""), line, None), ("", ""))[0]
                place = f"{name}: {where}" if where and has_same_lines else name
            found.setdefault(
                secret.value, Problem(tr("contains {secret}", secret=secret.name), place, REVOKE)
            )
    return [*found.values(), *_private_problems(name, text, parsed, decoded, private)]


def _private_problems(name: str, text: str, parsed: Any, decoded: str, private: Private) -> Iterator[Problem]:
    if not private.paths and next(_private_in(decoded, private), None) is None:
        return  # of a vocabulary, string by string would take long
    strings = [("", text)] if isinstance(parsed, str) else _strings(parsed, "")
    for where, value in strings:
        for what, at in _private_in(value, private):
            place = f"{name}: {where}" if where else f"{name}:{text.count(chr(10), 0, at) + 1}"
            yield Problem(what, place, private.cure)


def _private_in(value: str, private: Private) -> Iterator[tuple[str, int]]:
    """Yields (what it contains, position)."""
    if private.paths:
        for at, path in paths_in(value):
            yield tr("contains a path of this machine, {path}", path=path), at
    else:
        for at, home in homes_in(value, private.names if private.homes_of_names else ()):
            yield tr("contains a home directory, {home}", home=home), at
    if private.words:
        for at, name in names_in(value, private.names):
            yield tr("contains {name}, a name of this machine's user, home or host", name=name), at


def without_paths(name: str, text: str, names: Collection[str] = ()) -> str:
    """Shortens every absolute path in the text to its last part, and hides home directories and names whole."""
    return _edited(name, text, lambda value: without_private(value, names))


def with_other_base(name: str, text: str, before: str, after: str) -> str:
    """Replaces the base's name by another where it stands as a whole."""
    return _edited(name, text, lambda value: replace_name(value, before, after))


def _edited(name: str, text: str, edit: Callable[[str], str]) -> str:
    """Edits a text, or each string of a JSON file. A JSON file in which nothing changes keeps its bytes."""
    before = _parsed(text) if name.endswith(".json") else text
    if isinstance(before, str):
        return edit(text)
    after = _mapped(before, edit)
    return text if after == before else json.dumps(after, ensure_ascii=False, indent=2) + "\n"


_DEEPEST = 100


def _parsed(text: str) -> Any:
    """The value of a JSON file; the text itself if it is none after all, is a mere string, or is nested too deeply."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) or _is_deep(value) else value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for each in level
            if isinstance(each, list | dict)
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, list | dict)
        ]
        if not level:
            return False
    return True


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yields (place, text) of every string in a JSON value, keys included. Places look like `base.name`."""
    if isinstance(value, str):
        yield where or tr("the whole file"), value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{where}: a key" if where else "a key", key
            yield from _strings(item, f"{where}.{key}" if where else key)


def _lines(value: Any, name: str = "") -> Iterator[str]:
    """A line for each string of `_strings`, in its order: the text, behind the name of what holds it.

    Each ends with a semicolon, so that none reads on in the next.
    """
    if isinstance(value, str):
        yield f'"{name}": "{_one_line(value)}";' if name else f"{_one_line(value)};"
    elif isinstance(value, list):
        for item in value:
            yield from _lines(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            number = f": {item}" if isinstance(item, int) and item > 10**9 else ""
            yield f'"{_one_line(key)}"{number};'
            yield from _lines(item, _one_line(key))


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _mapped(value: Any, edit: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return edit(value)
    if isinstance(value, list):
        return [_mapped(item, edit) for item in value]
    if isinstance(value, dict):
        after = {edit(key): _mapped(item, edit) for key, item in value.items()}
        is_unique = len(after) == len(value)
        return after if is_unique else {key: _mapped(item, edit) for key, item in value.items()}
    return value


PNG_START = b"\x89PNG\r\n\x1a\n"
_MOST_PNG_TEXT = 1 << 22


def png_text(content: bytes) -> str:
    """Everything in a PNG file but its pixels, as text: its text chunks, unpacked where they are compressed, its other
    chunks, and what is no chunk of a picture, such as bytes after its end."""
    parts, at = [], len(PNG_START) if content.startswith(PNG_START) else 0
    while at and at + 12 <= len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        if at + 12 + size > len(content):
            break
        if kind != b"IDAT":
            parts += _chunk_texts(kind, content[at + 8 : at + 8 + size])
        at += 12 + size
        if kind == b"IEND":
            break
    return "\n".join(part.decode("utf-8", "replace") for part in [*parts, content[at:]])


def _chunk_texts(kind: bytes, data: bytes) -> list[bytes]:
    """The parts of a chunk between its zero bytes as a line, and its text unpacked if that is compressed."""
    parts = [part for part in data.split(b"\0") if part]
    texts = [b": ".join(parts)]
    if kind in (b"zTXt", b"iCCP", b"iTXt"):
        # a name, for iTXt two flags and two more names, and then the text, behind a byte for the kind of compression
        head, _, rest = data.partition(b"\0")
        if kind == b"iTXt":
            rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
        else:
            rest = rest[1:]
        with suppress(zlib.error):  # not compressed
            texts.append(head + b": " + zlib.decompressobj().decompress(rest, _MOST_PNG_TEXT))
    return texts
