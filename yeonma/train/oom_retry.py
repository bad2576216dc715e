"""Running out of memory: the micro-batch is halved, and what was computed is computed again, with the same result.

A process that has no room does this by itself; the others do not notice, since all meet in one sum at the end of a
step. What it has come to is kept in every checkpoint, so that a run which is continued takes the same sums in the same
order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from yeonma.batch.plan import MicroBatchBounds
from yeonma.errors import Log, UserError
from yeonma.tokenization.store import TokenStore

Result = TypeVar("Result")
NAMED_ROWS = 3


def _say(line: str) -> None:
    print(f"yeonma: {line}", file=sys.stderr, flush=True)


@dataclass
class MicroBatchLimit:
    """What this process takes through the model at once: `asked` at first, half of it after each lack of memory.

    `alone`: whether it may make more passes than the others, which it may not where weights are shared out.
    `by_tokens`: it is tokens that are halved, down to those of the longest unit, which then goes alone.
    """

    asked: MicroBatchBounds
    device: torch.device
    alone: bool = True
    by_tokens: bool = False
    say: Log = _say
    micro: MicroBatchBounds = field(init=False)

    def __post_init__(self) -> None:
        self.micro = self.asked

    def keep(self, most_examples: int) -> None:
        """As a checkpoint says that it was."""
        self.micro = replace(self.asked, most_examples=most_examples)

    def _smaller(self, store: TokenStore, units: np.ndarray) -> tuple[str, MicroBatchBounds] | None:
        """Words for what some units took at once, and for half of it; None where each already goes alone."""
        micro = self.micro
        if self.by_tokens and micro.most_tokens is not None:
            longest, whole = int(store.unit_lengths[units].max()), int(store.unit_lengths[units].sum())
            tokens = min(micro.most_tokens, whole)
            if tokens <= longest or len(units) == 1:
                return None
            half = max(longest, tokens // 2)
            return f"{tokens:,} tokens at once; going on with {half:,}", replace(micro, most_tokens=half)
        most = min(micro.most_examples, len(units))
        if most == 1:
            return None
        return f"{most} at once; going on with {most // 2}", replace(micro, most_examples=most // 2)

    def fit(
        self,
        compute: Callable[[], Result],
        store: TokenStore,
        units: np.ndarray,
        undo: Callable[[], None] = lambda: None,
    ) -> Result:
        """`compute()`, which reads `micro`, over some units; after a lack of memory `undo()`, and again with half.

        It must take part in no meeting of processes. Dropout draws the numbers that it would have drawn. Raises
        UserError where not even one unit at a time has room.
        """
        while True:
            random = torch.get_rng_state()
            on_gpu = self.device.type == "cuda"
            of_gpu = torch.cuda.get_rng_state(self.device) if on_gpu else None
            try:
                return compute()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_lack_of_memory(error):
                    raise
                smaller = self._smaller(store, units)
                if smaller is None or not self.alone:
                    raise _no_room(store, units, self.device, self.alone) from error
            undo()  # out here, where the error no longer holds the tensors of what failed
            if of_gpu is not None:
                torch.cuda.empty_cache()
                torch.cuda.set_rng_state(of_gpu, self.device)
            torch.set_rng_state(random)
            words, self.micro = smaller
            self.say(f"out of memory with {words}, the same result to rounding")


def _is_lack_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no class of its own for it. Linux may end a process instead, where nothing is caught."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


def _no_room(store: TokenStore, units: np.ndarray, device: torch.device, alone: bool) -> UserError:
    lengths = store.unit_lengths[units]
    longest = units[np.argsort(-lengths, kind="stable")[:NAMED_ROWS]]
    rows = ", ".join(
        f"{row} ({int(store.unit_lengths[unit]):,} tokens)"
        for row, unit in zip(store.rows_of(longest), longest, strict=True)
    )
    helps = "--gradient_checkpointing true, a smaller --cutoff_len or --dtype bfloat16"
    if alone:
        return UserError(
            f"no memory on {device} for one row at a time; the longest of the step",
            place=f"rows {rows}",
            cure=helps,
        )
    return UserError(
        f"no memory on {device}; where weights are shared out, no process can do a step in smaller parts alone",
        place=f"rows {rows}",
        cure=f"a smaller --micro_batch_size, {helps}",
    )
