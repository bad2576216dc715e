"""Preference data as text: a prompt with a chosen and a rejected answer, or with one answer and a label.

A template is filled as for supervised training, its answer field once for each answer. Turns come as
`messages` or `conversations` with the two answers beside them, or as two whole dialogues, whose shared beginning is the
prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from yeonma.data.columns import (
    FORMS,
    ROLES,
    Form,
    Recognised,
    Role,
    Turn,
    column_of,
    described,
    field_text,
    recognise,
    turn_of,
    turns_of,
)
from yeonma.data.rows import Row, Rows
from yeonma.data.template import Piece, Rendered, RenderedTurn, Template, answer_text, visible
from yeonma.data.text_checks import SPACED_APART, Notes, digest_of, notes_of
from yeonma.errors import Problem, UserError, did_you_mean

SIDES = ("chosen", "rejected")
_ROWS_LOOKED_AT = 100

_PAIR_FORMS = tuple(
    replace(form, needs=(*(group for group in form.needs if form.answer not in group), *((side,) for side in SIDES)))
    for form in FORMS
)  # fmt: skip
_LABELLED_FORMS = tuple(replace(form, needs=(*form.needs, ("label",))) for form in FORMS)

# Dialogues as one text, as in Anthropic's hh-rlhf.
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """One prompt with two answers, as text; both have the same variant and begin with the same turns.

    An answer of one turn stands in `answer`. Where an answer goes on over several turns, both sides hold all their
    turns, as a turn list does, and the first `prompt_turns` of them are the prompt.
    """

    chosen: Rendered
    rejected: Rendered
    prompt_turns: int


@dataclass(frozen=True, slots=True)
class RenderedLabel:
    """One prompt with an answer that is wanted, or not."""

    rendered: Rendered
    desirable: bool


def render_pair(template: Template, row: Row, columns: Mapping[str, str] | None = None) -> RenderedPair:
    """Fill the template with both answers of a row; `columns`: field -> column, `chosen` and `rejected` among them.

    Raises UserError with the row's place as `Template.render`; for an answer that is missing or empty; and for
    dialogues whose prompts differ.
    """
    names, columns = _answer_columns(template, columns)
    _check_given(row, names)
    if template.is_chat:
        template.check_columns(columns)
        return _turn_pair(template, row, columns, names)
    chosen, rejected = (
        template.render(row, {**columns, template.answer_field: names[side]}) for side in SIDES
    )
    return RenderedPair(chosen, rejected, len(chosen.turns))


def render_label(template: Template, row: Row, columns: Mapping[str, str] | None = None) -> RenderedLabel:
    """Fill the template as for supervised training; the column `label` says whether the answer is wanted.

    Of a turn list the last turn is the answer. Raises UserError as `Template.render`, and for a label that is not true
    or false.
    """
    columns = dict(columns or {})
    desirable = _label(row, columns.pop("label", "label"))
    rendered = template.render(row, columns)
    if template.is_chat:
        *asked, last = rendered.turns
        if last.role != "assistant":
            raise UserError("the turn list does not end with an assistant turn", place=row.place)
        rendered = replace(rendered, turns=tuple(asked), answer=last.pieces)
    return RenderedLabel(rendered, desirable)


def notes_of_pair(pair: RenderedPair) -> Notes:
    chosen, rejected = notes_of(pair.chosen), notes_of(pair.rejected)
    first, second = _answer_of(pair.chosen), _answer_of(pair.rejected)
    apart = first != second and "".join(first.split()) == "".join(second.split())
    return Notes(
        flags=chosen.flags | rejected.flags | (SPACED_APART if apart else 0),
        scripts=chosen.scripts | rejected.scripts,
        digest=digest_of([f"{chosen.digest:x}", f"{rejected.digest:x}"]),
        prompt_digest=chosen.prompt_digest,
    )


def recognise_pairs(rows: Rows, columns_setting: Mapping[str, str] | None = None) -> Recognised:
    """Choose the built-in template as `recognise`, for columns with `chosen` and `rejected` in the answer's place.

    Answers that are turns need the template chat; which column then holds the prompt's turns is part of the answer.
    """
    setting = dict(columns_setting or {})
    chosen = _first_value(rows, setting.get("chosen", "chosen"))
    dialogue = _is_dialogue(chosen)
    if isinstance(chosen, str) and not (dialogue and not _has_prompt(rows.columns, setting)):
        return recognise(rows.columns, setting, _PAIR_FORMS)
    named = [name for name in ("messages", "conversations") if column_of(name, setting, "") in rows.columns]
    needs = tuple((side,) for side in SIDES)
    if named:
        return recognise(rows.columns, setting, [Form("chat", ((named[0],), *needs), "")])
    found = recognise(rows.columns, setting, [Form("chat", needs, "", ("prompt",))])
    prompt = _first_value(rows, "prompt") if "messages" not in setting else None
    if prompt is None or (isinstance(prompt, str) and dialogue):
        return found
    return replace(found, columns=(("messages", "prompt"),))


def recognise_labelled(rows: Rows, columns_setting: Mapping[str, str] | None = None) -> Recognised:
    """Choose the built-in template as `recognise`, for columns with a `label` beside them."""
    return recognise(rows.columns, columns_setting, _LABELLED_FORMS)


def pair_without_column(
    template: Template, known: Sequence[str], columns: Mapping[str, str] | None = None
) -> list[Problem]:
    """What no column of the data fills, as `Template.without_column`; whole dialogues need no prompt of their own."""
    names, columns = _answer_columns(template, columns)
    if template.is_chat:
        template.check_columns(columns)
        return [_no_column(name, known) for name in names.values() if name not in known]
    found = [
        template.without_column(known, {**columns, template.answer_field: name}) for name in names.values()
    ]
    return list(dict.fromkeys(problem for problems in found for problem in problems))


def label_without_column(
    template: Template, known: Sequence[str], columns: Mapping[str, str] | None = None
) -> list[Problem]:
    """What no column of the data fills, as `Template.without_column`, and the label."""
    columns = dict(columns or {})
    label = columns.pop("label", "label")
    missing = [] if label in known else [_no_column(label, known)]
    return [*template.without_column(known, columns), *missing]


def _answer_columns(
    template: Template, columns: Mapping[str, str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The columns of chosen and rejected, and those of the other fields."""
    columns = dict(columns or {})
    if "answer" in columns or (template.answer_field in columns and not template.is_chat):
        cure = "name the columns of `chosen` and `rejected`"
        raise UserError("a pair has two answers", place="--columns", cure=cure)
    return {side: columns.pop(side, side) for side in SIDES}, columns


def _no_column(name: str, known: Sequence[str]) -> Problem:
    listed = f"it has {', '.join(map(visible, known))}"
    return Problem(
        f'the data has no column "{name}"', "--columns", visible(did_you_mean(name, known)) or listed
    )


def _check_given(row: Row, names: Mapping[str, str]) -> None:
    problems = []
    for name in names.values():
        value = row.values.get(name)
        if value is None or value in ([], {}) or (isinstance(value, str) and not value.strip()):
            state = "missing" if name not in row.values else "null" if value is None else "empty"
            cure = f"a pair needs both answers ({' and '.join(names.values())}); fill it or take the row out"
            problems.append(Problem(f'field "{name}" is {state}', row.place, cure))
    if problems:
        raise UserError(problems)


def _label(row: Row, column: str) -> bool:
    value = row.values.get(column)
    if isinstance(value, bool):
        return value
    words = {"true": True, "false": False, "1": True, "0": False}
    if value is not None and not isinstance(value, float) and str(value).strip().lower() in words:
        return words[str(value).strip().lower()]
    what = (
        f'field "{column}" is {described(value)}' if column in row.values else f'field "{column}" is missing'
    )
    raise UserError(what, place=row.place, cure="it says whether the answer is wanted: true or false")


# Turns


def _turn_pair(
    template: Template, row: Row, columns: Mapping[str, str], names: Mapping[str, str]
) -> RenderedPair:
    fields = [variant.answer_placeholder.field for variant in template.variants]
    held = [column_of(field, columns, "") for field in fields]
    number = next((number for number, name in enumerate(held) if row.values.get(name) is not None), 0)
    answers = {side: _turns(row, names[side]) for side in SIDES}
    whole = all(turns[0].role != "assistant" for turns in answers.values())
    before = () if whole else _prompt_turns(row, held[number])
    if not before and not whole and row.values.get(held[number]) is None and len(answers["chosen"]) < 2:
        raise UserError(
            f'field "{held[0]}" is missing, and the answers are no whole dialogues',
            place=row.place,
            cure=f"give the turns before the answers in {' or '.join(held)}",
        )
    chosen, rejected = ((*before, *answers[side]) for side in SIDES)
    count = _shared_turns(chosen, rejected, row.place)
    _check_sides({"chosen": chosen, "rejected": rejected}, count, row.place)
    single = len(chosen) == len(rejected) == count + 1
    return RenderedPair(
        chosen=_rendered(chosen, count, number, single),
        rejected=_rendered(rejected, count, number, single),
        prompt_turns=count,
    )


def _rendered(turns: Sequence[Turn], count: int, variant: int, single: bool) -> Rendered:
    """Turns as text; the field of each is its number, as in a turn list."""
    pieces = [Piece(turn.text, f"turn {number}") for number, turn in enumerate(turns, start=1)]
    rendered = [RenderedTurn(turn.role, (piece,)) for turn, piece in zip(turns, pieces, strict=True)]
    if single:
        return Rendered(tuple(rendered[:count]), (pieces[count],), variant, "assistant")
    return Rendered(tuple(rendered), (), variant, "assistant")


def _shared_turns(chosen: Sequence[Turn], rejected: Sequence[Turn], place: str) -> int:
    """How many turns both begin with: the prompt. Where one is how the other begins, all but its last answer."""
    both = range(min(len(chosen), len(rejected)))
    count = next((index for index in both if chosen[index] != rejected[index]), len(both))
    if count == len(both):
        count -= 1
    apart = [turns[count].role for turns in (chosen, rejected)]
    if count == 0 or apart != ["assistant", "assistant"]:
        what = f"chosen and rejected part at turn {count + 1}, which is not an answer in both: their prompts differ"
        cure = "give both answers the same turns before them"
        raise UserError(what, place=place, cure=cure)
    return count


def _check_sides(sides: Mapping[str, Sequence[Turn]], count: int, place: str) -> None:
    problems = [
        Problem(
            f"{side} ends with a turn of the {turns[-1].role}",
            place,
            "an answer ends with a turn of the assistant",
        )
        for side, turns in sides.items()
        if turns[-1].role != "assistant"
    ]
    last = sides["chosen"][count - 1].role
    if last in ("assistant", "system"):
        cure = "it ends with what is to be answered"
        problems.append(
            Problem(f"the prompt of chosen and rejected ends with a turn of the {last}", place, cure)
        )
    if problems:
        raise UserError(problems)


def _prompt_turns(row: Row, column: str) -> tuple[Turn, ...]:
    value = row.values.get(column)
    if value is None:
        return ()
    if isinstance(value, str):
        text = field_text(row, column)
        return (Turn("user", text),) if text is not None else ()
    return turns_of(row, column)


def _turns(row: Row, column: str) -> tuple[Turn, ...]:
    """An answer's turns: a list, one turn by itself, the text of one, or a dialogue as one text."""
    value = row.values[column]
    if isinstance(value, Mapping):
        turn = turn_of(value, column, row.place)
        if turn is None:
            raise UserError(f'field "{column}" is an empty system turn', place=row.place)
        return (turn,)
    if not isinstance(value, str):
        return turns_of(row, column)
    text = field_text(row, column) or ""
    turns = tuple(_spoken(text)) if _SPEAKER.match(text) else (Turn("assistant", text),)
    if any(not turn.text for turn in turns):
        raise UserError(f'field "{column}" has an empty turn', place=row.place, cure="take the row out")
    return turns


def _spoken(text: str) -> Iterator[Turn]:
    marks = list(_SPEAKER.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=True):
        yield Turn(_SPEAKERS[mark[1]], text[mark.end() : end].strip())


def _first_value(rows: Rows, column: str) -> object:
    """The first value of a column that is not null; None where there is none among the first rows."""
    values = (row.values.get(column) for row in islice(rows, _ROWS_LOOKED_AT))
    return next((value for value in values if value is not None), None)


def _is_dialogue(value: object) -> bool:
    """Whether a value is a whole dialogue: turns that do not begin with the answer."""
    if isinstance(value, str):
        return _SPEAKER.match(value) is not None
    first = value[0] if isinstance(value, Sequence) and value else None
    return isinstance(first, Mapping) and ROLES.get(str(first.get("from", first.get("role")))) != "assistant"


def _has_prompt(columns: Sequence[str], setting: Mapping[str, str]) -> bool:
    fields = {name for form in _PAIR_FORMS for group in form.needs for name in group} - set(SIDES)
    return any(column_of(field, setting, "") in columns for field in fields)


def _answer_of(rendered: Rendered) -> str:
    if rendered.answer:
        return answer_text(rendered)
    return "".join(piece.text for turn in rendered.turns for piece in turn.pieces)
