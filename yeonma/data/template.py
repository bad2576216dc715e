"""Reading a template's text: the frame, which is the template's own text, and the fields that stand in it.

Line by line, since no field spans lines. `yeonma.data.template` fills what is read here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import category

from yeonma.data.columns import Turn, column_of, field_text, turns_of
from yeonma.data.rows import Row
from yeonma.errors import Problem, UserError, did_you_mean

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


__all__ = [
    "BUILT_IN",
    "Piece",
    "Rendered",
    "RenderedTurn",
    "Template",
    "Variant",
    "answer_text",
    "field_lengths",
    "load_template",
    "prompt_text",
    "shorten",
]

BUILT_IN = ("title", "alpaca", "orca", "chat", "prompt-completion")
_ANSWERS = ("answer", "chosen", "rejected", "label")  # names in --columns for the last field and what it is
_BUILT_IN_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """One turn of a conversation, or with `role` None plain text that no chat template touches."""

    role: str | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text.

    A plain template gives one turn, with role None: the prompt. A template with `[user]` lines gives its
    turns before the answer. Both have the answer in `answer`, empty when only asking. A turn list gives all
    its turns and no `answer`: each assistant turn is one.
    """

    turns: tuple[RenderedTurn, ...]
    answer: tuple[Piece, ...]
    variant: int
    """Index of the variant that fitted the row."""
    answer_role: str | None
    """`assistant` where the model's chat template writes the turns, None for plain text."""


@dataclass(frozen=True)
class Template:
    """A parsed template. Two templates are equal when their text is, whatever they are called.

    `text` has LF line ends, no byte order mark and one final newline; parsing it gives an equal template.
    `is_chat`: the row's turn list goes through the model's chat template as it is (the built-in `chat`); then
    `answer_field` is the first of the columns that may hold the list.
    """

    text: str
    name: str = dataclasses.field(compare=False)
    variants: tuple[Variant, ...]
    answer_field: str
    fields: frozenset[str]
    is_chat: bool

    @staticmethod
    def parse(text: str, name: str = "template") -> Template:
        """Read a template's text; `name` stands for it in messages.

        Raises UserError, with line and column, as `read_variants` and for variants with different answers.
        """
        text = normalised(text, name)
        variants = read_variants(text, name)
        first = variants[0].answer_placeholder.field
        is_chat = variants[0].is_turn_list
        for variant in variants:
            answer = variant.answer_placeholder
            if variant.is_turn_list != is_chat:
                cure = "write all of them in one way"
                raise UserError(
                    "some variants are turn lists and some are not", place=answer.place, cure=cure
                )
            if answer.field != first and not is_chat:
                raise UserError(
                    f'this variant ends in the field "{answer.field}", the first one in "{first}"',
                    place=answer.place,
                    cure="the answer must be the same field in all variants",
                )
        fields = {name for variant in variants for name in variant.prompt_fields}
        fields.update(variant.answer_placeholder.field for variant in variants)
        return Template(text, name, variants, first, frozenset(fields), is_chat)

    def render(
        self, row: Row, columns: Mapping[str, str] | None = None, *, with_answer: bool = True
    ) -> Rendered:
        """Fill the first variant whose prompt fields all have text in `row`; `columns`: field -> column.

        The answer has no say in which variant it is, so that a row is asked as it was trained.
        With `with_answer` False the answer may be missing and is left out; so is a turn list's final answer.
        Raises UserError with the row's place for a missing, empty or wrong value, and for a turn list with
        nothing to train or nothing to ask.
        """
        if columns:
            self.check_columns(columns)
        if self.is_chat:
            return self._render_turn_list(row, columns, with_answer)
        texts: dict[str, str] = {}
        fits = (self._read(variant.prompt_fields, row, columns, texts) for variant in self.variants)
        number = next((number for number, fit in enumerate(fits) if fit), None)
        if number is None or (with_answer and not self._read((self.answer_field,), row, columns, texts)):
            raise self._lacking(row, columns, with_answer)
        variant = self.variants[number]
        turns = tuple([RenderedTurn(turn.role, _fill(turn.parts, texts)) for turn in variant.turns])
        answer = _fill(variant.answer, texts) if with_answer else ()
        return Rendered(turns, answer, number, variant.answer_role)

    def without_column(self, known: Sequence[str], columns: Mapping[str, str] | None) -> list[Problem]:
        """The fields that no column of the data fills, at their places; none where some variant has all of its own.

        Raises UserError for `columns` that fit no field.
        """
        if columns:
            self.check_columns(columns)
        if self.is_chat:
            answers = [variant.answer_placeholder for variant in self.variants]
            lacking = (
                [] if any(self._column(each.field, columns) in known for each in answers) else answers[:1]
            )
        else:
            each_lacks = [
                [one for one in variant.prompt_placeholders if self._column(one.field, columns) not in known]
                for variant in self.variants
            ]
            lacking = min(reversed(each_lacks), key=len)
            answer = self.variants[0].answer_placeholder
            lacking += [] if self._column(answer.field, columns) in known else [answer]
        first: dict[str, Placeholder] = {}
        for placeholder in lacking:
            first.setdefault(placeholder.field, placeholder)
        return [self._without(placeholder, known, columns) for placeholder in first.values()]

    def _without(
        self, placeholder: Placeholder, known: Sequence[str], columns: Mapping[str, str] | None
    ) -> Problem:
        column = self._column(placeholder.field, columns)
        what = f'the data has no column "{column}"'
        what += "" if column == placeholder.field else f' for the field "{placeholder.field}"'
        listed = f"it has {', '.join(map(visible, known))}"
        return Problem(what, placeholder.place, visible(did_you_mean(column, known)) or listed)

    def _render_turn_list(self, row: Row, columns: Mapping[str, str] | None, with_answer: bool) -> Rendered:
        fields = [variant.answer_placeholder.field for variant in self.variants]
        names = [self._column(name, columns) for name in fields]
        number = next((number for number, name in enumerate(names) if row.values.get(name) is not None), None)
        if number is None:
            raise UserError([_lacks(row, fields[0], names[0], " or ".join(fields))])
        turns = _turns_to_render(turns_of(row, names[number]), f'"{names[number]}"', row.place, with_answer)
        rendered = [
            RenderedTurn(turn.role, (Piece(turn.text, f"turn {index}"),))
            for index, turn in enumerate(turns, start=1)
        ]
        return Rendered(tuple(rendered), (), number, "assistant")

    def _read(
        self, fields: Sequence[str], row: Row, columns: Mapping[str, str] | None, texts: dict[str, str]
    ) -> bool:
        """Put the fields' texts into `texts`; False at the first field without any."""
        for name in fields:
            if name not in texts:
                text = field_text(row, self._column(name, columns) if columns else name)
                if text is None:
                    return False
                texts[name] = text
        return True

    def _column(self, name: str, columns: Mapping[str, str] | None) -> str:
        return column_of(name, columns, self.answer_field)

    def check_columns(self, columns: Mapping[str, str]) -> None:
        """Raises UserError for names of no field, and for the answer's column in the prompt, which would show it."""
        for name in columns:
            if name not in self.fields and name not in _ANSWERS:
                cure = did_you_mean(name, self.fields) or f"it has {', '.join(sorted(self.fields))}"
                raise UserError(f'the template has no field "{name}"', place="--columns", cure=cure)
        answer = self._column(self.answer_field, columns)
        for name in self.fields:
            if name != self.answer_field and self._column(name, columns) == answer and not self.is_chat:
                what = f'the column "{answer}" is the answer and also the field "{name}" of the prompt'
                raise UserError(what, place="--columns", cure="the prompt must not show the answer")

    def _lacking(self, row: Row, columns: Mapping[str, str] | None, with_answer: bool) -> UserError:
        """What the row lacks for the variant that is nearest to fitting, the last of equally near ones."""
        answer = (self.answer_field,)

        def lacking(variant: Variant) -> list[str]:
            fields = variant.prompt_fields + (answer if with_answer else ())
            return [name for name in fields if field_text(row, self._column(name, columns)) is None]

        variant = min(reversed(self.variants), key=lambda variant: len(lacking(variant)))
        used = ", ".join(variant.prompt_fields + answer)
        return UserError([_lacks(row, name, self._column(name, columns), used) for name in lacking(variant)])


def load_template(setting: str) -> Template:
    """The template that `--template` names: a built-in, else a file, else the text itself, which has braces.

    Raises UserError where it is none of them or the file cannot be read as UTF-8, and as `Template.parse`.
    """
    if setting in BUILT_IN:
        return Template.parse((_BUILT_IN_FOLDER / f"{setting}.txt").read_text(encoding="utf-8"), setting)
    if os.path.isfile(setting):  # unlike Path.is_file, False also for a text too long for a path
        return Template.parse(_read_file(Path(setting)), setting)
    if ("{" in setting and "}" in setting) or "\n" in setting:
        return Template.parse(setting, "--template")
    if os.path.exists(setting):
        raise UserError(
            "is not a file", place=setting, cure="give a template file, a text or a built-in name"
        )
    folder = Path(setting).parent
    beside = [str(path) for path in folder.iterdir() if path.is_file()] if os.path.isdir(folder) else []
    cure = f"the built-in templates are {', '.join(BUILT_IN)}"
    if suggestion := did_you_mean(setting, [*BUILT_IN, *beside]):
        cure = f"{cure}; {suggestion}"
    raise UserError(f'there is no built-in template and no file "{setting}"', place="--template", cure=cure)


def prompt_text(rendered: Rendered) -> str:
    """The whole prompt of a plain template.

    Raises ValueError for turns: they have no text before the model's chat template writes them.
    """
    if rendered.answer_role is not None:
        raise ValueError("the model's chat template writes the prompt of turns")
    return "".join([piece.text for turn in rendered.turns for piece in turn.pieces])


def answer_text(rendered: Rendered) -> str:
    """The answer's text, empty when only asking and for turn lists."""
    return "".join([piece.text for piece in rendered.answer])


def field_lengths(rendered: Rendered) -> dict[str, int]:
    """Prompt field -> characters of its text, in order: what may be shortened, so no assistant's turn."""
    return {
        piece.field: len(piece.text)
        for turn in rendered.turns
        if turn.role != "assistant"
        for piece in turn.pieces
        if piece.field is not None
    }


def shorten(rendered: Rendered, field: str, keep: int, side: str) -> Rendered:
    """Keep `keep` characters of one prompt field, at each place where it stands.

    `side` says what is lost: the `end`, the `start` or the `middle`. A character is not parted from its
    combining marks, nor a Hangul syllable that is written in Jamo; then somewhat fewer are kept.
    Raises ValueError for another `side` and for a field that `rendered` does not have.
    """
    texts = [piece.text for turn in rendered.turns for piece in turn.pieces if piece.field == field]
    if not texts:
        raise ValueError(f'the prompt has no field "{field}"')
    short = Piece(_kept(texts[0], max(keep, 0), side), field)
    turns = [
        replace(turn, pieces=tuple([short if piece.field == field else piece for piece in turn.pieces]))
        for turn in rendered.turns
    ]
    return replace(rendered, turns=tuple(turns))


def _kept(text: str, keep: int, side: str) -> str:
    kept_after = {"end": 0, "start": keep, "middle": keep // 2}
    if side not in kept_after:
        raise ValueError(f'side is "{side}", not end, start or middle')
    if keep >= len(text):
        return text
    start = len(text) - kept_after[side]
    end = keep - kept_after[side]
    while end > 0 and _belong_together(text[end - 1], text[end]):
        end -= 1
    while 0 < start < len(text) and _belong_together(text[start - 1], text[start]):
        start += 1
    return text[:end] + text[start:]


def _belong_together(left: str, right: str) -> bool:
    """Whether a border between two characters splits what is read as one (rules of Unicode Annex 29)."""
    if right < "\u0300":
        return False
    if category(right).startswith("M") or "\u200d" in (left, right):
        return True
    return _jamo(left) + _jamo(right) in ("LL", "LV", "LO", "LC", "VV", "VT", "OV", "OT", "CT", "TT")


def _jamo(char: str) -> str:
    """Leading, Vowel or Trailing Jamo; Open or Closed (with a trailing consonant) syllable; else nothing."""
    if "\uac00" <= char <= "\ud7a3":
        return "C" if (ord(char) - 0xAC00) % 28 else "O"
    if "\u1100" <= char <= "\u115f" or "\ua960" <= char <= "\ua97c":
        return "L"
    if "\u1160" <= char <= "\u11a7" or "\ud7b0" <= char <= "\ud7c6":
        return "V"
    return "T" if "\u11a8" <= char <= "\u11ff" or "\ud7cb" <= char <= "\ud7fb" else ""


def _fill(parts: tuple[Part, ...], texts: Mapping[str, str]) -> tuple[Piece, ...]:
    return tuple(
        [Piece(texts[part.field], part.field) if isinstance(part, Placeholder) else part for part in parts]
    )


def _turns_to_render(turns: tuple[Turn, ...], what: str, place: str, with_answer: bool) -> tuple[Turn, ...]:
    """All turns where they are trained; without the final assistant turn where they are asked."""
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if with_answer and last < 0:
        cure = "add the answer, or take the row out"
        raise UserError(f"{what} has no assistant turn: there is nothing to train", place=place, cure=cure)
    ends_with_answer = last == len(turns) - 1
    asked = turns[:last] if with_answer or ends_with_answer else turns
    if not asked:
        cure = "add the question, or take the row out"
        raise UserError(f"{what} has no turn before the answer", place=place, cure=cure)
    if not with_answer and not ends_with_answer and asked[-1].role == "system":
        cure = "add a user turn"
        raise UserError(f"{what} ends with a system turn: there is nothing to answer", place=place, cure=cure)
    return turns if with_answer else asked


def _lacks(row: Row, name: str, column: str, used: str) -> Problem:
    where = f'field "{name}"' if name == column else f'field "{name}" (column "{column}")'
    cure = f"the template uses {used}"
    if column in row.values:
        return Problem(f"{where} is {'null' if row.values[column] is None else 'empty'}", row.place, cure)
    if suggestion := visible(did_you_mean(column, row.values)):
        cure = f"{cure}; {suggestion}"
    return Problem(f"{where} is missing", row.place, cure)


def _read_file(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", place=str(path)) from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError("is not UTF-8", place=f"{path}:{line}", cure="save the template as UTF-8") from error
