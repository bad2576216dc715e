"""What a model kept of another one, in numbers and sentences: from what both make of the same panel.

The other one, the base, answers its own prompts with its own answers, so that it agrees with them wholly. A language in
which the base answers the questions by chance tells nothing about knowledge and is left out of that part. Something
counts as lost only if the loss is both significant and large; `docs/evaluate.md` has the reasons for the bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from yeonma.forgetting.panel import GeneralPanel, PanelScores
from yeonma.messages import counted, later, tr
from yeonma.resampling import interval, mean, resampled_sums

LEAST_SHARE = 0.9
"""Less of the base's own answers kept than this, with the upper end of its interval, is a loss."""
MOST_PROBABILITY_LOST = 0.05
"""A larger fall of the right answers' mean probability than this, with an interval below 0, is a loss."""
BY_CHANCE_P = 0.05
SEED = 0
"""Of the resampling: the numbers follow from the answers alone."""


@dataclass(frozen=True)
class KeptAnswers:
    """The base's own answers to general prompts, in the eyes of another model."""

    prompts: int
    tokens: int
    """Of the base's answers."""
    share: float
    """Of these tokens, those that the other model finds the most likely in their places too."""
    interval: tuple[float, float] | None
    """95%, over resampled prompts."""
    logprob_change: float
    """Mean change of a token's log-probability."""

    @property
    def is_lost(self) -> bool:
        return self.interval is not None and self.interval[1] < LEAST_SHARE


@dataclass(frozen=True)
class KeptKnowledge:
    """General questions in one or both languages, before and after."""

    languages: tuple[str, ...]
    """In which the base does not answer by chance."""
    questions: int
    """In these languages; 0 if there are none."""
    right: tuple[int, int]
    """Questions of which the right option is the most likely one: for the base, and for the other model."""
    probability: tuple[float, float]
    """The mean probability of the right option among the options."""
    interval: tuple[float, float] | None
    """95%, of the change of that probability, over resampled questions."""
    by_chance: tuple[str, ...]
    """Languages in which the base answers by chance."""

    @property
    def change(self) -> float:
        return self.probability[1] - self.probability[0]

    @property
    def is_lost(self) -> bool:
        return self.interval is not None and self.interval[1] < 0 and -self.change > MOST_PROBABILITY_LOST


@dataclass(frozen=True)
class Kept:
    """What a model kept of the base."""

    answers: KeptAnswers | None
    """None if no prompt fits into the model's positions."""
    knowledge: KeptKnowledge | None
    """None if no question does."""

    @property
    def is_lost(self) -> bool:
        return any(part is not None and part.is_lost for part in (self.answers, self.knowledge))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists, as JSON gives them back
        return {**values, "is_lost": self.is_lost}


def what_was_kept(
    panel: GeneralPanel, answers: Sequence[Sequence[int]], before: PanelScores, after: PanelScores
) -> Kept:
    """What the model of `after` kept of that of `before`, whose own answers to the prompts are `answers`."""
    return Kept(_answers(answers, before, after), _knowledge(panel, before, after))


def _answers(answers: Sequence[Sequence[int]], before: PanelScores, after: PanelScores) -> KeptAnswers | None:
    lengths = np.array([len(answer) for answer in answers], dtype=float)
    if not lengths.any():
        return None
    table = np.stack([np.array(after.chosen, dtype=float), lengths], axis=1)
    (sums,) = resampled_sums([table], SEED)
    return KeptAnswers(
        prompts=len(answers),
        tokens=int(lengths.sum()),
        share=float(table[:, 0].sum() / lengths.sum()),
        interval=interval(mean(sums)) if len(answers) > 1 else None,
        logprob_change=float((sum(after.logprobs) - sum(before.logprobs)) / lengths.sum()),
    )


def _knowledge(panel: GeneralPanel, before: PanelScores, after: PanelScores) -> KeptKnowledge | None:
    if not panel.questions:
        return None
    known = known_languages(panel, before)
    others = sorted({question.language for question in panel.questions} - set(known))
    asked = [number for number, question in enumerate(panel.questions) if question.language in known]
    both = [[scores.option_logprobs[number] for number in asked] for scores in (before, after)]
    likely = [np.array([_probability(one) for one in logprobs]) for logprobs in both]
    ends = None
    if len(asked) > 1:
        (sums,) = resampled_sums([(likely[1] - likely[0])[:, None]], SEED)
        ends = interval(sums[:, 0] / len(asked))
    means = [float(each.mean()) if asked else 0.0 for each in likely]
    right = [sum(map(_is_right, logprobs)) for logprobs in both]
    return KeptKnowledge(
        languages=known,
        questions=len(asked),
        right=(right[0], right[1]),
        probability=(means[0], means[1]),
        interval=ends,
        by_chance=tuple(others),
    )


def known_languages(panel: GeneralPanel, base: PanelScores) -> tuple[str, ...]:
    """The languages in which the base answers more questions rightly than chance explains."""
    known = []
    for language in sorted({question.language for question in panel.questions}):
        of_language = [
            (logprobs, 1 / len(logprobs))
            for question, logprobs in zip(panel.questions, base.option_logprobs, strict=True)
            if question.language == language
        ]
        right = sum(_is_right(logprobs) for logprobs, _ in of_language)
        if at_least(right, [chance for _, chance in of_language]) < BY_CHANCE_P:
            known.append(language)
    return tuple(known)


def _is_right(logprobs: Sequence[float]) -> bool:
    """Whether the first option alone is the most likely one."""
    return logprobs[0] > max(logprobs[1:])


def _probability(logprobs: Sequence[float]) -> float:
    """Of the first option, among all."""
    values = np.exp(np.array(logprobs) - max(logprobs))
    return float(values[0] / values.sum())


def at_least(right: int, chances: Sequence[float]) -> float:
    """The probability of at least so many right answers by chance: independent, each with its own probability."""
    distribution = np.ones(1)
    for chance in chances:
        distribution = np.convolve(distribution, [1 - chance, chance])
    return float(distribution[right:].sum())


LANGUAGES = {"en": later("English"), "ko": later("Korean")}


def sentences(kept: Kept, model: str, base: str) -> list[str]:
    """What was kept, for people. `model` and `base`: what the two are called."""
    found = [*_answer_sentences(kept, model, base), *_knowledge_sentences(kept, model, base)]
    if kept.is_lost:
        found.append(
            tr(
                "This is a loss of general abilities. A lower learning rate, fewer epochs, or general rows beside the "
                "task's (--replay) keep more."
            )
        )
    return found


def _answer_sentences(kept: Kept, model: str, base: str) -> Iterator[str]:
    answers = kept.answers
    if answers is None or answers.interval is None:
        return
    yield tr(
        "{model} keeps {share:.1%} of the tokens that {base} itself answers to {prompts} (95% interval {low:.1%} to "
        "{high:.1%}); their mean log-probability changes by {change:+.2f}.",
        model=model,
        base=base,
        prompts=counted(answers.prompts, "general prompt"),
        share=answers.share,
        low=answers.interval[0],
        high=answers.interval[1],
        change=answers.logprob_change,
    )


def _knowledge_sentences(kept: Kept, model: str, base: str) -> Iterator[str]:
    knowledge = kept.knowledge
    if knowledge is None:
        return
    if knowledge.questions and knowledge.interval is not None:
        yield tr(
            "{questions} ({languages}): {base} finds the right answer the most likely in {before}, {model} in {after}; "
            "its mean probability changes from {first:.3f} to {second:.3f} (95% interval of the change {low:+.3f} to "
            "{high:+.3f}).",
            questions=counted(knowledge.questions, "general question"),
            languages=_listed(knowledge.languages),
            base=base,
            model=model,
            before=knowledge.right[0],
            after=knowledge.right[1],
            first=knowledge.probability[0],
            second=knowledge.probability[1],
            low=knowledge.interval[0],
            high=knowledge.interval[1],
        )
    if knowledge.by_chance:
        yield tr(
            "General questions ({languages}): {base} answers them by chance, so that they cannot tell what was lost.",
            base=base,
            languages=_listed(knowledge.by_chance),
        )


def _listed(languages: Sequence[str]) -> str:
    return ", ".join(tr(LANGUAGES[language]) for language in languages)
