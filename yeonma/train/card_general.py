"""What a run's model kept of its base, for the card: both are asked the same general questions.

The base is asked once, whatever is trained on it: what it says lies in the cache folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yeonma.config.settings import EvaluationSettings, Quantization
from yeonma.forgetting.general_questions import CARD_QUESTIONS
from yeonma.forgetting.kept import Kept, known_languages, sentences, what_was_kept
from yeonma.forgetting.panel import GeneralPanel, Known, PanelScores, make_panel, own_answers, panel_scores
from yeonma.forgetting.panel_cache import FORMAT, panel_cache
from yeonma.messages import tr
from yeonma.model.load import eos_tokens
from yeonma.model.position_limits import model_positions
from yeonma.model.weights_identity import weights_identity
from yeonma.policy import Policy
from yeonma.shown import markdown


@dataclass(frozen=True, eq=False)
class BaseAsked:
    """The questions, and what the base makes of them."""

    panel: GeneralPanel
    answers: Sequence[Sequence[int]]
    scores: PanelScores


def question_count(evaluation: EvaluationSettings) -> int:
    """How many general questions a run asks."""
    if evaluation.general_questions is not None:
        return evaluation.general_questions
    return CARD_QUESTIONS if evaluation.card_rows else 0


def ask_base(
    policy: Policy, tokenizer: Any, count: int, quantization: Quantization, cache_dir: Path | None
) -> BaseAsked:
    """Asks the base so many questions. `policy`: the base alone. `cache_dir`: where its numbers are kept; None, where
    several processes share its weights and have to compute alike."""
    model = policy.transformers_model
    eos = eos_tokens(model.generation_config)
    panel = make_panel(tokenizer, eos, model_positions(model.config), count)
    cache: AbstractContextManager[Known] = nullcontext({})
    if cache_dir is not None:
        source = replace(policy.source, revision=policy.base.revision)
        identity = weights_identity(FORMAT, source, None, model.dtype, model.device, quantization, cache_dir)
        cache = panel_cache(cache_dir, identity)
    with cache as known:
        answers = own_answers(policy, tokenizer, panel, known)
        return BaseAsked(panel, answers, panel_scores(policy, panel, answers, known))


def kept_by(policy: Policy, base: BaseAsked) -> Kept:
    """What the trained model kept."""
    languages = known_languages(base.panel, base.scores)
    after = panel_scores(policy, base.panel, base.answers, {}, languages)
    return what_was_kept(base.panel, base.answers, base.scores, after)


def kept_sentences(kept: Kept) -> list[str]:
    """For the run's lines and the card."""
    return sentences(kept, tr("the trained model"), tr("the base"))


def kept_section(kept: Kept | None) -> list[str]:
    """The card's lines on it."""
    found = [] if kept is None else kept_sentences(kept)
    if not found:
        return []
    return [tr("## What was kept"), "", *(f"- {markdown(sentence)}" for sentence in found), ""]
