"""Processes: one, or as many as torchrun started. Sums over them, and nothing where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIME_OUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started (its RANK and WORLD_SIZE); a single process joins nothing."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIME_OUT)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def sum_over(group: Processes, tensor: torch.Tensor) -> torch.Tensor:
    """In place, the sum over all processes."""
    if group.count > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(
    group: Processes, parameters: Iterable[torch.nn.Parameter], extra: torch.Tensor
) -> torch.Tensor:
    """Sum the gradients of all processes, and `extra` (a small float32 vector) with them, in one all-reduce.

    A process that had no examples this step takes part with zeros. A parameter that no process has a gradient for
    keeps none, as it would in one process. Returns the summed `extra`.
    """
    if group.count == 1:
        return extra
    trained = list(parameters)
    held = extra.new_tensor([parameter.grad is not None for parameter in trained])
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    flat = torch.cat([*(grad.float().reshape(-1) for grad in grads), held, extra])
    dist.all_reduce(flat)
    *sums, held, extra = flat.split([*(grad.numel() for grad in grads), len(held), len(extra)])
    for parameter, grad, total, holders in zip(trained, grads, sums, held.tolist(), strict=True):
        parameter.grad = grad.copy_(total.view_as(grad)) if holders else None
    return extra


def gather_bytes(group: Processes, mine: torch.Tensor) -> list[torch.Tensor]:
    """Equal-length uint8 tensors of all processes, in order of rank."""
    if group.count == 1:
        return [mine]
    if dist.get_backend() == "nccl":
        mine = mine.cuda()
    everyone = [torch.empty_like(mine) for _ in range(group.count)]
    dist.all_gather(everyone, mine)
    return [each.cpu() for each in everyone]


def wait(group: Processes) -> None:
    if group.count > 1:
        dist.barrier()
