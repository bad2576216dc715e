"""AdamW and its 8-bit forms: close to each other, and resumed from saved tensors without a difference."""

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


def walked(kind: Optimizer, stop: int | None = None, device: str = "cpu") -> tuple[torch.Tensor, set[str]]:
    """Two parameters, one below 4,096 numbers, after some steps; `stop`: with another optimizer from there on, made of
    the tensors of the first. And the names of its tensors."""
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*s, generator=draw).to(device)) for s in ((64, 80), (7, 5))]
    names: dict[torch.Tensor, str] = {parameter: f"layers.{at}.A" for at, parameter in enumerate(parameters)}

    def make() -> torch.optim.Optimizer:
        return make_optimizer(
            kind, parameters, learning_rate=LEARNING_RATE, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.01
        )

    optimizer = make()
    for step in range(STEPS):
        if step == stop:
            saved = save(optimizer_tensors(optimizer, names))
            optimizer = make()
            restore_optimizer(optimizer, names, load(saved))
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
        optimizer.step()
    tensors = optimizer_tensors(optimizer, names)
    return torch.cat([parameter.detach().flatten().cpu() for parameter in parameters]), set(tensors)


@unpaged
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_saved_and_restored_it_walks_on_byte_for_byte(kind: Optimizer, stop: int) -> None:
    weights, names = walked(kind, stop)
    whole, all_names = walked(kind)
    assert torch.equal(weights, whole)
    assert names == all_names and len(names) > 5


@unpaged
@pytest.mark.parametrize("kind", IN_8_BITS)
def test_eight_bits_walk_near_the_whole_numbers(kind: Optimizer) -> None:
    (weights, _), (whole, _) = walked(kind), walked("adamw")
    furthest = float((weights - whole).abs().max())
    assert 0 < furthest < LEARNING_RATE  # of six steps of about that length
    assert torch.allclose(weights[-35:], whole[-35:], rtol=0, atol=1e-6)  # a small one's averages stay whole


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_too(kind: Optimizer) -> None:
    weights, _ = walked(kind, 4, device="cuda")
    assert torch.equal(weights, walked(kind, device="cuda")[0])
    assert float((weights - walked("adamw")[0]).abs().max()) < LEARNING_RATE
