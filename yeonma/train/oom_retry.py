"""Out of memory: halve the micro-batch and compute again, with the same result to rounding.

A process does this by itself. The others do not notice, since all meet in one sum at the end of a step. Every
checkpoint keeps the size that is left, so that a resumed run adds up the same numbers in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from yeonma.batch.batch import Batch
from yeonma.batch.plan import MicroBatchBounds
from yeonma.errors import Log, UserError

Result = TypeVar("Result")
NAMED_ROWS = 3


def _warn(line: str) -> None:
    print(f"yeonma: {line}", file=sys.stderr, flush=True)


@dataclass
class MicroBatchLimit:
    """The size of this process's micro-batches: `requested` at first, half of it each time memory runs out."""

    requested: MicroBatchBounds
    device: torch.device
    sharded: bool = False
    """All processes make equally many passes through the model, so that none can halve its micro-batches by itself."""
    by_tokens: bool = False
    """Halve the tokens, down to those of the longest unit, instead of the units."""
    log: Log = _warn
    bounds: MicroBatchBounds = field(init=False)

    def __post_init__(self) -> None:
        self.bounds = self.requested

    def restore(self, most_examples: int) -> None:
        """Set the number of units that a checkpoint holds."""
        self.bounds = replace(self.requested, most_examples=most_examples)

    def _halved(self, batch: Batch) -> tuple[str, MicroBatchBounds] | None:
        """A description and the bounds of half of what a micro-batch of this batch holds now; None where each unit is
        alone already."""
        bounds, lengths = self.bounds, batch.unit_lengths_U
        if self.by_tokens and bounds.most_tokens is not None:
            longest, tokens = int(lengths.max()), min(bounds.most_tokens, int(lengths.sum()))
            if tokens <= longest or len(lengths) == 1:
                return None
            half = max(longest, tokens // 2)
            return f"{tokens:,} tokens at once; continuing with {half:,}", replace(bounds, most_tokens=half)
        most = min(bounds.most_examples, len(lengths))
        if most == 1:
            return None
        return f"{most} at once; continuing with {most // 2}", replace(bounds, most_examples=most // 2)

    def fit(
        self, compute: Callable[[], Result], batch: Batch, undo: Callable[[], None] = lambda: None
    ) -> Result:
        """`compute()`, which takes the batch through the model within `bounds`. When memory runs out, `undo()` and
        again with half.

        `compute` must not communicate with other processes. Dropout draws the same numbers again. Raises UserError
        where a single unit does not fit into memory.
        """
        while True:
            cpu_state = torch.get_rng_state()
            cuda_state = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            try:
                return compute()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                halved = self._halved(batch)
                if halved is None or self.sharded:
                    raise _out_of_memory(batch, self.device, self.sharded) from error
            undo()  # outside of `except`, where the error no longer holds the tensors of the failed pass
            if cuda_state is not None:
                torch.cuda.empty_cache()
                torch.cuda.set_rng_state(cuda_state, self.device)
            torch.set_rng_state(cpu_state)
            description, self.bounds = halved
            self.log(f"out of memory with {description}, the same result to rounding")


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator raises a plain RuntimeError. Linux may kill the process instead, which nothing can catch."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


def _out_of_memory(batch: Batch, device: torch.device, sharded: bool) -> UserError:
    longest = np.argsort(-batch.unit_lengths_U, kind="stable")[:NAMED_ROWS]
    rows = ", ".join(f"{batch.unit_rows_U[unit]} ({batch.unit_lengths_U[unit]:,} tokens)" for unit in longest)
    cure = "--gradient_checkpointing true, a smaller --cutoff_len or --dtype bfloat16"
    if sharded:
        what = f"out of memory on {device}; with --shard a process cannot halve its micro-batches by itself"
        return UserError(what, place=f"rows {rows}", cure=f"a smaller --micro_batch_size, {cure}")
    what = f"out of memory on {device} with one row at a time; the longest of the step"
    return UserError(what, place=f"rows {rows}", cure=cure)
