"""The answers that the model draws to the prompts of a step, their rewards, and the batch that is trained on.

A draw depends on the model, the prompt, the seed of the run, the step, and the places of prompt and answer in the step.
It is made by the forest that trains: the same weights, the same products, the same tokens. Where there are several
processes, each draws the answers to its share of the prompts, the first one scores all, and all get all of them.

Shapes: P prompts of a step, G answers of a group, A = P x G answers, in order of the prompts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from yeonma.adapter.prompt_builder import Prompt, TemplateTexts
from yeonma.batch.batch import Batch
from yeonma.bounded.user_functions import UserFunctions
from yeonma.config.reward_settings import RewardSettings
from yeonma.data.rows import Row
from yeonma.data.template import Rendered
from yeonma.errors import UserError
from yeonma.generation.sampling import SamplingParams
from yeonma.generation.token_scores import ScoreLog
from yeonma.messages import counted, tr
from yeonma.model.load import eos_tokens
from yeonma.model.position_limits import model_positions
from yeonma.policy import Policy
from yeonma.rewards.rewards import Answered, Reward, rewards_of, score
from yeonma.tokenization.dataset import Dataset, PreparedSet
from yeonma.tokenization.example import AnswerTokens, Example, answer_tokens
from yeonma.train.distributed import Processes, gathered
from yeonma.train.loop import StepBatches
from yeonma.train.policy_losses import (
    ADVANTAGE,
    POLICY_LOSSES,
    SAMPLED_LOGPROB,
    TOKEN_SHARE,
    PolicyLoss,
)
from yeonma.train.prepare import Prepared


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer that the model drew."""

    unit: int
    """The place of its prompt in the step."""
    number: int
    """Its place in its group."""
    row: int
    """The row of the prompt, as numbered in the training rows."""
    seed: int
    """With which it was drawn."""
    token_ids: list[int]
    """With the token that ended it."""
    logprobs: list[float]
    """Of these tokens, when they were drawn."""
    ended: bool
    """Whether a stop token ended it, rather than `max_new_tokens`."""
    answer: str
    """Its text, without reasoning."""
    reward: float
    """The weighted sum."""
    rewards: dict[str, float]
    """By name, before their weights."""
    advantage: float = 0.0
    """What its reward is beside those of others (`PolicyLoss.advantages`)."""


@dataclass(frozen=True, eq=False)
class PromptRow:
    """A training row, and how its prompt is answered."""

    row: Row
    rendered: Rendered
    texts: TemplateTexts
    prompt_ids: np.ndarray

    @cached_property
    def prompt(self) -> Prompt:
        return self.texts.prompt(self.rendered, self.prompt_ids)

    @cached_property
    def wanted(self) -> str | None:
        return self.texts.reference(self.rendered, self.row.place)

    def answered(self, text: str) -> Answered:
        """What rewards read of a generated text."""
        return Answered(self.row.values, self.row.place, self.wanted, self.prompt.answer(text))


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What answers are drawn and scored with."""

    policy: Policy
    tokenizer: Any
    dataset: Dataset
    settings: RewardSettings
    rewards: Sequence[Reward]
    seed: int
    group: Processes

    @property
    def loss(self) -> PolicyLoss:
        return POLICY_LOSSES[self.settings.policy_loss]

    @cached_property
    def rows(self) -> dict[int, tuple[Row, PreparedSet]]:
        """The training rows by their number in the joined store. All of them stay in memory."""
        found, before = dict[int, tuple[Row, PreparedSet]](), 0
        for one in self.dataset.sets:
            found |= {before + row.number: (row, one) for row in one.train.rows}
            before += one.train.store.counts.rows
        return found

    @cached_property
    def tokens(self) -> dict[bool, AnswerTokens]:
        """What ends an answer, for templates without turns and with them."""
        eos, rules = eos_tokens(self.policy.transformers_model.generation_config), self.dataset.rules
        kinds = {one.template.has_turns for one in self.dataset.sets}
        return {kind: answer_tokens(self.tokenizer, rules if kind else None, eos) for kind in sorted(kinds)}

    @cached_property
    def texts(self) -> dict[str, TemplateTexts]:
        """By the name of the data set."""
        return {
            one.name: TemplateTexts(
                one.template, self.dataset.rules, self.tokenizer, self.tokens[one.template.has_turns]
            )
            for one in self.dataset.sets
        }

    def prompt_row(self, number: int, prompt_ids: np.ndarray) -> PromptRow:
        """The row with this number in the joined store."""
        row, one = self.rows[number]
        rendered = self.dataset.task.render(one.template, row, one.columns)
        return PromptRow(row, rendered, self.texts[one.name], prompt_ids)


@dataclass(frozen=True)
class StepRollouts:
    """The answers of a step, and what follows from them."""

    answers: list[DrawnAnswer]
    batch: Batch
    """The answers with an advantage other than 0, a group a unit."""
    metrics: dict[str, float]


def try_rewards(settings: RewardSettings, prepared: Prepared) -> None:
    """Before weights are loaded: the longest prompt leaves room for an answer, and every reward works on the first row
    with its own answer. Raises UserError otherwise."""
    check_room(prepared, settings.max_new_tokens)
    one = prepared.dataset.sets[0]
    (row,) = one.train.first_rows(1)
    rendered = prepared.dataset.task.render(one.template, row, one.columns)
    tokens = AnswerTokens(())
    wanted = TemplateTexts(one.template, prepared.dataset.rules, prepared.tokenizer, tokens).reference(
        rendered, row.place
    )
    with UserFunctions() as functions:
        score(rewards_of(settings, functions), [Answered(row.values, row.place, wanted, wanted or "")])


def check_room(prepared: Prepared, most_tokens: int) -> None:
    """Raises UserError if a prompt and an answer of `most_tokens` exceed the model's positions."""
    positions = model_positions(prepared.config)
    batch = Batch.from_store(prepared.dataset.train.store, prepared.dataset.train.units)
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
    """Draws and scores the answers to the prompts of `units`. Every process draws its share of them, and the first one
    scores all: every process gets the same. Raises UserError, in all of them, if a reward fails."""
    started = time.perf_counter()
    batch = Batch.from_store(rollouts.dataset.train.store, units)
    rows = batch.rows_E.tolist()
    asked = [
        rollouts.prompt_row(number, ids[:length])
        for number, ids, length in zip(rows, batch.token_ids, batch.prompt_lengths_E.tolist(), strict=True)
    ]
    group = rollouts.group
    shares = gathered(group, lambda: _draw(rollouts, asked, range(group.rank, len(asked), group.count), step))
    drawn = sorted((one for share in shares for one in share), key=lambda one: (one["unit"], one["number"]))
    texts = [one.pop("text") for one in drawn]
    drawing_seconds = time.perf_counter() - started

    def judged() -> list[dict[str, Any]]:
        read = [asked[one["unit"]].answered(text) for one, text in zip(drawn, texts, strict=True)]
        scores = score(rollouts.rewards, read)
        return [{"answer": one.answer, **scored} for one, scored in zip(read, scores, strict=True)]

    scores = gathered(group, lambda: judged() if group.first else [])[0]
    answers = [
        DrawnAnswer(**one, row=rows[one["unit"]], **scored) for one, scored in zip(drawn, scores, strict=True)
    ]
    answers = with_advantages(answers, rollouts.loss, rollouts.settings.group_size)
    prompts = [one.prompt_ids for one in asked]
    return StepRollouts(
        answers,
        training_batch(answers, prompts, rollouts.loss, rollouts.settings),
        {
            **_metrics(answers, rollouts.settings.group_size),
            "drawing_seconds": drawing_seconds,
            "scoring_seconds": time.perf_counter() - started - drawing_seconds,
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
        drawn=lambda step: (made[step].metrics, [asdict(answer) for answer in made[step].answers]),
    )


def _draw(
    rollouts: Rollouts, asked: Sequence[PromptRow], share: Sequence[int], step: int
) -> list[dict[str, Any]]:
    """The answers to some of the prompts, as far as DrawnAnswer is known then."""
    settings = rollouts.settings
    drawn: list[dict[str, Any]] = []
    for tokens in rollouts.tokens.values():
        wanted = [
            (unit, number)
            for unit in share
            if asked[unit].texts.tokens is tokens
            for number in range(settings.group_size)
        ]
        logs = [ScoreLog(0) for _ in wanted]
        seeds = [seed_of(rollouts.seed, step, unit, number) for unit, number in wanted]
        answers = rollouts.policy.generate_from_ids(
            [asked[unit].prompt_ids for unit, _ in wanted],
            rollouts.tokenizer,
            SamplingParams(
                stop_ids=tokens.stop_ids,
                shown_ids=tokens.shown_ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=1.0,
            ),
            batch_size=settings.rollout_batch_size,
            seeds=seeds,
            scores=logs,
        )
        drawn += [
            {
                "unit": unit,
                "number": number,
                "seed": seed,
                "token_ids": [token.token_id for token in log.tokens],
                "logprobs": [token.logprob for token in log.tokens],
                "ended": answer.ended,
                "text": answer.text,
            }
            for (unit, number), seed, log, answer in zip(wanted, seeds, logs, answers, strict=True)
        ]
    return drawn


def seed_of(seed: int, step: int, unit: int, number: int) -> int:
    """The seed of an answer: a number below 2**63."""
    content = np.array([seed, step, unit, number], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def with_advantages(answers: Sequence[DrawnAnswer], loss: PolicyLoss, group_size: int) -> list[DrawnAnswer]:
    """The answers of a step with their advantages."""
    reward_PG = np.array([answer.reward for answer in answers]).reshape(-1, group_size)
    advantages = loss.advantages(reward_PG).reshape(-1).tolist()
    return [replace(answer, advantage=value) for answer, value in zip(answers, advantages, strict=True)]


def training_batch(
    answers: Sequence[DrawnAnswer],
    prompts: Sequence[np.ndarray],
    loss: PolicyLoss,
    settings: RewardSettings,
) -> Batch:
    """The answers as a batch, without those whose advantage is 0: they have no gradient, and cost nothing. What a token
    counts in the loss is as if they were there. A batch of no answers has no units."""
    advantage_A = np.array([answer.advantage for answer in answers])
    tokens_A = np.array([len(answer.token_ids) for answer in answers], dtype=np.int64)
    share_A = loss.shares(tokens_A, settings.max_new_tokens)
    trained = np.flatnonzero(advantage_A)
    kept = trained if len(trained) else np.zeros(1, dtype=np.int64)
    answers = [answers[index] for index in kept.tolist()]
    batch = Batch.of(
        [example_of(answer, prompts[answer.unit]) for answer in answers],
        units=[answer.unit for answer in answers],
        example_extras={ADVANTAGE: advantage_A[kept]},
        token_extras={
            SAMPLED_LOGPROB: np.concatenate([answer.logprobs for answer in answers]),
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
