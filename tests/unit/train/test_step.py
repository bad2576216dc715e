"""A training step on a batch in memory: sampled answers with advantages, and a loss that no command offers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import VOCABULARY, plain_logprobs
from tests.steps import llama_with_lora, step_state
from yeonma.batch.batch import Batch
from yeonma.tokenization.example import Example
from yeonma.train.losses import Objective, Sums
from yeonma.train.step import evaluate, train_step

PROMPTS, ANSWERS = 3, 4
CLIP = 0.2


def clipped_policy_gradient(logprob_N: Tensor, batch: Batch) -> Sums:
    """PPO's clipped surrogate: Schulman et al. 2017, arXiv:1707.06347, equation 7, negated."""
    advantage_E = torch.from_numpy(batch.example_extras["advantage"]).to(logprob_N)
    advantage_N = advantage_E.repeat_interleave(torch.from_numpy(batch.trained_counts_E))
    sampled_N = torch.from_numpy(batch.token_extras["sampled_logprob"]).to(logprob_N)
    ratio_N = torch.exp(logprob_N - sampled_N)
    clipped_N = ratio_N.clamp(1 - CLIP, 1 + CLIP)
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    return -gain_N.sum(), (ratio_N != clipped_N).to(logprob_N).sum().reshape(1)


OBJECTIVE = Objective("ppo", per_token=True, sums=clipped_policy_gradient, metrics=("clipped",))


def sampled(random: np.random.Generator) -> list[Example]:
    """Several answers to each of a few prompts."""
    examples = []
    for prompt in range(PROMPTS):
        prompt_ids = random.integers(3, VOCABULARY, 20 + prompt)
        for _ in range(ANSWERS):
            answer = random.integers(3, VOCABULARY, random.integers(1, 9))
            tokens = np.concatenate([prompt_ids, answer]).astype(np.int32)
            trained = np.arange(len(tokens)) >= len(prompt_ids)
            examples.append(Example(tokens, trained, len(prompt_ids), prompt + 1, 0, 0, False, 0))
    return examples


@pytest.mark.parametrize("most_examples", [1, 5, 12])
def test_policy_gradient_step_equals_sequences_computed_one_by_one(most_examples: int) -> None:
    random = np.random.default_rng(0)
    examples = sampled(random)
    model, parameters = llama_with_lora()
    with torch.no_grad():
        sampled_logprobs = (
            torch.cat([plain_logprobs(model, example) for example in examples]).double().numpy()
        )
    # As if an earlier policy had sampled them.
    sampled_logprobs += random.normal(0, 0.3, len(sampled_logprobs))
    advantages = random.normal(0, 1, len(examples))
    batch = Batch.of(
        examples,
        example_extras={"advantage": advantages},
        token_extras={"sampled_logprob": sampled_logprobs},
    )

    logprob_N = torch.cat([plain_logprobs(model, example) for example in examples])
    ratio_N = torch.exp(logprob_N - torch.from_numpy(sampled_logprobs).float())
    advantage_N = torch.from_numpy(np.repeat(advantages, batch.trained_counts_E)).float()
    surrogate = torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - CLIP, 1 + CLIP) * advantage_N)
    loss = -surrogate.sum() / len(logprob_N)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert min(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4
    clipped_share = float(((ratio_N - 1).abs() > CLIP).float().mean())
    assert 0.2 < clipped_share < 0.8

    state, gradients = step_state(model, parameters, OBJECTIVE, most_examples)
    before = evaluate(state, {"rows": batch}, step=0, epoch=0.0)
    model.train()
    result = train_step(state, batch)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.metrics["clipped"] == pytest.approx(clipped_share, abs=1e-6)
    assert (result.units, result.trained_tokens) == (len(examples), len(logprob_N))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    after = evaluate(state, {"rows": batch}, step=1, epoch=1.0)
    assert before is not None
    assert after is not None
    assert before.loss == pytest.approx(loss.item(), rel=1e-5)
    assert after.loss < before.loss
