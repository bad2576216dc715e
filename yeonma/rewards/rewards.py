"""Rewards by their names in `--reward`, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yeonma.bounded.expressions import bounded_match
from yeonma.bounded.user_functions import UserFunctions, check_function, content_of_file
from yeonma.config.metric_names import FunctionName
from yeonma.config.reward_settings import RewardSettings
from yeonma.errors import UserError, did_you_mean, gather
from yeonma.messages import counted, tr

EXACT, PATTERN = "exact", "regex:"
PLACE, WEIGHTS = "--reward", "--reward_weights"
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
    def expression(self) -> str | None:
        return self.text.removeprefix(PATTERN) if self.text.startswith(PATTERN) else None

    def check(self) -> None:
        """Raises UserError if there is no such reward, without running anything of the user's."""
        if (function := self.function) is not None:
            check_function(function.file, function.function, PLACE)
        elif (expression := self.expression) is not None:
            bounded_match(expression, [""], place=PLACE)
        elif self.text != EXACT:
            cure = did_you_mean(self.text, [EXACT]) or tr(
                "known are exact, regex:PATTERN, and FILE.py:function for a function of your own"
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
        return exact


def exact(answers: Sequence[Answered]) -> list[dict[str, float]]:
    """1 where the answer is the row's own, blanks around both aside, else 0. Raises UserError for a row without one."""
    for one in answers:
        if one.wanted is None:
            what = tr("it has no answer of its own, with which exact compares")
            raise UserError(what, place=one.place, cure=tr("give its answer, or another --reward"))
    return [{EXACT: float(one.answer.strip() == str(one.wanted).strip())} for one in answers]


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
    """The rewards of the settings. Raises UserError for an unknown one, one that stands there twice, and another number
    of weights than of rewards."""
    given = [settings.reward] if isinstance(settings.reward, str) else settings.reward
    names, weights = [RewardName(text) for text in given], settings.reward_weights

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
    return names


def rewards_of(settings: RewardSettings, functions: UserFunctions) -> list[Reward]:
    """The rewards of a run, with their weights."""
    names = names_of(settings)
    weights = settings.reward_weights or [1.0] * len(names)
    return [
        Reward(str(name.function or name.text), name.scores(functions), weight)
        for name, weight in zip(names, weights, strict=True)
    ]


def contents(settings: RewardSettings) -> dict[str, str]:
    """Each function of the user's -> the SHA-256 of its file."""
    found = [name.function for name in names_of(settings)]
    return {str(one): content_of_file(one.file, PLACE) for one in found if one is not None}


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
