"""Frozen weights sharded over the processes by FSDP2: every process holds a shard of every weight.

A layer's weights are gathered from all processes when the layer runs, forward and again backward, and then freed.
Trained weights (the adapter) are replicated; the training step sums their gradients. The result is that of unsharded
weights, to rounding.

Gathering is a collective operation: all processes must run the same number of forward passes, with or without
gradients, in the same order (`yeonma.train.step` ensures that).

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
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
RUN_AS_FORWARD = "yeonma_run_as_forward"  # a method of sharded models, see `run_as_forward`


def shard_weights(model: nn.Module, device: torch.device) -> None:
    """Shard the frozen weights of `model` over all processes and copy the others to `device`.

    `model` has its adapter and is on the CPU. A process never has more than its shards and one layer on `device`. Until
    then, weights that transformers has mapped from their file are pages of that file, which all processes of the
    machine share.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if device.type == "cpu":
        _return_freed_memory()
    # a weight that is a single number cannot be sharded
    replicated = {weight for weight in model.parameters() if weight.requires_grad or weight.ndim == 0}
    for part in (*parts_of(model), model):
        # if the model's own group stayed gathered, a process that writes a state dict would differ from the others
        fully_shard(part, mesh=mesh, ignored_params=replicated, reshard_after_forward=True)
    for weight in replicated:
        weight.data = weight.data.to(device)
    # the view is of logits, which are not modified in place
    warnings.filterwarnings(
        "ignore", rf"FSDP2-wrapped module \({type(model).__name__}\) returned a view", UserWarning
    )
    setattr(model, RUN_AS_FORWARD, MethodType(_call, model))
    register_fsdp_forward_method(model, RUN_AS_FORWARD)


def _return_freed_memory() -> None:
    """Make the C library return large tensors to the system when they are freed.

    Otherwise its heap fragments: with a model of 285 MB, gathering and freeing layers left a process with 800 MB
    instead of 180.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    except (OSError, AttributeError):  # not glibc
        return


def parts_of(model: Any) -> list[nn.Module]:
    """The modules whose frozen weights are gathered together: the decoder layers, and the embedding and the head unless
    they share a weight. All other weights stay gathered for a whole forward pass.

    Layers are those in transformers' `_no_split_modules`, or else the entries of the model's module lists.
    """
    class_names = set(getattr(model, "_no_split_modules", None) or ())
    layers = _outermost(model, lambda module: own_class(module).__name__ in class_names)
    if not any(_has_frozen(layer) for layer in layers):
        lists = _outermost(model, lambda module: isinstance(module, nn.ModuleList))
        layers = [layer for module_list in lists for layer in module_list.children()]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [layer for layer in (embedding, head) if layer is not None]
    if len(ends) == 2 and set(embedding.parameters()) & set(head.parameters()):
        ends = []
    inside = {module for layer in layers for module in layer.modules()}
    return [part for part in (*layers, *ends) if _has_frozen(part) and (part in layers or part not in inside)]


def _outermost(module: nn.Module, matches: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The matching modules below `module` that are not inside another matching one."""
    outermost: dict[nn.Module, None] = {}  # a layer that is used twice counts once
    for child in module.children():
        outermost.update(dict.fromkeys([child] if matches(child) else _outermost(child, matches)))
    return list(outermost)


def _has_frozen(module: nn.Module) -> bool:
    return any(not weight.requires_grad for weight in module.parameters())


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of frozen weights that are gathered in a process at a time: two parts, since the next one is gathered while
    one runs, and the weights of no part."""
    parts = parts_of(model)
    sizes = sorted((_frozen_bytes(part.parameters()) for part in parts), reverse=True)
    inside = {weight for part in parts for weight in part.parameters()}
    return sum(sizes[:2]) + _frozen_bytes(weight for weight in model.parameters() if weight not in inside)


def _frozen_bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters if not parameter.requires_grad)


def local_weight_bytes(model: nn.Module) -> int:
    """Bytes of frozen weights in this process; of a sharded weight, those of its shard."""
    weights = [local_shard(weight.detach()) for weight in model.parameters() if not weight.requires_grad]
    storages = [weight.untyped_storage() for weight in weights]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, RUN_AS_FORWARD)


def own_class(module: nn.Module) -> type:
    """The class of a module, without FSDP2's subclass of it."""
    return type(module).__mro__[2] if hasattr(module, "unshard") else type(module)


def _call(model: nn.Module, function: Callable[[], Result]) -> Result:
    return function()


def run_as_forward(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call `function`, which calls parts of the model, like a forward pass of the whole model: the weights of no part
    are gathered. For a model that is not sharded, this is a plain call."""
    run: Callable[[Callable[[], Result]], Result] | None = getattr(model, RUN_AS_FORWARD, None)
    return function() if run is None else run(function)


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Gathers the module's own weights within the block, for code that uses them without calling the module."""
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def recover(model: nn.Module) -> None:
    """Make a sharded model usable again after an error in a forward pass that all processes have had."""
    if not is_sharded(model):
        return
    reset: Callable[[], None] | None = getattr(model, "reset_iter_state", None)
    if reset is not None:
        reset()
        return
    from torch.distributed.fsdp import fully_shard  # before torch 2.12 there is no public function for this

    for module in model.modules():
        if not hasattr(module, "unshard"):
            continue
        state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
        group = state._fsdp_param_group
        for holder in (state, group) if group is not None else (state,):
            holder._training_state = type(holder._training_state).IDLE
        if group is not None:
            group.wait_for_unshard()
            group.reshard()
        state._state_ctx.iter_forward_root = None
        state._comm_ctx.all_gather_state = None
        state._comm_ctx.post_forward_order.clear()


def broadcast_trained(model: nn.Module) -> None:
    """Copy the trained weights of the first process to all processes of a sharded model."""
    if is_sharded(model):
        for weight in model.parameters():
            if weight.requires_grad:
                dist.broadcast(weight.detach(), 0)


def any_process(model: nn.Module, flags: list[bool]) -> list[bool]:
    """The flags combined by "or" over the processes of a sharded model; otherwise the flags themselves."""
    if not is_sharded(model):
        return flags
    device = next(model.parameters()).device
    sums = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(sums, dist.ReduceOp.MAX)
    return [bool(flag) for flag in sums.tolist()]


def local_shard(weight: torch.Tensor) -> torch.Tensor:
    """This process's shard of a weight, which may be empty."""
    local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local
