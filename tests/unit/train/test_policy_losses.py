"""The losses of learning from rewards: against their formulas, and whatever the micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.models import plain_logprobs
from tests.rollouts import MOST_TOKENS, answers, prompts, reward_settings
from tests.steps import llama_with_lora, step_state
from yeonma.batch.batch import Batch
from yeonma.train.build import clip_of
from yeonma.train.policy_losses import POLICY_LOSSES, policy_objective
from yeonma.train.rollouts import DrawnAnswer, example_of, training_batch
from yeonma.train.step import train_step

REWARDS = [[0.0, 1.0, 0.0], [0.5, 0.25, 2.0], [1.0, 1.0, 0.0]]
EQUAL = [1.0, 1.0, 1.0]
LOSSES = sorted(POLICY_LOSSES)


def batch_of(loss: str, rewards: list[list[float]], drawn: list[DrawnAnswer] | None = None) -> Batch:
    drawn = drawn or answers(loss, rewards)
    return training_batch(drawn, prompts(len(rewards)), POLICY_LOSSES[loss], reward_settings(loss))


def by_hand(name: str, drawn: list[DrawnAnswer], logprobs: list[list[float]]) -> float:
    """The loss of a step by its paper's formula, answer by answer and token by token."""
    rewards = np.array([answer.reward for answer in drawn]).reshape(-1, 3)
    low, high = POLICY_LOSSES[name].clip.low, POLICY_LOSSES[name].clip.high
    lengths = [len(answer.token_ids) for answer in drawn]
    total = 0.0
    for index, (answer, now) in enumerate(zip(drawn, logprobs, strict=True)):
        group, own = rewards[index // 3], rewards[index // 3][index % 3]
        others = [reward for place, reward in enumerate(group) if place != index % 3]
        advantage = {
            "dr_grpo": own - group.mean(),
            "rloo": own - sum(others) / 2,
            "reinforce++": (own - rewards.mean()) / (rewards.std(ddof=1) + 1e-4),
        }.get(name, (own - group.mean()) / (group.std(ddof=1) + 1e-4))
        before = answer.logprobs
        sequence_ratio = math.exp(sum(a - b for a, b in zip(now, before, strict=True)) / len(now))
        for token, logprob in enumerate(now):
            ratio = sequence_ratio if name == "gspo" else math.exp(logprob - before[token])
            if name == "cispo":
                loss = -min(ratio, 1 + high) * advantage * logprob
            else:
                loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            total += loss * {
                "grpo": 1 / (len(now) * len(drawn)),
                "gspo": 1 / (len(now) * len(drawn)),
                "dr_grpo": 1 / (MOST_TOKENS * len(drawn)),
                "rloo": 1 / len(drawn),
            }.get(name, 1 / sum(lengths))
    return total


@pytest.mark.parametrize("name", LOSSES)
def test_formula(name: str) -> None:
    model, parameters = llama_with_lora()
    drawn, asked = answers(name, REWARDS), prompts(len(REWARDS))
    with torch.no_grad():  # each answer alone, before the model's attention is replaced
        logprobs = [
            plain_logprobs(model, example_of(answer, asked[answer.unit])).tolist() for answer in drawn
        ]
    batch = batch_of(name, REWARDS)
    assert len(batch) == len(drawn)  # none has an advantage of 0
    objective = policy_objective(POLICY_LOSSES[name], clip_of(reward_settings(name)))
    state, _ = step_state(model, parameters, objective, 2)
    assert train_step(state, batch).loss == pytest.approx(by_hand(name, drawn, logprobs), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_are_only_speed(name: str) -> None:
    found = []
    for most_examples in (1, 2, 3):
        model, parameters = llama_with_lora()
        objective = policy_objective(POLICY_LOSSES[name], clip_of(reward_settings(name)))
        state, gradients = step_state(model, parameters, objective, most_examples)
        result = train_step(state, batch_of(name, REWARDS))
        found.append((result, dict(gradients)))
    first, gradients = found[0]
    for other, others in found[1:]:
        assert other.loss == pytest.approx(first.loss, rel=1e-5, abs=1e-7)
        assert other.metrics == pytest.approx(first.metrics, rel=1e-5)
        for weight in gradients:
            torch.testing.assert_close(others[weight], gradients[weight], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"reinforce++"}))
def test_groups_of_equal_rewards_cost_nothing_and_count(name: str) -> None:
    drawn = answers(name, [*REWARDS, EQUAL])
    batch = batch_of(name, [*REWARDS, EQUAL], drawn)
    assert len(batch) == 3 * len(REWARDS) and batch.unit_count == len(REWARDS)
    model, parameters = llama_with_lora()
    objective = policy_objective(POLICY_LOSSES[name], clip_of(reward_settings(name)))
    state, gradients = step_state(model, parameters, objective, 2)
    with_equal = train_step(state, batch).loss
    model, parameters = llama_with_lora()
    state, alone = step_state(model, parameters, objective, 2)
    without = train_step(state, batch_of(name, REWARDS, drawn[: 3 * len(REWARDS)])).loss
    tokens = [sum(len(answer.token_ids) for answer in drawn[:count]) for count in (9, 12)]
    part = tokens[0] / tokens[1] if name in ("dapo", "cispo") else 9 / 12
    assert with_equal == pytest.approx(part * without, rel=1e-5)
    for weight, gradient in alone.items():
        torch.testing.assert_close(gradients[weight], part * gradient, rtol=1e-4, atol=5e-6)


def test_a_step_without_any_difference_changes_nothing() -> None:
    model, parameters = llama_with_lora()
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    objective = policy_objective(POLICY_LOSSES["grpo"], clip_of(reward_settings("grpo")))
    state, _ = step_state(model, parameters, objective, 2)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1.0)
    state = replace(state, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    result = train_step(state, batch_of("grpo", [EQUAL, EQUAL]))
    assert (result.loss, result.grad_norm, result.units, result.metrics) == (0.0, 0.0, 0, {})
    assert all(torch.equal(weight, before[name]) for name, weight in parameters.items())


@pytest.mark.parametrize("name", LOSSES)
def test_a_ratio_beyond_its_bounds_has_no_gradient(name: str) -> None:
    """But in CISPO, whose weight is bounded and whose gradient stays."""
    far = [replace(answer, logprobs=[-50.0] * len(answer.logprobs)) for answer in answers(name, REWARDS)]
    batch = batch_of(name, REWARDS, far)
    kept = batch.select_units([1])  # rewards 0.5, 0.25, 2: only the last one is above the mean
    objective = policy_objective(POLICY_LOSSES[name], clip_of(reward_settings(name)))
    logprob_N = torch.full((kept.trained_tokens,), -4.0, requires_grad=True)
    loss, metrics = objective.sums(logprob_N, kept)
    loss.backward()
    assert logprob_N.grad is not None
    positive = np.repeat(kept.example_extras["advantage"] > 0, kept.trained_counts_E)
    has_gradient = logprob_N.grad.numpy() != 0
    assert has_gradient[~positive].all()
    assert has_gradient[positive].all() if name == "cispo" else not has_gradient[positive].any()
    assert metrics[1] == len(logprob_N)  # all outside


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [("grpo", "gspo", 1.0), ("dapo", "cispo", 1.0), ("rloo", "dr_grpo", 1.5 * MOST_TOKENS)],
)
def test_where_losses_coincide(one: str, other: str, factor: float) -> None:
    """The gradients of answers that the model itself has just drawn, as docs/rewards.md says."""
    found = []
    for name in (one, other):
        batch = batch_of(name, REWARDS)
        logprobs = batch.token_extras["sampled_logprob"]
        logprob_N = torch.tensor(logprobs, requires_grad=True)
        objective = policy_objective(POLICY_LOSSES[name], clip_of(reward_settings(name)))
        objective.sums(logprob_N, batch)[0].backward()
        found.append(logprob_N.grad)
    torch.testing.assert_close(found[0], factor * found[1])
