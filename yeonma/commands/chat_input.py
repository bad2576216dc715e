"""What people type in `yeonma chat`: messages of one line or several, and commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from yeonma.errors import UserError, did_you_mean
from yeonma.messages import tr
from yeonma.shown import one_line

COMMANDS = MappingProxyType(
    {
        "/base": tr("Switch between the base model alone and the fine-tuned model."),
        "/help": tr("List these commands."),
        "/paste": tr("Take all lines up to /end as one text, exactly as they are."),
        "/quit": tr("End the chat. Ctrl-D does the same."),
        "/reset": tr("Start the conversation, or the current question, anew."),
        "/undo": tr("Take back the last message with its answer, or the last field."),
    }
)
"""Name -> what it does."""
END_OF_PASTE = "/end"
CONTINUES = "\\"
"""At the end of a line: the text goes on in the next one."""
_COMMAND = re.compile(r"/[A-Za-z][A-Za-z_-]*")


@dataclass(frozen=True)
class Command:
    name: str
    """One of COMMANDS."""


def read_entry(label: str, read_line: Callable[[str], str] = input) -> str | Command:
    """A text or a command. `read_line` takes a label to show and returns a line without its line end.

    A line is a text. It goes on in the next line if it ends in a backslash, which is then a line end. After `/paste`
    all lines up to `/end` or the end of the input are the text. A line that is one word with a slash before it is a
    command, but not within a text.

    Raises EOFError at the end of the input, and UserError for an unknown command.
    """
    line = read_line(one_line(label))
    word = line.strip()
    if word == "/paste":
        return "\n".join(_pasted(read_line))
    if _COMMAND.fullmatch(word):
        return _command(word)
    lines = [line]
    while lines[-1].endswith(CONTINUES):
        lines[-1] = lines[-1].removesuffix(CONTINUES)
        try:
            lines.append(read_line(""))
        except EOFError:
            break
    return "\n".join(lines)


def _pasted(read_line: Callable[[str], str]) -> list[str]:
    lines: list[str] = []
    try:
        while (line := read_line("")).strip() != END_OF_PASTE:
            lines.append(line)
    except EOFError:
        pass
    return lines


def _command(word: str) -> Command:
    if word not in COMMANDS:
        cure = did_you_mean(word, COMMANDS) or tr("the commands are {commands}", commands=", ".join(COMMANDS))
        raise UserError(
            tr("unknown command"),
            place=word,
            cure=tr("{cure}; write a text like this after /paste", cure=cure),
        )
    return Command(word)


def help_lines() -> list[str]:
    width = max(map(len, COMMANDS)) + 2
    return [
        *(f"{name:{width}}{about}" for name, about in COMMANDS.items()),
        tr("A line that ends in a backslash goes on in the next line."),
    ]
