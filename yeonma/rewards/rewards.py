"""Rewards by their names in `--reward`, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from yeonma.bounded.expressions import bounded_match
from yeonma.errors import UserError, did_you_mean
from yeonma.messages import counted, tr

PATTERN = "regex:"
PLACE = "--reward"


@dataclass(frozen=True)
class Answered:
    """An answer to a row."""

    row: Mapping[str, object]
    """The row's columns."""
    place: str
    """Of the row, for a message."""
    wanted: str
    """The row's own answer."""
    answer: str
    """What the model answered, without its reasoning."""


@dataclass(frozen=True)
class Reward:
    """One reward, by the name that logs have for it."""

    name: str
    scores: Callable[[Sequence[Answered]], list[dict[str, float]]]
    """Answers -> numbers by name for each; a reward with one number has it under its own name."""
    weight: float = 1.0


def exact(answers: Sequence[Answered]) -> list[dict[str, float]]:
    """1 where the answer is the row's own, blanks around them aside, else 0."""
    return [{"exact": float(one.answer.strip() == one.wanted.strip())} for one in answers]


def pattern(expression: str) -> Reward:
    """1 where the whole answer matches a regular expression, else 0. Raises UserError for an invalid one."""
    bounded_match(expression, [""], place=PLACE)

    def scores(answers: Sequence[Answered]) -> list[dict[str, float]]:
        found = bounded_match(expression, [one.answer for one in answers], place=PLACE)
        return [{"regex": float(matches)} for matches in found]

    return Reward("regex", scores)


NAMED: Mapping[str, Callable[[Sequence[Answered]], list[dict[str, float]]]] = {"exact": exact}


def rewards_of(names: Sequence[str], weights: Sequence[float] | None) -> list[Reward]:
    """The rewards of the settings `reward` and `reward_weights`.

    Raises UserError for an unknown name, an invalid expression, or another number of weights.
    """
    if weights is not None and len(weights) != len(names):
        what = tr(
            "{weights} for {rewards}",
            weights=counted(len(weights), "weight"),
            rewards=counted(len(names), "reward"),
        )
        raise UserError(what, place="--reward_weights", cure=tr("give one weight for each reward"))
    found = [_reward(name) for name in names]
    twice = next((one.name for one in found if [other.name for other in found].count(one.name) > 1), None)
    if twice is not None:
        raise UserError(tr("{name} stands there twice", name=twice), place=PLACE, cure=tr("name it once"))
    return [
        Reward(one.name, one.scores, weight)
        for one, weight in zip(found, weights or [1.0] * len(found), strict=True)
    ]


def _reward(name: str) -> Reward:
    if name.startswith(PATTERN):
        return pattern(name.removeprefix(PATTERN))
    if name in NAMED:
        return Reward(name, NAMED[name])
    cure = did_you_mean(name, NAMED) or tr(
        "there are {names} and {pattern}", names=", ".join(NAMED), pattern=f"{PATTERN}PATTERN"
    )
    raise UserError(tr('"{name}" is not a reward', name=name), place=PLACE, cure=cure)


@dataclass(frozen=True)
class Scored:
    """What an answer got."""

    total: float
    """The weighted sum."""
    parts: Mapping[str, float]


def score(rewards: Sequence[Reward], answers: Sequence[Answered]) -> list[Scored]:
    """The answers' rewards. Raises UserError for a reward that is no finite number."""
    totals, parts = [0.0] * len(answers), [dict[str, float]() for _ in answers]
    for reward in rewards:
        for index, numbers in enumerate(reward.scores(answers)):
            for name, number in numbers.items():
                if not math.isfinite(number):
                    raise UserError(
                        tr(
                            "its reward {name} is {number}, which is no finite number",
                            name=name,
                            number=number,
                        ),
                        place=answers[index].place,
                        cure=tr("let the reward give a finite number for every answer"),
                    )
                parts[index][name] = number
                totals[index] += reward.weight * number
    return [Scored(total, named) for total, named in zip(totals, parts, strict=True)]
