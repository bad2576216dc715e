"""AdamW and its 8-bit forms: they stay close to each other and resume from saved tensors without a difference."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from tests.quantised import needs_bitsandbytes
from yeonma.config.settings import Optimizer
from yeonma.train.optimizers import make_optimizer, optimizer_tensors, restore_optimizer

STEPS, LEARNING_RATE = 6, 1e-2
IN_8_BITS = [
    pytest.param(kind, marks=needs_bitsandbytes) for kind in ("adamw_8bit", "paged_adamw_8bit")
]  # the CPU has no paged memory, and bitsandbytes says so
KINDS = ["adamw", *IN_8_BITS]
unpaged = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def run_steps(
    kind: Optimizer, stop: int | None = None, device: str = "cpu", *, in_groups: bool = False
) -> tuple[torch.Tensor, set[str]]:
    """The weights of two parameters after STEPS steps, and the names of the optimizer's tensors. One parameter has
    fewer than 4,096 numbers. At step `stop`, a new optimizer continues from the saved tensors of the first."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(*shape, generator=generator).to(device))
        for shape in ((64, 80), (7, 5))
    ]
    names: dict[torch.Tensor, str] = {
        parameter: f"layers.{index}.A" for index, parameter in enumerate(parameters)
    }

    def new_optimizer() -> torch.optim.Optimizer:
        groups = [
            {"params": [one], "weight_decay": decay}
            for one, decay in zip(parameters, (0.01, 0.0), strict=True)
        ]
        return make_optimizer(
            kind,
            groups if in_groups else parameters,
            learning_rate=LEARNING_RATE,
            betas=(0.9, 0.99),
            epsilon=1e-8,
            weight_decay=0.01,
        )

    optimizer = new_optimizer()
    for step in range(STEPS):
        if step == stop:
            saved = save(optimizer_tensors(optimizer, names))
            optimizer = new_optimizer()
            restore_optimizer(optimizer, names, load(saved))
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
    tensors = optimizer_tensors(optimizer, names)
    return torch.cat([parameter.detach().flatten().cpu() for parameter in parameters]), set(tensors)


@unpaged
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("in_groups", [False, True])
def test_restored_optimizer_continues_byte_for_byte(kind: Optimizer, stop: int, in_groups: bool) -> None:
    weights, names = run_steps(kind, stop, in_groups=in_groups)
    uninterrupted, all_names = run_steps(kind, in_groups=in_groups)
    assert torch.equal(weights, uninterrupted)
    assert names == all_names and len(names) > 5


@unpaged
@pytest.mark.parametrize("kind", IN_8_BITS)
def test_8_bit_optimizer_stays_close_to_adamw(kind: Optimizer) -> None:
    (weights, _), (adamw_weights, _) = run_steps(kind), run_steps("adamw")
    largest_gap = float((weights - adamw_weights).abs().max())
    assert 0 < largest_gap < LEARNING_RATE  # each of the six steps is about that long
    # the averages of a small parameter are not quantised
    assert torch.allclose(weights[-35:], adamw_weights[-35:], rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_restore_and_agree_on_a_gpu(kind: Optimizer) -> None:
    weights, _ = run_steps(kind, 4, device="cuda")
    assert torch.equal(weights, run_steps(kind, device="cuda")[0])
    assert float((weights - run_steps("adamw")[0]).abs().max()) < LEARNING_RATE
