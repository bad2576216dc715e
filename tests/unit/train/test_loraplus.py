"""LoRA+: B learns at a multiple of A's rate, as in PEFT, through steps, schedules, weight decay and resumed runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from tests.models import tiny_model
from tests.runs import Done, articles, left_behind, model_folder, sft, trained, unfinished_copy, write_jsonl
from yeonma.model.load import LoraShape, add_lora
from yeonma.train.optimizers import make_loraplus_optimizer, make_optimizer

RATE, RATIO, STEPS = 1e-2, 16, 4
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.99), "epsilon": 1e-8, "weight_decay": 0.1}
RUN: dict[str, object] = {
    "max_steps": 4,
    "save_steps": 2,
    "val_set_size": 4,
    "eval_steps": 2,
    "weight_decay": 0.1,
    "lora_dropout": 0.1,
}


def after_steps(
    optimizer_of: Callable[[Any], torch.optim.Optimizer], **shape: Any
) -> dict[str, torch.Tensor]:
    """The trained weights after steps along random gradients, which depend on the parameter's name alone."""
    peft_model = add_lora(tiny_model("llama"), LoraShape(4, 8, 0.0, "all-linear", **shape), seed=0)
    optimizer = optimizer_of(peft_model)
    trained = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    for step in range(STEPS):
        for number, (_, weight) in enumerate(sorted(trained.items())):
            generator = torch.Generator().manual_seed(100 * step + number)
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return {name: weight.detach() for name, weight in trained.items()}


def ours(ratio: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda model: make_loraplus_optimizer("adamw", model, ratio, learning_rate=RATE, **OPTIONS)


def of_peft(model: Any) -> torch.optim.Optimizer:
    options = {"betas": OPTIONS["betas"], "eps": OPTIONS["epsilon"], "loraplus_weight_decay": 0.1}
    kind = torch.optim.AdamW
    return create_loraplus_optimizer(model, kind, lr=RATE, loraplus_lr_ratio=RATIO, **options)


def by_hand(model: Any) -> torch.optim.Optimizer:
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight], "lr": RATE * (RATIO if "lora_B" in name else 1)} for name, weight in trained
    ]
    options = {"betas": OPTIONS["betas"], "eps": OPTIONS["epsilon"], "weight_decay": 0.1}
    return torch.optim.AdamW(groups, **options)


def plain(model: Any) -> torch.optim.Optimizer:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return make_optimizer("adamw", trained, learning_rate=RATE, **OPTIONS)


@pytest.mark.parametrize("reference", [of_peft, by_hand])
def test_steps_are_those_of_peft_and_of_the_paper(
    reference: Callable[[Any], torch.optim.Optimizer],
) -> None:
    found, expected = after_steps(ours(RATIO)), after_steps(reference)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)


def test_magnitudes_of_dora_learn_as_fast_as_b_and_do_not_decay() -> None:
    found, expected = after_steps(ours(RATIO), use_dora=True), after_steps(of_peft, use_dora=True)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)


def test_ratio_of_one_is_plain_adamw() -> None:
    found, expected = after_steps(ours(1)), after_steps(plain)
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loraplus")
    model_folder(folder / "base")
    write_jsonl(folder / "rows.jsonl", articles(12))
    return folder


def run(place: Path, output: Path, **settings: object) -> Done:
    return trained(output, place / "base", place / "rows.jsonl", **{**RUN, **settings})


def test_run_says_so_and_another_ratio_is_another_run(place: Path, tmp_path: Path) -> None:
    done = run(place, tmp_path / "out", loraplus_ratio=RATIO)
    assert "LoRA+: B learns at 16 times the learning rate of A" in done.out
    assert done.steps[0]["learning_rate"] == 3e-3  # that of A
    other = sft(
        tmp_path / "out", place / "base", place / "rows.jsonl", **{**RUN, "loraplus_ratio": RATIO + 1}
    )
    assert other.status == 2
    assert "loraplus_ratio was 16" in other.err
    without = run(place, tmp_path / "plain")
    assert without.losses[0] == done.losses[0]
    assert without.losses[2] != done.losses[2]


@pytest.mark.parametrize("schedule", ["cosine_with_min_lr", "greedy"])
def test_resumed_run_has_the_bytes_of_one_without_a_stop(place: Path, tmp_path: Path, schedule: str) -> None:
    more: dict[str, object] = {"loraplus_ratio": RATIO, "lr_scheduler": schedule}
    if schedule == "cosine_with_min_lr":
        more["lr_scheduler_kwargs"] = {"min_lr": 1e-4}
    whole = run(place, tmp_path / "whole" / "out", **more)
    output = unfinished_copy(whole.folder, tmp_path / "again" / "out")
    shutil.rmtree(output / "checkpoint-4")
    resumed = run(place, output, **more)
    assert "continuing after step 2" in resumed.out
    assert left_behind(output) == left_behind(whole.folder)
    rates = json.loads((output / "checkpoint-2" / "state.json").read_text())["schedule"]["_last_lr"]
    assert rates[2] == pytest.approx(RATIO * rates[0])


def test_micro_batches_are_only_speed(place: Path, tmp_path: Path) -> None:
    one, other = (
        run(place, tmp_path / f"by{size}", loraplus_ratio=RATIO, micro_batch_size=size, lora_dropout=0)
        for size in (1, 4)
    )
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-3, atol=1e-5)
