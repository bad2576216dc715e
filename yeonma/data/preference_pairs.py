"""Preference data as text: a prompt with a chosen and a rejected answer, or with one answer and a label.

A template is filled as for supervised training, once per answer. Turns come as `messages` or `conversations` plus the
two answers, or as two whole dialogues, whose shared beginning is the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from yeonma.data.columns import FORMS, Columns, Form, Recognised, column_of, field_text, recognise
from yeonma.data.rows import Row, Rows
from yeonma.data.strict_json import described
from yeonma.data.template import Rendered, Template, answer_text, as_rendered_turns, missing_column
from yeonma.data.template_syntax import joined
from yeonma.data.text_checks import SPACED_APART, Notes, digest_of, notes_of
from yeonma.data.turns import ROLES, Role, Turn, turn_of, turns_of
from yeonma.errors import Problem, UserError

SIDES = ("chosen", "rejected")
_ROWS_INSPECTED = 100

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
    """One prompt with two answers, as text. Both have the same variant and begin with the same turns.

    An answer of one turn is in `answer`. If an answer has several turns, both sides hold all turns, like a turn list,
    and the first `prompt_turns` of them are the prompt.
    """

    chosen: Rendered
    rejected: Rendered
    prompt_turns: int


@dataclass(frozen=True, slots=True)
class RenderedLabel:
    """One prompt with an answer that is labelled desirable or not."""

    rendered: Rendered
    desirable: bool


def render_pair(template: Template, row: Row, columns: Columns = None) -> RenderedPair:
    """Fill the template with both answers of a row. `columns` may also map `chosen` and `rejected`.

    Raises UserError with the row's place as `Template.render`, for an answer that is missing or empty, and for
    dialogues whose prompts differ.
    """
    answers, prompt_columns = _split_columns(template, columns)
    _check_answers(row, answers)
    if template.is_chat:
        template.check_columns(prompt_columns)
        return _turn_pair(template, row, prompt_columns, answers)
    chosen, rejected = (
        template.render(row, {**prompt_columns, template.answer_field: answers[side]}) for side in SIDES
    )
    return RenderedPair(chosen, rejected, len(chosen.turns))


def render_label(template: Template, row: Row, columns: Columns = None) -> RenderedLabel:
    """Fill the template as for supervised training; the column `label` says whether the answer is desirable.

    The last turn of a turn list is the answer. Raises UserError as `Template.render`, and for a label that is not true
    or false.
    """
    columns = dict(columns or {})
    desirable = _label(row, columns.pop("label", "label"))
    rendered = template.render(row, columns)
    if template.is_chat:
        *prompt, last = rendered.turns
        if last.role != "assistant":
            raise UserError("the turn list does not end with an assistant turn", place=row.place)
        rendered = replace(rendered, turns=tuple(prompt), answer=last.pieces)
    return RenderedLabel(rendered, desirable)


def notes_of_pair(pair: RenderedPair) -> Notes:
    """The notes of both answers together."""
    chosen, rejected = notes_of(pair.chosen), notes_of(pair.rejected)
    first, second = _whole_text(pair.chosen), _whole_text(pair.rejected)
    differ_in_space = first != second and "".join(first.split()) == "".join(second.split())
    return Notes(
        flags=chosen.flags | rejected.flags | (SPACED_APART if differ_in_space else 0),
        scripts=chosen.scripts | rejected.scripts,
        digest=digest_of([f"{chosen.digest:x}", f"{rejected.digest:x}"]),
        prompt_digest=chosen.prompt_digest,
    )


def recognise_pairs(rows: Rows, columns: Columns = None) -> Recognised:
    """Choose the built-in template as `recognise` does, with columns `chosen` and `rejected` in place of the answer.

    Answers that are turns need the template chat; the result then says which column holds the prompt's turns.
    """
    chosen = _first_value(rows, column_of("chosen", columns, ""))
    dialogue = _is_dialogue(chosen)
    if isinstance(chosen, str) and not (dialogue and not _has_prompt(rows.columns, columns)):
        return recognise(rows.columns, columns, _PAIR_FORMS)
    turn_lists = [
        field for field in ("messages", "conversations") if column_of(field, columns, "") in rows.columns
    ]
    needs = tuple((side,) for side in SIDES)
    if turn_lists:
        return recognise(rows.columns, columns, [Form("chat", ((turn_lists[0],), *needs), "")])
    recognised = recognise(rows.columns, columns, [Form("chat", needs, "", ("prompt",))])
    prompt = None if columns and "messages" in columns else _first_value(rows, "prompt")
    if prompt is None or (isinstance(prompt, str) and dialogue):
        return recognised
    return replace(recognised, columns=(("messages", "prompt"),))


def recognise_labelled(rows: Rows, columns: Columns = None) -> Recognised:
    """Choose the built-in template as `recognise` does, with a column `label` in addition."""
    return recognise(rows.columns, columns, _LABELLED_FORMS)


def fields_of_pair(template: Template) -> frozenset[str]:
    """The fields that `render_pair` reads: those of the prompt, and both answers."""
    prompt = template.fields if template.is_chat else template.fields - {template.answer_field}
    return prompt | {*SIDES}


def missing_pair_columns(template: Template, names: Sequence[str], columns: Columns = None) -> list[Problem]:
    """Like `Template.missing_columns`, for both answers. Whole dialogues need no prompt column."""
    answers, prompt_columns = _split_columns(template, columns)
    if template.is_chat:
        template.check_columns(prompt_columns)
        return [missing_column(name, names, "--columns") for name in answers.values() if name not in names]
    by_answer = [
        template.missing_columns(names, {**prompt_columns, template.answer_field: name})
        for name in answers.values()
    ]
    return list(dict.fromkeys(problem for problems in by_answer for problem in problems))


def missing_label_columns(template: Template, names: Sequence[str], columns: Columns = None) -> list[Problem]:
    """Like `Template.missing_columns`, with the label's column."""
    columns = dict(columns or {})
    label = columns.pop("label", "label")
    missing = [] if label in names else [missing_column(label, names, "--columns")]
    return [*template.missing_columns(names, columns), *missing]


def _split_columns(template: Template, columns: Columns) -> tuple[dict[str, str], dict[str, str]]:
    """The columns of `chosen` and `rejected`, and the mapping of the other fields."""
    columns = dict(columns or {})
    if "answer" in columns or (template.answer_field in columns and not template.is_chat):
        cure = "name the columns of `chosen` and `rejected`"
        raise UserError("a pair has two answers", place="--columns", cure=cure)
    return {side: columns.pop(side, side) for side in SIDES}, columns


def _check_answers(row: Row, answers: Mapping[str, str]) -> None:
    """Raises UserError unless both answers have a value; `answers`: side -> column."""
    problems = []
    for name in answers.values():
        value = row.values.get(name)
        if value is None or value in ([], {}) or (isinstance(value, str) and not value.strip()):
            state = "missing" if name not in row.values else "null" if value is None else "empty"
            cure = f"a pair needs both answers ({' and '.join(answers.values())}); fill it or remove the row"
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
    state = described(value) if column in row.values else "missing"
    cure = "give true or false: whether the answer is desirable"
    raise UserError(f'field "{column}" is {state}', place=row.place, cure=cure)


# Turns


def _turn_pair(
    template: Template, row: Row, columns: Mapping[str, str], answer_columns: Mapping[str, str]
) -> RenderedPair:
    prompt_columns = [
        column_of(variant.answer_placeholder.field, columns, "") for variant in template.variants
    ]
    variant = next((i for i, name in enumerate(prompt_columns) if row.values.get(name) is not None), 0)
    prompt_column = prompt_columns[variant]
    answers = {side: _answer_turns(row, answer_columns[side]) for side in SIDES}
    dialogues = all(turns[0].role != "assistant" for turns in answers.values())
    before = () if dialogues else _prompt_turns(row, prompt_column)
    no_prompt = not before and row.values.get(prompt_column) is None
    if no_prompt and not dialogues and len(answers["chosen"]) < 2:
        raise UserError(
            f'field "{prompt_columns[0]}" is missing, and the answers are not whole dialogues',
            place=row.place,
            cure=f"give the turns before the answers in {' or '.join(prompt_columns)}",
        )
    chosen, rejected = ((*before, *answers[side]) for side in SIDES)
    count = _shared_turns(chosen, rejected, row.place)
    _check_sides({"chosen": chosen, "rejected": rejected}, count, row.place)
    single = len(chosen) == len(rejected) == count + 1
    return RenderedPair(
        chosen=_rendered(chosen, count, variant, single),
        rejected=_rendered(rejected, count, variant, single),
        prompt_turns=count,
    )


def _rendered(turns: Sequence[Turn], prompt_turns: int, variant: int, single: bool) -> Rendered:
    """Turns as text. With `single`, the only turn after the prompt becomes `answer`."""
    rendered = as_rendered_turns(turns)
    if single:
        return Rendered(rendered[:prompt_turns], rendered[prompt_turns].pieces, variant, "assistant")
    return Rendered(rendered, (), variant, "assistant")


def _shared_turns(chosen: Sequence[Turn], rejected: Sequence[Turn], place: str) -> int:
    """The number of turns of the prompt, with which both begin. The last turn of either never belongs to it."""
    shorter = min(len(chosen), len(rejected))
    count = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter)
    if count == shorter:
        count -= 1
    first_roles = [turns[count].role for turns in (chosen, rejected)]
    if count == 0 or first_roles != ["assistant", "assistant"]:
        problem = (
            f"chosen and rejected differ from turn {count + 1} on, which is not an answer in both: "
            "their prompts differ"
        )
        cure = "give both answers the same turns before them"
        raise UserError(problem, place=place, cure=cure)
    return count


def _check_sides(sides: Mapping[str, Sequence[Turn]], count: int, place: str) -> None:
    problems = [
        Problem(f"{side} ends with a {turns[-1].role} turn", place, "end it with an assistant turn")
        for side, turns in sides.items()
        if turns[-1].role != "assistant"
    ]
    role = sides["chosen"][count - 1].role
    if role in ("assistant", "system"):
        article = "an" if role == "assistant" else "a"
        problem = f"the prompt of chosen and rejected ends with {article} {role} turn"
        problems.append(Problem(problem, place, "end it with the turn to answer"))
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


def _answer_turns(row: Row, column: str) -> tuple[Turn, ...]:
    """An answer's turns: a list, a single turn, the text of one, or a dialogue as one text."""
    value = row.values[column]
    if isinstance(value, Mapping):
        turn = turn_of(value, column, row.place)
        if turn is None:
            raise UserError(f'field "{column}" is an empty system turn', place=row.place)
        return (turn,)
    if not isinstance(value, str):
        return turns_of(row, column)
    text = field_text(row, column) or ""
    turns = tuple(_split_dialogue(text)) if _SPEAKER.match(text) else (Turn("assistant", text),)
    if any(not turn.text for turn in turns):
        raise UserError(f'field "{column}" has an empty turn', place=row.place, cure="remove the row")
    return turns


def _split_dialogue(text: str) -> Iterator[Turn]:
    marks = list(_SPEAKER.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=True):
        yield Turn(_SPEAKERS[mark[1]], text[mark.end() : end].strip())


def _first_value(rows: Rows, column: str) -> object:
    """The first value of a column that is not null; None if there is none in the first rows."""
    values = (row.values.get(column) for row in islice(rows, _ROWS_INSPECTED))
    return next((value for value in values if value is not None), None)


def _is_dialogue(value: object) -> bool:
    """Whether a value is a whole dialogue: turns that do not begin with an answer."""
    if isinstance(value, str):
        return _SPEAKER.match(value) is not None
    first = value[0] if isinstance(value, Sequence) and value else None
    return isinstance(first, Mapping) and ROLES.get(str(first.get("from", first.get("role")))) != "assistant"


def _has_prompt(names: Sequence[str], columns: Columns) -> bool:
    fields = {name for form in _PAIR_FORMS for group in form.needs for name in group} - set(SIDES)
    return any(column_of(field, columns, "") in names for field in fields)


def _whole_text(rendered: Rendered) -> str:
    """The answer; for answers of several turns, the whole conversation."""
    return answer_text(rendered) if rendered.answer else joined(rendered.prompt_pieces)
