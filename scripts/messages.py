"""Brings the catalogues of messages up to date with the code.

    python scripts/messages.py

Messages that the code has and a catalogue lacks are added without a translation, and those that the code has no longer
are removed. Then every `.po` is compiled. It prints what has no translation yet.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from yeonma.messages import CATALOGUES, forms

ROOT = Path(__file__).parents[1]
CALLS = ("tr", "later", "counted")
"""Functions of `yeonma.messages`."""


@dataclass(frozen=True)
class Message:
    """A message of the code: its forms, and where it stands."""

    forms: tuple[str, ...]
    place: str


def messages() -> Iterator[Message]:
    """The messages of all modules, in order. Raises ValueError where one is no literal."""
    for path in sorted((ROOT / "yeonma").rglob("*.py")):
        yield from messages_of(path)


def messages_of(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text("utf-8"))
    imported = {
        name.asname or name.name: name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "yeonma.messages"
        for name in node.names
        if name.name in CALLS
    }
    place = path.relative_to(ROOT).as_posix()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            of_words = imported[node.func.id] == "counted"
            arguments = node.args[1:3] if of_words else node.args[:1]
            literals = [
                argument.value
                for argument in arguments
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            ]
            if len(literals) == len(arguments):
                yield Message(forms(*literals) if of_words else (literals[0],), place)
            elif any(isinstance(argument, (ast.JoinedStr, ast.BinOp)) for argument in arguments):
                raise ValueError(
                    f"{place}:{node.lineno}: the message is made of parts; put values at {{places}}"
                )


def updated(catalogue: Catalog) -> Catalog:
    """The catalogue with the messages of the code: old translations, and empty ones."""
    result = Catalog(
        locale=catalogue.locale, header_comment="# Yeonma's messages.", charset="utf-8", fuzzy=False
    )
    for message in messages():
        key = message.forms[0] if len(message.forms) == 1 else message.forms
        old = catalogue.get(message.forms[0])
        result.add(key, old.string if old else None, locations=[(message.place, None)])
    return result


def written(catalogue: Catalog) -> bytes:
    """The `.po`."""
    buffer = io.BytesIO()
    write_po(buffer, catalogue, width=110, omit_header=False, sort_output=False, include_lineno=False)
    lines = buffer.getvalue().decode("utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(_UNUSED_HEADERS)).encode("utf-8")


_UNUSED = (
    "Project-Id-Version",
    "Report-Msgid-Bugs-To",
    "POT-Creation-Date",
    "PO-Revision-Date",
    "Generated-By",
)
_UNUSED_HEADERS = tuple(f'"{name}' for name in (*_UNUSED, "Last-Translator", "Language-Team"))


def compiled(catalogue: Catalog) -> bytes:
    """The `.mo`, without the time at which it was made."""
    catalogue.creation_date = catalogue.revision_date = datetime(2026, 1, 1, tzinfo=timezone.utc)
    buffer = io.BytesIO()
    write_mo(buffer, catalogue)
    return buffer.getvalue()


def read(path: Path) -> Catalog:
    with path.open("rb") as file:
        return read_po(file, locale=path.stem)


def main() -> None:
    for path in sorted(CATALOGUES.glob("*.po")):
        catalogue = updated(read(path))
        path.write_bytes(written(catalogue))
        path.with_suffix(".mo").write_bytes(compiled(read(path)))
        missing = [message for message in catalogue if message.id and not _is_whole(message.string)]
        print(f"{path.name}: {len(list(catalogue)) - 1} messages, {len(missing)} without a translation")
        for message in missing:
            print(f"  {message.locations[0][0]}: {message.id}")


def _is_whole(translation: str | tuple[str, ...]) -> bool:
    return bool(translation) and all(translation)


if __name__ == "__main__":
    main()
