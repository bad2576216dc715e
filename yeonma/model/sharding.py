"""Weights sharded over the processes by FSDP2: every process holds a shard of every weight of the base.

A layer's weights are gathered from all processes when the layer runs, forward and again backward, and then freed. An
adapter's weights are replicated; the training step sums their gradients. If all weights of the model are trained, they
are sharded as frozen ones are, and FSDP2 sums their gradients after each backward pass, each process keeping its shard
of the sum. The result is that of unsharded weights, to rounding.

Gathering is a collective operation: all processes must run the same number of forward passes, with or without
gradients, in the same order (`yeonma.train.step` ensures that).

Zhao et al. 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from yeonma.errors import UserError
from yeonma.messages import tr

Result = TypeVar("Result")
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
RUN_AS_FORWARD = "yeonma_run_as_forward"  # a method of sharded models, see `run_as_forward`


def shard_weights(
    model: nn.Module, device: torch.device, prepare: Callable[[nn.Module], None] = lambda part: None
) -> None:
    """Shard the frozen weights of `model`, or all if all are trained, over all processes, and copy the others to
    `device`.

    `model` has its adapter and is on the CPU. A process never has more than its shards and one layer on `device`. Until
    then, weights that transformers has mapped from their file are pages of that file, which all processes of the
    machine share. `prepare` is called with each part before its weights are sharded, and with the model last. Raises
    UserError if all weights are trained and some cannot be sharded for that.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if device.type == "cpu":
        _return_freed_memory()
    # a weight that is a single number cannot be sharded
    is_full = trains_all(model)
    if is_full:
        _check_trained(model)
    replicated = {
        weight for weight in model.parameters() if (weight.requires_grad and not is_full) or weight.ndim == 0
    }
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for part in (*parts_of(model), model):
        prepare(part)
        # if the model's own group stayed gathered, a process that writes a state dict would differ from the others
        sharded: Any = fully_shard(
            part, mesh=mesh, ignored_params=replicated, reshard_after_forward=True, mp_policy=policy
        )
        sharded.set_gradient_divide_factor(1.0)  # sums, not means
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for weight in replicated:
        weight.data = weight.data.to(device)
    # the view is of logits, which are not modified in place
    warnings.filterwarnings(
        "ignore", rf"FSDP2-wrapped module \({type(model).__name__}\) returned a view", UserWarning
    )
    setattr(model, RUN_AS_FORWARD, MethodType(_call, model))
    register_fsdp_forward_method(model, RUN_AS_FORWARD)


def _check_trained(model: nn.Module) -> None:
    """Raises UserError for weights that FSDP2 cannot train in shards."""
    if numbers := [name for name, weight in model.named_parameters() if weight.ndim == 0]:
        what = tr("{numbers} is a single number, which cannot be sharded and trained", numbers=numbers[0])
        raise UserError(what, place="shard", cure=tr("leave it out, or use --train lora"))
    formats = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    if len(formats) > 1:
        what = tr(
            "the model holds its weights in {formats}, which cannot be trained in shards",
            formats=tr(" and ").join(sorted(formats)),
        )
        raise UserError(what, place="shard", cure=tr("use --dtype float32"))


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
    """The modules whose sharded weights are gathered together: the decoder layers, and the embedding and the head
    unless they share a weight. All other weights stay gathered for a whole forward pass.

    Layers are those in transformers' `_no_split_modules`, or else the entries of the model's module lists.
    """
    class_names = set(getattr(model, "_no_split_modules", None) or ())
    layers = _outermost(model, lambda module: own_class(module).__name__ in class_names)
    is_full = trains_all(model)

    def is_sharded_part(module: nn.Module) -> bool:
        return any(is_full or not weight.requires_grad for weight in module.parameters())

    if not any(is_sharded_part(layer) for layer in layers):
        lists = _outermost(model, lambda module: isinstance(module, nn.ModuleList))
        layers = [layer for module_list in lists for layer in module_list.children()]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [layer for layer in (embedding, head) if layer is not None]
    if len(ends) == 2 and set(embedding.parameters()) & set(head.parameters()):
        ends = []
    inside = {module for layer in layers for module in layer.modules()}
    parts = (*layers, *ends)
    return [part for part in parts if is_sharded_part(part) and (part in layers or part not in inside)]


def _outermost(module: nn.Module, matches: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The matching modules below `module` that are not inside another matching one."""
    outermost: dict[nn.Module, None] = {}  # a layer that is used twice counts once
    for child in module.children():
        outermost.update(dict.fromkeys([child] if matches(child) else _outermost(child, matches)))
    return list(outermost)


def trains_all(model: nn.Module) -> bool:
    """Whether all weights of the model are trained, instead of an adapter's alone."""
    return all(weight.requires_grad for weight in model.parameters())


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of sharded weights that are gathered in a process at a time: two parts, since the next one is gathered
    while one runs, and the weights of no part."""
    parts = parts_of(model)
    is_full = trains_all(model)

    def sharded_bytes(weights: Iterable[nn.Parameter]) -> int:
        return sum(weight.nbytes for weight in weights if is_full or not weight.requires_grad)

    sizes = sorted((sharded_bytes(part.parameters()) for part in parts), reverse=True)
    inside = {weight for part in parts for weight in part.parameters()}
    return sum(sizes[:2]) + sharded_bytes(weight for weight in model.parameters() if weight not in inside)


def local_weight_bytes(model: nn.Module) -> int:
    """Bytes of the base's weights in this process; of a sharded weight, those of its shard."""
    is_full = trains_all(model)
    weights = [
        local_shard(weight.detach()) for weight in model.parameters() if is_full or not weight.requires_grad
    ]
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
            if weight.requires_grad and not is_shard(weight):
                dist.broadcast(weight.detach(), 0)


def any_process(model: nn.Module, flags: list[bool]) -> list[bool]:
    """The flags combined by "or" over the processes of a sharded model; otherwise the flags themselves."""
    if not is_sharded(model):
        return flags
    device = next(model.parameters()).device
    sums = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(sums, dist.ReduceOp.MAX)
    return [bool(flag) for flag in sums.tolist()]


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether a tensor is sharded, so that this process has a part of it."""
    return hasattr(tensor, "to_local")


def whole_tensor(tensor: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
    """A tensor, gathered from all processes if it is sharded, on the CPU; None unless `keep`. All processes must call
    it."""
    whole = tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return whole.detach().cpu() if keep else None


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor, whole in every process, on the device of the other, and sharded as it is."""
    tensor = tensor.to(other.device)
    if not is_shard(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def local_shard(weight: torch.Tensor) -> torch.Tensor:
    """This process's shard of a weight, which may be empty."""
    local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local
