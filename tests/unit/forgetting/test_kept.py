"""What counts as kept and as lost, from scores made by hand; chance, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import log

import numpy as np
import pytest

from yeonma.forgetting.general_questions import QUESTIONS, GeneralQuestion, general_prompts, general_questions
from yeonma.forgetting.kept import Kept, at_least, known_languages, sentences, what_was_kept
from yeonma.forgetting.panel import GeneralPanel, PanelScores


def panel_of(languages: Sequence[str], prompts: int = 20, options: int = 4) -> GeneralPanel:
    texts = tuple(str(number) for number in range(options))
    questions = tuple(GeneralQuestion(language, "facts", "?", texts) for language in languages)
    return GeneralPanel(questions, ((),) * len(questions), (np.arange(3, dtype=np.int32),) * prompts, (2,))


def scores_of(panel: GeneralPanel, right: Sequence[float], kept: Sequence[int]) -> PanelScores:
    """The right options have these probabilities, and the other ones share the rest."""
    logprobs = [
        (log(p), *[log((1 - p) / (len(question.options) - 1))] * (len(question.options) - 1))
        for p, question in zip(right, panel.questions, strict=True)
    ]
    return PanelScores(tuple(logprobs), tuple(kept), tuple(-0.5 * (40 - one) for one in kept))


def kept_of(right: Sequence[float], kept: Sequence[int], before: Sequence[float] | None = None) -> Kept:
    panel = panel_of(["en"] * len(right), len(kept))
    first = scores_of(panel, before or [0.8] * len(right), [40] * len(kept))
    return what_was_kept(panel, [[5] * 40] * len(kept), first, scores_of(panel, right, kept))


def test_the_questions_are_as_many_in_both_languages_and_each_has_one_right_answer() -> None:
    questions = general_questions(QUESTIONS)
    assert len(questions) == QUESTIONS and general_questions(1000) == questions
    for language in ("en", "ko"):
        assert sum(question.language == language for question in questions) == QUESTIONS // 2
    for question in questions:
        assert 2 <= len(question.options) <= 4
        others = [option for option in question.options if option != question.options[0]]
        assert len(others) == len(question.options) - 1 == len(set(others))
        assert not any(option.startswith(question.options[0]) for option in others), question
        assert not any(question.options[0].startswith(option) for option in others), question
    kinds = [question.kind for question in general_questions(24)]
    assert len(set(kinds)) == 7
    assert {prompt.language for prompt in general_prompts(12)} == {"en", "ko"}


@pytest.mark.parametrize("count", [0, 1, 2, 5, 24])
def test_a_part_of_the_questions_is_spread_over_all(count: int) -> None:
    chosen = general_questions(count)
    assert len(chosen) == count == len({question.question for question in chosen})


@pytest.mark.parametrize("chances", [(0.25,) * 5, (0.5, 0.25, 1 / 3, 0.5)])
def test_chance_is_that_of_all_outcomes_counted(chances: tuple[float, ...]) -> None:
    for right in range(len(chances) + 1):
        expected = 0.0
        for outcome in product((0, 1), repeat=len(chances)):
            if sum(outcome) >= right:
                expected += float(
                    np.prod([p if hit else 1 - p for hit, p in zip(outcome, chances, strict=True)])
                )
        assert at_least(right, chances) == pytest.approx(expected)


def test_nothing_is_lost_by_the_base_itself() -> None:
    kept = kept_of([0.8] * 20, [40] * 20)
    assert kept.answers is not None and kept.knowledge is not None
    assert (kept.answers.share, kept.answers.logprob_change, kept.knowledge.change) == (1, 0, 0)
    assert not kept.is_lost


def test_a_loss_is_significant_and_large() -> None:
    few = [0.1] * 2 + [0.8] * 18  # two questions forgotten: a mean of 0.07, which chance may do
    assert not kept_of(few, [39] * 20).is_lost
    small = [0.78] * 20  # surely a little less
    kept = kept_of(small, [38] * 20)
    assert kept.knowledge is not None and kept.knowledge.interval is not None
    assert kept.knowledge.interval[1] < 0 and not kept.is_lost
    assert kept_of([0.3] * 10 + [0.8] * 10, [38] * 20).is_lost
    assert kept_of([0.8] * 20, [22] * 20).is_lost
    unsure = kept_of([0.8] * 20, [40, 28] * 10)  # 85%, and nobody knows whether 90% would be kept
    assert unsure.answers is not None and unsure.answers.share == 0.85 and not unsure.is_lost


def test_a_base_that_answers_by_chance_cannot_lose_knowledge_but_answers() -> None:
    chance = [0.26, 0.2, 0.2, 0.2] * 5
    kept = kept_of([0.2] * 20, [10] * 20, before=chance)
    assert kept.knowledge is not None and kept.answers is not None
    assert (kept.knowledge.languages, kept.knowledge.by_chance) == ((), ("en",))
    assert not kept.knowledge.is_lost and kept.answers.is_lost
    told = sentences(kept, "the trained model", "the base")
    assert len(told) == 3 and "by chance" in told[1] and "--replay" in told[2]


def test_a_language_in_which_the_base_answers_by_chance_does_not_hide_the_other() -> None:
    panel = panel_of(["en", "ko"] * 12)
    before = scores_of(panel, [0.8, 0.2] * 12, [40] * 20)
    assert known_languages(panel, before) == ("en",)
    after = scores_of(panel, [0.8, 0.2] * 12, [40] * 20)
    asked = tuple(
        () if question.language == "ko" else one
        for question, one in zip(panel.questions, after.option_logprobs, strict=True)
    )
    kept = what_was_kept(panel, [[5] * 40] * 20, before, PanelScores(asked, after.chosen, after.logprobs))
    assert kept.knowledge is not None
    assert (kept.knowledge.questions, kept.knowledge.right) == (12, (12, 12))
    assert (kept.knowledge.languages, kept.knowledge.by_chance) == (("en",), ("ko",))


def test_equally_likely_options_are_not_right() -> None:
    panel = panel_of(["en"] * 8)
    assert known_languages(panel, scores_of(panel, [0.25] * 8, [40] * 20)) == ()


def test_a_panel_without_questions_or_prompts_tells_nothing() -> None:
    panel = panel_of([], 0)
    kept = what_was_kept(panel, [], PanelScores((), (), ()), PanelScores((), (), ()))
    assert (kept.answers, kept.knowledge, kept.is_lost) == (None, None, False)
    assert sentences(kept, "a", "b") == []
