"""Short causal convolutions over a forest: the first tokens of a segment read the last inputs of its ancestors.

The convolution runs over the flat tokens as if they were one sequence. Then the first tokens of every segment, whose
inputs lie elsewhere, are computed from these.

Shapes: T tokens, W channels, K width of the convolution, S segments, F tokens that are computed anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from yeonma.model.recurrence.pieces import add_rows_
from yeonma.model.transfer import to_device


@dataclass(frozen=True, eq=False)
class Taps:
    """The inputs of a forest's convolution. Inputs are the tokens, then those that it starts from; -1 stands for 0."""

    first_F: torch.Tensor
    """The first K - 1 tokens of every segment, or all if it has fewer."""
    input_FK: torch.Tensor
    """Their inputs, 0 where there is none."""
    exists_FK1: torch.Tensor
    """Whether there is an input."""
    last_SK: torch.Tensor | None
    """The last K - 1 inputs of every segment, -1 where there is none; None if nothing continues later."""


def lay_out_taps(
    lengths: Sequence[int],
    parents: Sequence[int | None],
    width: int,
    device: torch.device,
    *,
    origins: Sequence[int] | None = None,
    keep_last: bool = False,
) -> Taps:
    """`width`: K. `origins`: as in `lay_out_pieces`; each has K - 1 inputs behind those of the tokens."""
    total, start = sum(lengths), 0
    last: list[np.ndarray] = []
    first_F: list[np.ndarray] = []
    input_FK: list[np.ndarray] = []
    for index, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        if parent is not None:
            before = last[parent]
        elif origins is not None:
            before = total + origins[index] * (width - 1) + np.arange(width - 1)
        else:
            before = np.full(width - 1, -1)
        path = np.concatenate([before, np.arange(start, start + length)])
        last.append(path[len(path) - (width - 1) :])
        count = min(length, width - 1)
        first_F.append(np.arange(start, start + count))
        input_FK.append(path[np.arange(count)[:, None] + np.arange(width)])
        start += length
    inputs = np.concatenate(input_FK)

    on_device = partial(to_device, device=device)
    return Taps(
        on_device(np.concatenate(first_F)),
        on_device(np.maximum(inputs, 0)),
        on_device((inputs >= 0)[..., None]),
        on_device(np.stack(last)) if keep_last else None,
    )


def causal_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    taps: Taps,
    initial: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (1, W, T), weight (W, K), bias (W,) -> (1, W, T), with the arguments of transformers' `causal_conv1d_fn`.

    initial: (origins, K - 1, W), the last inputs before segments without a parent; they get no gradient.
    """
    inputs = x[0].t()
    # as much precision as one product over all inputs has
    exact = inputs.to(torch.promote_types(weight.dtype, torch.float32))
    kernel = weight.to(exact.dtype)
    output: torch.Tensor = _Convolution.apply(exact, kernel, taps, initial)
    if bias is not None:
        output = output + bias
    if activation is not None:
        from transformers.activations import ACT2FN  # imports PyTorch's compiler

        output = ACT2FN[activation](output)
    return output.to(x.dtype).t().unsqueeze(0)


def last_inputs(x: torch.Tensor, taps: Taps, initial: torch.Tensor | None = None) -> torch.Tensor:
    """(S, K - 1, W): the last inputs of every segment, for what continues it."""
    assert taps.last_SK is not None
    inputs = x[0].t()
    bank = inputs if initial is None else torch.cat([inputs, initial.flatten(0, 1).to(inputs)])
    return bank[taps.last_SK.clamp_min(0)] * (taps.last_SK >= 0).unsqueeze(-1)


class _Convolution(torch.autograd.Function):
    """The convolution (T, W) -> (T, W): over one sequence with zeros before it, by K passes over memory in either
    direction, except for the rows `taps.first_F`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, taps: Taps, initial: torch.Tensor | None
    ) -> torch.Tensor:
        kernel = weight.t().contiguous()
        result = x * kernel[-1]
        for shift, factor in _shifts(kernel, len(x)):
            result[shift:].addcmul_(x[:-shift], factor)
        result.index_copy_(0, taps.first_F, (_windows(x, taps, initial) * kernel).sum(1))
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.taps, ctx.initial = taps, initial
        return result

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        taps, kernel = ctx.taps, weight.t().contiguous()
        of_first = upstream.index_select(0, taps.first_F).unsqueeze(1)
        of_others = upstream.index_fill(0, taps.first_F, 0)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = of_others * kernel[-1]
            for shift, factor in _shifts(kernel, len(upstream)):
                to_x[:-shift].addcmul_(of_others[shift:], factor)
            inputs = taps.exists_FK1 & (taps.input_FK < len(upstream)).unsqueeze(-1)
            index = taps.input_FK.clamp_max(len(upstream) - 1).flatten()
            add_rows_(to_x, index, (of_first * kernel * inputs).flatten(0, 1))
        if ctx.needs_input_grad[1]:
            width, length = len(kernel), len(upstream)
            padded = F.pad(x, (0, 0, width - 1, 0))
            to_weight = torch.stack([(padded[k : k + length] * of_others).sum(0) for k in range(width)])
            to_weight = (to_weight + (_windows(x, taps, ctx.initial) * of_first).sum(0)).t()
        return to_x, to_weight, None, None


def _shifts(kernel: torch.Tensor, length: int) -> Iterator[tuple[int, torch.Tensor]]:
    """How many tokens before its own a token reads, and the weights (W,) of that input, without its own."""
    for shift in range(1, min(len(kernel), length)):
        yield shift, kernel[-1 - shift]


def _windows(x: torch.Tensor, taps: Taps, initial: torch.Tensor | None) -> torch.Tensor:
    """(F, K, W): the inputs of the rows `taps.first_F`."""
    bank = x if initial is None else torch.cat([x, initial.flatten(0, 1).to(x)])
    return bank.index_select(0, taps.input_FK.flatten()).unflatten(0, taps.input_FK.shape) * taps.exists_FK1
