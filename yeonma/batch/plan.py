"""The units of every step, of a process's share of it, and of a micro-batch: pure functions of lengths and seed.

The units of a step depend on (seed, epoch, batch_size) and, in a mixture, on the shares of its data sets: they are the
same for any number of processes and any micro-batch size. Every process computes the whole plan, so there is no
communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heapreplace
from math import ceil

import numpy as np

COUNTED_STEPS = 200_000
"""Of a mixture, one by one."""
COLLECTED_STEPS = 10_000
GROUPED_STEPS = 50  # group_by_length sorts the shuffled examples of this many steps by length


@dataclass(frozen=True)
class Shares:
    """A mixture in which each data set has a share of every step, to rounding."""

    sets: tuple[np.ndarray, ...]
    """The units of each data set: indices into `Plan.positions`."""
    weights: tuple[int, ...]
    """Their shares, relative to the sum of the weights."""

    def counts(self, batch_size: int, steps: int) -> Iterator[list[int]]:
        """How many units of each data set are in each of the steps.

        In a step, a data set has its exact share rounded down or up. Those that are furthest behind are rounded up, so
        that over many steps each comes to its share.
        """
        total = sum(self.weights)
        exact = [weight * batch_size for weight in self.weights]  # in units of 1 / total, as below
        rounded_down = [share // total for share in exact]
        can_round_up = [number for number, share in enumerate(exact) if share % total]
        missing = batch_size - sum(rounded_down)
        behind = [0] * len(exact)
        for _ in range(steps):
            behind = [before + share for before, share in zip(behind, exact, strict=True)]
            counts = list(rounded_down)
            for number in sorted(can_round_up, key=lambda one: counts[one] * total - behind[one])[:missing]:
                counts[number] += 1
            behind = [due - count * total for due, count in zip(behind, counts, strict=True)]
            yield counts

    def steps(self, seed: int, batch_size: int, start: int, end: int) -> Iterator[np.ndarray]:
        """The units of the steps from `start` to before `end`. Each data set is passed through again and again, each
        time in another order."""
        taken = [0] * len(self.sets)
        orders: dict[tuple[int, int], np.ndarray] = {}
        for step, counts in enumerate(self.counts(batch_size, end)):
            if step >= start:
                yield np.concatenate(
                    [
                        self._take(number, taken[number], count, seed, orders)
                        for number, count in enumerate(counts)
                    ]
                )
            taken = [before + count for before, count in zip(taken, counts, strict=True)]

    def _take(
        self, number: int, first: int, count: int, seed: int, orders: dict[tuple[int, int], np.ndarray]
    ) -> np.ndarray:
        """The next `count` units of a data set of which `first` were taken. `orders` has the orders of its passes."""
        units, parts = self.sets[number], [np.zeros(0, dtype=np.int64)]
        while count:
            turn, within = divmod(first, len(units))
            if (number, turn) not in orders:
                orders.pop((number, turn - 1), None)
                random = np.random.Generator(np.random.PCG64([seed, turn, number]))
                orders[number, turn] = random.permutation(len(units))
            part = orders[number, turn][within : within + count]
            parts.append(units[part])
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)


@dataclass(frozen=True)
class Plan:
    """The steps of a run over `positions`, the units (examples or pairs) to train on."""

    positions: np.ndarray  # int64, units of the token store
    lengths: np.ndarray  # tokens of each unit
    batch_size: int
    seed: int
    total_steps: int
    group_by_length: bool = False
    shares: Shares | None = None
    """None: an epoch has every position once."""
    epoch_units: int | None = None
    """Units of an epoch; None: as many as positions."""

    @property
    def steps_per_epoch(self) -> int:
        return ceil((self.epoch_units or len(self.positions)) / self.batch_size)

    def steps(self, start: int = 0) -> Iterator[np.ndarray]:
        """The units of every step from `start` on, as positions in the token store.

        The last step of an epoch may be smaller than the others, but not in a mixture with shares.
        """
        if self.shares is not None:
            steps = self.shares.steps(self.seed, self.batch_size, start, self.total_steps)
            yield from (self.positions[indices] for indices in steps)
            return
        order, order_epoch = np.zeros(0, dtype=np.int64), -1
        for step in range(start, self.total_steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                lengths = self.lengths if self.group_by_length else None
                order = epoch_order(len(self.positions), self.seed, epoch, self.batch_size, lengths)
                order_epoch = epoch
            yield self.positions[order[within * self.batch_size : (within + 1) * self.batch_size]]

    def used(self) -> np.ndarray:
        """The distinct units that the run trains on, ascending: all of them, unless the run ends before."""
        if self.shares is None and self.total_steps >= self.steps_per_epoch:
            return np.unique(self.positions)
        if self.shares is not None and min(self.passes()) >= 1:
            return np.unique(self.positions)
        taken: np.ndarray = np.zeros(0, dtype=np.int64)
        parts: list[np.ndarray] = []
        for step in self.steps():
            parts.append(step)
            if len(parts) == COLLECTED_STEPS:  # memory does not grow with the number of steps
                taken, parts = np.unique(np.concatenate([taken, *parts])), []
        return np.unique(np.concatenate([taken, *parts]))

    def passes(self) -> list[float]:
        """With shares: how often the run passes through each data set. Of a run with very many steps at least so often:
        what is rounded in a step, less than a unit for each data set, is left out."""
        assert self.shares is not None
        if self.total_steps > COUNTED_STEPS:
            total, several = sum(self.shares.weights), len(self.shares.sets)
            return [
                (self.total_steps * self.batch_size * weight // total - several) / len(units)
                for weight, units in zip(self.shares.weights, self.shares.sets, strict=True)
            ]
        counts = np.zeros(len(self.shares.sets), dtype=np.int64)
        for step in self.shares.counts(self.batch_size, self.total_steps):
            counts += step
        return [int(count) / len(units) for count, units in zip(counts, self.shares.sets, strict=True)]

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
    shares: Shares | None = None,
    epoch_units: int | None = None,
) -> Plan:
    """`max_steps` takes precedence over `num_epochs`. An epoch has as many units as `positions`, or `epoch_units`."""
    steps = max_steps or max(1, ceil(num_epochs * ceil((epoch_units or len(positions)) / batch_size)))
    return Plan(positions, lengths, batch_size, seed, steps, group_by_length, shares, epoch_units)


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
