"""Templates: filling them with a row, and shortening. `template_syntax.py` reads their text.

The built-in templates are files in `templates/`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from unicodedata import category

from yeonma.data.bundled_samples import sample_template
from yeonma.data.columns import (
    KWARGS_COLUMN,
    SIDE_COLUMNS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    Columns,
    column_of,
    field_text,
    is_filled,
    without_value,
)
from yeonma.data.rows import Row
from yeonma.data.template_syntax import (
    TURN_LIST,
    Piece,
    Placeholder,
    TemplatePart,
    Variant,
    joined,
    normalised,
    placeholders,
    read_variants,
    visible,
)
from yeonma.data.turns import Turn, is_turn_list, object_of, tools_of, turn_list, with_system
from yeonma.data.words import all_of, field_name
from yeonma.errors import Problem, UserError, did_you_mean, system_reason
from yeonma.messages import tr

BUILT_IN = (
    "title",
    "alpaca",
    "alpaca-turns",
    "orca",
    "chat",
    "prompt-completion",
    "prompt-completion-turns",
    "text",
)
_BUILT_IN_FOLDER = Path(__file__).parent / "templates"
_ANSWER_NAMES = ("answer", "chosen", "rejected", "label")
"""Names that `--columns` accepts besides the template's own fields: the answer, or its two sides, or its label."""


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """A turn of a conversation. With `role` None it is plain text, to which no chat template applies.

    `turn`: the turn of a turn list that it comes from, with its reasoning, tool calls, weight and other keys.
    """

    role: str | None
    pieces: tuple[Piece, ...]
    turn: Turn | None = None

    @property
    def text(self) -> str:
        return joined(self.pieces)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text.

    A plain template gives one turn, the prompt, with role None. A template with `[user]` lines gives its turns before
    the answer. Both have the answer in `answer`, which is empty when only the prompt is rendered. A turn list gives all
    its turns and no `answer`: every assistant turn from the index `first_answer` on is an answer.
    """

    turns: tuple[RenderedTurn, ...]
    answer: tuple[Piece, ...]
    variant: int
    """Index of the variant that was filled."""
    answer_role: str | None
    """`assistant` if the model's chat template writes the turns, None for plain text."""
    is_text: bool = False
    """Whether `answer` is a whole text, without a prompt."""
    first_answer: int = 0
    answer_turn: Turn | None = None
    """The turn that `answer` comes from, with its reasoning and tool calls, if a turn list gave it."""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of the tools that the row offers, for the chat template."""
    chat_kwargs: dict[str, Any] = field(default_factory=dict)
    """The row's arguments of the chat template, such as `enable_thinking`."""

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

        Raises UserError, with line and column, as `read_variants` and for variants with different answers.
        """
        text = normalised(text, name)
        variants = read_variants(text, name)
        first = variants[0].answer_placeholder.field
        is_chat = variants[0].is_turn_list
        for variant in variants:
            answer = variant.answer_placeholder
            if variant.is_text and len(variants) > 1:
                raise UserError(
                    tr("[text] has no variants"), place=answer.place, cure=tr("remove the others")
                )
            if variant.is_turn_list != is_chat:
                problem = tr("the answer is [turns] in some variants and not in others")
                raise UserError(problem, place=answer.place, cure=tr("end all of them with [turns], or none"))
            if answer.field != first and not is_chat:
                raise UserError(
                    tr(
                        'this variant ends with the field "{field}", the first one with "{first}"',
                        field=answer.field,
                        first=first,
                    ),
                    place=answer.place,
                    cure=tr("use the same answer field in all variants"),
                )
        fields = {name for variant in variants for name in (*variant.prompt_fields, *variant.turn_fields)}
        fields.update(name for variant in variants for name in variant.answer_fields)
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
        number = self._variant_of(row, columns, texts)
        answer_fields = self.variants[number or 0].answer_fields if with_answer else ()
        if number is None or not self._read_fields(answer_fields, row, columns, texts):
            raise self._missing_fields(row, columns, with_answer)
        variant = self.variants[number]
        if variant.turn_fields:
            turns = self._prompt_turns(variant, row, columns, texts)
        else:
            turns = tuple([RenderedTurn(turn.role, _fill(turn.parts, texts)) for turn in variant.turns])
        answer = _fill(variant.answer, texts) if with_answer else ()
        if variant.is_text and not with_answer:
            cure = tr("give a text to continue with --prompt")
            raise UserError(
                tr("the template trains whole texts: there is no prompt to ask"), place=row.place, cure=cure
            )
        rendered = Rendered(turns, answer, number, variant.answer_role, variant.is_text)
        return self._with_side_columns(rendered, row, columns)

    @cached_property
    def side_columns(self) -> tuple[str, ...]:
        """The columns that are part of a prompt without standing in the template: for templates with `[turns]`, those
        for system prompt (unless the template has a `[system]` turn), tools and arguments of the chat template."""
        if not any(variant.is_turn_list or variant.turn_fields for variant in self.variants):
            return ()
        has_system = any(variant.has_system for variant in self.variants)
        names = (*TOOL_COLUMNS, KWARGS_COLUMN) if has_system else SIDE_COLUMNS
        return tuple([name for name in names if name not in self.fields])

    def columns_read(self, columns: Columns) -> set[str]:
        """The columns that rendering reads."""
        side = {(columns or {}).get(name, name) for name in self.side_columns}
        return side | {self._column(name, columns) for name in self.fields}

    @property
    def has_turns(self) -> bool:
        """Whether the model's chat template writes the prompts of some rows."""
        return any(variant.answer_role is not None for variant in self.variants)

    @property
    def is_text(self) -> bool:
        """Whether rows are whole texts: all of them is trained, and there is no prompt."""
        return self.variants[0].is_text

    @cached_property
    def takes_turns(self) -> bool:
        """Whether a conversation can be asked as it is: the template adds no text of its own, but perhaps a system
        turn."""
        return self.is_chat or self._last_user_field is not None

    @cached_property
    def _last_user_field(self) -> str | None:
        """The field of the last user turn, for a template with `[turns]` before turns that hold nothing but fields."""
        if not any(variant.turn_fields for variant in self.variants):
            return None
        turns = [
            turn for variant in self.variants for turn in variant.turns if turn.role in ("user", "assistant")
        ]
        has_text = any(isinstance(part, Piece) and part.text.strip() for turn in turns for part in turn.parts)
        lasts = [variant.turns[-1] for variant in self.variants]
        if has_text or any(len(variant.answer) > 1 for variant in self.variants):
            return None
        fields = [placeholders(last.parts)[0].field for last in lasts if last.role == "user"]
        return fields[0] if len(fields) == len(lasts) else None

    @property
    def _system_field(self) -> str | None:
        """The field or column of the system prompt."""
        turns = [turn for variant in self.variants for turn in variant.turns if turn.role == "system"]
        fields = [placeholder.field for turn in turns for placeholder in placeholders(turn.parts)]
        return fields[0] if fields else "system" if "system" in self.side_columns else None

    def row_of_turns(self, turns: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """The row whose prompt is this conversation, which ends with the turn to answer. For `takes_turns`."""
        *before, last = turns
        row: dict[str, object] = {}
        if before and before[0].get("role") in ("system", "developer") and (name := self._system_field):
            row[name] = before[0].get("content")
            before = before[1:]
        lists = self.variants[0].turn_fields
        if self.is_chat:
            return {**row, (lists[0] if lists else self.answer_field): [*before, last]}
        history: dict[str, object] = {lists[0]: before} if before else {}
        return {**row, **history, self._last_user_field or "": last.get("content")}

    def missing_columns(self, names: Sequence[str], columns: Columns) -> list[Problem]:
        """Problems for the fields that no column (`names`) of the data fills; none if some variant can be filled.

        Raises UserError for `columns` with unknown fields.
        """
        if columns:
            self.check_columns(columns)

        def missing(placeholders: Sequence[Placeholder]) -> list[Placeholder]:
            return [part for part in placeholders if self._column(part.field, columns) not in names]

        def missing_in(variant: Variant) -> list[Placeholder]:
            answers = [part for part in variant.answer if isinstance(part, Placeholder)]
            return missing([*variant.prompt_placeholders, *answers])

        by_variant = [missing_in(variant) for variant in self.variants]
        unfilled = min(by_variant if self.is_chat else reversed(by_variant), key=len)
        first: dict[str, Placeholder] = {}
        for placeholder in unfilled:
            first.setdefault(placeholder.field, placeholder)
        return [self._missing_column(placeholder, names, columns) for placeholder in first.values()]

    def _missing_column(self, placeholder: Placeholder, names: Sequence[str], columns: Columns) -> Problem:
        column = self._column(placeholder.field, columns)
        return missing_column(column, names, placeholder.place, placeholder.field)

    def _render_turn_list(self, row: Row, columns: Columns, with_answer: bool) -> Rendered:
        texts: dict[str, str] = {}
        number = self._variant_of(row, columns, texts)
        if number is None:
            raise self._missing_turns(row, columns)
        variant = self.variants[number]
        before = self._prompt_turns(variant, row, columns, texts)
        name = self._column(variant.answer_placeholder.field, columns)
        after: tuple[Turn, ...] = ()
        if row.values.get(name) is not None:
            after = _turns_in(row, name, "assistant" if variant.turn_fields else None)
        elif with_answer or not before:
            raise UserError([_missing_field(row, variant.answer_placeholder.field, name, name)])
        after = _turns_to_render(after, name, row.place, with_answer, bool(before))
        turns = (*before, *as_rendered_turns(after, len(before)))
        rendered = Rendered(turns, (), number, "assistant", first_answer=len(before))
        return self._with_side_columns(rendered, row, columns)

    def _variant_of(self, row: Row, columns: Columns, texts: dict[str, str]) -> int | None:
        """The first variant whose prompt the row can fill; the texts of its fields are added to `texts`."""
        for number, variant in enumerate(self.variants):
            lists = [row.values.get(self._column(name, columns)) for name in variant.turn_fields]
            if variant.is_turn_list and not lists:  # an empty list is a fault of its own
                has_turns = (
                    row.values.get(self._column(variant.answer_placeholder.field, columns)) is not None
                )
            else:
                has_turns = all(map(is_filled, lists))
            if has_turns:
                if self._read_fields(variant.prompt_fields, row, columns, texts):
                    return number
        return None

    def _prompt_turns(
        self, variant: Variant, row: Row, columns: Columns, texts: Mapping[str, str]
    ) -> tuple[RenderedTurn, ...]:
        turns: list[RenderedTurn] = []
        for turn in variant.turns:
            if turn.role == TURN_LIST:
                column = self._column(placeholders(turn.parts)[0].field, columns)
                turns += as_rendered_turns(_turns_in(row, column, "user"), len(turns))
            else:
                turns.append(RenderedTurn(turn.role, _fill(turn.parts, texts)))
        return tuple(turns)

    def _with_side_columns(self, rendered: Rendered, row: Row, columns: Columns) -> Rendered:
        """The row with its columns for system prompt, tools and arguments of the chat template."""
        rendered = self.with_arguments(rendered, row, columns)
        systems = self._side_values(SYSTEM_COLUMNS, row, columns)
        if not systems:
            return rendered
        column, value = systems[0]
        text = field_text(row, column) or ""
        for other, other_value in systems[1:]:
            if other_value != value:
                problem = tr(
                    'the columns "{column}" and "{other}" have different texts', column=column, other=other
                )
                raise UserError(problem, place=row.place, cure=tr("keep one of them"))
        first = rendered.turns[0] if rendered.turns else None
        before = (Turn("system", first.text),) if first is not None and first.role == "system" else ()
        if with_system(before, text, column, row.place) == before:
            return rendered
        system = RenderedTurn("system", (Piece(text, column),))
        return replace(rendered, turns=(system, *rendered.turns), first_answer=rendered.first_answer + 1)

    def _side_values(self, names: Sequence[str], row: Row, columns: Columns) -> list[tuple[str, object]]:
        """(column, value) of those of the side columns `names` that hold something in the row."""
        named = [(columns or {}).get(name, name) for name in names if name in self.side_columns]
        return [(column, row.values[column]) for column in named if is_filled(row.values.get(column))]

    def with_arguments(self, rendered: Rendered, row: Row, columns: Columns) -> Rendered:
        """The row with what its columns say about tools and other arguments of the chat template."""
        offered = self._side_values(TOOL_COLUMNS, row, columns)
        tools = [tools_of(value, column, row.place) for column, value in offered]
        if len(tools) > 1 and tools[0] != tools[1]:
            problem = tr("the columns {tool_columns} have different tools", tool_columns=all_of(TOOL_COLUMNS))
            raise UserError(problem, place=row.place, cure=tr("keep one of them"))
        for column, value in self._side_values((KWARGS_COLUMN,), row, columns):
            rendered = replace(rendered, chat_kwargs=object_of(value, column, row.place))
        return replace(rendered, tools=tools[0]) if tools else rendered

    def _missing_turns(self, row: Row, columns: Columns) -> UserError:
        fields = [
            name
            for variant in self.variants
            for name in (*variant.prompt_fields, *variant.turn_fields, variant.answer_placeholder.field)
        ]
        lists = [variant.answer_placeholder.field for variant in self.variants]
        names = list(dict.fromkeys(fields))
        missing = next(
            (name for name in names if not is_filled(row.values.get(self._column(name, columns)))), lists[0]
        )
        return UserError(
            [_missing_field(row, missing, self._column(missing, columns), " or ".join(dict.fromkeys(lists)))]
        )

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
            if name not in self.fields and name not in _ANSWER_NAMES and name not in self.side_columns:
                cure = did_you_mean(name, self.fields) or tr(
                    "it has {fields}", fields=", ".join(sorted(self.fields))
                )
                raise UserError(
                    tr('the template has no field "{name}"', name=name), place="--columns", cure=cure
                )
        answer = self._column(self.answer_field, columns)
        for name in self.fields:
            if name != self.answer_field and self._column(name, columns) == answer and not self.is_chat:
                problem = tr(
                    'the column "{answer}" is the answer and also the prompt field "{name}"',
                    answer=answer,
                    name=name,
                )
                raise UserError(problem, place="--columns", cure=tr("the prompt must not show the answer"))

    def _missing_fields(self, row: Row, columns: Columns, with_answer: bool) -> UserError:
        """The error for the variant with the fewest missing fields; of several such variants, the last."""

        def missing(variant: Variant) -> list[str]:
            lists = [
                name
                for name in variant.turn_fields
                if not is_filled(row.values.get(self._column(name, columns)))
            ]
            fields = variant.prompt_fields + (variant.answer_fields if with_answer else ())
            return lists + [name for name in fields if field_text(row, self._column(name, columns)) is None]

        variant = min(reversed(self.variants), key=lambda variant: len(missing(variant)))
        used = ", ".join((*variant.turn_fields, *variant.prompt_fields, *variant.answer_fields))
        return UserError(
            [_missing_field(row, name, self._column(name, columns), used) for name in missing(variant)]
        )


def load_template(setting: str) -> Template:
    """The template that `--template` gives: a built-in name, a bundled sample (`sample:title_en`), a file, or the
    template text itself (text with braces).

    Raises UserError if it is none of these or the file is not UTF-8, and as `Template.parse`.
    """
    if setting in BUILT_IN:
        return Template.parse((_BUILT_IN_FOLDER / f"{setting}.txt").read_text(encoding="utf-8"), setting)
    if (sample := sample_template(setting)) is not None:
        return Template.parse(_read_file(sample), setting)
    if os.path.isfile(setting):  # unlike Path.is_file, False also for a text too long for a path
        return Template.parse(_read_file(Path(setting)), setting)
    if ("{" in setting and "}" in setting) or "\n" in setting:
        return Template.parse(setting, "--template")
    if os.path.exists(setting):
        raise UserError(
            tr("is not a file"),
            place=setting,
            cure=tr("give a template file, a template text or a built-in name"),
        )
    folder = Path(setting).parent
    siblings = [str(path) for path in folder.iterdir() if path.is_file()] if os.path.isdir(folder) else []
    cure = tr("the built-in templates are {built_in}", built_in=", ".join(BUILT_IN))
    if suggestion := did_you_mean(setting, [*BUILT_IN, *siblings]):
        cure = f"{cure}; {suggestion}"
    raise UserError(
        tr('no built-in template and no file is named "{setting}"', setting=setting),
        place="--template",
        cure=cure,
    )


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


def as_rendered_turns(turns: Sequence[Turn], before: int = 0) -> tuple[RenderedTurn, ...]:
    """Turns as text. The field of a turn is named by its number, counted after `before` turns: `turn 1`."""
    return tuple(
        [
            RenderedTurn(turn.role, (Piece(turn.text, f"turn {number}"),), None if turn.is_plain else turn)
            for number, turn in enumerate(turns, start=before + 1)
        ]
    )


def missing_column(column: str, names: Sequence[str], place: str, field: str = "") -> Problem:
    """The problem that no column of the data is named `column`, for `field`, which is named if it has another name."""
    listed = tr("it has {visible}", visible=", ".join(map(visible, names)))
    cure = visible(did_you_mean(column, names)) or listed
    problem = (
        tr('the data has no column "{column}"', column=column)
        if field in ("", column)
        else tr('the data has no column "{column}" for the field "{field}"', column=column, field=field)
    )
    return Problem(problem, place, cure)


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


def _turns_in(row: Row, column: str, role: str | None) -> tuple[Turn, ...]:
    """The turns in a column of turns. It may hold them as JSON text or hold a single turn. If it holds other text, that
    is one turn of this role; with `role` None, text is an error."""
    value = row.values.get(column)
    if isinstance(value, str):
        turns = _list_in_text(value)
        if turns is None and role is not None and (text := field_text(row, column)) is not None:
            turns = [{"role": role, "content": text}]
        value = value if turns is None else turns
    return turn_list([value] if isinstance(value, Mapping) else value, column, row.place)


def _list_in_text(text: str) -> object:
    """The turn list that a text holds as JSON; None if it holds none."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if is_turn_list(value) else None


def _turns_to_render(
    turns: tuple[Turn, ...], column: str, place: str, with_answer: bool, has_prompt: bool
) -> tuple[Turn, ...]:
    """All turns for training; for a prompt, without the final assistant turn.

    `has_prompt`: other turns of the row stand before them.
    """
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if with_answer and last < 0:
        problem = tr('"{column}" has no assistant turn: there is nothing to train', column=column)
        raise UserError(problem, place=place, cure=tr("add the answer, or remove the row"))
    ends_with_answer = last == len(turns) - 1
    prompt = turns[:last] if with_answer or (turns and ends_with_answer) else turns
    if not prompt and not has_prompt:
        problem = tr('"{column}" has no turn before the answer', column=column)
        raise UserError(problem, place=place, cure=tr("add the question, or remove the row"))
    if not with_answer and not ends_with_answer and prompt and prompt[-1].role == "system":
        problem = tr('"{column}" ends with a system turn: there is nothing to answer', column=column)
        raise UserError(problem, place=place, cure=tr("add a user turn"))
    return turns if with_answer else prompt


def _missing_field(row: Row, name: str, column: str, used: str) -> Problem:
    where = (
        field_name(name)
        if name == column
        else tr('field "{name}" (column "{column}")', name=name, column=column)
    )
    cure = tr("the template uses {used}", used=used)
    if column in row.values:
        state: Literal["null", "empty"] = "null" if row.values[column] is None else "empty"
        return Problem(without_value(where, state), row.place, cure)
    if suggestion := visible(did_you_mean(column, row.values)):
        cure = f"{cure}; {suggestion}"
    return Problem(without_value(where, "missing"), row.place, cure)


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


def _read_file(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            tr("cannot be read: {strerror}", strerror=system_reason(error)), place=str(path)
        ) from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            tr("is not UTF-8"), place=f"{path}:{line}", cure=tr("save the template as UTF-8")
        ) from error
