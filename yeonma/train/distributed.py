"""The processes of a run, one or as many as torchrun started, and the collectives between them.

They join in two stages. `rendezvous` connects them through torchrun's store and starts the heartbeat. Then rows are
read and tokenised, which may take hours in one process. `process_group` waits until all are ready and initialises
PyTorch's process group, whose collectives have an ordinary timeout.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from yeonma.errors import Problem, UserError
from yeonma.messages import tr
from yeonma.model.sharding import is_shard
from yeonma.model.transfer import to_device
from yeonma.train.heartbeat import watch_processes

if TYPE_CHECKING:  # some builds of PyTorch have no torch.distributed
    from torch.distributed.distributed_c10d import Store

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
"""Within which all processes must start."""
COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Of a collective. Longer than rank 0 needs for a checkpoint or the model card, for which the other ranks wait."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Rendezvous:
    """The processes of a run before the process group exists."""

    rank: int
    count: int
    store: Store | None
    """Shared by all processes; None for a single one."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is."""

    rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def rendezvous() -> Iterator[Rendezvous]:
    """Connect to the other processes that torchrun started, if any, by RANK and WORLD_SIZE.

    Raises ProcessLost if another process dies before the block ends. If this process is stuck in a collective then, the
    heartbeat ends this process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Rendezvous(0, 1, None)
        return
    if not dist.is_available():
        raise UserError(
            tr("this build of PyTorch has no torch.distributed"), cure=tr("run it as one process")
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous as torch_rendezvous

    store, rank, count = next(torch_rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    store.set_timeout(RENDEZVOUS_TIMEOUT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its processes
    with watch_processes(PrefixStore(f"heartbeat/{attempt}", store.clone()), rank, count):
        yield Rendezvous(rank, count, PrefixStore(f"group/{attempt}", store))


@contextmanager
def process_group(processes: Rendezvous, device: torch.device) -> Iterator[Processes]:
    """Wait until all processes get here, and initialise PyTorch's process group."""
    if processes.store is None:
        yield Processes(0, 1)
        return
    processes.store.set(f"ready/{processes.rank}", "")
    ready_keys = [f"ready/{rank}" for rank in range(processes.count)]
    while not processes.store.check(ready_keys):  # no timeout: the heartbeat detects dead processes
        time.sleep(POLL_SECONDS)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=processes.store,
        rank=processes.rank,
        world_size=processes.count,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield Processes(processes.rank, processes.count)
    finally:
        dist.destroy_process_group()


def sum_over(group: Processes, tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if group.count > 1:
        dist.all_reduce(tensor)
    return tensor


BUCKET_NUMBERS = 64 * 2**20
"""How many numbers of gradients are copied into one vector and summed at once: 256 MB. An adapter has fewer."""


def sum_gradients(
    group: Processes, parameters: Iterable[torch.nn.Parameter], extra: torch.Tensor
) -> torch.Tensor:
    """Sum the gradients over all processes, and `extra` (a small float32 vector) with the first of them, in one
    all-reduce for each BUCKET_NUMBERS numbers.

    Sharded parameters are left out, because FSDP2 has summed their gradients. A process without a gradient contributes
    zeros. A parameter without a gradient in any process keeps none, as in a
    single process. Returns the sum of `extra`.
    """
    if group.count == 1:
        return extra
    buckets: list[list[torch.nn.Parameter]] = [[]]
    for parameter in parameters:
        if is_shard(parameter):
            continue
        if buckets[-1] and sum(one.numel() for one in [*buckets[-1], parameter]) > BUCKET_NUMBERS:
            buckets.append([])
        buckets[-1].append(parameter)
    for number, bucket in enumerate(buckets):
        total = _sum_bucket(bucket, extra[: 0 if number else None])
        extra = extra if number else total
    return extra


def _sum_bucket(trained: Sequence[torch.nn.Parameter], extra: torch.Tensor) -> torch.Tensor:
    here = [parameter.grad is not None for parameter in trained]
    has_grad = to_device(here, extra.device, extra.dtype)
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained]
    flat = torch.cat([*(grad.float().reshape(-1) for grad in grads), has_grad, extra])
    dist.all_reduce(flat)
    *sums, has_grad, extra = flat.split([*(grad.numel() for grad in grads), len(has_grad), len(extra)])
    # without a read, which waits for the GPU, where the answer is known
    held = here if all(here) else [bool(holders) for holders in has_grad.tolist()]
    for parameter, grad, total, is_held in zip(trained, grads, sums, held, strict=True):
        parameter.grad = grad.copy_(total.view_as(grad)) if is_held else None
    return extra


def gather_bytes(group: Processes, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Gather uint8 tensors of equal length from all processes, in order of rank, on the CPU."""
    if group.count == 1:
        return [tensor]
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    gathered = [torch.empty_like(tensor) for _ in range(group.count)]
    dist.all_gather(gathered, tensor)
    return [tensor.cpu() for tensor in gathered]


def gather_texts(group: Processes, text: str) -> list[str]:
    """Gather texts of any length from all processes, in order of rank."""
    if group.count == 1:
        return [text]
    content = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
    length = torch.tensor([len(text.encode())]).view(torch.uint8)
    lengths = [int(one.view(torch.int64)) for one in gather_bytes(group, length)]
    padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
    padded[: len(content)] = content
    gathered = gather_bytes(group, padded)
    return [one[:size].numpy().tobytes().decode() for one, size in zip(gathered, lengths, strict=True)]


def gathered(group: Processes, compute: Callable[[], Any]) -> list[Any]:
    """What `compute` returns in every process, in order of rank: values that JSON holds. If it raises UserError in one,
    all processes raise it."""
    try:
        part: dict[str, Any] = {"value": compute()}
    except UserError as error:
        part = {"problems": [[str(one.what), str(one.place), str(one.cure)] for one in error.problems]}
    parts = [json.loads(text) for text in gather_texts(group, json.dumps(part))]
    problems = [Problem(*problem) for one in parts for problem in one.get("problems", ())]
    if problems:
        raise UserError(problems)
    return [one["value"] for one in parts]


def check_same_content(group: Processes, content: str) -> None:
    """Raises UserError in every process if `content`, a description of settings and data, is not the same in all."""
    digest = torch.frombuffer(bytearray(sha256(content.encode()).digest()), dtype=torch.uint8)
    first, *others = gather_bytes(group, digest)
    different = [str(rank) for rank, other in enumerate(others, 1) if not torch.equal(other, first)]
    if different:
        raise UserError(
            tr(
                "process {different} of {count} has other settings, data, base weights or versions than process 0",
                different=", ".join(different),
                count=group.count,
            ),
            cure=tr("give every process the same command, files and versions"),
        )


def wait(group: Processes) -> None:
    if group.count > 1:
        dist.barrier()
