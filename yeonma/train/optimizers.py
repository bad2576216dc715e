"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), also with 8-bit averages by bitsandbytes (Dettmers et al. 2021,
arXiv:2110.02861).

In 8 bits, blocks of 256 numbers share a scale; parameters with fewer than 4,096 numbers keep float32 averages. The
driver moves paged averages out of GPU memory when the space is needed. Checkpoints store the state of all of them in
the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from yeonma.config.settings import Optimizer
from yeonma.model.sharding import is_shard, like, whole_tensor

EMBEDDING_RATE = 1e-6
"""The paper's and PEFT's learning rate for LoRA on an embedding, whatever the other rates are."""


def make_optimizer(
    name: Optimizer,
    parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of these parameters, which all learn at one rate. They may be groups with a weight decay of their
    own."""
    kind, options = _kind(name)
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, **options
    )
    return optimizer


def make_loraplus_optimizer(
    name: Optimizer,
    peft_model: Any,
    ratio: float,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of LoRA+ (Hayou et al. 2024, arXiv:2402.12354), in PEFT's groups: B, and vectors such as DoRA's
    magnitudes, learn at `ratio` times `learning_rate`; biases have no weight decay. LoRA on an embedding, which only
    adapters of other tools have, learns at EMBEDDING_RATE. The first group is that of A, at `learning_rate`."""
    from peft.optimizers import create_loraplus_optimizer

    kind, options = _kind(name)
    return create_loraplus_optimizer(
        peft_model,
        kind,
        lr=learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=weight_decay,
        loraplus_lr_embedding=EMBEDDING_RATE,
        betas=betas,
        eps=epsilon,
        **options,
    )


def _kind(name: Optimizer) -> tuple[Any, dict[str, Any]]:
    """The class of an optimizer, and the options that it always has."""
    if name == "adamw":
        return torch.optim.AdamW, {"fused": True}
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[name], {}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], *, keep: bool = True
) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors by name, such as `PARAMETER/exp_avg`; empty unless `keep`. If parameters are
    sharded, all processes must call it."""
    tensors = {
        f"{names[parameter]}/{key}": whole_tensor(torch.as_tensor(value), keep=keep)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if keep or is_shard(value)
    }
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items() if tensor is not None}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.Tensor, str],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Restores the state from the result of `optimizer_tensors`. Raises KeyError for unknown parameter names."""
    by_name = {name: parameter for parameter, name in names.items()}
    if hasattr(optimizer, "init_state"):
        _init_state(optimizer, {by_name[key.rpartition("/")[0]] for key in tensors})
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = by_name[name]
        state = optimizer.state[parameter]
        if isinstance(
            state.get(entry), torch.Tensor
        ):  # bitsandbytes has allocated it, perhaps in paged memory
            state[entry].copy_(value)
        elif entry == "step":  # AdamW keeps a tensor beside the parameter, bitsandbytes a plain number
            state[entry] = value.to(parameter.device) if value.is_floating_point() else int(value)
        else:
            state[entry] = like(value, parameter)


def _init_state(optimizer: Any, parameters: set[torch.Tensor]) -> None:
    """Allocates the state of a bitsandbytes optimizer, as its first step would."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter in parameters:
                optimizer.init_state(group, parameter, group_index, index)
