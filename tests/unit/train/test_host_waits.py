"""How often the host waits for the GPU, and how many kernels a step has: counted on a simulated GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import modeling_rope_utils

from tests.models import VOCABULARY, tiny_model
from tests.simulated_cuda import CUDA, H100, SimulatedCuda, move_to_gpu, one_varlen_kernel, simulated_cuda
from tests.steps import step_state
from yeonma.batch.batch import Batch
from yeonma.data.task import PAIRS
from yeonma.model import load
from yeonma.model.attention import varlen
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.logprobs import plain_head
from yeonma.model.transfer import to_device
from yeonma.tokenization.example import AnswerRole, Example
from yeonma.train.losses import REFERENCE_LOGPROB, SFT, TOKEN_LOSSES, Objective
from yeonma.train.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from yeonma.train.preference_losses import LOSSES, PreferenceOptions, preference_objective
from yeonma.train.step import StepResult, TrainState, evaluate, prepare_step, train_step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

ONE_WAIT = ["train_step in train/step.py: tolist"]


def a_model(family: str, dtype: torch.dtype) -> Any:
    model = tiny_model(family).to(dtype)
    load.add_lora(model, load.LoraShape(4, 8, 0.0, "all-linear"), 0)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return model


def state_on(
    cuda: SimulatedCuda | None,
    objective: Objective = SFT,
    most_examples: int = 100,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
) -> TrainState:
    """A state on the simulated GPU, or else on the CPU."""
    model = a_model(family, dtype)
    state, _ = step_state(model, dict(model.named_parameters()), objective, most_examples)
    patch_kernels(model, support=state.support, trim_last=True)
    if cuda is not None:
        move_to_gpu(cuda, model)
        state = replace(state, support=replace(state.support, capability=H100))
    model.train()
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = make_optimizer(
        "adamw",
        list(parameters.values()),
        learning_rate=1e-3,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.01,
    )
    return replace(
        state,
        support=replace(state.support, head=plain_head(model)),
        parameters=parameters,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        max_grad_norm=1.0,
        start={name: weight.detach().clone() for name, weight in parameters.items()},
    )


def examples(count: int, prompts: int, answers: tuple[int, int] = (2, 9)) -> list[Example]:
    """Rows in groups with one prompt."""
    random = np.random.default_rng(0)
    of_prompt = [random.integers(3, VOCABULARY, 20) for _ in range(prompts)]
    rows = []
    for index in range(count):
        prompt = of_prompt[index * prompts // count]
        ids = np.concatenate([prompt, random.integers(3, VOCABULARY, random.integers(*answers))])
        trained = np.arange(len(ids)) >= len(prompt)
        rows.append(Example(ids.astype(np.int32), trained, len(prompt), index + 1, 0, 0, False, 0))
    return rows


def answers_to_rows() -> Batch:
    return Batch.of(examples(9, 3))


def preferences(name: str) -> Batch:
    roles = [AnswerRole.CHOSEN, AnswerRole.REJECTED] * 4
    units = [index // 2 for index in range(8)]
    if LOSSES[name].task is not PAIRS:
        roles, units = [AnswerRole.DESIRABLE, AnswerRole.UNDESIRABLE] * 4, list(range(8))
    reference = np.random.default_rng(1).normal(-20, 1, 8)
    extras = {REFERENCE_LOGPROB: reference}
    return Batch.of(examples(8, 4), units=units, roles=roles, example_extras=extras)


@pytest.fixture(autouse=True)
def _varlen_on_the_simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attention", lambda: one_varlen_kernel)


def counted_step(
    batch: Batch, *arguments: Any, **keywords: Any
) -> tuple[StepResult, list[str], dict[str, int]]:
    """A step's result, its waits and its kernels. A step before it lets rotary modules move their frequencies."""
    with simulated_cuda() as cuda:
        state = state_on(cuda, *arguments, **keywords)
        train_step(state, batch)
        cuda.waits.clear()
        cuda.kernels.clear()
        return train_step(state, batch), list(cuda.waits), dict(cuda.kernels)


PICKS_ON_THE_HOST = pytest.mark.skipif(
    "torch.where" not in inspect.getsource(modeling_rope_utils.dynamic_rope_update),
    reason="this version of transformers picks LongRoPE's frequencies on the host",
)
FAMILIES = [
    ("llama", 100),
    ("gemma3_text", 3),
    ("llama", 3),
    ("olmo_hybrid", 3),
    pytest.param("phi3 longrope", 3, marks=PICKS_ON_THE_HOST),
    ("qwen3_moe", 3),
]


@pytest.mark.parametrize(("family", "most_examples"), FAMILIES)
def test_supervised_step_waits_once_whatever_its_micro_batches(family: str, most_examples: int) -> None:
    _, waits, _ = counted_step(answers_to_rows(), SFT, most_examples, family)
    assert waits == ONE_WAIT


def test_pairs_and_weighted_tokens_wait_once_as_well() -> None:
    dpo = preference_objective(LOSSES["sigmoid"], PreferenceOptions(), 64)
    assert counted_step(preferences("sigmoid"), dpo, 4)[1] == ONE_WAIT
    weighted = [replace(row, weights=np.full(len(row.trained), 0.5)) for row in examples(9, 3)]
    assert counted_step(Batch.of(weighted), TOKEN_LOSSES["dft"], 4)[1] == ONE_WAIT


def test_a_loss_that_measures_the_step_first_waits_for_that() -> None:
    aot = preference_objective(LOSSES["aot"], PreferenceOptions(), 64)
    waits = counted_step(preferences("aot"), aot, 4)[1]
    assert waits == ["_measured_logprobs in train/step.py: copies from the GPU", *ONE_WAIT]


def test_evaluation_waits_for_the_micro_batches_together() -> None:
    with simulated_cuda() as cuda:
        state = state_on(cuda, most_examples=3)
        cuda.waits.clear()
        record = evaluate(state, {"rows": answers_to_rows()}, step=0, epoch=0.0)
    copies = ["add_losses in train/step.py: copies from the GPU"] * 3  # only the first of them really waits
    assert record is not None and cuda.waits[:3] == copies and len(cuda.waits) == 5


def test_next_step_is_prepared_before_the_host_waits() -> None:
    batch, order = answers_to_rows(), list[str]()
    with simulated_cuda() as cuda:
        state = state_on(cuda, most_examples=3)
        prepared = prepare_step(state, batch)
        cuda.wait = order.append  # type: ignore[method-assign]
        one = train_step(state, batch, prepared=prepared, meanwhile=lambda: order.append("meanwhile"))
        other = train_step(state_on(cuda, most_examples=3), batch)
    assert prepared.inputs is not None and prepared.inputs.source_U.device == CUDA
    assert order[:2] == ["meanwhile", "tolist"]
    assert one == other


def test_kernels_of_a_micro_batch_do_not_depend_on_its_examples() -> None:
    few, many = (counted_step(Batch.of(examples(count, count)), SFT)[2] for count in (3, 12))
    assert few == many
    assert (few["varlen_attn"], few["varlen_attn_backward"], few["_fused_adamw_"]) == (2, 2, 1)


def test_step_on_the_simulated_gpu_has_the_cpu_s_numbers() -> None:
    batch = answers_to_rows()
    expected = train_step(state_on(None, SFT, 3, "llama", torch.float32), batch)
    with simulated_cuda() as cuda:
        found = train_step(state_on(cuda, SFT, 3, "llama", torch.float32), batch)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        found = train_step(state_on(cuda, SFT, 3, "llama"), batch)  # in bfloat16, by varlen
    assert found.loss == pytest.approx(expected.loss, rel=0.03)


def test_restored_optimizer_has_its_counter_on_the_gpu() -> None:
    batch = answers_to_rows()
    with simulated_cuda() as cuda:
        state = state_on(cuda)
        train_step(state, batch)
        names = {weight: name for name, weight in state.parameters.items()}
        tensors = optimizer_tensors(state.optimizer, names)
        assert all(tensor.device.type == "cpu" for tensor in tensors.values())
        other = state_on(cuda)
        restore_optimizer(
            other.optimizer, {weight: name for name, weight in other.parameters.items()}, tensors
        )
        kept = [value for entries in other.optimizer.state.values() for value in entries.values()]
    assert len(kept) == 3 * len(names) and all(value.device == CUDA for value in kept)


def _with_mask(x: torch.Tensor) -> object:
    return x[x > 0]


WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "mask": _with_mask,
    "nonzero": torch.nonzero,
    "unique": torch.unique,
    "repeats": lambda x: x.repeat_interleave((x > 0).long()),
    "new tensor": lambda x: x.new_tensor([1.0]),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "to": lambda x: torch.ones(3).to(x.device),
    "not pinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "not awaited": lambda x: torch.ones(3).pin_memory().to(x.device),
    "index of the CPU": lambda x: x[torch.tensor([0, 1])],
    "write": lambda x: x.copy_(torch.ones(3)),
}
QUEUED: dict[str, Callable[[torch.Tensor], object]] = {
    "product": lambda x: x @ x,
    "device": lambda x: x.to(x.device).float(),
    "pinned": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "transfer": lambda x: to_device([1, 2], x.device),
    "index": lambda x: x[torch.arange(2, device=x.device)],
    "zeros": lambda x: torch.zeros(3, device=x.device),
    "shape": lambda x: x.view(1, 3).shape,
    "where": lambda x: torch.where(x > 0, x, 0.0),
}


def test_simulated_gpu_sees_what_makes_a_host_wait() -> None:
    with simulated_cuda() as cuda:
        x = cuda.tensor(torch.tensor([1.0, -2.0, 3.0]))
        for name, call in {**WAITING, **QUEUED}.items():
            cuda.waits.clear()
            call(x)
            assert len(cuda.waits) == (name in WAITING), name
