"""Text of others, such as data, names, and files of foreign models, made safe for people to read.

Whatever reaches a terminal, a log, Markdown, HTML, YAML or JSON goes through here. A character that is invisible, moves
the cursor, ends a line or turns the direction of writing is shown as its escape: `\\x1b`, `\\n`, `\\u202e`. All else
stays as it is: letters and marks of any script, and what joins the parts of an emoji. A backslash is not escaped, so
that ordinary text is unchanged, and what was escaped once is not escaped again.
"""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from typing import Any

from yeonma.messages import tr

MOST_OF_A_LINE = 10_000
"""Characters of a line of progress or a warning. A longer one is cut in its middle."""

_INVISIBLE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
"""Control characters, marks of direction, line ends, what has no width, halves of characters, what is no character.
Tab and line feed are not among them."""
_EMOJI = "\u00a9\u00ae\u203c-\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"  # and their parts
_JOINED_SCRIPTS = "\u0620-\u109f\u1700-\u1cff\ua800-\uabff\U00011000-\U00011fff"
"""Arabic, the scripts of India and their kin: joiners are part of their spelling."""
_CAN_JOIN = f"[{_EMOJI}{_JOINED_SCRIPTS}]"
_SELECTORS = "\ufe00-\ufe0f"
"""They choose between forms of the character before."""
_IDEOGRAPHS = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_STRAY = (
    f"(?<!{_CAN_JOIN})[\u200c\u200d]|[\u200c\u200d](?!{_CAN_JOIN})"
    f'|(?<![^\\s\x00-"$-)+-/:-\x9f{_INVISIBLE}{_SELECTORS}])[{_SELECTORS}]'
    f"|(?<![{_IDEOGRAPHS}])[\U000e0100-\U000e01ef]"
)
"""Joiners and selectors with nothing to join or to select, which only hide in a text."""
_IN_LINES = f"[{_INVISIBLE}]|{_STRAY}"
_IN_LINE = f"[\n{_INVISIBLE}]|{_STRAY}"
_compiled = cache(re.compile)
"""Compiled at first use, which takes longer than `--help` should."""
_SHORT = {"\n": "\\n", "\r": "\\r"}


def one_line(text: str, most: int | None = None) -> str:
    """`text` for a place of one line: line ends are escaped, too. Of more than `most` characters, beginning and end."""
    if text.isascii() and text.isprintable() and (most is None or len(text) <= most):
        return text
    return _escaped(text, _IN_LINE, most)


def many_lines(text: str, most: int | None = None) -> str:
    """`text` for a place of several lines, such as a block of code: its line feeds stay. `most` as in `one_line`."""
    return _escaped(text, _IN_LINES, most)


def has_hidden(text: str) -> bool:
    """Whether `many_lines` would change the text."""
    return _compiled(_IN_LINES).search(text) is not None


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    return _SHORT.get(char) or _numbered(char)


def _numbered(char: str) -> str:
    number = ord(char)
    return (
        f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
    )


def _escaped(text: str, pattern: str, most: int | None) -> str:
    """Of a text that is too long, beginning and end stay, and its length stands between."""
    hidden = _compiled(pattern)
    if most is None or len(text) <= most:
        text = hidden.sub(_escape, text)
        if most is None or len(text) <= most:
            return text
    between = tr(" [... {count:,} characters ...] ", count=len(text))
    half = (most - len(between)) // 2
    return hidden.sub(_escape, text[:half])[:half] + between + hidden.sub(_escape, text[-half:])[-half:]


class GrowingText:
    """A text that comes piece by piece, as `many_lines` shows it. A joiner at a piece's end waits for the next."""

    def __init__(self) -> None:
        self._before = self._waiting = ""

    def shown(self, piece: str) -> str:
        """What can be shown after this piece."""
        text = self._waiting + piece
        self._waiting = text[-1:] if text[-1:] in ("\u200c", "\u200d") else ""
        return self._next(text.removesuffix(self._waiting), self._waiting)

    def rest(self) -> str:
        """What is still to be shown when nothing follows."""
        text, self._waiting = self._waiting, ""
        return self._next(text, "")

    def _next(self, text: str, behind: str) -> str:
        """`text`, which stands between what was shown last and `behind`."""
        hidden = _compiled(_IN_LINES)
        shown = "".join(
            _escape(match) if (match := hidden.match(around, at)) else around[at]
            for around in (self._before + text + behind,)
            for at in range(len(self._before), len(self._before) + len(text))
        )
        self._before = text[-1:] or self._before
        return shown


def html(text: str) -> str:
    """One line of text in HTML or SVG, within an element or an attribute."""
    from html import escape  # its table of names takes longer than `--help` should

    return escape(one_line(text))


def html_lines(text: str) -> str:
    """Several lines of text in HTML, within an element such as `pre`."""
    from html import escape

    return escape(many_lines(text))


_MARKS = r"[`\[\]<|]|\*(?=\S)|(?<=\S)\*|~(?=~)|\\(?=[!-/:-@\[-`{-~])|(?<!\w)_|_(?!\w)|&(?=#?\w+;)"


def markdown(text: str) -> str:
    """One line of text in Markdown, in which nothing is a mark, a link or HTML."""
    return _compiled(_MARKS).sub(
        lambda match: {"<": "&lt;", "&": "&amp;"}.get(match[0], f"\\{match[0]}"), one_line(text)
    )


def code(text: str, *, in_table: bool = False) -> str:
    """One line of text as code within a line of Markdown. `in_table`: in a cell of a table."""
    shown = one_line(text) or " "
    if in_table:
        shown = shown.replace("|", "\\|")
    longest = max(map(len, re.findall("`+", shown)), default=0)
    blank = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{'`' * (longest + 1)}{blank}{shown}{blank}{'`' * (longest + 1)}"


def code_block(text: str, language: str = "text") -> list[str]:
    """The lines of a block of code in Markdown. No line of the text can end it."""
    longest = max(map(len, re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return [fence + language, many_lines(text), fence]


def json_text(value: Any, **options: Any) -> str:
    """JSON in which letters of all scripts can be read, and no invisible character stands. `options`: of json.dumps."""
    text = json.dumps(value, ensure_ascii=False, **options)
    return _compiled(_IN_LINES).sub(lambda match: json.dumps(match[0])[1:-1], text)


def shell_word(word: str) -> str:
    """A word of a command line for a shell to read: as `shlex.quote`, or in `$'...'` if characters are escaped."""
    if one_line(word) == word:
        return shlex.quote(word)
    quoted = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_compiled(_IN_LINE).sub(_in_shell, quoted)}'"


def _in_shell(match: re.Match[str]) -> str:
    """A byte that is no UTF-8 stands in a file's name as half a character."""
    char = match[0]
    byte = ord(char) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else _SHORT.get(char) or _wide(char)


def _wide(char: str) -> str:
    """By its bytes where bash would read `\\x9b` as one byte, not as a character."""
    return _numbered(char) if ord(char) < 0x80 or ord(char) > 0xFF else f"\\u{ord(char):04x}"


def size_text(count: int) -> str:
    """A number of bytes for people: `1.2 MB`."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def indented(text: str) -> str:
    """Lines of another library: those after the first are indented, so that none of them passes for a line of ours."""
    first, *others = many_lines(text).split("\n")
    return "\n".join([first, *(f"  {line}" if line[:1].strip() else line for line in others)])


def traceback_text(error: BaseException) -> str:
    """The traceback of an exception, with the text of the exception escaped."""
    from traceback import format_exception

    parts = format_exception(error)
    return "".join(many_lines(part) if part.startswith("\n") else indented(part) for part in parts)
