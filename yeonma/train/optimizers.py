"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), and the same with its averages in 8 bits, by bitsandbytes.

In 8 bits blocks of 256 numbers share a scale; parameters of fewer than 4,096 numbers keep theirs in float32. Paged ones
lie in memory that the driver moves out of the GPU where it is needed for something else. Dettmers et al. 2021,
arXiv:2110.02861. Their state is AdamW's under other names, so that checkpoints keep it likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from yeonma.config.settings import Optimizer


def make_optimizer(
    kind: Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(
            parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
        )
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    optimizer: torch.optim.Optimizer = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[kind](
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
    )
    return optimizer


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]
) -> dict[str, torch.Tensor]:
    """Optimizer state as flat tensors, `name/exp_avg` and so on."""
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.Tensor, str],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    by_name = {name: parameter for parameter, name in names.items()}
    if hasattr(optimizer, "init_state"):
        _begin(optimizer, {by_name[key.rpartition("/")[0]] for key in tensors})
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        parameter = by_name[name]
        state = optimizer.state[parameter]
        if isinstance(
            state.get(what), torch.Tensor
        ):  # where bitsandbytes has put it, which may be paged memory
            state[what].copy_(value)
        elif what == "step":  # AdamW keeps its step counter on the CPU, bitsandbytes as a plain number
            state[what] = value if value.is_floating_point() else int(value)
        else:
            state[what] = value.to(parameter.device)


def _begin(optimizer: Any, parameters: set[torch.Tensor]) -> None:
    """Make the state of bitsandbytes' optimizer, as its first step would."""
    for at, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter in parameters:
                optimizer.init_state(group, parameter, at, place)
