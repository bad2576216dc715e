"""Strings that try to leave the place where they are shown, and a check that none did."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from unicodedata import category

import yaml

MARK = "INJECTED"
"""No line of any output may begin with it: it stands after every kind of line end of the strings below."""
NAME = f"e\x1b[2J\n{MARK}\r{MARK}\u2028{MARK}\x85{MARK}\u202e\x9b1m[red]:smile:<script>`|\"'](x)&lt;---"
"""Fits into the name of a file or a folder."""
TEXT = f"</script><img src=x onerror=alert(1)>\x01\x07\x7f\n---\n{MARK}: 1\n```\n# {MARK}\n````\u2066\u200b\ufeff{NAME}"
STRINGS = (
    NAME,
    TEXT,
    f"\n{MARK}",
    f"x\r\n{MARK}",
    f"x\x0b{MARK}\x0c{MARK}\x1c{MARK}",
    "\x1b]0;title\x07\x1b[31m\x9b31m",
    "\u202eevil\u2066\u2069\u200f",
    "[link=file:///etc/passwd]x[/link] [/] [bold",
    "{document} {{ 7 * 7 }} %s %d {0}",
    "a" * 30_000,
    f"\n{MARK} " * 5_000,
)
MOST = 20_000
EXACT = (
    "template.txt",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "special_tokens_map.json",
    "config.json",
)
"""Files that hold what a model or a person wrote, to be read by programs: byte for byte."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def check_shown(text: str, where: str = "") -> None:
    """No invisible character but tab and line feed, and no line that begins with the mark."""
    for char in set(text) - {"\n", "\t"}:
        bad = category(char) in ("Cc", "Cs", "Zl", "Zp") or "\u202a" <= char <= "\u202e"
        bad |= "\u2066" <= char <= "\u2069" or char in "\u200b\u200e\u200f\u061c\ufeff"
        assert not bad, f"{where}: {char!a} in {_around(text, text.index(char))}"
    for line in text.split("\n"):
        assert not line.startswith(MARK), f"{where}: {line[:200]!a}"


def check_screen(text: str, where: str = "") -> None:
    """The same for what a terminal with colours gets."""
    check_shown(_COLOURS.sub("", text), where)


def check_messages(text: str, where: str = "") -> None:
    """What a command says on standard error."""
    check_shown(text, where)
    assert len(text) <= MOST, f"{where}: {len(text):,} characters"


def check_files(folder: Path) -> list[str]:
    """Checks the text files of a folder that are for people to read; returns their names."""
    names: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in CHECKS and path.name not in EXACT:
            names.append(path.name)
            CHECKS[path.suffix](path.read_bytes().decode("utf-8"), path.name)
    return names


def check_card(text: str, where: str) -> None:
    """A model card: its own data has the keys that it should, and outside of code there are no foreign marks."""
    _, head, body = re.match(r"(---\n)(.*?\n)---\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    check_shown(head, where)
    about = yaml.safe_load(head)
    assert sorted(about) == ["library_name", "pipeline_tag", "tags"], about  # the base is a local folder
    assert set(about["tags"]) <= {"lora", "yeonma"}
    check_shown(body.replace(MARK, "x"), where)
    rest = outside_of_code(body)
    check_shown(rest, where)
    plain = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", rest)
    for ours in ("![loss](loss.svg)", "<details>", "<summary>"):
        plain = plain.replace(ours, "")
    assert not re.search(r"<\w|(?<!\\)\]\(", plain), f"{where}: {plain!a}"


def check_page(text: str, where: str) -> None:
    """HTML or SVG: well formed, with elements of ours alone. A template stands in a `pre` with its own lines."""
    check_shown(text.replace(MARK, "x"), where)
    check_shown(re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL), where)
    seen = _Elements()
    seen.feed(text)
    seen.close()
    assert not seen.foreign, f"{where}: {seen.foreign}"


class _Elements(HTMLParser):
    """Collects what no page of ours has: images, attributes of events, more than two scripts, the strings' text."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if (
            tag in ("img", "iframe", "a")
            or self.scripts > 2
            or any(name.startswith("on") for name, _ in attrs)
        ):
            self.foreign.append(f"<{tag} {attrs}>")


CHECKS: Mapping[str, Callable[[str, str], None]] = {
    **dict.fromkeys((".yaml", ".json", ".jsonl", ".txt"), check_shown),
    **dict.fromkeys((".html", ".svg"), check_page),
    ".md": check_card,
}


def outside_of_code(text: str) -> str:
    """Markdown without its blocks of code, as CommonMark reads them."""
    kept: list[str] = []
    fence = ""
    for line in text.split("\n"):
        ticks = re.match(r" {0,3}(`{3,})([^`]*)$", line)
        if not fence and ticks:
            fence = ticks[1]
        elif fence and ticks and len(ticks[1]) >= len(fence) and not ticks[2].strip():
            fence = ""
        elif not fence:
            kept.append(line)
    assert not fence, "a block of code without an end"
    return "\n".join(kept)


def _around(text: str, at: int) -> str:
    return ascii(text[max(0, at - 60) : at + 60])
