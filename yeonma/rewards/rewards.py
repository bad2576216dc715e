"""Rewards by their names in `--reward`, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from yeonma.bounded.expressions import bounded_match
from yeonma.bounded.user_functions import UserFunctions, check_function, content_of_file
from yeonma.config.metric_names import FunctionName
from yeonma.config.reward_settings import RewardSettings
from yeonma.errors import UserError, did_you_mean, gather
from yeonma.files import user_path
from yeonma.messages import counted, tr
from yeonma.packages import install
from yeonma.rewards import checkers

EXACT, MATH, PATTERN, SCHEMA = "exact", "math", "regex:", "json_schema:"
PLACE, WEIGHTS = "--reward", "--reward_weights"
CHECKERS = Path(checkers.__file__)
"""The file of the rewards that run in the users' process."""
FUNCTION = "reward"
"""The function of a file that is given without one."""


@dataclass(frozen=True)
class Answered:
    """An answer to a row."""

    row: Mapping[str, object]
    """The row's columns."""
    place: str
    """Of the row, for a message."""
    wanted: str | None
    """The row's own answer, if it has one."""
    answer: str
    """What the model answered, without its reasoning."""


ScoreAnswers = Callable[[Sequence[Answered]], list[dict[str, float]]]
"""Answers -> numbers by name for each of them."""


@dataclass(frozen=True)
class RewardName:
    """A reward of the settings: `exact`, an expression, or a function."""

    text: str
    """As the user wrote it."""

    @property
    def function(self) -> FunctionName | None:
        path, colon, name = self.text.rpartition(":")
        if self.text.endswith(".py"):
            return FunctionName(self.text, FUNCTION)
        return FunctionName(path, name) if colon and path.endswith(".py") else None

    @property
    def label(self) -> str:
        """The name without folders, so that it is the same wherever files lie."""
        if (function := self.function) is not None:
            return str(function)
        return self.text if self.schema is None else f"{SCHEMA}{self.schema.name}"

    @property
    def expression(self) -> str | None:
        return self.text.removeprefix(PATTERN) if self.text.startswith(PATTERN) else None

    @property
    def schema(self) -> Path | None:
        """The file of a JSON schema."""
        return user_path(self.text.removeprefix(SCHEMA)) if self.text.startswith(SCHEMA) else None

    def check(self) -> None:
        """Raises UserError if there is no such reward, without running anything of the user's."""
        if (schema := self.schema) is not None:
            _check_package("jsonschema", ["jsonschema"])
            if not schema.is_file():
                what = tr("there is no file {path}", path=schema)
                raise UserError(
                    what, place=PLACE, cure=tr("write json_schema:FILE with the path of a JSON schema")
                )
        elif self.text == MATH:
            _check_package("math_verify", ["math-verify", "antlr4-python3-runtime"])
        elif (function := self.function) is not None:
            check_function(function.file, function.function, PLACE)
        elif (expression := self.expression) is not None:
            bounded_match(expression, [""], place=PLACE)
        elif self.text != EXACT:
            cure = did_you_mean(self.text, [EXACT, MATH]) or tr(
                "known are exact, math, regex:PATTERN, json_schema:FILE, and FILE.py:function for your own"
            )
            raise UserError(tr('no reward "{name}"', name=self.text), place=PLACE, cure=cure)

    def scores(self, functions: UserFunctions) -> ScoreAnswers:
        """How answers are scored. `functions`: the process of the user's functions."""
        if (function := self.function) is not None:
            return lambda answers: [
                functions.values(function.file, function.function, one.row, one.answer, one.place)
                for one in answers
            ]
        if (expression := self.expression) is not None:
            return lambda answers: _matching(expression, answers)
        if (schema := self.schema) is not None:
            row = {"schema": str(schema)}
            return lambda answers: [
                functions.values(CHECKERS, "json_schema", row, one.answer, one.place) for one in answers
            ]
        if self.text == MATH:
            return lambda answers: [
                functions.values(CHECKERS, MATH, {"wanted": wanted}, one.answer, one.place)
                for one, wanted in zip(answers, _wanted(answers, MATH), strict=True)
            ]
        return exact


def exact(answers: Sequence[Answered]) -> list[dict[str, float]]:
    """1 where the answer is the row's own, blanks around both aside, else 0. Raises UserError for a row without one."""
    wanted = _wanted(answers, EXACT)
    return [
        {EXACT: float(one.answer.strip() == own.strip())} for one, own in zip(answers, wanted, strict=True)
    ]


def _wanted(answers: Sequence[Answered], name: str) -> list[str]:
    """The rows' own answers. Raises UserError for a row without one."""
    found = []
    for one in answers:
        if one.wanted is None:
            what = tr("it has no answer of its own, with which {name} compares", name=name)
            raise UserError(what, place=one.place, cure=tr("give its answer, or another --reward"))
        found.append(one.wanted)
    return found


def _check_package(module: str, packages: Sequence[str]) -> None:
    if find_spec(module) is None:
        what = tr("this reward needs {package}", package=packages[0])
        raise UserError(what, place=PLACE, cure=install(*packages))


def _matching(expression: str, answers: Sequence[Answered]) -> list[dict[str, float]]:
    """1 where the whole answer matches, else 0."""
    found = bounded_match(expression, [one.answer for one in answers], place=PLACE)
    return [{"regex": float(matches)} for matches in found]


@dataclass(frozen=True)
class Reward:
    """One reward of a run."""

    name: str
    """As logs have it."""
    scores: ScoreAnswers
    weight: float = 1.0


def names_of(settings: RewardSettings) -> list[RewardName]:
    """The rewards of the settings, unchecked."""
    given = [settings.reward] if isinstance(settings.reward, str) else settings.reward
    return [RewardName(text) for text in given]


def check_names(settings: RewardSettings) -> None:
    """Raises UserError for an unknown reward, one that stands there twice, and another number of weights than of
    rewards."""
    names, weights = names_of(settings), settings.reward_weights

    def check_counts() -> None:
        if not names:
            raise UserError(tr("it names no reward"), place=PLACE, cure=tr("give one, such as exact"))
        twice = next((name.text for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(tr("{name} stands there twice", name=twice), place=PLACE, cure=tr("name it once"))
        if weights is not None and len(weights) != len(names):
            what = tr(
                "{weights} for {rewards}",
                weights=counted(len(weights), "weight"),
                rewards=counted(len(names), "reward"),
            )
            raise UserError(what, place=WEIGHTS, cure=tr("give one weight for each reward"))

    gather(check_counts, *(name.check for name in names))


def rewards_of(settings: RewardSettings, functions: UserFunctions) -> list[Reward]:
    """The rewards of a run, with their weights. Raises UserError as `check_names`."""
    check_names(settings)
    names = names_of(settings)
    weights = settings.reward_weights or [1.0] * len(names)
    return [
        Reward(name.label, name.scores(functions), weight)
        for name, weight in zip(names, weights, strict=True)
    ]


def contents(settings: RewardSettings) -> dict[str, str]:
    """Each function of the user's, and each schema -> the SHA-256 of its file."""
    found: dict[str, str] = {}
    for name in names_of(settings):
        if (function := name.function) is not None:
            found[str(function)] = content_of_file(function.file, PLACE)
        elif (schema := name.schema) is not None:
            found[name.label] = content_of_file(schema, PLACE)
    return found


def score(rewards: Sequence[Reward], answers: Sequence[Answered]) -> list[dict[str, Any]]:
    """For each answer `reward`, the weighted sum, and `rewards`, the numbers by their names before their weights. What
    a function gives as several numbers counts as their sum.

    Raises UserError if a function of the user's fails, or gives other names from answer to answer.
    """
    totals, parts = [0.0] * len(answers), [dict[str, float]() for _ in answers]
    for reward in rewards:
        found = reward.scores(answers)
        for index, numbers in enumerate(found):
            if numbers.keys() != found[0].keys() or not numbers.keys().isdisjoint(parts[index]):
                what = tr(
                    "its numbers are {names} for this row, and {first} for another or of another reward",
                    names=", ".join(numbers),
                    first=", ".join(found[0]),
                )
                cure = tr("give the same keys for every row, and other keys than other rewards")
                raise UserError(what, place=f"{reward.name}, {answers[index].place}", cure=cure)
            parts[index] |= numbers
            totals[index] += reward.weight * math.fsum(numbers.values())
    return [{"reward": total, "rewards": named} for total, named in zip(totals, parts, strict=True)]
