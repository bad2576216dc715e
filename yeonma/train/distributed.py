"""Processes: one, or as many as torchrun started. Sums over them, and nothing where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256

import torch
import torch.distributed as dist

from yeonma.errors import UserError
from yeonma.train.heartbeat import company

TIME_TO_MEET = timedelta(minutes=30)
"""For all processes to start."""
TIME_OUT = timedelta(days=30)
"""Of a sum. The others may wait for hours while one tokenises; who is gone, `heartbeat` finds."""


@dataclass(frozen=True)
class Processes:
    rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started (its RANK and WORLD_SIZE); a single process joins nothing.

    Raises ProcessLost where one of the others ends early; the process ends by itself where it hangs in a sum then.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1)
        return
    if not dist.is_available():
        raise UserError("this build of PyTorch has no torch.distributed", cure="run it as one process")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, count = next(rendezvous("env://", timeout=TIME_TO_MEET))
    store.set_timeout(TIME_TO_MEET)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the processes
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"group/{attempt}", store),
        rank=rank,
        world_size=count,
        timeout=TIME_OUT,
    )
    try:
        with company(PrefixStore(f"heartbeat/{attempt}", store.clone()), rank, count):
            yield Processes(rank, count)
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


def check_alike(group: Processes, content: str) -> None:
    """Raises UserError, in every process, where one was given other settings, data or files than the first."""
    mine = torch.frombuffer(bytearray(sha256(content.encode()).digest()), dtype=torch.uint8)
    first, *others = gather_bytes(group, mine)
    odd = [str(rank) for rank, each in enumerate(others, 1) if not torch.equal(each, first)]
    if odd:
        raise UserError(
            f"process {', '.join(odd)} of {group.count} has other settings, data or versions than process 0",
            cure="give every process the same command, files and versions",
        )


def wait(group: Processes) -> None:
    if group.count > 1:
        dist.barrier()
