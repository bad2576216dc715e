"""Frozen weights shared out over the processes, by FSDP2: each process keeps its part of every weight.

What a layer holds is gathered from all processes when the layer runs, forward and again backward, and let go after
it. Trained weights (the adapter) stay whole in every process; the step sums their gradients itself. The mathematics is
that of whole weights, to rounding.

Gathering is a meeting of all processes: each must send the same number of forward passes through the model, with
gradients or without, in the same order (`yeonma.train.step` sees to that).
Zhao et al. 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Result = TypeVar("Result")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
WITHIN = "yeonma_within"  # a sharded model's method, see `within`


def shard_weights(model: nn.Module, device: torch.device) -> None:
    """Share out the frozen weights of `model`, an adapted model on the CPU, over all processes; the rest goes to
    `device` whole.

    No process holds more than its parts and one layer on `device`. On the CPU, weights that transformers has mapped
    from their file stay pages of that file until then, which all processes of a machine have in common.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if device.type == "cpu":
        _return_freed_memory()
    # a weight that is a single number has nothing to share out
    whole = {each for each in model.parameters() if each.requires_grad or each.ndim == 0}
    for part in (*parts_of(model), model):
        # kept whole, the model's own group would make processes differ whenever one of them writes a state dict
        fully_shard(part, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    for each in whole:
        each.data = each.data.to(device)
    # of logits, which nobody here writes into
    warnings.filterwarnings(
        "ignore", rf"FSDP2-wrapped module \({type(model).__name__}\) returned a view", UserWarning
    )
    setattr(model, WITHIN, MethodType(_call, model))
    register_fsdp_forward_method(model, WITHIN)


def _return_freed_memory() -> None:
    """Have the C library give large tensors back to the system when they are freed. Its heap would grow holes: layers
    that are gathered and let go left it, in a model of 285 MB, 800 MB in each process instead of 180."""
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    except (OSError, AttributeError):  # not glibc's
        return


def parts_of(model: Any) -> list[nn.Module]:
    """The modules whose frozen weights are gathered together: each decoder layer, and the embedding and the head
    where they share no weight. What is in none of them is gathered for the whole of a forward pass.

    Layers are those that transformers names as not to be split, else the entries of the model's lists of modules.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    layers = _outermost(model, lambda module: own_class(module).__name__ in named)
    if not any(_has_frozen(layer) for layer in layers):
        lists = _outermost(model, lambda module: isinstance(module, nn.ModuleList))
        layers = [layer for each in lists for layer in each.children()]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [each for each in (embedding, head) if each is not None]
    if len(ends) == 2 and set(embedding.parameters()) & set(head.parameters()):
        ends = []
    inside = {module for layer in layers for module in layer.modules()}
    return [each for each in (*layers, *ends) if _has_frozen(each) and (each in layers or each not in inside)]


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}  # a layer that is used twice is one
    for child in module.children():
        found.update(dict.fromkeys([child] if wanted(child) else _outermost(child, wanted)))
    return list(found)


def _has_frozen(module: nn.Module) -> bool:
    return any(not each.requires_grad for each in module.parameters())


def gathered_bytes(model: nn.Module) -> int:
    """Of frozen weights, what a process holds whole at a time: two neighbouring parts, since the next is gathered
    while one runs, and what belongs to no part."""
    parts = parts_of(model)
    sizes = sorted((_frozen_bytes(part.parameters()) for part in parts), reverse=True)
    inside = {each for part in parts for each in part.parameters()}
    return sum(sizes[:2]) + _frozen_bytes(each for each in model.parameters() if each not in inside)


def _frozen_bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(each.nbytes for each in parameters if not each.requires_grad)


def held_bytes(model: nn.Module) -> int:
    """Bytes of frozen weights that this process holds now: of a weight that is shared out, its part."""
    weights = [own_part(each.detach()) for each in model.parameters() if not each.requires_grad]
    return sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in weights}.values()
    )


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, WITHIN)


def own_class(module: nn.Module) -> type:
    """The class of a module; FSDP2 puts a subclass of its own in front."""
    return type(module).__mro__[2] if hasattr(module, "unshard") else type(module)


def _call(model: nn.Module, function: Callable[[], Result]) -> Result:
    return function()


def within(model: nn.Module, function: Callable[[], Result]) -> Result:
    """`function()`, which calls parts of the model, as a forward pass of the whole model: with what belongs to no
    part gathered. For a model that is not sharded, a plain call."""
    run: Callable[[Callable[[], Result]], Result] | None = getattr(model, WITHIN, None)
    return function() if run is None else run(function)


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """The module's own weights whole meanwhile, for those who use them without calling it."""
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def recover(model: nn.Module) -> None:
    """Make a sharded model ready again after an error in the midst of a forward pass, the same in every process."""
    if not is_sharded(model):
        return
    reset: Callable[[], None] | None = getattr(model, "reset_iter_state", None)
    if reset is not None:
        reset()
        return
    from torch.distributed.fsdp import fully_shard  # before torch 2.12 there is no door for this

    for module in model.modules():
        if not hasattr(module, "unshard"):
            continue
        state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
        group = state._fsdp_param_group
        for each in (state, group) if group is not None else (state,):
            each._training_state = type(each._training_state).IDLE
        if group is not None:
            group.wait_for_unshard()
            group.reshard()
        state._state_ctx.iter_forward_root = None
        state._comm_ctx.all_gather_state = None
        state._comm_ctx.post_forward_order.clear()


def spread_trained(model: nn.Module) -> None:
    """The first process's trained weights, into every process of a sharded model."""
    if is_sharded(model):
        for each in model.parameters():
            if each.requires_grad:
                dist.broadcast(each.detach(), 0)


def agree_on(model: nn.Module, found: list[bool]) -> list[bool]:
    """True where it is in any process; of a model that is not sharded, just what was found."""
    if not is_sharded(model):
        return found
    device = next(model.parameters()).device
    flags = torch.tensor(found, dtype=torch.float32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight, which may be nothing."""
    local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local
