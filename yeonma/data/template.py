"""Templates: text with `{fields}`. Parsing, filling with a row, shortening.

The last field is the answer; all before it is the prompt. Variants are separated by `---` lines; `[user]` and
`[assistant]` lines begin turns, which the model's chat template writes; `[turns]` names a column that holds a whole
conversation. Fields do not span lines. The built-in templates are files in `templates/`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import category

from yeonma.data.columns import Columns, column_of, field_text
from yeonma.data.rows import Row
from yeonma.data.turns import Turn, turns_of
from yeonma.errors import Problem, UserError, did_you_mean

BUILT_IN = ("title", "alpaca", "orca", "chat", "prompt-completion")
_BUILT_IN_FOLDER = Path(__file__).parent / "templates"
_ANSWER_NAMES = ("answer", "chosen", "rejected", "label")
"""Names that `--columns` accepts besides the template's own fields: the answer, or its two sides, or its label."""
_ROLES = ("system", "user", "assistant")
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
    """A turn of the template. With `role` None it is plain text, the only turn of its variant."""

    role: str | None
    parts: tuple[TemplatePart, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of the template. For a turn list `turns` is empty: its one placeholder names the list's column."""

    turns: tuple[FrameTurn, ...]
    answer: tuple[TemplatePart, ...]
    answer_role: str | None
    prompt_fields: tuple[str, ...]
    """The distinct fields before the answer, in order."""

    @property
    def is_turn_list(self) -> bool:
        return not self.turns

    @property
    def prompt_placeholders(self) -> list[Placeholder]:
        return placeholders(part for turn in self.turns for part in turn.parts)

    @property
    def answer_placeholder(self) -> Placeholder:
        return placeholders(self.answer)[0]


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """A turn of a conversation. With `role` None it is plain text, to which no chat template applies."""

    role: str | None
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return joined(self.pieces)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text.

    A plain template gives one turn, the prompt, with role None. A template with `[user]` lines gives its turns before
    the answer. Both have the answer in `answer`, which is empty when only the prompt is rendered. A turn list gives all
    its turns and no `answer`: every assistant turn is an answer.
    """

    turns: tuple[RenderedTurn, ...]
    answer: tuple[Piece, ...]
    variant: int
    """Index of the variant that was filled."""
    answer_role: str | None
    """`assistant` if the model's chat template writes the turns, None for plain text."""

    @property
    def prompt_pieces(self) -> list[Piece]:
        """The pieces of all turns, concatenated."""
        return [piece for turn in self.turns for piece in turn.pieces]


@dataclass(frozen=True)
class Template:
    """A parsed template. Templates with equal texts are equal, whatever their names.

    `text` has LF line ends, no byte order mark and one final newline; parsing it gives an equal template.
    `is_chat`: the row's turn list goes through the model's chat template unchanged (the built-in `chat`); then
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
        """Parse a template's text; messages call it `name`.

        Raises UserError, with line and column, as `_read_variants` and for variants with different answers.
        """
        text = _normalised(text, name)
        variants = _read_variants(text, name)
        first = variants[0].answer_placeholder.field
        is_chat = variants[0].is_turn_list
        for variant in variants:
            answer = variant.answer_placeholder
            if variant.is_turn_list != is_chat:
                problem = "some variants are turn lists and others are not"
                raise UserError(problem, place=answer.place, cure="make all of them turn lists, or none")
            if answer.field != first and not is_chat:
                raise UserError(
                    f'this variant ends with the field "{answer.field}", the first one with "{first}"',
                    place=answer.place,
                    cure="use the same answer field in all variants",
                )
        fields = {name for variant in variants for name in variant.prompt_fields}
        fields.update(variant.answer_placeholder.field for variant in variants)
        return Template(text, name, variants, first, frozenset(fields), is_chat)

    def render(self, row: Row, columns: Columns = None, *, with_answer: bool = True) -> Rendered:
        """Fill the first variant whose prompt fields all have text in `row`.

        The answer does not influence the choice of the variant, so that a row gets the prompt that it had in training.
        With `with_answer` False the answer is left out and may be missing; so is a turn list's final answer.
        Raises UserError with the row's place for a missing, empty or invalid value, and for a turn list without an
        answer to train or a turn to answer.
        """
        if columns:
            self.check_columns(columns)
        if self.is_chat:
            return self._render_turn_list(row, columns, with_answer)
        texts: dict[str, str] = {}
        fits = (self._read_fields(variant.prompt_fields, row, columns, texts) for variant in self.variants)
        number = next((number for number, fit in enumerate(fits) if fit), None)
        answer_fields = (self.answer_field,) if with_answer else ()
        if number is None or not self._read_fields(answer_fields, row, columns, texts):
            raise self._missing_fields(row, columns, with_answer)
        variant = self.variants[number]
        turns = tuple([RenderedTurn(turn.role, _fill(turn.parts, texts)) for turn in variant.turns])
        answer = _fill(variant.answer, texts) if with_answer else ()
        return Rendered(turns, answer, number, variant.answer_role)

    def missing_columns(self, names: Sequence[str], columns: Columns) -> list[Problem]:
        """Problems for the fields that no column (`names`) of the data fills; none if some variant can be filled.

        Raises UserError for `columns` with unknown fields.
        """
        if columns:
            self.check_columns(columns)

        def missing(placeholders: Sequence[Placeholder]) -> list[Placeholder]:
            return [part for part in placeholders if self._column(part.field, columns) not in names]

        answers = [variant.answer_placeholder for variant in self.variants]
        if self.is_chat:
            unfilled = answers[:1] if len(missing(answers)) == len(answers) else []
        else:
            by_variant = [missing(variant.prompt_placeholders) for variant in self.variants]
            unfilled = [*min(reversed(by_variant), key=len), *missing(answers[:1])]
        first: dict[str, Placeholder] = {}
        for placeholder in unfilled:
            first.setdefault(placeholder.field, placeholder)
        return [self._missing_column(placeholder, names, columns) for placeholder in first.values()]

    def _missing_column(self, placeholder: Placeholder, names: Sequence[str], columns: Columns) -> Problem:
        column = self._column(placeholder.field, columns)
        field = "" if column == placeholder.field else f' for the field "{placeholder.field}"'
        return missing_column(column, names, placeholder.place, field)

    def _render_turn_list(self, row: Row, columns: Columns, with_answer: bool) -> Rendered:
        fields = [variant.answer_placeholder.field for variant in self.variants]
        names = [self._column(name, columns) for name in fields]
        number = next((number for number, name in enumerate(names) if row.values.get(name) is not None), None)
        if number is None:
            raise UserError([_missing_field(row, fields[0], names[0], " or ".join(fields))])
        turns = _turns_to_render(turns_of(row, names[number]), f'"{names[number]}"', row.place, with_answer)
        return Rendered(as_rendered_turns(turns), (), number, "assistant")

    def _read_fields(self, fields: Sequence[str], row: Row, columns: Columns, texts: dict[str, str]) -> bool:
        """Add the fields' texts to `texts`; return False at the first field without text."""
        for name in fields:
            if name not in texts:
                text = field_text(row, self._column(name, columns) if columns else name)
                if text is None:
                    return False
                texts[name] = text
        return True

    def _column(self, name: str, columns: Columns) -> str:
        return column_of(name, columns, self.answer_field)

    def check_columns(self, columns: Mapping[str, str]) -> None:
        """Raises UserError for unknown fields, and for a prompt field that shows the answer's column."""
        for name in columns:
            if name not in self.fields and name not in _ANSWER_NAMES:
                cure = did_you_mean(name, self.fields) or f"it has {', '.join(sorted(self.fields))}"
                raise UserError(f'the template has no field "{name}"', place="--columns", cure=cure)
        answer = self._column(self.answer_field, columns)
        for name in self.fields:
            if name != self.answer_field and self._column(name, columns) == answer and not self.is_chat:
                problem = f'the column "{answer}" is the answer and also the prompt field "{name}"'
                raise UserError(problem, place="--columns", cure="the prompt must not show the answer")

    def _missing_fields(self, row: Row, columns: Columns, with_answer: bool) -> UserError:
        """The error for the variant with the fewest missing fields; of several such variants, the last."""
        answer = (self.answer_field,)

        def missing(variant: Variant) -> list[str]:
            fields = variant.prompt_fields + (answer if with_answer else ())
            return [name for name in fields if field_text(row, self._column(name, columns)) is None]

        variant = min(reversed(self.variants), key=lambda variant: len(missing(variant)))
        used = ", ".join(variant.prompt_fields + answer)
        return UserError(
            [_missing_field(row, name, self._column(name, columns), used) for name in missing(variant)]
        )


def load_template(setting: str) -> Template:
    """The template that `--template` gives: a built-in name, a file, or the template text itself (text with braces).

    Raises UserError if it is none of these or the file is not UTF-8, and as `Template.parse`.
    """
    if setting in BUILT_IN:
        return Template.parse((_BUILT_IN_FOLDER / f"{setting}.txt").read_text(encoding="utf-8"), setting)
    if os.path.isfile(setting):  # unlike Path.is_file, False also for a text too long for a path
        return Template.parse(_read_file(Path(setting)), setting)
    if ("{" in setting and "}" in setting) or "\n" in setting:
        return Template.parse(setting, "--template")
    if os.path.exists(setting):
        raise UserError(
            "is not a file", place=setting, cure="give a template file, a template text or a built-in name"
        )
    folder = Path(setting).parent
    siblings = [str(path) for path in folder.iterdir() if path.is_file()] if os.path.isdir(folder) else []
    cure = f"the built-in templates are {', '.join(BUILT_IN)}"
    if suggestion := did_you_mean(setting, [*BUILT_IN, *siblings]):
        cure = f"{cure}; {suggestion}"
    raise UserError(f'no built-in template and no file is named "{setting}"', place="--template", cure=cure)


def prompt_text(rendered: Rendered) -> str:
    """The whole prompt of a plain template.

    Raises ValueError for turns: the model's chat template writes their text.
    """
    if rendered.answer_role is not None:
        raise ValueError("the model's chat template writes the prompt of turns")
    return joined(rendered.prompt_pieces)


def answer_text(rendered: Rendered) -> str:
    """The answer's text; empty for turn lists and if only the prompt was rendered."""
    return joined(rendered.answer)


def joined(pieces: Iterable[Piece]) -> str:
    return "".join([piece.text for piece in pieces])


def as_rendered_turns(turns: Sequence[Turn]) -> tuple[RenderedTurn, ...]:
    """Turns as text. The field of a turn is named by its number: `turn 1`."""
    return tuple(
        [
            RenderedTurn(turn.role, (Piece(turn.text, f"turn {number}"),))
            for number, turn in enumerate(turns, start=1)
        ]
    )


def missing_column(column: str, names: Sequence[str], place: str, field: str = "") -> Problem:
    """The problem that no column of the data is named `column`. `field` is appended to the message."""
    listed = f"it has {', '.join(map(visible, names))}"
    cure = visible(did_you_mean(column, names)) or listed
    return Problem(f'the data has no column "{column}"{field}', place, cure)


def visible(text: str) -> str:
    """`text` with invisible characters (zero-width, control, unusual spaces) written as U+200B."""
    return "".join([char if char.isprintable() else f"U+{ord(char):04X}" for char in text])


def field_lengths(rendered: Rendered) -> dict[str, int]:
    """Prompt field -> characters of its text, in order, without assistant turns, which are never shortened."""
    return {
        piece.field: len(piece.text)
        for turn in rendered.turns
        if turn.role != "assistant"
        for piece in turn.pieces
        if piece.field is not None
    }


def shorten(rendered: Rendered, field: str, keep: int, side: str) -> Rendered:
    """Shorten a prompt field to `keep` characters, wherever it appears.

    `side` is the part to cut: the `end`, the `start` or the `middle`. Combining marks stay with their character and
    the Jamo of a Hangul syllable stay together, so the result may be slightly shorter.
    Raises ValueError for another `side` and for a field that `rendered` does not have.
    """
    texts = [piece.text for piece in rendered.prompt_pieces if piece.field == field]
    if not texts:
        raise ValueError(f'the prompt has no field "{field}"')
    short = Piece(_shortened(texts[0], max(keep, 0), side), field)
    turns = [
        replace(turn, pieces=tuple([short if piece.field == field else piece for piece in turn.pieces]))
        for turn in rendered.turns
    ]
    return replace(rendered, turns=tuple(turns))


# Filling


def _fill(parts: tuple[TemplatePart, ...], texts: Mapping[str, str]) -> tuple[Piece, ...]:
    return tuple(
        [Piece(texts[part.field], part.field) if isinstance(part, Placeholder) else part for part in parts]
    )


def _turns_to_render(turns: tuple[Turn, ...], column: str, place: str, with_answer: bool) -> tuple[Turn, ...]:
    """All turns for training; for a prompt, without the final assistant turn. `column` is its quoted name."""
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if with_answer and last < 0:
        problem = f"{column} has no assistant turn: there is nothing to train"
        raise UserError(problem, place=place, cure="add the answer, or remove the row")
    ends_with_answer = last == len(turns) - 1
    prompt = turns[:last] if with_answer or ends_with_answer else turns
    if not prompt:
        problem = f"{column} has no turn before the answer"
        raise UserError(problem, place=place, cure="add the question, or remove the row")
    if not with_answer and not ends_with_answer and prompt[-1].role == "system":
        problem = f"{column} ends with a system turn: there is nothing to answer"
        raise UserError(problem, place=place, cure="add a user turn")
    return turns if with_answer else prompt


def _missing_field(row: Row, name: str, column: str, used: str) -> Problem:
    where = f'field "{name}"' if name == column else f'field "{name}" (column "{column}")'
    cure = f"the template uses {used}"
    if column in row.values:
        return Problem(f"{where} is {'null' if row.values[column] is None else 'empty'}", row.place, cure)
    if suggestion := visible(did_you_mean(column, row.values)):
        cure = f"{cure}; {suggestion}"
    return Problem(f"{where} is missing", row.place, cure)


# Shortening


def _shortened(text: str, keep: int, side: str) -> str:
    kept_at_end = {"end": 0, "start": keep, "middle": keep // 2}
    if side not in kept_at_end:
        raise ValueError(f'side is "{side}", not end, start or middle')
    if keep >= len(text):
        return text
    start = len(text) - kept_at_end[side]
    end = keep - kept_at_end[side]
    while end > 0 and _inseparable(text[end - 1], text[end]):
        end -= 1
    while 0 < start < len(text) and _inseparable(text[start - 1], text[start]):
        start += 1
    return text[:end] + text[start:]


def _inseparable(left: str, right: str) -> bool:
    """Whether two adjacent characters belong to one grapheme cluster (rules of Unicode Annex 29)."""
    if right < "\u0300":
        return False
    if category(right).startswith("M") or "\u200d" in (left, right):
        return True
    return _jamo(left) + _jamo(right) in ("LL", "LV", "LO", "LC", "VV", "VT", "OV", "OT", "CT", "TT")


def _jamo(char: str) -> str:
    """The kind of a Hangul character: Leading, Vowel or Trailing Jamo; Open or Closed syllable; empty for others."""
    if "\uac00" <= char <= "\ud7a3":
        return "C" if (ord(char) - 0xAC00) % 28 else "O"
    if "\u1100" <= char <= "\u115f" or "\ua960" <= char <= "\ua97c":
        return "L"
    if "\u1160" <= char <= "\u11a7" or "\ud7b0" <= char <= "\ud7c6":
        return "V"
    return "T" if "\u11a8" <= char <= "\u11ff" or "\ud7cb" <= char <= "\ud7fb" else ""


# Parsing


def _normalised(text: str, name: str) -> str:
    """The text with LF line ends, no byte order mark and one final newline. Raises UserError for NUL and surrogates."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"
    for number, line in enumerate(text.split("\n"), start=1):
        for column, character in enumerate(line, start=1):
            if character == "\0" or "\ud800" <= character <= "\udfff":
                problem = f"U+{ord(character):04X} is not a text character"
                raise UserError(problem, place=f"{name}:{number}:{column}", cure="remove it")
    return text


def _read_variants(text: str, name: str) -> tuple[Variant, ...]:
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
        more = Problem(f"{len(problems) - _PROBLEMS_SHOWN} more such problems", name)
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
            yield Problem('"}" without an opening "{"', column_place, 'write "}}" for a literal brace')
            at += 1
        elif line[at] != "{":
            borders = [border for border in (opening, end, len(line)) if border >= 0]
            yield Piece(line[at : min(borders)], None)
            at = min(borders)
        elif end < 0 or at < opening < end:
            yield Problem('"{" is not closed', column_place, 'write "{{" for a literal brace')
            at += 1
        else:
            yield _placeholder(line[at + 1 : end], column_place)
            at = end + 1


def _placeholder(name: str, place: str) -> Placeholder | Problem:
    shown, inside = visible(name), name.strip()
    if shown != name:
        return Problem(f'the field name "{shown}" contains an invisible character', place, "delete it")
    if inside and inside != name:
        return Problem(f'"{{{name}}}" begins or ends with a space', place, f'write "{{{inside}}}"')
    if not inside or name.isdigit() or not all(_allowed_in_name(char) for char in name):
        rule = "a field is just a column's name (letters, digits, _, - and spaces)"
        cure = 'write "{{" and "}}" for literal braces'
        return Problem(f'"{{{name}}}" is not a field: {rule}', place, cure)
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
        cure = 'write "{document}", with single braces' if doubled else 'name a column, such as "{document}"'
        raise UserError("the template has no field", place=place, cure=cure)
    first = next(line for line in lines if line.text.strip())
    if first.text.rstrip() == "[turns]":
        return _turn_list(lines, first)
    markers = [index for index, line in enumerate(lines) if _role(line)]
    return _with_roles(lines, markers) if markers else _plain(lines, place)


def _plain(lines: Sequence[_Line], place: str) -> Variant:
    parts = _parts_of(lines)
    last = max(index for index, part in enumerate(parts) if isinstance(part, Placeholder))
    prompt, answer = parts[:last], parts[last:]
    if all(isinstance(part, Piece) and not part.text.strip() for part in prompt):
        problem = "the template has an answer but no prompt"
        raise UserError(problem, place=place, cure="write the prompt before the answer")
    return _checked((FrameTurn(None, prompt),), answer, None)


def _with_roles(lines: Sequence[_Line], markers: Sequence[int]) -> Variant:
    for number, line in enumerate(lines):
        word = line.text.strip().strip("[]").lower()
        if line.text.strip() and number < markers[0]:
            raise UserError("text before the first turn", place=line.place, cure="move it into a turn")
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
        cure = "move the other fields to earlier turns"
        raise UserError("the last turn must have exactly one field, the answer", place=place, cure=cure)
    if not prompt:
        cure = "add a [user] turn before it"
        raise UserError("the template has an answer but no prompt", place=place, cure=cure)
    return _checked(tuple(prompt), answer.parts, "assistant")


def _frame_turn(marker: _Line, lines: Sequence[_Line]) -> FrameTurn:
    start = next((index for index, line in enumerate(lines) if line.text), len(lines))
    turn = FrameTurn(_role(marker), _parts_of(lines[start:]))
    if not turn.parts:
        cure = "write its text, or remove the turn"
        raise UserError(f"the [{turn.role}] turn is empty", place=marker.place, cure=cure)
    return turn


def _turn_list(lines: Sequence[_Line], first: _Line) -> Variant:
    """`[turns]` and one field below it: the column that holds a whole conversation."""
    parts = [part for line in lines if line is not first for part in line.parts]
    parts = [part for part in parts if isinstance(part, Placeholder) or part.text.strip()]
    if len(parts) != 1:
        cure = "the model's chat template writes the rest"
        raise UserError("[turns] takes exactly one field and no other text", place=first.place, cure=cure)
    return Variant((), tuple(parts), "assistant", ())


def _checked(turns: tuple[FrameTurn, ...], answer: tuple[TemplatePart, ...], role: str | None) -> Variant:
    """The variant. Raises UserError if its prompt shows the answer."""
    answer_field = placeholders(answer)[0].field
    before = placeholders(part for turn in turns for part in turn.parts)
    for placeholder in before:
        if placeholder.field == answer_field:
            problem = f'the prompt shows "{answer_field}", which is the answer (the last field)'
            cure = "remove it from the prompt, or the model learns to copy it"
            raise UserError(problem, place=placeholder.place, cure=cure)
    return Variant(turns, answer, role, tuple(dict.fromkeys(placeholder.field for placeholder in before)))


def _role(line: _Line) -> str:
    text = line.text.rstrip()
    return text[1:-1] if text in [f"[{role}]" for role in _ROLES] else ""


def _parts_of(lines: Sequence[_Line]) -> tuple[TemplatePart, ...]:
    """The parts of some lines as one text. Empty lines at its end are dropped: editors add them."""
    end = len(lines)
    while end > 0 and not lines[end - 1].text:
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
