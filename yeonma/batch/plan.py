"""The units of every step, of a process's share of it, and of a micro-batch: pure functions of lengths and seed.

The units of a step depend on (seed, epoch, batch_size) alone: they are the same for any number of processes and any
micro-batch size. Every process computes the whole plan, so there is no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heapreplace
from math import ceil

import numpy as np

GROUPED_STEPS = 50  # group_by_length sorts the shuffled examples of this many steps by length


@dataclass(frozen=True)
class Plan:
    """The steps of a run over `positions`, the units (examples or pairs) to train on."""

    positions: np.ndarray  # int64, units of the token store
    lengths: np.ndarray  # tokens of each unit
    batch_size: int
    seed: int
    total_steps: int
    group_by_length: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return ceil(len(self.positions) / self.batch_size)

    def steps(self, start: int = 0) -> Iterator[np.ndarray]:
        """The units of every step from `start` on, as positions in the token store.

        The last step of an epoch may be smaller than the others.
        """
        order, order_epoch = np.zeros(0, dtype=np.int64), -1
        for step in range(start, self.total_steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                lengths = self.lengths if self.group_by_length else None
                order = epoch_order(len(self.positions), self.seed, epoch, self.batch_size, lengths)
                order_epoch = epoch
            yield self.positions[order[within * self.batch_size : (within + 1) * self.batch_size]]

    def used(self) -> np.ndarray:
        """The units that the run trains on, ascending: all of them, unless the run ends within the first epoch."""
        if self.total_steps >= self.steps_per_epoch:
            return np.sort(self.positions)
        return np.sort(np.concatenate(list(self.steps())))

    def epoch_at(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / self.steps_per_epoch


@dataclass(frozen=True)
class MicroBatchBounds:
    """Limits on a micro-batch. They affect speed and memory; the result is the same to rounding."""

    most_examples: int
    most_tokens: int | None
    share_prefix: bool


def make_plan(
    positions: np.ndarray,
    lengths: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    num_epochs: float,
    max_steps: int | None,
    group_by_length: bool = False,
) -> Plan:
    """`max_steps` takes precedence over `num_epochs`."""
    steps = max_steps or max(1, ceil(num_epochs * ceil(len(positions) / batch_size)))
    return Plan(positions, lengths, batch_size, seed, steps, group_by_length)


def epoch_order(
    count: int, seed: int, epoch: int, batch_size: int, lengths: np.ndarray | None = None
) -> np.ndarray:
    """A permutation of range(count). With `lengths`, examples of similar length share a step."""
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = random.permutation(count)
    if lengths is None:
        return order
    steps: list[np.ndarray] = []
    for start in range(0, count, GROUPED_STEPS * batch_size):
        block = order[start : start + GROUPED_STEPS * batch_size]
        block = block[np.argsort(-lengths[block], kind="stable")]
        steps.extend(block[i : i + batch_size] for i in range(0, len(block), batch_size))
    full = [step for step in steps if len(step) == batch_size]
    partial = [step for step in steps if len(step) < batch_size]  # at most one; it stays last
    shuffled = [full[i] for i in random.permutation(len(full))]
    return np.concatenate(shuffled + partial)


def shares(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """One list per process of its units, as indices into `lengths`, balanced by tokens. It may be empty."""
    return _balanced(lengths, processes, most=len(lengths))


def micro_batches(
    lengths: Sequence[int], most_examples: int, most_tokens: int | None = None
) -> list[list[int]]:
    """Micro-batches as lists of indices into `lengths`: as few as the limits allow, with about equal token counts.

    An example longer than `most_tokens` is alone in its micro-batch.
    """
    if not lengths:
        return []
    count = ceil(len(lengths) / most_examples)
    if most_tokens is not None:
        count = max(count, ceil(sum(min(length, most_tokens) for length in lengths) / most_tokens))
    while True:
        batches = _balanced(lengths, count, most_examples)
        if most_tokens is None or all(
            len(batch) < 2 or sum(lengths[i] for i in batch) <= most_tokens for batch in batches
        ):
            return [batch for batch in batches if batch]
        count += 1


def _balanced(lengths: Sequence[int], bins: int, most: int) -> list[list[int]]:
    """Distribute indices over bins: the longest first, into the bin with the fewest tokens that is not full."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    open_bins = [(0, number) for number in range(bins)]  # tokens so far; a heap
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, target = open_bins[0]
        filled[target].append(index)
        if len(filled[target]) < most:
            heapreplace(open_bins, (load + int(lengths[index]), target))
        else:
            heappop(open_bins)
    return [sorted(members) for members in filled]
