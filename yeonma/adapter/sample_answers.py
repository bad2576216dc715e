"""sample_answers.json of an adapter folder: what the trained model and its base answer to the sample rows.

`yeonma verify --served` compares a server with them, without weights. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yeonma.files import damage_as_user_error
from yeonma.messages import tr
from yeonma.shown import json_text

SAMPLE_ANSWERS = "sample_answers.json"
SCALES = ("0.5", "2", "4")
"""Factors of the adapter's scale at which its log-probabilities are kept too: half of it, and what a server has that
applies the adapter twice or takes rsLoRA for LoRA, and LoRA for rsLoRA."""


@dataclass(frozen=True)
class GreedyAnswer:
    """A model's most likely answer, token by token."""

    token_ids: list[int]
    """Without the token that ends it."""
    text: str
    """As other tools return it: what the tokens add to the prompt, without special tokens."""
    content: str
    """The text without what the template puts around an answer."""
    ended: bool
    """Whether a stop token ended it, rather than the number of tokens."""


@dataclass(frozen=True)
class ScoredIds:
    """Token ids after the prompt, and how likely the trained model and its base find each of them there."""

    token_ids: list[int]
    trained: list[float]
    """Natural logarithms, one per token."""
    base: list[float] | None
    """None if the base's weights were trained themselves."""
    scaled: Mapping[str, list[float]] | None = None
    """By the factors in SCALES, the trained model's with its adapter's scale times that; None without LoRA layers, and
    in folders of earlier versions."""

    def at(self, places: Iterable[int]) -> ScoredIds:
        """The tokens at these places."""
        places = list(places)

        def taken(numbers: list[float]) -> list[float]:
            return [numbers[place] for place in places]

        base = None if self.base is None else taken(self.base)
        scaled = None if self.scaled is None else {scale: taken(self.scaled[scale]) for scale in SCALES}
        return ScoredIds([self.token_ids[place] for place in places], taken(self.trained), base, scaled)


@dataclass(frozen=True)
class SampleAnswer:
    """A row of the model card, asked with its prompt of training."""

    row_number: int
    prompt_ids: list[int]
    trained: GreedyAnswer
    base: GreedyAnswer
    wanted_ids: ScoredIds
    """The row's own answer, with the token that ends it if that is trained."""
    greedy_ids: ScoredIds
    """The trained model's answer, as in `trained`."""
    base_ids: ScoredIds
    """The beginning of the base's answer, as in `base`."""
    data_set: str = ""
    """As on the card: its data set, if the run has several."""


def as_json(answers: Sequence[SampleAnswer]) -> str:
    """The content of the file."""
    return json_text({"answers": [asdict(answer) for answer in answers]}) + "\n"


def read_sample_answers(folder: Path) -> list[SampleAnswer] | None:
    """The answers in a folder, or None without a sample_answers.json, as in folders of earlier versions.

    Raises UserError if the file is damaged.
    """
    path = folder / SAMPLE_ANSWERS
    if not path.exists():
        return None
    with damage_as_user_error(path):
        content = json.loads(path.read_text("utf-8"))
        return [_answer(entry) for entry in content["answers"]]


def _answer(entry: Any) -> SampleAnswer:
    answer = SampleAnswer(
        entry["row_number"],
        entry["prompt_ids"],
        GreedyAnswer(**entry["trained"]),
        GreedyAnswer(**entry["base"]),
        ScoredIds(**entry["wanted_ids"]),
        ScoredIds(**entry["greedy_ids"]),
        ScoredIds(**entry["base_ids"]),
        entry.get("data_set", ""),
    )
    _check(isinstance(answer.data_set, str))
    _check(type(answer.row_number) is int and _are_ids(answer.prompt_ids) and bool(answer.prompt_ids))
    for greedy in (answer.trained, answer.base):
        _check(_are_ids(greedy.token_ids) and type(greedy.ended) is bool)
        _check(isinstance(greedy.text, str) and isinstance(greedy.content, str))
    for scored in (answer.wanted_ids, answer.greedy_ids, answer.base_ids):
        _check(_are_ids(scored.token_ids))
        if scored.scaled is not None:
            _check(isinstance(scored.scaled, dict) and set(scored.scaled) == set(SCALES))
        for logprobs in (scored.trained, scored.base, *(scored.scaled or {}).values()):
            if logprobs is not None:
                _check(isinstance(logprobs, list) and len(logprobs) == len(scored.token_ids))
                _check(all(type(number) in (int, float) for number in logprobs))
    return answer


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _check(is_right: bool) -> None:
    if not is_right:
        raise TypeError(tr("a value has another kind"))
