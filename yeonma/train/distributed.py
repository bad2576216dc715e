"""The processes of a run: one, or as many as torchrun started. Sums over them; with one process, nothing to do.

They meet in two stages. `rendezvous` makes them known to each other by torchrun's store, and starts the heartbeat. Rows
are read and tokenised then, which may take one process hours. `process_group` waits until all are ready and makes
PyTorch's process group, whose collectives have an ordinary timeout.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from yeonma.errors import UserError
from yeonma.train.heartbeat import watch_processes

if TYPE_CHECKING:  # some builds of PyTorch have no torch.distributed
    from torch.distributed.distributed_c10d import Store

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
"""For all processes to start."""
COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""For all processes to take part in a sum. Longer than rank 0 takes for a checkpoint or the model card, for which the
others wait."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Rendezvous:
    """The processes of a run before they have a process group."""

    rank: int
    count: int
    store: Store | None
    """Shared by all; None in a single process."""


@dataclass(frozen=True)
class Processes:
    rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def rendezvous() -> Iterator[Rendezvous]:
    """Meet the processes that torchrun started (by RANK and WORLD_SIZE); a single process meets nobody.

    Raises ProcessLost if another process dies before the block ends. If this process waits for it meanwhile, the
    heartbeat ends this process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Rendezvous(0, 1, None)
        return
    if not dist.is_available():
        raise UserError("this build of PyTorch has no torch.distributed", cure="run it as one process")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous as torch_rendezvous

    store, rank, count = next(torch_rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    store.set_timeout(RENDEZVOUS_TIMEOUT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the processes
    with watch_processes(PrefixStore(f"heartbeat/{attempt}", store.clone()), rank, count):
        yield Rendezvous(rank, count, PrefixStore(f"group/{attempt}", store))


@contextmanager
def process_group(met: Rendezvous, device: torch.device) -> Iterator[Processes]:
    """Wait for all processes to come here, and join them in PyTorch's process group."""
    if met.store is None:
        yield Processes(0, 1)
        return
    met.store.set(f"ready/{met.rank}", "")
    everyone = [f"ready/{rank}" for rank in range(met.count)]
    while not met.store.check(everyone):  # without a limit: the heartbeat finds a process that died
        time.sleep(POLL_SECONDS)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=met.store,
        rank=met.rank,
        world_size=met.count,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield Processes(met.rank, met.count)
    finally:
        dist.destroy_process_group()


def sum_over(group: Processes, tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if group.count > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(
    group: Processes, parameters: Iterable[torch.nn.Parameter], extra: torch.Tensor
) -> torch.Tensor:
    """Sum the gradients of all processes, and `extra` (a small float32 vector) with them, in one all-reduce.

    A process that has no gradient contributes zeros. A parameter for which no process has a gradient keeps none, as it
    would in one process. Returns the sum of `extra`.
    """
    if group.count == 1:
        return extra
    trained = list(parameters)
    has_grad = extra.new_tensor([parameter.grad is not None for parameter in trained])
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained]
    flat = torch.cat([*(grad.float().reshape(-1) for grad in grads), has_grad, extra])
    dist.all_reduce(flat)
    *sums, has_grad, extra = flat.split([*(grad.numel() for grad in grads), len(has_grad), len(extra)])
    for parameter, grad, total, holders in zip(trained, grads, sums, has_grad.tolist(), strict=True):
        parameter.grad = grad.copy_(total.view_as(grad)) if holders else None
    return extra


def gather_bytes(group: Processes, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The uint8 tensors of all processes, of equal length, in order of rank; on the CPU."""
    if group.count == 1:
        return [tensor]
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    gathered = [torch.empty_like(tensor) for _ in range(group.count)]
    dist.all_gather(gathered, tensor)
    return [one.cpu() for one in gathered]


def check_alike(group: Processes, content: str) -> None:
    """Raises UserError, in every process, if one has other settings, data or files than the first."""
    digest = torch.frombuffer(bytearray(sha256(content.encode()).digest()), dtype=torch.uint8)
    first, *others = gather_bytes(group, digest)
    different = [str(rank) for rank, one in enumerate(others, 1) if not torch.equal(one, first)]
    if different:
        raise UserError(
            f"process {', '.join(different)} of {group.count} has other settings, data or versions than process 0",
            cure="give every process the same command, files and versions",
        )


def wait(group: Processes) -> None:
    if group.count > 1:
        dist.barrier()
