"""Answers while a model is trained: at each evaluation it answers a few validation rows, and the answers are measured.

Decoding is greedy and draws no random number, so that the weights of a run do not depend on it. The rows are shared out
over the ranks; with sharded weights every rank answers all of them, because every forward pass needs all ranks. The
first rank measures the answers of all, and tells the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from yeonma.adapter.prompt_builder import NO_LIMIT
from yeonma.bounded.user_functions import UserFunctions
from yeonma.errors import UserError
from yeonma.generation.completion import Answer, generate
from yeonma.generation.sampling import SamplingParams
from yeonma.model.position_limits import model_positions
from yeonma.run_folder.progress import EvaluationRecord
from yeonma.train import model_card
from yeonma.train.answer_rows import AnswerPlan, AnswerRow, AnswerScores, in_metrics, score_answers
from yeonma.train.distributed import gathered, sum_over
from yeonma.train.interrupt import REASONS
from yeonma.train.step import TrainState


@dataclass(frozen=True)
class AnsweredRows:
    """The answers of one evaluation, measured."""

    metrics: dict[str, float]
    """By their keys in metrics.jsonl."""
    lines: list[dict[str, Any]]
    """For answers.jsonl, one for each row, without the step."""
    seconds: float

    def added_to(self, record: EvaluationRecord) -> EvaluationRecord:
        return replace(
            record, metrics={**record.metrics, **self.metrics}, seconds=record.seconds + self.seconds
        )


class _Abandoned(Exception):
    """This rank stops answering, because the run is about to stop."""


def answer_and_measure(
    state: TrainState, plan: AnswerPlan, tokenizer: Any, functions: UserFunctions
) -> AnsweredRows | None:
    """The answers of the model as it is now. None if a rank abandoned them because the run is about to stop.

    Raises UserError, in all ranks alike, if a function of the user's fails.
    """
    started = time.perf_counter()
    group = state.group
    own = range(len(plan.rows)) if state.sharded else range(group.rank, len(plan.rows), group.count)
    own_part: dict[str, Any] | UserError = {}
    abandoned = False
    try:
        answers = _answers(state, [plan.rows[index] for index in own], tokenizer)
        own_part = {
            str(index): {"text": answer.text, "tokens": len(answer.token_ids), "ended": answer.ended}
            for index, answer in zip(own, answers, strict=True)
        }
    except UserError as error:  # no memory for a prompt
        own_part = error
    except _Abandoned:
        abandoned = True
    flags = torch.tensor([float(abandoned), *state.stop.requests()], device=state.model.device)
    flags = sum_over(group, flags).cpu()
    state.stop.agree(flags[-len(REASONS) :].tolist())
    if flags[0]:
        return None

    def told() -> dict[str, Any]:
        if isinstance(own_part, UserError):
            raise own_part
        return own_part

    by_row = {index: one for part in gathered(group, told) for index, one in part.items()}
    in_order = [by_row[str(index)] for index in range(len(plan.rows))]
    measured = gathered(group, lambda: _measured(plan, in_order, functions) if group.first else {})[0]
    return AnsweredRows(measured["metrics"], measured["lines"], time.perf_counter() - started)


def _measured(
    plan: AnswerPlan, generated: Sequence[Mapping[str, Any]], functions: UserFunctions
) -> dict[str, Any]:
    """Metrics and lines of the answers."""
    texts = [row.prompt.answer(one["text"]) for row, one in zip(plan.rows, generated, strict=True)]
    scores = score_answers(plan, texts, functions)
    return {"metrics": in_metrics(scores.overall), "lines": _lines(plan, generated, texts, scores)}


def _lines(
    plan: AnswerPlan, generated: Sequence[Mapping[str, Any]], texts: Sequence[str], scores: AnswerScores
) -> list[dict[str, Any]]:
    lines = []
    for row, one, text, numbers in zip(plan.rows, generated, texts, scores.by_row, strict=True):
        reasoning = row.prompt.reasoning(one["text"])
        lines.append(
            {
                **({"data_set": row.data_set} if row.data_set else {}),
                "row": row.number,
                **({} if reasoning is None else {"reasoning": reasoning}),
                "answer": text,
                "tokens": one["tokens"],
                "ended": one["ended"],
                "scores": numbers,
            }
        )
    return lines


def _answers(state: TrainState, rows: Sequence[AnswerRow], tokenizer: Any) -> list[Answer]:
    """The greedy answers, in the order of the rows. Raises _Abandoned."""

    def check(index: int, answer: Answer) -> None:
        if state.stop.is_urgent() and not state.sharded:
            raise _Abandoned

    answers: dict[int, Answer] = {}
    positions = model_positions(state.model.config) or NO_LIMIT
    kinds = list(dict.fromkeys((row.tokens.stop_ids, row.tokens.shown_ids) for row in rows))
    for stop_ids, shown_ids in kinds:
        indices = [
            index
            for index, row in enumerate(rows)
            if (row.tokens.stop_ids, row.tokens.shown_ids) == (stop_ids, shown_ids)
        ]
        prompts = [rows[index].prompt.token_ids for index in indices]
        room = positions - max(map(len, prompts))
        sampling = SamplingParams(
            stop_ids=stop_ids,
            shown_ids=shown_ids,
            max_new_tokens=max(1, min(model_card.MAX_NEW_TOKENS, room)),
        )
        found = generate(
            state.model,
            tokenizer,
            prompts,
            sampling,
            by_forest=state.support.forest,
            batch_size=len(prompts),
            on_answer=check,
        )
        answers |= dict(zip(indices, found, strict=True))
    return [answers[index] for index in range(len(rows))]
