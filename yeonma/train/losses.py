"""What a training step needs of a loss, and the loss of supervised training.

A loss is a pure function of log-probabilities, summed over a micro-batch; the step divides once, by its trained tokens,
pairs or labelled answers. The preference losses are in `pair_losses.py` and `label_losses.py`, their table in
`preference_losses.py`.

Shapes: E examples, N trained tokens. Log-probabilities are natural; those of an answer are summed in float64 over its
trained tokens, its end token included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yeonma.batch.batch import TOKEN_WEIGHT, Batch, Extras
from yeonma.model.transfer import to_device

Sums = tuple[Tensor, Tensor]
"""The loss, a scalar, and M metrics, each summed."""
Carried = Mapping[str, float]
"""Numbers that an objective carries from step to step. Checkpoints hold them."""

REFERENCE_LOGPROB = "reference_logprob"
"""Extra of a batch, per example: the reference's log-probability of the whole answer."""
LOG_SQUARE = "log_square"
"""Extra of a batch, per trained token: the log of the sum of the squares of all tokens' probabilities there."""
UNTRAINED = "untrained"
"""Extra of a batch: the model has not been updated since the start, so it is its own reference. Log-ratios are then
exactly 0. The reference's stored numbers come from forests of another layout and would differ in the last bits."""


@dataclass(frozen=True)
class StepMeasure:
    """What a loss must know of the whole step before the step's micro-batches: answers are measured without gradient
    and without dropout, and every micro-batch gets what follows from them."""

    examples: Callable[[Batch, int], Batch]
    """(the step's batch, the most tokens of an example) -> the answers to measure."""
    with_reference: bool
    """Whether the reference is measured on them, too. Otherwise they have the extra REFERENCE_LOGPROB."""
    extras: Callable[[Batch, NDArray[np.float64], NDArray[np.float64]], Extras]
    """(the step's batch, log-probability of each measured answer, the reference's) -> extras of the step's batch."""
    names: tuple[str, ...]
    """The names of these extras."""


@dataclass(frozen=True)
class Objective:
    """A loss as the training step sees it."""

    name: str
    per_token: bool
    """Whether the step divides by the weights of its trained tokens (their number, if none has a weight), or by its
    units."""
    sums: Callable[[Tensor, Batch], Sums]
    """(logprob_N of a micro-batch, the micro-batch) -> sums of the loss and of M metrics."""
    shares: bool = False
    """Whether the step divides by nothing, because the batch says what part of the step's loss each token has."""
    metrics: tuple[str, ...] = ()
    """Names of the M metrics."""
    report: Callable[[Mapping[str, float]], dict[str, float]] = dict
    """The metrics' means over the step -> the metrics to log."""
    measures: tuple[StepMeasure, ...] = ()
    cutoff_len: int = 0
    """The most tokens of an example that is only measured."""
    start: Carried = field(default_factory=dict)
    """The numbers that go from step to step, as they are before the first. Every example of a batch has them as
    extras."""
    carry: Callable[[Carried, Mapping[str, float], int], Carried] | None = None
    """(the numbers of this step, the metrics' means over it, its units) -> those of the next step."""
    reads_squares: bool = False
    """Whether `sums` reads the token extra LOG_SQUARE."""
    evaluation: Callable[[Tensor, Batch], Sums] | None = None
    """`sums` of an evaluation, if they are others."""

    def count(self, batch: Batch) -> float:
        """What a step or an evaluation divides its sums by."""
        if self.shares:
            return 1
        return batch.trained_weight if self.per_token else batch.unit_count


def sft_loss(logprob_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """Negative log-likelihood summed over the trained tokens, times their weights if given: a scalar, to be divided by
    the number of tokens or the sum of weights."""
    return -logprob_N.sum() if weight_N is None else -(logprob_N * weight_N).sum()


def dft_loss(logprob_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """Dynamic Fine-Tuning: Wu et al. 2025, arXiv:2508.05629: each token's negative log-likelihood times its own
    probability, without gradient through the latter. Summed like `sft_loss`, and divided by the same number."""
    return sft_loss(logprob_N * logprob_N.detach().exp(), weight_N)


def _token_sums(loss: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[Tensor, Batch], Sums]:
    def sums(logprob_N: Tensor, batch: Batch) -> Sums:
        weights = batch.token_extras.get(TOKEN_WEIGHT)
        weight_N = None if weights is None else like(logprob_N, weights)
        return loss(logprob_N, weight_N), logprob_N.new_zeros(0)

    return sums


SFT = Objective("sft", per_token=True, sums=_token_sums(sft_loss))
DFT = Objective("sft", per_token=True, sums=_token_sums(dft_loss), evaluation=_token_sums(sft_loss))
TOKEN_LOSSES: Mapping[str, Objective] = {"nll": SFT, "dft": DFT}
"""The objectives of supervised training, by the value of `--token_loss`."""


def answer_logprobs(logprob_N: Tensor, counts: Sequence[int] | np.ndarray) -> Tensor:
    """logprob_E: the log-probability of each example's whole answer, in float64. `counts`: the trained tokens of each
    example. The policy's and the reference's are both summed here.

    Each sum adds only the example's own tokens, in order, so that other examples do not change its bits.
    """
    parts = logprob_N.double().split([int(count) for count in counts])
    return torch.stack([part.sum() for part in parts])


def reference_logprobs_of(logprob_E: Tensor, batch: Batch) -> Tensor:
    """The reference's log-probabilities of the batch's answers; those of the model itself if it is untrained."""
    if UNTRAINED in batch.example_extras:
        return logprob_E.detach()
    return like(logprob_E, batch.example_extras[REFERENCE_LOGPROB])


def untrained(batch: Batch) -> Batch:
    """The batch for a model that still is its own reference; unchanged if the loss has none."""
    if REFERENCE_LOGPROB not in batch.example_extras:
        return batch
    return batch.with_example_extras({UNTRAINED: np.ones(len(batch))})


def at(values_E: Tensor, examples: np.ndarray) -> Tensor:
    """The values of some examples."""
    return values_E[to_device(examples, values_E.device)]


def like(values_E: Tensor, numbers: np.ndarray) -> Tensor:
    """The numbers as a tensor of the same device and dtype."""
    return to_device(np.asarray(numbers, dtype=np.float64), values_E.device, values_E.dtype)
