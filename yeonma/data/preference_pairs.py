"""Preference data as text: a prompt with a chosen and a rejected answer, or with one answer and a label.

A template is filled as for supervised training, once per answer. Turns come as `messages` or `conversations` plus the
two answers, or as two whole dialogues, whose shared beginning is the prompt, or as one dialogue and the other answer.
OpenAI's and ms-swift's columns are such turns under other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from yeonma.data.column_paths import value_in, with_paths
from yeonma.data.columns import FORMS, Columns, Form, Recognised, column_of, field_text, recognise
from yeonma.data.rows import Row, Rows
from yeonma.data.strict_json import described
from yeonma.data.template import (
    Rendered,
    Template,
    answer_text,
    as_rendered_turns,
    joined,
    load_template,
    missing_column,
)
from yeonma.data.text_checks import SPACED_APART, Notes, digest_of, notes_of
from yeonma.data.turns import ROLES, Role, Turn, turn_of, turns_of
from yeonma.errors import Problem, UserError

SIDES = ("chosen", "rejected")
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns beside turns whose text is the system turn of the prompt."""
_TURN_COLUMNS = ("messages", "conversations")
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


def render_pairs(template: Template, row: Row, columns: Columns = None) -> tuple[RenderedPair, ...]:
    """Fill the template with both answers of a row. `columns` may also map `chosen` and `rejected`.

    A list of several rejected answers, as texts or as turn lists, gives a pair for each.
    Raises UserError with the row's place as `Template.render`, for an answer that is missing or empty, for dialogues
    whose prompts differ, and beside turns for tools and for a second system text.
    """
    answers, prompt_columns = _split_columns(template, columns)
    row, rejected = _each_answer(row, answers["rejected"])
    _check_answers(row, answers, rejected)
    if template.is_chat:
        template.check_columns(prompt_columns)
        return tuple(
            [_turn_pair(template, row, prompt_columns, answers["chosen"], column) for column in rejected]
        )
    chosen, *others = (
        template.render(row, {**prompt_columns, template.answer_field: column})
        for column in (answers["chosen"], *rejected)
    )
    return tuple([RenderedPair(chosen, other, len(chosen.turns)) for other in others])


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


def notes_of_pairs(pairs: Sequence[RenderedPair]) -> Notes:
    """The notes of all answers of a row together. Its pairs have one chosen answer."""
    chosen, *others = (notes_of(side) for side in (pairs[0].chosen, *(pair.rejected for pair in pairs)))
    text = _whole_text(pairs[0].chosen)
    differ_in_space = any(_differ_in_space(text, _whole_text(pair.rejected)) for pair in pairs)
    flags, scripts = (SPACED_APART if differ_in_space else 0) | chosen.flags, chosen.scripts
    for notes in others:
        flags, scripts = flags | notes.flags, scripts | notes.scripts
    return Notes(
        flags=flags,
        scripts=scripts,
        digest=digest_of([f"{notes.digest:x}" for notes in (chosen, *others)]),
        prompt_digest=chosen.prompt_digest,
    )


def pair_shape(rows: Rows, columns: Columns = None) -> dict[str, str]:
    """What `--columns` would say about turns in OpenAI's form or in ms-swift's; nothing about other rows.

    OpenAI: `input.messages`, `preferred_output`, `non_preferred_output`. ms-swift: `messages`, whose last turn is the
    chosen answer, with `rejected_response` or `rejected_messages`. `columns` is what the user mapped already.
    """
    named, names = columns or {}, rows.columns
    if any(side in named or side in names for side in SIDES):
        return {}
    if "preferred_output" in names and "non_preferred_output" in names:
        shape = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
        nested = "messages" not in named and isinstance(_first_value(rows, "input"), Mapping)
        return {**({"messages": "input.messages"} if nested else {}), **shape}
    rejected = next((name for name in ("rejected_messages", "rejected_response") if name in names), None)
    dialogue = next(
        (name for field in _TURN_COLUMNS if (name := column_of(field, columns, "")) in names), None
    )
    return {"chosen": dialogue, "rejected": rejected} if rejected and dialogue else {}


def recognise_pairs(rows: Rows, columns: Columns = None) -> Recognised:
    """Choose the built-in template as `recognise` does, with columns `chosen` and `rejected` in place of the answer.

    Answers that are turns need the template chat; the result then says which columns hold the turns.
    Raises UserError as `recognise`, and if the template of texts does not show a column with system prompts.
    """
    shape = pair_shape(rows, columns)
    columns = {**shape, **(columns or {})}
    rows = with_paths(rows, columns)
    recognised = _recognise_pairs(rows, columns)
    return replace(recognised, columns=(*shape.items(), *recognised.columns))


def _recognise_pairs(rows: Rows, columns: Mapping[str, str]) -> Recognised:
    chosen = _first_value(rows, column_of("chosen", columns, ""))
    dialogue = _is_dialogue(chosen)
    is_turns = chosen is None or isinstance(chosen, (Mapping, list, tuple))
    if not is_turns and not (dialogue and not _has_prompt(rows.columns, columns)):
        return _showing_system(recognise(rows.columns, columns, _PAIR_FORMS), rows, columns)
    turn_lists = [field for field in _TURN_COLUMNS if column_of(field, columns, "") in rows.columns]
    needs = tuple((side,) for side in SIDES)
    if turn_lists:
        form = Form("chat", ((turn_lists[0],), *needs), "")
        return _with_system_turns(recognise(rows.columns, columns, [form]), rows)
    form = Form("chat", needs, "", ("prompt",))
    recognised = _with_system_turns(recognise(rows.columns, columns, [form]), rows)
    prompt = None if "messages" in columns else _first_value(rows, "prompt")
    if prompt is None or (isinstance(prompt, str) and dialogue):
        return recognised
    return replace(recognised, columns=(("messages", "prompt"),))


def _showing_system(recognised: Recognised, rows: Rows, columns: Mapping[str, str]) -> Recognised:
    """The same. Raises UserError if the template of texts does not show a column with system prompts."""
    template = recognised.template
    used = load_template(template).fields | {*columns.values()}
    for name in SYSTEM_COLUMNS:
        if name in used or name not in rows.columns:
            continue
        values = (row.values.get(name) for row in islice(rows, _ROWS_INSPECTED))
        if any(value is not None and str(value).strip() for value in values):
            orca = f"--template orca with --columns '{{question: {column_of('prompt', columns, '')}}}'"
            shown = orca if template == "prompt-completion" else f"one of your own with {{{name}}}"
            problem = f'the template {template} does not show the column "{name}"'
            cure = f"give a template that does, {shown}; or --template {template} to leave the column out"
            raise UserError(problem, place="--template", cure=cure)
    return recognised


def _with_system_turns(recognised: Recognised, rows: Rows) -> Recognised:
    """The same, with a reason that names the columns of system prompts."""
    names = [name for name in SYSTEM_COLUMNS if name in rows.columns]
    reason = f"{recognised.reason}; system turns are in {' or '.join(names)}"
    return replace(recognised, reason=reason) if names else recognised


def recognise_labelled(rows: Rows, columns: Columns = None) -> Recognised:
    """Choose the built-in template as `recognise` does, with a column `label` in addition."""
    return recognise(rows.columns, columns, _LABELLED_FORMS)


def fields_of_pair(template: Template) -> frozenset[str]:
    """The fields that `render_pairs` reads: those of the prompt, and both answers."""
    if template.is_chat:
        return template.fields | {*SIDES, *SYSTEM_COLUMNS}
    return (template.fields - {template.answer_field}) | {*SIDES}


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


def _each_answer(row: Row, column: str) -> tuple[Row, list[str]]:
    """A row with a column for each of several answers in a list, and the names of these columns; else the row itself.

    A list of turns is one answer.
    """
    value = row.values.get(column)
    if not isinstance(value, (list, tuple)) or not value or any(isinstance(part, Mapping) for part in value):
        return row, [column]
    named = {f"{column}[{number}]": part for number, part in enumerate(value)}
    return replace(row, values={**row.values, **named}), list(named)


def _check_answers(row: Row, answers: Mapping[str, str], rejected: Sequence[str]) -> None:
    """Raises UserError unless all answers have a value. `answers`: side -> column; `rejected`: the columns of each."""
    problems = []
    for name in (answers["chosen"], *rejected):
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
    template: Template, row: Row, columns: Mapping[str, str], chosen_column: str, rejected_column: str
) -> RenderedPair:
    prompt_columns = [
        column_of(variant.answer_placeholder.field, columns, "") for variant in template.variants
    ]
    variant = next((i for i, name in enumerate(prompt_columns) if row.values.get(name) is not None), 0)
    prompt_column = prompt_columns[variant]
    _refuse_tools(row, prompt_column)
    by_side = {"chosen": chosen_column, "rejected": rejected_column}
    sides = {side: _answer_turns(row, column) for side, column in by_side.items()}
    whole = [
        side
        for side, turns in sides.items()
        if turns[0].role != "assistant" or by_side[side] in prompt_columns
    ]
    if len(whole) == 1:
        sides = _with_dialogue(sides, whole[0], row.place)
    elif not whole:
        before = _prompt_turns(row, prompt_column)
        if not before and row.values.get(prompt_column) is None and len(sides["chosen"]) < 2:
            raise UserError(
                f'field "{prompt_columns[0]}" is missing, and the answers are not whole dialogues',
                place=row.place,
                cure=f"give the turns before the answers in {' or '.join(prompt_columns)}",
            )
        sides = {side: (*before, *turns) for side, turns in sides.items()}
    chosen, rejected = (_with_system(row, turns) for turns in sides.values())
    count = _shared_turns(chosen, rejected, row.place)
    _check_sides({"chosen": chosen, "rejected": rejected}, count, row.place)
    single = len(chosen) == len(rejected) == count + 1
    return RenderedPair(
        chosen=_rendered(chosen, count, variant, single),
        rejected=_rendered(rejected, count, variant, single),
        prompt_turns=count,
    )


def _with_dialogue(
    sides: Mapping[str, tuple[Turn, ...]], whole: str, place: str
) -> dict[str, tuple[Turn, ...]]:
    """Both sides as dialogues. `whole` is one, and its last turn is the answer; the other may be only an answer."""
    *prompt, last = sides[whole]
    if last.role != "assistant":
        raise UserError([_wrong_end(whole, last, place)])
    return {
        side: turns if side == whole or list(turns[: len(prompt)]) == prompt else (*prompt, *turns)
        for side, turns in sides.items()
    }


def _with_system(row: Row, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns, after the system prompt that a column beside them holds. Raises UserError for two that differ."""
    texts = {name: text for name in SYSTEM_COLUMNS if (text := field_text(row, name)) is not None}
    if not texts:
        return turns
    own = {f"a turn of {turns[0].role}": turns[0].text} if turns[0].role == "system" else {}
    (first, text), *others = (own | texts).items()
    for other, other_text in others:
        if other_text.strip() != text.strip():
            where = "the turns begin with another system turn" if own else f'field "{first}" says another'
            problem = f'field "{other}" is a system prompt, but {where}'
            raise UserError(problem, place=row.place, cure="keep one of them")
    return turns if own else (Turn("system", text), *turns)


def _refuse_tools(row: Row, prompt_column: str) -> None:
    """Raises UserError for tools beside the turns, which no prompt shows."""
    parent = prompt_column.rpartition(".")[0]
    for path in ("tools", "rejected_tools", *([f"{parent}.tools"] if parent else [])):
        value = value_in(row, path)
        if value and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")):
            cure = "write the tools into the system turn, or remove them"
            raise UserError(f'field "{path}": tools cannot be trained', place=row.place, cure=cure)


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
        _wrong_end(side, turns[-1], place) for side, turns in sides.items() if turns[-1].role != "assistant"
    ]
    role = sides["chosen"][count - 1].role
    if role in ("assistant", "system"):
        article = "an" if role == "assistant" else "a"
        problem = f"the prompt of chosen and rejected ends with {article} {role} turn"
        problems.append(Problem(problem, place, "end it with the turn to answer"))
    if problems:
        raise UserError(problems)


def _wrong_end(side: str, last: Turn, place: str) -> Problem:
    return Problem(f"{side} ends with a {last.role} turn", place, "end it with an assistant turn")


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


def _differ_in_space(first: str, second: str) -> bool:
    return first != second and "".join(first.split()) == "".join(second.split())


def _whole_text(rendered: Rendered) -> str:
    """The answer; for answers of several turns, the whole conversation."""
    return answer_text(rendered) if rendered.answer else joined(rendered.prompt_pieces)
