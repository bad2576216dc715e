"""What goes through the model at once, in this process, turn by turn; and the idle passes that sharding needs.

Where frozen weights are sharded, every forward pass gathers them from all processes, so all must make equally many.
Shares are balanced by tokens, not by counts: a process with fewer micro-batches than another, or with none, makes up
for it by passes over a few tokens, which change nothing. Every process works this out for all; nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch

from yeonma.model.forward import Forward, example_logprobs
from yeonma.tokens.plan import MicroBatching, micro_batches, shares
from yeonma.tokens.store import TokenStore

IDLE_TOKENS = 2


@dataclass(frozen=True)
class Turn:
    """The examples of one micro-batch, none where this process only keeps the others company; then idle passes."""

    examples: np.ndarray
    idle: int = 0


@dataclass(frozen=True)
class Company:
    """The processes that share a step, and what they must do alike."""

    rank: int
    count: int
    sharded: bool
    """Whether all must make the same number of forward passes, in every turn."""


def turns(
    store: TokenStore,
    units: np.ndarray,
    examples_of: Callable[[np.ndarray], np.ndarray],
    micro: MicroBatching,
    company: Company,
    by_forest: bool,
) -> list[Turn]:
    """This process's share of the units, as the examples that go through the model at once; empty where it has none.

    `by_forest`: a micro-batch is one pass; otherwise each of its examples is.
    """
    split = shares(store.unit_lengths[units].tolist(), company.count)

    def of(rank: int) -> list[np.ndarray]:
        mine = units[split[rank]]
        batches = micro_batches(store.unit_lengths[mine].tolist(), micro.most_examples, micro.most_tokens)
        return [found for members in batches if len(found := examples_of(mine[members]))]

    if not company.sharded:
        return [Turn(examples) for examples in of(company.rank)]
    mine, *others = (of(rank) for rank in (company.rank, *range(company.count)))
    passes = [[1 if by_forest else len(examples) for examples in each] for each in others]
    idle = idle_passes(passes, company.rank)
    mine += [np.zeros(0, dtype=np.int64)] * (len(idle) - len(mine))
    return [Turn(examples, more) for examples, more in zip(mine, idle, strict=True)]


def idle_passes(passes: Sequence[Sequence[int]], rank: int) -> list[int]:
    """Passes that process `rank` lacks in each turn; `passes` are those of every process in its own turns."""
    most = [max(column) for column in zip_longest(*passes, fillvalue=0)]
    own = [*passes[rank], *[0] * (len(most) - len(passes[rank]))]
    return [wanted - there for wanted, there in zip(most, own, strict=True)]


def turn_logprobs(
    model: torch.nn.Module, how: Forward, store: TokenStore, turn: Turn, spare: int, share_prefix: bool
) -> torch.Tensor:
    """logprob_N of the turn's examples, as `example_logprobs` gives them; empty, and with a gradient that is 0, where
    the turn is idle alone. `spare`: an example of the step, whose first tokens serve for idle passes where the turn has
    none of its own.
    """
    examples = [store.example(int(position)) for position in turn.examples]
    passes = []
    if examples:
        passes.append(
            example_logprobs(
                model,
                how,
                [each.token_ids for each in examples],
                [each.trained for each in examples],
                share_prefix=share_prefix,
                units=store.units[turn.examples],
            )
        )
    few = (examples[0] if examples else store.example(spare)).token_ids[:IDLE_TOKENS]
    for _ in range(turn.idle):
        idle = example_logprobs(model, how, [few], [np.arange(len(few)) > 0], share_prefix=False)
        passes.append(idle[:0])
    return torch.cat(passes) if len(passes) > 1 else passes[0]


@contextmanager
def unless_idle(turn: Turn, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """A backward pass inside gives no parameter a gradient in a turn that is idle alone: one that has none stays so,
    and the optimizer leaves it alone, as it would without the turn."""
    without = [] if len(turn.examples) else [each for each in parameters if each.grad is None]
    yield
    for each in without:
        each.grad = None
