"""The general questions and prompts that come with Yeonma, in English and Korean, written for this project.

They lie in samples/*.json, which no name of a sample reaches: nobody trains on them by accident. Questions and prompts
of the two languages take turns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yeonma.data.bundled_samples import FOLDER

QUESTIONS = 64
"""All questions, half of them in each language."""
CARD_QUESTIONS = 24
"""Those of a model card."""


@dataclass(frozen=True)
class GeneralQuestion:
    """A question with short answers, of which only the first is right."""

    language: str
    """`en` or `ko`."""
    kind: str
    """facts, arithmetic, words, sense, reading, code or instructions."""
    question: str
    options: tuple[str, ...]
    """Two to four. Where they stand says nothing: a model is not shown the others."""


@dataclass(frozen=True)
class GeneralPrompt:
    """What people ask a chat model, with no one right answer."""

    language: str
    prompt: str


def general_questions(count: int) -> list[GeneralQuestion]:
    """So many of the questions (at most all), evenly spaced over kinds and languages."""
    return [
        GeneralQuestion(entry["language"], entry["kind"], entry["question"], tuple(entry["options"]))
        for entry in _spread(_read("general_questions.json"), count)
    ]


def general_prompts(count: int) -> list[GeneralPrompt]:
    """So many of the prompts, likewise."""
    return [
        GeneralPrompt(entry["language"], entry["prompt"])
        for entry in _spread(_read("general_prompts.json"), count)
    ]


def _read(name: str) -> list[Any]:
    entries: list[Any] = json.loads((FOLDER / name).read_text("utf-8"))
    return entries


def _spread(entries: Sequence[Any], count: int) -> list[Any]:
    """So many entries of each language, evenly spaced. Entries of the two languages take turns."""
    pairs = [entries[start : start + 2] for start in range(0, len(entries), 2)]
    wanted = min(-(-count // 2), len(pairs))
    chosen = [pairs[(2 * number + 1) * len(pairs) // (2 * wanted)] for number in range(wanted)]
    return [entry for pair in chosen for entry in pair][:count]
