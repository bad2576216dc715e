"""Reading a template's text: the frame, which is the template's own text, and the fields that stand in it.

Line by line, since no field spans lines. `yeonma.text.template` fills what is read here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from unicodedata import category

from yeonma.errors import Problem, UserError

_ROLES = ("system", "user", "assistant")
_PROBLEMS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text: the frame's own (`field` is None) or, once rendered, a field's."""

    text: str
    field: str | None


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Where the text of a field goes. `place` (`file:line:column`) is for messages alone."""

    field: str
    place: str = dataclasses.field(compare=False)


Part = Piece | Placeholder


@dataclass(frozen=True, slots=True)
class FrameTurn:
    """One turn before it is filled; `role` None is plain text, the only turn of its variant."""

    role: str | None
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to write a row. A turn list has no turns here: its one placeholder is the list's column."""

    turns: tuple[FrameTurn, ...]
    answer: tuple[Part, ...]
    answer_role: str | None
    prompt_fields: tuple[str, ...]
    """The fields before the answer, each once, in order."""

    @property
    def is_turn_list(self) -> bool:
        return not self.turns

    @property
    def prompt_placeholders(self) -> list[Placeholder]:
        return placeholders(part for turn in self.turns for part in turn.parts)

    @property
    def answer_placeholder(self) -> Placeholder:
        return placeholders(self.answer)[0]


def normalised(text: str, name: str) -> str:
    """LF line ends, no byte order mark, one final newline. UserError for NUL and lone surrogates."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"
    for number, line in enumerate(text.split("\n"), start=1):
        for column, character in enumerate(line, start=1):
            if character == "\0" or "\ud800" <= character <= "\udfff":
                what = f"U+{ord(character):04X} is not a character of a text"
                raise UserError(what, place=f"{name}:{number}:{column}", cure="take it out")
    return text


def read_variants(text: str, name: str) -> tuple[Variant, ...]:
    """The variants of a normalised text, each sound in itself; `name` stands for the text in messages.

    Raises UserError, with line and column, for unbalanced braces, for fields that are not plain column names,
    for a variant without a field or without a prompt, and for an answer that already stands in its prompt.
    """
    return tuple([_variant(lines, name) for lines in _sections(_scan(text, name))])


def placeholders(parts: Iterable[Part]) -> list[Placeholder]:
    """The fields' places among `parts`, in order."""
    return [part for part in parts if isinstance(part, Placeholder)]


def visible(text: str) -> str:
    """`text` with what one cannot see (zero-width, control, odd spaces) written as U+200B."""
    return "".join([char if char.isprintable() else f"U+{ord(char):04X}" for char in text])


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    place: str
    parts: tuple[Part, ...]


def _scan(text: str, name: str) -> list[_Line]:
    lines: list[_Line] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{name}:{number}"
        found = list(_scan_line(line, place))
        problems += [part for part in found if isinstance(part, Problem)]
        lines.append(_Line(line, place, tuple([part for part in found if not isinstance(part, Problem)])))
    if len(problems) > _PROBLEMS_SHOWN:
        more = Problem(f"{len(problems) - _PROBLEMS_SHOWN} more of these", name)
        problems = [*problems[:_PROBLEMS_SHOWN], more]
    if problems:
        raise UserError(problems)
    return lines


def _scan_line(line: str, place: str) -> Iterator[Part | Problem]:
    at = 0
    while at < len(line):
        here = f"{place}:{at + 1}"
        end, opening = line.find("}", at), line.find("{", at + 1)
        if line.startswith(("{{", "}}"), at):
            yield Piece(line[at], None)
            at += 2
        elif line[at] == "}":
            yield Problem('"}" without a "{" before it', here, 'write "}}" for the brace itself')
            at += 1
        elif line[at] != "{":
            borders = [border for border in (opening, end, len(line)) if border >= 0]
            yield Piece(line[at : min(borders)], None)
            at = min(borders)
        elif end < 0 or at < opening < end:
            yield Problem('"{" is not closed', here, 'write "{{" for the brace itself')
            at += 1
        else:
            yield _placeholder(line[at + 1 : end], here)
            at = end + 1


def _placeholder(name: str, place: str) -> Placeholder | Problem:
    shown, inside = visible(name), name.strip()
    if shown != name:
        return Problem(f'the field name "{shown}" has an invisible character', place, "delete it")
    if inside and inside != name:
        return Problem(f'"{{{name}}}" has a space at its edge', place, f'write "{{{inside}}}"')
    if not inside or name.isdigit() or not all(_may_stand_in_name(char) for char in name):
        rule = "a field is a column's name alone (letters, digits, _, - and spaces)"
        cure = 'write "{{" and "}}" for the braces themselves'
        return Problem(f'"{{{name}}}" is not a field: {rule}', place, cure)
    return Placeholder(name, place)


def _may_stand_in_name(char: str) -> bool:
    return char.isalnum() or char in "_- " or category(char).startswith("M")


def _sections(lines: Sequence[_Line]) -> list[list[_Line]]:
    """The lines of each variant, without the separators."""
    sections: list[list[_Line]] = [[]]
    for line in lines:
        if line.text.rstrip() == "---":
            sections.append([])
        else:
            sections[-1].append(line)
    return sections


def _variant(lines: Sequence[_Line], name: str) -> Variant:
    place = lines[0].place if lines else name
    if not placeholders(part for line in lines for part in line.parts):
        doubled = any("{{" in line.text for line in lines)
        cure = 'write "{document}", with single braces' if doubled else 'name a column, such as "{document}"'
        raise UserError("the template has no field", place=place, cure=cure)
    first = next(line for line in lines if line.text.strip())
    if first.text.rstrip() == "[turns]":
        return _turn_list(lines, first)
    markers = [index for index, line in enumerate(lines) if _role(line)]
    return _with_roles(lines, markers) if markers else _plain(lines, place)


def _plain(lines: Sequence[_Line], place: str) -> Variant:
    parts = _joined(lines)
    last = max(index for index, part in enumerate(parts) if isinstance(part, Placeholder))
    prompt, answer = parts[:last], parts[last:]
    if all(isinstance(part, Piece) and not part.text.strip() for part in prompt):
        cure = "write before it what the model is asked"
        raise UserError("the template has only the answer and no prompt", place=place, cure=cure)
    return _checked((FrameTurn(None, prompt),), answer, None)


def _with_roles(lines: Sequence[_Line], markers: Sequence[int]) -> Variant:
    for number, line in enumerate(lines):
        word = line.text.strip().strip("[]").lower()
        if line.text.strip() and number < markers[0]:
            raise UserError(
                "there is text before the first turn", place=line.place, cure="put it into a turn"
            )
        if word in _ROLES and number not in markers and line.text.strip().startswith("["):
            raise UserError(
                f'"{line.text}" does not begin a turn', place=line.place, cure=f'write "[{word}]"'
            )
    ends = [*markers[1:], len(lines)]
    turns = [
        _frame_turn(lines[start], lines[start + 1 : end]) for start, end in zip(markers, ends, strict=True)
    ]
    *prompt, answer = turns
    place = lines[markers[-1]].place
    if answer.role != "assistant":
        cure = "end with [assistant] and the answer"
        raise UserError(f"the last turn is [{answer.role}]", place=place, cure=cure)
    if len(placeholders(answer.parts)) != 1:
        cure = "put other fields into earlier turns"
        raise UserError("the last turn must have one field, the answer", place=place, cure=cure)
    if not prompt:
        cure = "add a [user] turn before it"
        raise UserError("the template has only the answer and no prompt", place=place, cure=cure)
    return _checked(tuple(prompt), answer.parts, "assistant")


def _frame_turn(marker: _Line, lines: Sequence[_Line]) -> FrameTurn:
    start = next((index for index, line in enumerate(lines) if line.text), len(lines))
    turn = FrameTurn(_role(marker), _joined(lines[start:]))
    if not turn.parts:
        cure = "write its text, or take it out"
        raise UserError(f"the [{turn.role}] turn is empty", place=marker.place, cure=cure)
    return turn


def _turn_list(lines: Sequence[_Line], first: _Line) -> Variant:
    """`[turns]` and one field below it: the column that holds a whole conversation."""
    parts = [part for line in lines if line is not first for part in line.parts]
    parts = [part for part in parts if isinstance(part, Placeholder) or part.text.strip()]
    if len(parts) != 1:
        cure = "the model's chat template writes the rest"
        raise UserError("below [turns] stands one field and nothing else", place=first.place, cure=cure)
    return Variant((), tuple(parts), "assistant", ())


def _checked(turns: tuple[FrameTurn, ...], answer: tuple[Part, ...], role: str | None) -> Variant:
    """The variant, unless its prompt shows the answer."""
    answer_field = placeholders(answer)[0].field
    before = placeholders(part for turn in turns for part in turn.parts)
    for placeholder in before:
        if placeholder.field == answer_field:
            what = f'the prompt shows "{answer_field}", which is the answer (the last field)'
            raise UserError(
                what, place=placeholder.place, cure="take it out there, or the model learns to copy it"
            )
    return Variant(turns, answer, role, tuple(dict.fromkeys(placeholder.field for placeholder in before)))


def _role(line: _Line) -> str:
    text = line.text.rstrip()
    return text[1:-1] if text in [f"[{role}]" for role in _ROLES] else ""


def _joined(lines: Sequence[_Line]) -> tuple[Part, ...]:
    """The lines as one text, without the empty lines at its end: those are an editor's, not the answer's."""
    end = len(lines)
    while end > 0 and not lines[end - 1].text:
        end -= 1
    parts: list[Part] = []
    literal = ""
    for number, line in enumerate(lines[:end]):
        literal += "\n" if number else ""
        for part in line.parts:
            if isinstance(part, Piece):
                literal += part.text
                continue
            if literal:
                parts.append(Piece(literal, None))
            parts.append(part)
            literal = ""
    return (*parts, Piece(literal, None)) if literal else tuple(parts)
