"""What a judge said -> verdicts, results of rows, win rates.

Each two answers are judged in both orders. A model wins a row only if both verdicts are for it: a judge that prefers a
place, whoever stands there, brings ties and not wins (Zheng et al. 2023, arXiv:2306.05685). A verdict that cannot be
read is counted as such, and its row has no result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from yeonma.resampling import holm, interval, mean, resampled_sums, swap_test

JudgeVerdict = Literal["first", "second", "tie"]
"""Which of the two answers is better, by its place."""
RowResult = Literal["first", "second", "tie", "equal", "none"]
"""Which of the two models wins a row. `equal`: the answers are the same text, which is a tie without a question.
`none`: a verdict is missing or cannot be read."""
WRITTEN: dict[str, JudgeVerdict] = {"A": "first", "B": "second", "tie": "tie"}
"""How the judge writes a verdict."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": list(WRITTEN)}},
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}
"""Of the JSON object that a judge is asked for. The reason stands first, so that it is written before the verdict."""
_SWAPPED: dict[JudgeVerdict, JudgeVerdict] = {"first": "second", "second": "first", "tie": "tie"}
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)
_REASONING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_POINTS: dict[RowResult, float] = {"first": 0.0, "second": 1.0, "tie": 0.5, "equal": 0.5}
"""Of the second model."""


def verdict_in(text: str, *, cut: bool = False) -> JudgeVerdict | None:
    """The verdict in what a judge wrote: a JSON object with `verdict`, alone or in a block of code, or a verdict alone.

    Reasoning between `<think>` and `</think>` before it is left out. None for anything else, and for a verdict alone in
    an answer that was `cut` at its greatest length, of which nobody knows how it went on.
    """
    text = _without_reasoning(text)
    if text in WRITTEN:
        return None if cut else WRITTEN[text]
    written = _json_in(text).get("verdict")
    return WRITTEN.get(written) if isinstance(written, str) else None


def reason_in(text: str) -> str:
    """The reason beside a verdict; empty if there is none, or no verdict."""
    value = _json_in(_without_reasoning(text))
    reason = value.get("reason")
    return reason if isinstance(reason, str) and "verdict" in value else ""


def _without_reasoning(text: str) -> str:
    return _REASONING.sub("", text, count=1).strip() if text.lstrip().startswith("<think>") else text.strip()


def _json_in(text: str) -> dict[str, Any]:
    """The JSON object that the text is; empty if it is none."""
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1]
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a key that stands twice")
    return dict(pairs)


@dataclass(frozen=True)
class JudgedRow:
    """The verdicts on one row's answers of two models. In `swapped`, the second model's answer stood first."""

    is_equal: bool = False
    """Whether both answers are the same text, so that nobody was asked."""
    given: JudgeVerdict | None = None
    swapped: JudgeVerdict | None = None
    reasons: tuple[str, str] = ("", "")
    """What the judge wrote beside the two verdicts."""

    @property
    def by_model(self) -> tuple[JudgeVerdict | None, JudgeVerdict | None]:
        """Both verdicts, with `first` and `second` for the models and not for the places."""
        return self.given, None if self.swapped is None else _SWAPPED[self.swapped]

    @property
    def result(self) -> RowResult:
        if self.is_equal:
            return "equal"
        one, other = self.by_model
        if one is None or other is None:
            return "none"
        return one if one == other else "tie"

    @property
    def by_place(self) -> bool:
        """Whether the place decided: both verdicts are for the answer that stood first, or both for the other one."""
        return self.given is not None and self.given != "tie" and self.given == self.swapped


@dataclass(frozen=True)
class JudgedPair:
    """What a judge says of two models over all rows. Shares are fractions; None where nothing was judged."""

    wins: tuple[int, int]
    ties: int
    """Rows with two verdicts and no winner; those with equal answers are not among them."""
    equal: int
    unjudged: int
    """Rows with a verdict that is missing or cannot be read."""
    win_rate: float | None
    """Of the second model over all rows with a result; a tie counts one half."""
    win_interval: tuple[float, float] | None
    p: float | None
    p_corrected: float | None
    agreement: float | None
    """The share of rows with two verdicts in which both say the same of the models."""
    place_bias: float | None
    """The share of rows with two verdicts that the place decided."""


def judged_pairs(pairs: Sequence[Sequence[JudgedRow]], seed: int) -> list[JudgedPair]:
    """The numbers of each two models, for a list of their rows each. p-values are corrected for the number of pairs."""
    found = [_judged_pair(rows, seed) for rows in pairs]
    tested = [pair.p for pair in found if pair.p is not None]
    corrected = iter(holm(tested))
    return [pair if pair.p is None else replace(pair, p_corrected=next(corrected)) for pair in found]


def _judged_pair(rows: Sequence[JudgedRow], seed: int) -> JudgedPair:
    results = [row.result for row in rows]
    table = np.array([[_POINTS.get(result, 0.0), float(result in _POINTS)] for result in results])
    twice = [row for row in rows if None not in row.by_model and not row.is_equal]
    judged = int(table[:, 1].sum())
    several = judged > 1
    ends = interval(mean(resampled_sums([table], seed)[0])) if several else None
    other = np.stack([table[:, 1] - table[:, 0], table[:, 1]], axis=1)
    return JudgedPair(
        wins=(results.count("first"), results.count("second")),
        ties=results.count("tie"),
        equal=results.count("equal"),
        unjudged=results.count("none"),
        win_rate=float(mean(table.sum(axis=0))) if judged else None,
        win_interval=ends,
        p=swap_test(other, table, mean, seed) if several else None,
        p_corrected=None,
        agreement=_share([row.by_model[0] == row.by_model[1] for row in twice]),
        place_bias=_share([row.by_place for row in twice]),
    )


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
