"""The syntax of templates: text with `{fields}` -> variants, which are turns and an answer.

The last field is the answer; all before it is the prompt. Variants are separated by `---` lines; `[system]`, `[user]`
and `[assistant]` lines begin turns, which the model's chat template writes; `[turns]` names a column that holds turns,
`[text]` one of whole texts. An `[answer]` line in plain text, and the last `[assistant]` line, begin an answer that may
have several fields. Fields do not span lines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from unicodedata import category

from yeonma.errors import Problem, UserError
from yeonma.messages import counted, tr

_ROLES = ("system", "user", "assistant")
TURN_LIST, _ANSWER = "turns", "answer"
"""The other markers of a template: `[turns]`, `[answer]`."""
_PROBLEMS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text: of the frame (`field` is None) or, once rendered, of a field."""

    text: str
    field: str | None


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A field to be filled. `place` (`file:line:column`) is only for messages."""

    field: str
    place: str = dataclasses.field(compare=False)


TemplatePart = Piece | Placeholder


@dataclass(frozen=True, slots=True)
class FrameTurn:
    """A turn of the template. With `role` None it is plain text, the only turn of its variant. With the role `turns` it
    stands for the turns in the column that its one placeholder names."""

    role: str | None
    parts: tuple[TemplatePart, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of the template."""

    turns: tuple[FrameTurn, ...]
    """The turns of the prompt. Often none for a turn list, which has its own."""
    answer: tuple[TemplatePart, ...]
    answer_role: str | None
    prompt_fields: tuple[str, ...]
    """The distinct fields before the answer, in order, without columns of turns."""
    is_text: bool = False
    """Whether the field is a whole text, all of which is trained: there is no prompt."""
    is_turn_list: bool = False
    """Whether the answer is `[turns]`: its one placeholder names the column of a turn list."""

    @property
    def prompt_placeholders(self) -> list[Placeholder]:
        return placeholders(part for turn in self.turns for part in turn.parts)

    @property
    def turn_fields(self) -> tuple[str, ...]:
        """The columns of turns before the answer."""
        return tuple([placeholders(turn.parts)[0].field for turn in self.turns if turn.role == TURN_LIST])

    @property
    def answer_placeholder(self) -> Placeholder:
        return placeholders(self.answer)[-1]

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """The distinct fields of the answer; the last of them is the template's answer field."""
        return tuple(dict.fromkeys(placeholder.field for placeholder in placeholders(self.answer)))

    @property
    def has_system(self) -> bool:
        return any(turn.role == "system" for turn in self.turns)


def joined(pieces: Iterable[Piece]) -> str:
    return "".join([piece.text for piece in pieces])


def visible(text: str) -> str:
    """`text` with invisible characters (zero-width, control, unusual spaces) written as U+200B."""
    return "".join([char if char.isprintable() else f"U+{ord(char):04X}" for char in text])


def normalised(text: str, name: str) -> str:
    """The text with LF line ends, no byte order mark and one final newline. Raises UserError for NUL and surrogates."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"
    for number, line in enumerate(text.split("\n"), start=1):
        for column, character in enumerate(line, start=1):
            if character == "\0" or "\ud800" <= character <= "\udfff":
                problem = tr("U+{character:04X} is not a text character", character=ord(character))
                raise UserError(problem, place=f"{name}:{number}:{column}", cure=tr("remove it"))
    return text


def read_variants(text: str, name: str) -> tuple[Variant, ...]:
    """The variants of a normalised text, which messages call `name`.

    Raises UserError, with line and column, for unbalanced braces, for fields that are not plain column names, for a
    variant without a field or without a prompt, and for a prompt that shows the answer.
    """
    return tuple([_variant(lines, name) for lines in _sections(_scan(text, name))])


def placeholders(parts: Iterable[TemplatePart]) -> list[Placeholder]:
    """The placeholders among `parts`, in order."""
    return [part for part in parts if isinstance(part, Placeholder)]


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    place: str
    parts: tuple[TemplatePart, ...]


def _scan(text: str, name: str) -> list[_Line]:
    lines: list[_Line] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{name}:{number}"
        parts = list(_scan_line(line, place))
        problems += [part for part in parts if isinstance(part, Problem)]
        lines.append(_Line(line, place, tuple([part for part in parts if not isinstance(part, Problem)])))
    if len(problems) > _PROBLEMS_SHOWN:
        more = Problem(counted(len(problems) - _PROBLEMS_SHOWN, "more such problem"), name)
        problems = [*problems[:_PROBLEMS_SHOWN], more]
    if problems:
        raise UserError(problems)
    return lines


def _scan_line(line: str, place: str) -> Iterator[TemplatePart | Problem]:
    at = 0
    while at < len(line):
        column_place = f"{place}:{at + 1}"
        end, opening = line.find("}", at), line.find("{", at + 1)
        if line.startswith(("{{", "}}"), at):
            yield Piece(line[at], None)
            at += 2
        elif line[at] == "}":
            yield Problem(
                tr('"}}" without an opening "{{"'), column_place, tr('write "}}}}" for a literal brace')
            )
            at += 1
        elif line[at] != "{":
            borders = [border for border in (opening, end, len(line)) if border >= 0]
            yield Piece(line[at : min(borders)], None)
            at = min(borders)
        elif end < 0 or at < opening < end:
            yield Problem(tr('"{{" is not closed'), column_place, tr('write "{{{{" for a literal brace'))
            at += 1
        else:
            yield _placeholder(line[at + 1 : end], column_place)
            at = end + 1


def _placeholder(name: str, place: str) -> Placeholder | Problem:
    shown, inside = visible(name), name.strip()
    if shown != name:
        return Problem(
            tr('the field name "{shown}" contains an invisible character', shown=shown),
            place,
            tr("delete it"),
        )
    if inside and inside != name:
        return Problem(
            tr('"{{{name}}}" begins or ends with a space', name=name),
            place,
            tr('write "{{{inside}}}"', inside=inside),
        )
    if not inside or name.isdigit() or not all(_allowed_in_name(char) for char in name):
        cure = tr('write "{{{{" and "}}}}" for literal braces')
        return Problem(
            tr(
                '"{{{name}}}" is not a field: a field is just a column\'s name (letters, digits, _, - and spaces)',
                name=name,
            ),
            place,
            cure,
        )
    return Placeholder(name, place)


def _allowed_in_name(char: str) -> bool:
    return char.isalnum() or char in "_- " or category(char).startswith("M")


def _sections(lines: Sequence[_Line]) -> list[list[_Line]]:
    """Lists of lines, one per variant, without the separators."""
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
        cure = (
            tr('write "{{document}}", with single braces')
            if doubled
            else tr('name a column, such as "{{document}}"')
        )
        raise UserError(tr("the template has no field"), place=place, cure=cure)
    first = next(line for line in lines if line.text.strip())
    if first.text.rstrip() == "[text]":
        return _whole_text(lines, first)
    markers = [index for index, line in enumerate(lines) if _role(line)]
    return _with_roles(lines, markers) if markers else _plain(lines, place)


def _whole_text(lines: Sequence[_Line], first: _Line) -> Variant:
    """`[text]` and one field below it: a column of whole texts."""
    parts = [part for line in lines if line is not first for part in line.parts]
    fields = [part for part in parts if isinstance(part, Placeholder)]
    if len(fields) != 1 or any(isinstance(part, Piece) and part.text.strip() for part in parts):
        problem = tr("[text] takes exactly one field and no other text")
        raise UserError(problem, place=first.place, cure=tr("whole texts are trained without a frame"))
    return Variant((), tuple(fields), None, (), is_text=True)


def _plain(lines: Sequence[_Line], place: str) -> Variant:
    marks = [index for index, line in enumerate(lines) if line.text.rstrip() == f"[{_ANSWER}]"]
    if len(marks) > 1:
        problem = tr("a second [answer] line")
        raise UserError(problem, place=lines[marks[1]].place, cure=tr("keep the one where the answer begins"))
    if marks:
        before, after = lines[: marks[0]], lines[marks[0] + 1 :]
        prompt, answer = _parts_of([*before, _Line("", place, ())], keep_end=True), _parts_of(after)
        if not placeholders(answer):
            raise UserError(
                tr("no field follows [answer]"),
                place=lines[marks[0]].place,
                cure=tr("add the answer's field"),
            )
    else:
        parts = _parts_of(lines)
        last = max(index for index, part in enumerate(parts) if isinstance(part, Placeholder))
        prompt, answer = parts[:last], parts[last:]
    if all(isinstance(part, Piece) and not part.text.strip() for part in prompt):
        problem = tr("the template has an answer but no prompt")
        raise UserError(problem, place=place, cure=tr("write the prompt before the answer"))
    return _checked((FrameTurn(None, prompt),), answer, None)


def _with_roles(lines: Sequence[_Line], markers: Sequence[int]) -> Variant:
    for number, line in enumerate(lines):
        word = line.text.strip().strip("[]").lower()
        if line.text.strip() and number < markers[0]:
            raise UserError(
                tr("text before the first turn"), place=line.place, cure=tr("move it into a turn")
            )
        if word in _ROLES and number not in markers and line.text.strip().startswith("["):
            raise UserError(
                tr('"{text}" does not begin a turn', text=line.text),
                place=line.place,
                cure=tr('write "[{word}]"', word=word),
            )
    ends = [*markers[1:], len(lines)]
    turns = [
        _frame_turn(lines[start], lines[start + 1 : end]) for start, end in zip(markers, ends, strict=True)
    ]
    *prompt, answer = turns
    place = lines[markers[-1]].place
    if answer.role == TURN_LIST:
        return _checked(tuple(prompt), answer.parts, "assistant", is_turn_list=True)
    if answer.role != "assistant":
        cure = tr("end with [assistant] and the answer, or with [turns]")
        raise UserError(tr("the last turn is [{role}]", role=answer.role), place=place, cure=cure)
    if not placeholders(answer.parts):
        raise UserError(
            tr("the last turn has no field, the answer"), place=place, cure=tr("add the answer's field")
        )
    if not prompt:
        cure = tr("add a [user] turn before it")
        raise UserError(tr("the template has an answer but no prompt"), place=place, cure=cure)
    return _checked(tuple(prompt), answer.parts, "assistant")


def _frame_turn(marker: _Line, lines: Sequence[_Line]) -> FrameTurn:
    start = next((index for index, line in enumerate(lines) if line.text), len(lines))
    turn = FrameTurn(_role(marker), _parts_of(lines[start:]))
    if turn.role == TURN_LIST:
        parts = tuple([part for part in turn.parts if isinstance(part, Placeholder) or part.text.strip()])
        if len(parts) != 1 or not isinstance(parts[0], Placeholder):
            cure = tr("name the column of turns below it; other text goes into turns of its own")
            raise UserError(
                tr("[turns] takes exactly one field and no other text"), place=marker.place, cure=cure
            )
        return FrameTurn(TURN_LIST, parts)
    if not turn.parts:
        cure = tr("write its text, or remove the turn")
        raise UserError(tr("the [{role}] turn is empty", role=turn.role), place=marker.place, cure=cure)
    return turn


def _checked(
    turns: tuple[FrameTurn, ...],
    answer: tuple[TemplatePart, ...],
    role: str | None,
    *,
    is_turn_list: bool = False,
) -> Variant:
    """The variant. Raises UserError if its prompt shows the answer."""
    answer_fields = {placeholder.field for placeholder in placeholders(answer)}
    before = placeholders(part for turn in turns for part in turn.parts)
    for placeholder in before:
        if placeholder.field in answer_fields:
            problem = tr(
                'the prompt shows "{field}", which is the answer (the last field)', field=placeholder.field
            )
            cure = tr("remove it from the prompt, or the model learns to copy it")
            raise UserError(problem, place=placeholder.place, cure=cure)
    texts = placeholders(part for turn in turns if turn.role != TURN_LIST for part in turn.parts)
    fields = tuple(dict.fromkeys(placeholder.field for placeholder in texts))
    return Variant(turns, answer, role, fields, is_turn_list=is_turn_list)


def _role(line: _Line) -> str:
    text = line.text.rstrip()
    return text[1:-1] if text in [f"[{role}]" for role in (*_ROLES, TURN_LIST)] else ""


def _parts_of(lines: Sequence[_Line], *, keep_end: bool = False) -> tuple[TemplatePart, ...]:
    """The parts of some lines as one text. Empty lines at its end are dropped, unless `keep_end`: editors add them."""
    end = len(lines)
    while end > 0 and not lines[end - 1].text and not keep_end:
        end -= 1
    parts: list[TemplatePart] = []
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
