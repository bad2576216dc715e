"""Tables that scripts write into pages of the docs, between two comments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def between(begin: str, end: str, page: str, text: str, place: str) -> str:
    """The page with the text between its two comments. Exits with a message where they are missing."""
    before, found, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not (found and last):
        raise SystemExit(f"{place}: the lines {begin} and {end} are missing")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def write_pages(begin: str, end: str, texts: Mapping[str, str], source: str, *, check: bool) -> bool:
    """Writes the text of each page, by its path in the project, unless `check`. Names those that differ from `source`.
    Returns whether any did."""
    stale = []
    for name, text in texts.items():
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        fresh = between(begin, end, page, text, name)
        if fresh != page:
            stale.append(name)
            if not check:
                path.write_text(fresh, encoding="utf-8")
    for name in stale:
        print(f"{name}: differs from {source}; run `make docs`" if check else f"{name}: written")
    return bool(stale)
