"""Preference data as text: a prompt with a chosen and a rejected answer, or with one answer and a label.

A template is filled as for supervised training, once per answer. Turns come as `messages` or `conversations` plus the
two answers, or as two whole dialogues, whose shared beginning is the prompt, or as one dialogue and the other answer.
OpenAI's and ms-swift's columns are such turns under other names.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from yeonma.data.column_paths import value_in, with_paths
from yeonma.data.columns import (
    FORMS,
    ROWS_INSPECTED,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    Columns,
    Form,
    Recognised,
    column_of,
    field_text,
    filled_columns,
    is_filled,
    recognise,
    without_value,
)
from yeonma.data.rows import Row, Rows
from yeonma.data.strict_json import described
from yeonma.data.template import (
    Rendered,
    Template,
    answer_text,
    as_rendered_turns,
    missing_column,
)
from yeonma.data.template_syntax import joined
from yeonma.data.text_checks import SPACED_APART, Notes, digest_of, notes_of
from yeonma.data.turns import ROLES, Role, Turn, tools_of, turn_of, turns_of
from yeonma.data.words import all_of, any_of, field_name
from yeonma.errors import Problem, UserError, brief
from yeonma.messages import tr

SIDES = ("chosen", "rejected")
LABEL_COLUMNS = ("label", "kto_tag")
LABEL_WORDS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "chosen", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable"), False),
}
"""Labels, in any case, and whether they say that the answer is desirable."""
_TURN_COLUMNS = ("messages", "conversations")
_TEXT_WITH_TURNS = {"alpaca": "alpaca-turns"}
"""Templates that give way beside a system prompt; prompt and completion become turns of the template chat."""

_PAIR_FORMS = tuple(
    replace(form, needs=(*(group for group in form.needs if form.answer not in group), *((side,) for side in SIDES)))
    for form in FORMS
)  # fmt: skip
_LABELLED_FORMS = tuple(replace(form, needs=(*form.needs, LABEL_COLUMNS)) for form in FORMS)

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
    """Fill the template as for supervised training; `label` or `kto_tag` says whether the answer is desirable.

    The last turn of a turn list is the answer. With turns, `columns` may map `answer` to a column of its own, whose
    turns follow those of the prompt. Raises UserError as `Template.render` and `render_pairs`, and for a label that
    is none of LABEL_WORDS.
    """
    columns = dict(columns or {})
    desirable = _label(row, _label_column(row.values, columns))
    columns.pop("label", None)
    if template.is_chat:
        return RenderedLabel(_labelled_turns(template, row, columns), desirable)
    return RenderedLabel(template.render(row, columns), desirable)


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
    """What `--columns` would say about turns under other names than `messages`, `chosen` and `rejected`.

    OpenAI's: `input.messages`, `preferred_output`, `non_preferred_output`. ms-swift's: `messages`, whose last turn is
    the chosen answer, with `rejected_response` or `rejected_messages`. TRL's: the turns before the answers in `prompt`.
    Empty for other rows. `columns` is what the user mapped already.
    """
    named, names = columns or {}, rows.columns
    turns = next((name for field in _TURN_COLUMNS if (name := column_of(field, columns, "")) in names), None)
    if any(side in named or side in names for side in SIDES):
        in_prompt = turns is None and "messages" not in named and _has_prompt_of_turns(rows, columns)
        return {"messages": "prompt"} if in_prompt else {}
    if "preferred_output" in names and "non_preferred_output" in names:
        nested = "messages" not in named and isinstance(_first_value(rows, "input"), Mapping)
        answers = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
        return {"messages": "input.messages", **answers} if nested else answers
    rejected = next((name for name in ("rejected_messages", "rejected_response") if name in names), None)
    return {"chosen": turns, "rejected": rejected} if rejected and turns else {}


def _has_prompt_of_turns(rows: Rows, columns: Columns) -> bool:
    """Whether `prompt` comes before answers that are turns, and is not the beginning of whole dialogues as text."""
    chosen, prompt = _first_value(rows, column_of("chosen", columns, "")), _first_value(rows, "prompt")
    if prompt is None or chosen is None or not (_is_turns(chosen) or _is_dialogue(chosen)):
        return False
    return not (isinstance(prompt, str) and _is_dialogue(chosen))


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
    whole_texts = isinstance(chosen, str) and _is_dialogue(chosen) and not _has_prompt(rows.columns, columns)
    if chosen is not None and not _is_turns(chosen) and not whole_texts:
        recognised = recognise(filled_columns(rows), columns, _PAIR_FORMS, _TEXT_WITH_TURNS)
        return _as_turns(recognised, rows, {"messages": column_of("prompt", columns, "")})
    turn_list = [(field,) for field in _TURN_COLUMNS if column_of(field, columns, "") in rows.columns][:1]
    needs = (*turn_list, *((side,) for side in SIDES))
    form = Form("chat", needs, "", () if turn_list else ("prompt",))
    return _with_system_turns(recognise(rows.columns, columns, [form]), rows)


def _as_turns(recognised: Recognised, rows: Rows, columns: Mapping[str, str]) -> Recognised:
    """A prompt and its answers as turns if a system prompt or tools stand beside them; `columns` are those of the
    template chat. With turns, the reason names the columns of system prompts."""
    if recognised.template == "chat":
        return _with_system_turns(recognised, rows)
    beside = [name for name in (*SYSTEM_COLUMNS, *TOOL_COLUMNS) if name in filled_columns(rows)]
    if recognised.template != "prompt-completion" or not beside:
        return recognised
    shown = ", ".join((recognised.shown, *beside))
    return replace(recognised, template="chat", shown=shown, columns=tuple(columns.items()))


def _with_system_turns(recognised: Recognised, rows: Rows) -> Recognised:
    """The same, with a reason that names the columns of system prompts."""
    names = tuple([name for name in SYSTEM_COLUMNS if name in rows.columns])
    return replace(recognised, system_columns=names)


def labelled_shape(rows: Rows, columns: Columns = None) -> dict[str, str]:
    """What `--columns` would say about `prompt` and `completion` that hold turns; nothing about other rows."""
    named, names = columns or {}, {*rows.columns}
    other_turns = {column_of(field, columns, "") for field in _TURN_COLUMNS} - {"prompt"}
    if "answer" in named or names & other_turns or not names >= {"prompt", "completion"}:
        return {}
    in_turns = any(_is_turns(_first_value(rows, name)) for name in ("prompt", "completion"))
    return {"messages": "prompt", "answer": "completion"} if in_turns else {}


def recognise_labelled(rows: Rows, columns: Columns = None) -> Recognised:
    """Choose the built-in template as `recognise` does, with a column `label` or `kto_tag` in addition.

    Raises UserError as `recognise_pairs`.
    """
    shape = labelled_shape(rows, columns)
    columns = {**shape, **(columns or {})}
    if shape:
        form = Form("chat", (("messages",), ("answer",), LABEL_COLUMNS), "")
        recognised = _with_system_turns(recognise(rows.columns, columns, [form]), rows)
    else:
        recognised = recognise(filled_columns(rows), columns, _LABELLED_FORMS, _TEXT_WITH_TURNS)
        names = {
            "messages": column_of("prompt", columns, ""),
            "answer": column_of("completion", columns, "completion"),
        }
        recognised = _as_turns(recognised, rows, names)
    return replace(recognised, columns=(*shape.items(), *recognised.columns))


def fields_of_pair(template: Template) -> frozenset[str]:
    """The fields that `render_pairs` reads: those of the prompt, and both answers."""
    if template.is_chat:
        return template.fields | {*SIDES, *SYSTEM_COLUMNS}
    return (template.fields - {template.answer_field}) | {*SIDES}


def fields_of_label(template: Template) -> frozenset[str]:
    """The fields that `render_label` reads. `answer` is a column of its own only with turns."""
    return template.fields | {*LABEL_COLUMNS, *((*SYSTEM_COLUMNS, "answer") if template.is_chat else ())}


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
    needed = [_label_column(names, columns)]
    columns.pop("label", None)
    if template.is_chat and "messages" in columns and "answer" in columns:
        needed.insert(0, columns["answer"])
    missing = [missing_column(name, names, "--columns") for name in needed if name not in names]
    return [*template.missing_columns(names, columns), *missing]


def _split_columns(template: Template, columns: Columns) -> tuple[dict[str, str], dict[str, str]]:
    """The columns of `chosen` and `rejected`, and the mapping of the other fields."""
    columns = dict(columns or {})
    if "answer" in columns or (template.answer_field in columns and not template.is_chat):
        cure = tr("name the columns of `chosen` and `rejected`")
        raise UserError(tr("a pair has two answers"), place="--columns", cure=cure)
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
    if problems := _without_value(row, (answers["chosen"], *rejected)):
        cure = tr(
            "a pair needs both answers ({answers}); fill it or remove the row",
            answers=all_of(answers.values()),
        )
        raise UserError([replace(problem, cure=cure) for problem in problems])


def _without_value(row: Row, columns: Sequence[str]) -> list[Problem]:
    """A problem for each of the columns that has no value or an empty one."""
    problems = []
    for name in columns:
        value = row.values.get(name)
        if value is None or value in ([], {}) or (isinstance(value, str) and not value.strip()):
            state: Literal["missing", "null", "empty"] = (
                "missing" if name not in row.values else "null" if value is None else "empty"
            )
            problems.append(Problem(without_value(field_name(name), state), row.place))
    return problems


def _label_column(names: Container[str], columns: Mapping[str, str]) -> str:
    """The column of the label, of those that `names` has."""
    first = LABEL_COLUMNS[0]
    return columns.get(first) or next((name for name in LABEL_COLUMNS if name in names), first)


def _label(row: Row, column: str) -> bool:
    value = row.values.get(column)
    if isinstance(value, (str, int, float)) and (word := str(value).strip().lower()) in LABEL_WORDS:
        return LABEL_WORDS[word]
    state = f'"{brief(value)}"' if isinstance(value, str) else described(value)
    good, bad = (
        ", ".join(word for word, is_good in LABEL_WORDS.items() if is_good == side) for side in (True, False)
    )
    found = tr('field "{column}" is {state}', column=column, state=state)
    raise UserError(
        found if column in row.values else without_value(field_name(column), "missing"),
        place=row.place,
        cure=tr("say whether the answer is desirable: {good}; or not: {bad}", good=good, bad=bad),
    )


def _labelled_turns(template: Template, row: Row, columns: dict[str, str]) -> Rendered:
    """A turn list with its last turn as the answer, or the turns of a prompt and of an answer from two columns."""
    names = [
        column_of(variant.answer_placeholder.field, columns, template.answer_field)
        for variant in template.variants
    ]
    column = next((name for name in names if row.values.get(name) is not None), names[0])
    apart = columns.get("answer") if "messages" in columns else None
    if apart is None:
        rendered = template.render(row, columns)
    else:
        template.check_columns(columns)
        if problems := _without_value(row, (column, apart)):
            cure = tr(
                "a labelled answer needs both {column} and {apart}; fill it or remove the row",
                column=column,
                apart=apart,
            )
            raise UserError([replace(problem, cure=cure) for problem in problems])
        turns = _with_system(row, (*_prompt_turns(row, column), *_answer_turns(row, apart)))
        rendered = Rendered(as_rendered_turns(turns), (), names.index(column), "assistant")
    *prompt, last = rendered.turns
    if last.role != "assistant":
        what = (
            tr("the turn list does not end with an assistant turn")
            if apart is None
            else tr('field "{apart}" does not end with an assistant turn', apart=apart)
        )
        raise UserError(what, place=row.place, cure=tr("end it with the answer"))
    _refuse_weights([last.turn], row.place)
    rendered = replace(rendered, turns=tuple(prompt), answer=last.pieces, answer_turn=last.turn)
    return _with_tools(template, row, columns, column, rendered)


# Turns


def _turn_pair(
    template: Template, row: Row, columns: Mapping[str, str], chosen_column: str, rejected_column: str
) -> RenderedPair:
    prompt_columns = [
        column_of(variant.answer_placeholder.field, columns, "") for variant in template.variants
    ]
    variant = next((i for i, name in enumerate(prompt_columns) if row.values.get(name) is not None), 0)
    prompt_column = prompt_columns[variant]
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
                tr(
                    'field "{prompt_columns}" is missing, and the answers are not whole dialogues',
                    prompt_columns=prompt_columns[0],
                ),
                place=row.place,
                cure=tr(
                    "give the turns before the answers in {prompt_columns}",
                    prompt_columns=any_of(prompt_columns),
                ),
            )
        sides = {side: (*before, *turns) for side, turns in sides.items()}
    chosen, rejected = (_with_system(row, turns) for turns in sides.values())
    count = _shared_turns(chosen, rejected, row.place)
    _check_sides({"chosen": chosen, "rejected": rejected}, count, row.place)
    _refuse_weights([*chosen[count:], *rejected[count:]], row.place)
    single = len(chosen) == len(rejected) == count + 1
    chosen_text, rejected_text = (
        _with_tools(template, row, columns, prompt_column, _rendered(turns, count, variant, single))
        for turns in (chosen, rejected)
    )
    return RenderedPair(chosen_text, rejected_text, count)


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
            problem = (
                tr(
                    'field "{other}" is a system prompt, but the turns begin with another system turn',
                    other=other,
                )
                if own
                else tr(
                    'field "{other}" is a system prompt, but field "{first}" says another',
                    other=other,
                    first=first,
                )
            )
            raise UserError(problem, place=row.place, cure=tr("keep one of them"))
    return turns if own else (Turn("system", text), *turns)


def _with_tools(
    template: Template, row: Row, columns: Columns, prompt_column: str, rendered: Rendered
) -> Rendered:
    """The row with the tools beside its turns, in columns of their own or in OpenAI's `input`. Raises UserError for
    tools of the rejected answer alone: both answers have one prompt."""
    if is_filled(value_in(row, "rejected_tools")):
        problem = tr('field "rejected_tools": both answers of a pair have the same tools')
        raise UserError(problem, place=row.place, cure=tr("remove it"))
    rendered = template.with_arguments(rendered, row, columns)
    parent = prompt_column.rpartition(".")[0]
    if rendered.tools or not parent:
        return rendered
    path = f"{parent}.tools"
    return replace(rendered, tools=tools_of(value_in(row, path), path, row.place))


def _refuse_weights(turns: Iterable[Turn | None], place: str) -> None:
    """Raises UserError for weights of answers: a preference loss has none."""
    if any(turn is not None and turn.weight not in (None, 1) for turn in turns):
        problem = tr("an answer has a weight, which preference data does not use")
        raise UserError(problem, place=place, cure=tr("remove the weight, or the row"))


def _rendered(turns: Sequence[Turn], prompt_turns: int, variant: int, single: bool) -> Rendered:
    """Turns as text. With `single`, the only turn after the prompt becomes `answer`."""
    rendered = as_rendered_turns(turns)
    if single:
        answer = rendered[prompt_turns]
        return Rendered(rendered[:prompt_turns], answer.pieces, variant, "assistant", answer_turn=answer.turn)
    return Rendered(rendered, (), variant, "assistant")


def _shared_turns(chosen: Sequence[Turn], rejected: Sequence[Turn], place: str) -> int:
    """The number of turns of the prompt, with which both begin. The last turn of either never belongs to it."""
    shorter = min(len(chosen), len(rejected))
    count = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter)
    if count == shorter:
        count -= 1
    first_roles = [turns[count].role for turns in (chosen, rejected)]
    if count == 0 or first_roles != ["assistant", "assistant"]:
        problem = tr(
            "chosen and rejected differ from turn {count} on, which is not an answer in both: their "
            "prompts differ",
            count=count + 1,
        )
        cure = tr("give both answers the same turns before them")
        raise UserError(problem, place=place, cure=cure)
    return count


def _check_sides(sides: Mapping[str, Sequence[Turn]], count: int, place: str) -> None:
    problems = [
        _wrong_end(side, turns[-1], place) for side, turns in sides.items() if turns[-1].role != "assistant"
    ]
    role = sides["chosen"][count - 1].role
    if role in ("assistant", "system"):
        problem = (
            tr("the prompt of chosen and rejected ends with an assistant turn")
            if role == "assistant"
            else tr("the prompt of chosen and rejected ends with a system turn")
        )
        problems.append(Problem(problem, place, tr("end it with the turn to answer")))
    if problems:
        raise UserError(problems)


def _wrong_end(side: str, last: Turn, place: str) -> Problem:
    return Problem(
        tr("{side} ends with a {role} turn", side=side, role=last.role),
        place,
        tr("end it with an assistant turn"),
    )


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
            raise UserError(tr('field "{column}" is an empty system turn', column=column), place=row.place)
        return (turn,)
    if not isinstance(value, str):
        return turns_of(row, column)
    text = field_text(row, column) or ""
    turns = tuple(_split_dialogue(text)) if _SPEAKER.match(text) else (Turn("assistant", text),)
    if any(not turn.text for turn in turns):
        raise UserError(
            tr('field "{column}" has an empty turn', column=column),
            place=row.place,
            cure=tr("remove the row"),
        )
    return turns


def _split_dialogue(text: str) -> Iterator[Turn]:
    marks = list(_SPEAKER.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=True):
        yield Turn(_SPEAKERS[mark[1]], text[mark.end() : end].strip())


def _first_value(rows: Rows, column: str) -> object:
    """The first value of a column that is not null; None if there is none in the first rows."""
    values = (row.values.get(column) for row in islice(rows, ROWS_INSPECTED))
    return next((value for value in values if value is not None), None)


def _is_turns(value: object) -> bool:
    """Whether a value may be a turn or a list of turns, not a text."""
    return isinstance(value, (Mapping, list, tuple))


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
