"""What each model of a comparison kept of the first one: all general questions, asked of every model.

What a model was asked lies in the cache folder, so that a comparison with known answers loads no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yeonma.errors import Log
from yeonma.evaluate.candidates import Candidate
from yeonma.forgetting.kept import known_languages, sentences, what_was_kept
from yeonma.forgetting.panel import (
    GeneralPanel,
    Known,
    PanelScores,
    make_panel,
    needs_model,
    own_answers,
    panel_scores,
)
from yeonma.forgetting.panel_cache import FORMAT, panel_cache
from yeonma.messages import counted, tr
from yeonma.model.load import generation_eos
from yeonma.model.weights_identity import weights_identity
from yeonma.policy import Policy


@dataclass(frozen=True)
class GeneralQuestions:
    """How many questions every model is asked, and where what it says is kept."""

    count: int
    cache_dir: Path
    dtype: torch.dtype
    device: torch.device


class GeneralAsked:
    """What the models were asked so far. The first one is asked first: its answers are put to the others."""

    def __init__(self, options: GeneralQuestions, candidates: Sequence[Candidate]) -> None:
        self._options, self._candidates = options, candidates
        self._panels = [_panel_of(candidate, options.count) for candidate in candidates]
        first, *_ = self._panels
        tokens = [len(candidate.prompt_builder.tokenizer) for candidate in candidates]
        # the first one's answers may have tokens that a model with fewer of them does not know
        self._panels = [
            panel
            if known >= tokens[0] and _equal(panel.prompts, first.prompts)
            else replace(panel, prompts=())
            for panel, known in zip(self._panels, tokens, strict=True)
        ]
        self._answers: list[list[int]] | None = None
        self._scores: dict[int, PanelScores] = {}

    def is_known(self, model: int) -> bool:
        """Whether the model need not be loaded. If so, `ask` may be called without it."""
        panel = self._panels[model]
        with self._cache(model) as known:
            if model == 0:
                if needs_model(panel, known, None):
                    return False
                self._answers = own_answers(None, None, panel, known)
            return not needs_model(panel, known, self._answers_for(panel), self._languages(model))

    def ask(self, model: int, policy: Policy | None, log: Log) -> None:
        """Asks the model, as far as its answers are not known."""
        panel, candidate = self._panels[model], self._candidates[model]
        if policy is not None:
            questions = counted(len(panel.questions), "general question")
            log(tr("{name}: asking {questions}", name=candidate.name, questions=questions))
        with self._cache(model) as known:
            if model == 0:
                self._answers = own_answers(policy, candidate.prompt_builder.tokenizer, panel, known)
            answers, languages = self._answers_for(panel), self._languages(model)
            self._scores[model] = panel_scores(policy, panel, answers, known, languages)

    def entries(self) -> list[dict[str, Any]]:
        """What each model after the first kept of it, for report.json."""
        entries = []
        names = [candidate.name for candidate in self._candidates]
        for model in range(1, len(self._candidates)):
            panel = self._panels[model]
            if self._panels[0].questions != panel.questions:
                continue
            kept = what_was_kept(panel, self._answers_for(panel), self._scores[0], self._scores[model])
            told = sentences(kept, names[model], names[0])
            entries.append({"models": [0, model], **kept.record(), "sentences": told})
        return entries

    def _languages(self, model: int) -> tuple[str, ...] | None:
        """The languages in which a model is asked: all, but for others than the first those in which that one knows
        more than chance."""
        return known_languages(self._panels[0], self._scores[0]) if model else None

    def _answers_for(self, panel: GeneralPanel) -> list[list[int]]:
        assert self._answers is not None
        return self._answers if panel.prompts else []

    def _cache(self, model: int) -> AbstractContextManager[Known]:
        options, candidate = self._options, self._candidates[model]
        source, quantization = candidate.prompt_builder.source, candidate.quantization
        identity = weights_identity(
            FORMAT, source, candidate.adapter, options.dtype, options.device, quantization, options.cache_dir
        )
        return panel_cache(options.cache_dir, identity)


def _panel_of(candidate: Candidate, count: int) -> GeneralPanel:
    builder = candidate.prompt_builder
    return make_panel(builder.tokenizer, generation_eos(builder.source), builder.positions, count)


def _equal(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))
