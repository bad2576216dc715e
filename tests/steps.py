"""A training step in the process, on a tiny model with a seeded LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models import tiny_model
from yeonma.batch.plan import MicroBatchBounds
from yeonma.model import load
from yeonma.model.forest_support import check_forest_support
from yeonma.train.distributed import Processes
from yeonma.train.losses import Objective
from yeonma.train.oom_retry import MicroBatchLimit
from yeonma.train.step import TrainState

Parameters = dict[str, torch.nn.Parameter]


def llama_with_lora() -> tuple[Any, Parameters]:
    """The model, still with its own attention, and its trained parameters, none of which is zero."""
    model = tiny_model("llama")
    peft_model = load.add_lora(model, load.LoraShape(4, 8, 0.0, "all-linear"), 0)
    parameters = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(1)
    for weight in parameters.values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return model, parameters


def step_state(
    model: Any, parameters: Parameters, objective: Objective, most_examples: int
) -> tuple[TrainState, dict[str, Tensor]]:
    """A state for steps with micro-batches of so many examples, and a dict that gets the gradients of each step."""
    optimizer = torch.optim.SGD(list(parameters.values()), lr=1e-3)
    gradients: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: weight.grad.clone() for name, weight in parameters.items()})  # type: ignore[union-attr, func-returns-value]
    )
    limit = MicroBatchLimit(MicroBatchBounds(most_examples, None, share_prefix=True), torch.device("cpu"))
    state = TrainState(
        model=model,
        support=check_forest_support(model),
        parameters=parameters,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        by_metric=False,
        max_grad_norm=0.0,
        limit=limit,
        objective=objective,
        group=Processes(0, 1),
    )
    return state, gradients
