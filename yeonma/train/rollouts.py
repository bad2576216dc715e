"""The answers that the model draws to the prompts of a step, their rewards, and the batch that is trained on.

A draw depends on the model, the prompt, the seed of the run, the step, and the places of prompt and answer in the step.
It is made by the forest that trains: the same weights, the same products, the same tokens. Where there are several
processes, each draws and scores the answers to its share of the prompts, and all get all of them.

Shapes: P prompts of a step, G answers of a group, A = P x G answers, in order of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from yeonma.batch.batch import Batch
from yeonma.config.reward_settings import RewardSettings
from yeonma.data.rows import Row
from yeonma.data.template import wanted_answer
from yeonma.errors import UserError
from yeonma.generation.completion import Answer
from yeonma.generation.sampling import SamplingParams
from yeonma.generation.token_scores import ScoreLog
from yeonma.messages import counted, tr
from yeonma.model.load import eos_tokens
from yeonma.model.position_limits import model_positions
from yeonma.policy import Policy
from yeonma.rewards.rewards import Answered, Reward, score
from yeonma.tokenization.dataset import Dataset, PreparedSet
from yeonma.tokenization.example import AnswerTokens, Example, answer_tokens, end_of_prompt
from yeonma.train.distributed import Processes, gather_texts
from yeonma.train.loop import StepBatches
from yeonma.train.policy_losses import (
    ADVANTAGE,
    SAMPLED_LOGPROB,
    TOKEN_SHARE,
    PolicyLoss,
)


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer that the model drew."""

    unit: int
    """The place of its prompt in the step."""
    number: int
    """Its place in its group."""
    row: int
    """The row of the prompt, as numbered in the training rows."""
    token_ids: list[int]
    """With the token that ended it."""
    logprobs: list[float]
    """Of these tokens, when they were drawn."""
    ended: bool
    """Whether a stop token ended it, rather than `max_new_tokens`."""
    text: str
    """Without reasoning."""
    reward: float
    rewards: dict[str, float]
    """By name, before their weights."""


@dataclass(frozen=True)
class Rollouts:
    """What answers are drawn with."""

    policy: Policy
    tokenizer: Any
    dataset: Dataset
    settings: RewardSettings
    loss: PolicyLoss
    rewards: Sequence[Reward]
    seed: int
    group: Processes

    @cached_property
    def rows(self) -> dict[int, tuple[Row, PreparedSet]]:
        """The training rows by their number in the joined store. All of them stay in memory."""
        found, before = dict[int, tuple[Row, PreparedSet]](), 0
        for one in self.dataset.sets:
            found |= {before + row.number: (row, one) for row in one.train.rows}
            before += one.train.store.counts.rows
        return found

    @cached_property
    def tokens(self) -> AnswerTokens:
        """What ends an answer, and what the chat template makes the model write around it."""
        is_turns = self.dataset.template.has_turns
        eos = eos_tokens(self.policy.transformers_model.generation_config)
        return answer_tokens(self.tokenizer, self.dataset.rules if is_turns else None, eos)

    def answered(self, row: int, prompt: Sequence[int], answer: Answer) -> Answered:
        """What a reward reads of an answer to a row."""
        record, one = self.rows[row]
        rendered = self.dataset.task.render(one.template, record, one.columns)
        shape = self.tokens.shape
        parts = shape.parts(answer.text, is_open=shape.opens(end_of_prompt(prompt, self.tokenizer)))
        wanted = shape.parts(wanted_answer(rendered)).content
        return Answered(record.values, record.place, wanted, parts.content.removesuffix(shape.trail))


@dataclass(frozen=True)
class StepRollouts:
    """The answers of a step, and what follows from them."""

    answers: list[DrawnAnswer]
    batch: Batch
    """The answers with an advantage other than 0, a group a unit."""
    metrics: dict[str, float]


def check_room(dataset: Dataset, units: np.ndarray, most_tokens: int, config: Any) -> None:
    """Raises UserError if a prompt and an answer of `most_tokens` exceed the model's positions."""
    positions = model_positions(config)
    batch = Batch.from_store(dataset.train.store, units)
    longest = int(batch.prompt_lengths_E.max())
    if positions is not None and longest + most_tokens > positions:
        what = tr(
            "the longest prompt has {prompt}, which leaves no {answer} of the model's {positions:,} positions",
            prompt=counted(longest, "token"),
            answer=counted(most_tokens, "token"),
            positions=positions,
        )
        cure = tr("lower it to {room}, or lower --cutoff_len", room=max(positions - longest, 1))
        raise UserError(what, place="--max_new_tokens", cure=cure)


def draw_step(rollouts: Rollouts, units: np.ndarray, step: int) -> StepRollouts:
    """Draws and scores the answers to the prompts of `units`. Every process gets the same."""
    started = time.perf_counter()
    batch = Batch.from_store(rollouts.dataset.train.store, units)
    prompts = [
        ids[:length] for ids, length in zip(batch.token_ids, batch.prompt_lengths_E.tolist(), strict=True)
    ]
    rows = batch.rows_E.tolist()
    share = range(rollouts.group.rank, len(prompts), rollouts.group.count)
    drawn, scoring_seconds = _draw(rollouts, prompts, rows, share, step)
    texts = gather_texts(rollouts.group, json.dumps([asdict(answer) for answer in drawn]))
    answers = [DrawnAnswer(**values) for text in texts for values in json.loads(text)]
    answers.sort(key=lambda answer: (answer.unit, answer.number))
    seconds = time.perf_counter() - started - scoring_seconds
    return StepRollouts(
        answers,
        training_batch(answers, prompts, rollouts.loss, rollouts.settings),
        {
            **_metrics(answers, rollouts.settings.group_size),
            "drawing_seconds": seconds,
            "scoring_seconds": scoring_seconds,
        },
    )


def drawn_batches(rollouts: Rollouts) -> StepBatches:
    """The batches of a run that learns from what it draws."""
    made = dict[int, StepRollouts]()

    def batch_of(units: np.ndarray, step: int) -> Batch:
        made.clear()
        made[step] = draw_step(rollouts, units, step)
        return made[step].batch

    return StepBatches(
        batch_of,
        ahead=False,
        updates=rollouts.settings.updates_per_rollout,
        metrics=lambda step: made[step].metrics,
    )


def _draw(
    rollouts: Rollouts, prompts: Sequence[np.ndarray], rows: Sequence[int], share: Sequence[int], step: int
) -> tuple[list[DrawnAnswer], float]:
    """The answers to this process's share of the prompts, and the seconds that their rewards took."""
    settings = rollouts.settings
    asked = [(unit, number) for unit in share for number in range(settings.group_size)]
    scores = [ScoreLog(0) for _ in asked]
    sampling = SamplingParams(
        stop_ids=rollouts.tokens.stop_ids,
        shown_ids=rollouts.tokens.shown_ids,
        max_new_tokens=settings.max_new_tokens,
        temperature=1.0,
    )
    answers = rollouts.policy.generate_from_ids(
        [prompts[unit] for unit, _ in asked],
        rollouts.tokenizer,
        sampling,
        batch_size=settings.rollout_batch_size,
        seeds=[seed_of(rollouts.seed, step, unit, number) for unit, number in asked],
        scores=scores,
    )
    started = time.perf_counter()
    texts = [
        rollouts.answered(rows[unit], prompts[unit].tolist(), answer)
        for (unit, _), answer in zip(asked, answers, strict=True)
    ]
    scored = score(rollouts.rewards, texts)
    seconds = time.perf_counter() - started
    drawn = [
        DrawnAnswer(
            unit=unit,
            number=number,
            row=rows[unit],
            token_ids=[token.token_id for token in log.tokens],
            logprobs=[float(token.logprob or 0.0) for token in log.tokens],
            ended=answer.ended,
            text=text.answer,
            reward=one.total,
            rewards=dict(one.parts),
        )
        for (unit, number), log, answer, text, one in zip(asked, scores, answers, texts, scored, strict=True)
    ]
    return drawn, seconds


def seed_of(seed: int, step: int, unit: int, number: int) -> int:
    """The seed of an answer: a number below 2**63."""
    content = np.array([seed, step, unit, number], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def training_batch(
    answers: Sequence[DrawnAnswer],
    prompts: Sequence[np.ndarray],
    loss: PolicyLoss,
    settings: RewardSettings,
) -> Batch:
    """The answers as a batch, without those whose advantage is 0: they have no gradient, and cost nothing. What a token
    counts in the loss is as if they were there. A batch of no answers has no units."""
    reward_PG = np.array([answer.reward for answer in answers]).reshape(-1, settings.group_size)
    advantage_A = loss.advantages(reward_PG).reshape(-1)
    tokens_A = np.array([len(answer.token_ids) for answer in answers], dtype=np.int64)
    share_A = loss.shares(tokens_A, settings.max_new_tokens)
    trained = np.flatnonzero(advantage_A)
    kept = trained if len(trained) else np.zeros(1, dtype=np.int64)
    batch = Batch.of(
        [example_of(answers[index], prompts[answers[index].unit]) for index in kept],
        units=[answers[index].unit for index in kept],
        example_extras={ADVANTAGE: advantage_A[kept]},
        token_extras={
            SAMPLED_LOGPROB: np.concatenate([answers[index].logprobs for index in kept]),
            TOKEN_SHARE: np.repeat(share_A[kept], tokens_A[kept]),
        },
    )
    return batch if len(trained) else batch.select_units([])


def example_of(answer: DrawnAnswer, prompt: np.ndarray) -> Example:
    """The tokens of an answer behind those of its prompt; all of the answer's are trained."""
    token_ids = np.concatenate([prompt, np.array(answer.token_ids, dtype=np.int32)]).astype(np.int32)
    return Example(
        token_ids=token_ids,
        trained=np.arange(len(token_ids)) >= len(prompt),
        prompt_length=len(prompt),
        row=answer.row,
        variant=0,
        cut_characters=0,
        straddles=False,
        special_text=0,
    )


def _metrics(answers: Sequence[DrawnAnswer], group_size: int) -> dict[str, float]:
    """Means over the answers of a step, or over its groups."""
    reward_PG = np.array([answer.reward for answer in answers]).reshape(-1, group_size)
    names = list(answers[0].rewards)
    parts: Mapping[str, float] = {
        f"reward_{name}": float(np.mean([answer.rewards[name] for answer in answers])) for name in names
    }
    return {
        "reward": float(reward_PG.mean()),
        "reward_best": float(reward_PG.max(axis=1).mean()),
        **(parts if len(names) > 1 else {}),
        "equal_groups": float((reward_PG.max(axis=1) == reward_PG.min(axis=1)).mean()),
        "answer_tokens": float(np.mean([len(answer.token_ids) for answer in answers])),
        "unfinished": float(np.mean([not answer.ended for answer in answers])),
    }
