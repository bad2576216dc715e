"""Compares the losses of learning from rewards, and their gradients, with TRL's GRPOTrainer on the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.rollouts import GROUP, MOST_TOKENS, answers, prompts, reward_settings
from tests.runs import model_folder
from tests.steps import step_state
from yeonma.config.reward_settings import PolicyLossName
from yeonma.train.build import clip_of
from yeonma.train.policy_losses import ADVANTAGE, POLICY_LOSSES, policy_objective
from yeonma.train.rollouts import training_batch
from yeonma.train.step import train_step

pytestmark = pytest.mark.slow

REWARDS = [[0.0, 1.0, 0.0], [0.5, 0.25, 2.0], [1.0, 1.0, 0.0]]
LOW, HIGH = 0.2, 0.3
TRL: dict[PolicyLossName, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": False},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1 + HIGH},  # a bound, where ours is what lies beyond 1
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


def model_of(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, weight in model.named_parameters():
        weight.requires_grad = "self_attn" in name or "mlp" in name
    return model


@pytest.mark.parametrize("loss", sorted(TRL))
def test_same_loss_and_gradients(tmp_path: Path, base: Path, loss: PolicyLossName) -> None:
    drawn, asked = answers(loss, REWARDS), prompts(len(REWARDS))
    settings = reward_settings(loss, clip_low=LOW, clip_high=HIGH)
    batch = training_batch(drawn, asked, POLICY_LOSSES[loss], settings)
    assert len(batch) == len(drawn)

    theirs = model_of(base)
    options = {"epsilon": LOW, "epsilon_high": HIGH, **TRL[loss]}
    trainer = GRPOTrainer(
        theirs,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            num_generations=GROUP,
            per_device_train_batch_size=len(drawn),
            max_completion_length=MOST_TOKENS,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 12}),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def padded(values: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row + [0] * (MOST_TOKENS - len(row)) for row in values], dtype=dtype)

    prompt_ids = torch.tensor([asked[answer.unit].tolist() for answer in drawn])
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": padded([answer.token_ids for answer in drawn], torch.long),
        "completion_mask": padded([[1] * len(answer.token_ids) for answer in drawn], torch.long),
        "advantages": torch.tensor(batch.example_extras[ADVANTAGE], dtype=torch.float32),
        "old_per_token_logps": padded([answer.logprobs for answer in drawn], torch.float32),
        "num_items_in_batch": torch.tensor(sum(len(answer.token_ids) for answer in drawn)),
    }
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()

    ours = model_of(base)
    parameters = {name: weight for name, weight in ours.named_parameters() if weight.requires_grad}
    objective = policy_objective(POLICY_LOSSES[loss], clip_of(settings))
    state, gradients = step_state(ours, parameters, objective, 2)
    assert train_step(state, batch).loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for name, weight in theirs.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-5)
