"""When memory runs out, halves the micro-batch and repeats the computation, with the same result to rounding.

Each process does this by itself, without the others noticing, because they communicate only at the end of a step. Every
checkpoint records the size, so that a resumed run forms its sums in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from yeonma.batch.batch import Batch
from yeonma.batch.plan import MicroBatchBounds
from yeonma.errors import Log, UserError
from yeonma.messages import counted, tr
from yeonma.streams import log_line

Result = TypeVar("Result")
NAMED_ROWS = 3
"""Rows that the error message lists."""


@dataclass
class MicroBatchLimit:
    """The size of this process's micro-batches: `requested` at first, then half as much each time memory runs out."""

    requested: MicroBatchBounds
    device: torch.device
    sharded: bool = False
    """All processes must then make the same number of forward passes, so none can halve its micro-batches by itself."""
    by_tokens: bool = False
    """Halve the token budget, down to the length of the longest unit, instead of the number of units."""
    log: Log = log_line
    bounds: MicroBatchBounds = field(init=False)

    def __post_init__(self) -> None:
        self.bounds = self.requested

    def restore(self, most_examples: int) -> None:
        """Sets the number of units that a checkpoint recorded."""
        self.bounds = replace(self.requested, most_examples=most_examples)

    def _halved(self, batch: Batch) -> tuple[str, MicroBatchBounds] | None:
        """A line about it, and bounds for micro-batches of half the size; None if each unit of the batch is alone
        already."""
        bounds, lengths = self.bounds, batch.unit_lengths_U
        if self.by_tokens and bounds.most_tokens is not None:
            longest, tokens = int(lengths.max()), min(bounds.most_tokens, int(lengths.sum()))
            if tokens <= longest or len(lengths) == 1:
                return None
            half = max(longest, tokens // 2)
            line = tr(
                "out of memory with {tokens:,} tokens at once; continuing with {half:,}, the same result to rounding",
                tokens=tokens,
                half=half,
            )
            return line, replace(bounds, most_tokens=half)
        units = min(bounds.most_examples, len(lengths))
        if units == 1:
            return None
        line = tr(
            "out of memory with {units} at once; continuing with {half}, the same result to rounding",
            units=units,
            half=units // 2,
        )
        return line, replace(bounds, most_examples=units // 2)

    def fit(
        self, compute: Callable[[], Result], batch: Batch, undo: Callable[[], None] = lambda: None
    ) -> Result:
        """Returns `compute()`, which sends the batch through the model within `bounds`. When memory runs out, calls
        `undo()`, halves the bounds and tries again, with the same random numbers.

        `compute` must not communicate with other processes. Raises UserError if a single unit does not fit into memory.
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
            undo()  # outside of `except`, so that the error no longer references the tensors of the failed pass
            if cuda_state is not None:
                torch.cuda.empty_cache()
                torch.cuda.set_rng_state(cuda_state, self.device)
            torch.set_rng_state(cpu_state)
            line, self.bounds = halved
            self.log(line)


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator raises a plain RuntimeError. Linux may also kill the process, which cannot be caught."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


def _out_of_memory(batch: Batch, device: torch.device, sharded: bool) -> UserError:
    longest = np.argsort(-batch.unit_lengths_U, kind="stable")[:NAMED_ROWS]
    rows = ", ".join(
        f"{batch.unit_rows_U[unit]} ({counted(batch.unit_lengths_U[unit], 'token')})" for unit in longest
    )
    cure = tr("--gradient_checkpointing true, a smaller --cutoff_len or --dtype bfloat16")
    if sharded:
        what = tr(
            "out of memory on {device}; with --shard a process cannot halve its micro-batches by itself",
            device=device,
        )
        cure = tr(
            "a smaller --micro_batch_size, --gradient_checkpointing true, a smaller --cutoff_len or --dtype bfloat16"
        )
        return UserError(what, place=tr("rows {rows}", rows=rows), cure=cure)
    what = tr("out of memory on {device} with one row at a time; the longest of the step", device=device)
    return UserError(what, place=tr("rows {rows}", rows=rows), cure=cure)
