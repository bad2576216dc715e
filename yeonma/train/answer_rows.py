"""The validation rows that a model answers while it is trained, with their prompts of training and wanted answers.

Needs no weights, so that everything wrong with rows and metrics is said before they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yeonma.adapter.prompt_builder import Prompt, TemplateTexts
from yeonma.adapter.samples import MAX_NEW_TOKENS, prompts_of, with_room
from yeonma.bounded.user_functions import UserFunctions
from yeonma.config.metric_names import (
    LABEL_METRICS,
    PREFIX,
    SETTING,
    MetricNames,
    check_best,
    metric_names,
)
from yeonma.config.settings import EvaluationSettings
from yeonma.data.strict_json import Fault
from yeonma.data.text_scores import (
    MetricTokenizer,
    chrf,
    chrf_counts,
    json_scores,
    json_value,
    metric_tokenizer,
    rouge,
)
from yeonma.errors import Problem, UserError
from yeonma.messages import tr
from yeonma.model.load import generation_eos
from yeonma.model.position_limits import model_positions
from yeonma.model.source import BaseSource
from yeonma.tokenization.answer_labels import answer_labels
from yeonma.tokenization.dataset import Dataset, PreparedSet, used_rows
from yeonma.tokenization.example import AnswerRole, AnswerTokens, answer_tokens

MOST_PROBLEMS = 10
Scores = dict[str, float]
"""Name of a number -> its value."""


@dataclass(frozen=True, eq=False)
class AnswerRow:
    """A row that is answered at every evaluation."""

    data_set: str
    """Its name if there are several; else empty."""
    number: int
    place: str
    """For messages."""
    values: Mapping[str, object]
    """The row, for functions of the user's."""
    prompt: Prompt
    tokens: AnswerTokens
    """What ends its answer."""
    reference: str
    """The wanted answer."""


@dataclass(frozen=True, eq=False)
class AnswerPlan:
    """What a run measures on answers at every evaluation."""

    names: MetricNames
    rows: tuple[AnswerRow, ...]
    """Empty if labels alone are measured, by likelihood."""
    words: MetricTokenizer
    """What ROUGE counts."""

    def identity(self) -> dict[str, Any]:
        """What of it decides results, for run.json, besides the settings and the content of the user's files."""
        return {"rougeL counts": self.words.name} if "rougeL" in self.names.of_text else {}


def answer_plan(
    settings: EvaluationSettings,
    dataset: Dataset,
    source: BaseSource,
    config: Any,
    tokenizer: Any,
    seed: int,
) -> AnswerPlan | None:
    """The plan of a run; None if it measures nothing. `config`: the base model's.

    Raises UserError if the data have no rows for a metric.
    """
    names = metric_names(settings.answer_metrics)
    check_best(settings.keep_best, names)
    if not names:
        return None
    if names.of_labels:
        _check_labels(dataset, names, tokenizer)
    rows: list[AnswerRow] = []
    if names.need_answers:
        sets = [one for one in dataset.sets if one.validation is not None and not one.template.is_text]
        if not sets:
            what = tr("there is no validation row to answer: whole texts have no prompts")
            raise UserError(what, place=SETTING, cure=tr("leave it out, or hold rows with prompts out"))
        positions = model_positions(config)
        numbers = [_numbers(one) for one in sets]
        for index, (one, count) in enumerate(
            zip(sets, _shares([len(own) for own in numbers], settings.answer_rows), strict=True)
        ):
            draw = np.random.Generator(np.random.PCG64([seed, index]))
            chosen = np.sort(draw.permutation(numbers[index])[:count])
            rows += _rows_of_set(dataset, one, chosen.tolist(), source, tokenizer, positions)
        if not rows:
            what = tr("no validation row has a wanted answer")
            raise UserError(what, place=SETTING, cure=tr("hold such rows out, or leave it out"))
    if "json" in names.of_text:
        _check_json(rows)
    return AnswerPlan(names, tuple(rows), metric_tokenizer(row.reference for row in rows))


def _check_labels(dataset: Dataset, names: MetricNames, tokenizer: Any) -> None:
    for one in dataset.sets:
        store = one.train.store
        if one.validation is not None and answer_labels(store, store.examples_of(one.train.units), tokenizer):
            return
    raise no_label_rows(names)


def no_label_rows(names: MetricNames) -> UserError:
    """The error of metrics of labels for data that have none."""
    cure = tr("leave it out, or measure exact: the fraction of answers that are the wanted ones")
    return UserError(
        [
            Problem(
                tr("{name} needs answers that are the labels of a classification", name=name), SETTING, cure
            )
            for name in names.of_labels
        ]
    )


def _check_json(rows: Sequence[AnswerRow]) -> None:
    problems = []
    for row in rows:
        try:
            json_value(row.reference)
        except Fault as fault:
            what = tr("its wanted answer is no JSON: {problem}", problem=fault.problem)
            problems.append(Problem(what, row.place, tr("leave json out of --answer_metrics")))
    if problems:
        raise UserError(problems[:MOST_PROBLEMS])


def _numbers(one: PreparedSet) -> np.ndarray:
    """The numbers of a data set's validation rows that may have a wanted answer."""
    assert one.validation is not None
    store, positions = one.validation.store, one.validation.positions
    return used_rows(store, positions[store.roles[positions] != AnswerRole.UNDESIRABLE])


def _shares(available: Sequence[int], count: int) -> list[int]:
    """How many rows of each data set are answered: equally many, as far as each has them."""
    shares = [0] * len(available)
    while count and (open_sets := [index for index, own in enumerate(available) if shares[index] < own]):
        each = max(1, count // len(open_sets))
        for index in open_sets[:count]:
            more = min(each, available[index] - shares[index])
            shares[index] += more
            count -= more
    return shares


def _rows_of_set(
    dataset: Dataset,
    one: PreparedSet,
    numbers: Sequence[int],
    source: BaseSource,
    tokenizer: Any,
    positions: int | None,
) -> list[AnswerRow]:
    """The rows with these numbers that have a wanted answer. Reads the data up to the last of them."""
    assert one.validation is not None
    found = one.validation.rows_of(numbers)
    task, rules = dataset.task, dataset.rules
    rendered = [task.preferred(task.render(one.template, row, one.columns)) for row in found]
    stored = prompts_of(one.validation.store, [row.number for row in found])
    prompts = with_room(stored, rendered, found, tokenizer, rules, positions, MAX_NEW_TOKENS)
    tokens = answer_tokens(tokenizer, rules if one.template.has_turns else None, generation_eos(source))
    texts = TemplateTexts(one.template, rules, tokenizer, tokens)
    return [
        AnswerRow(
            one.name if len(dataset.sets) > 1 else "",
            row.number,
            row.place,
            row.values,
            texts.prompt(text, prompt),
            tokens,
            reference,
        )
        for row, text, prompt in zip(found, rendered, prompts, strict=True)
        if (reference := texts.reference(text, row.place)) is not None
    ]


@dataclass(frozen=True)
class AnswerScores:
    """The numbers of all rows together, and those of each row."""

    overall: Scores
    by_row: list[Scores]


def score_answers(plan: AnswerPlan, answers: Sequence[str], functions: UserFunctions) -> AnswerScores:
    """The numbers of the plan's metrics for one answer to each of its rows; higher is better in all of them.

    exact, rougeL, chrf, json and json_fields are between 0 and 100, and a function's numbers are means over the rows.
    Raises UserError if a function of the user's fails.
    """
    references = [row.reference for row in plan.rows]
    overall: Scores = {}
    by_row: list[Scores] = [{} for _ in answers]

    def add(name: str, values: Sequence[float], of_all: float | None = None) -> None:
        for scores, value in zip(by_row, values, strict=True):
            scores[name] = value
        overall[name] = float(np.mean(values)) if of_all is None else of_all

    pairs = list(zip(answers, references, strict=True))
    for metric in plan.names.of_text:
        if metric == "exact":
            add("exact", [100.0 * (answer == reference) for answer, reference in pairs])
        elif metric == "chrf":
            counts = chrf_counts(answers, references)
            add("chrf", chrf(counts).tolist(), float(chrf(counts.sum(axis=0))))
        elif metric == "rougeL":
            split = plan.words.split
            add("rougeL", [100 * rouge(split(answer), split(wanted))[2] for answer, wanted in pairs])
        else:
            whole, fields = zip(*(json_scores(answer, wanted) for answer, wanted in pairs), strict=True)
            add("json", [100 * value for value in whole])
            add("json_fields", [100 * value for value in fields])
    for function in plan.names.functions:
        found = [
            functions.values(function.file, function.function, row.values, answer, row.place)
            for row, answer in zip(plan.rows, answers, strict=True)
        ]
        _check_names(plan, function.function, found, overall, function.path)
        for name in found[0]:
            add(name, [values[name] for values in found])
    return AnswerScores(overall, by_row)


def _check_names(
    plan: AnswerPlan, function: str, found: Sequence[Scores], others: Scores, place: str
) -> None:
    """Raises UserError if a function's numbers have other names from row to row, or names of other metrics."""
    for row, values in zip(plan.rows, found, strict=True):
        if values.keys() != found[0].keys():
            what = tr(
                "the function {function} returned {names} for {row}, and {first} before",
                function=function,
                names=", ".join(values),
                row=row.place,
                first=", ".join(found[0]),
            )
            raise UserError(what, place=place, cure=tr("return the same keys for every row"))
    if taken := sorted(found[0].keys() & {*others, *LABEL_METRICS}):
        what = tr(
            "the function {function} gives {name}, which is measured already",
            function=function,
            name=taken[0],
        )
        raise UserError(what, place=place, cure=tr("give it another name"))


def try_metrics(plan: AnswerPlan, keep_best: bool | str) -> None:
    """Calls each of the user's functions once, on the first row and its wanted answer.

    Raises UserError if one fails, and if `keep_best` names a number that none of them gives.
    """
    if not plan.names.functions:
        return
    first = AnswerPlan(plan.names, plan.rows[:1], plan.words)
    with UserFunctions() as functions:
        scores = score_answers(first, [plan.rows[0].reference], functions)
    check_best(keep_best, plan.names, [name for name in scores.overall if name not in plan.names.built_in()])


def in_metrics(scores: Scores) -> Scores:
    """The numbers by their keys in metrics.jsonl."""
    return {PREFIX + name: value for name, value in scores.items()}
