"""Forest -> log-probabilities of the trained tokens. Training calls the LM head nowhere else.

Shapes: T tokens, N trained tokens, U distinct (source, target) pairs, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from yeonma.batch.batch import Batch
from yeonma.batch.forest import Forest, lay_out
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.attention.backend import Capability, ForestLayout
from yeonma.model.attention.dispatch import layout
from yeonma.model.kernels.linear import float32_product, product
from yeonma.model.position_limits import length_borders, model_positions
from yeonma.model.rotary_lengths import position_ids
from yeonma.model.sharding import gathered, is_sharded, own_class, run_as_forward
from yeonma.model.transfer import to_device

HEAD_CHUNK_BYTES = 32 * 2**20
"""Bytes of float32 logits in memory at a time, on the CPU."""
CUDA_CHUNK_BYTES = 512 * 2**20
"""The same on a GPU. It reads the head once per chunk; 1,000 rows or more hide that behind the product."""
READ_POSITIONS = "read_positions"
"""Keyword of a forward pass: the positions whose final hidden states are read; None for all."""


@dataclass(frozen=True)
class Head:
    """An LM head as data: logits are `cap * tanh(scale * (hidden @ weight.T + bias) / cap)`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    cap: float | None
    chunk_bytes: int | None = None  # float32 logits in memory at a time; None for HEAD_CHUNK_BYTES


@dataclass(frozen=True)
class ForestSupport:
    """How to compute log-probabilities with a model: the result of the trial in `check_forest_support`."""

    forest: bool
    """Whether the model supports forests; otherwise it computes one sequence at a time."""
    head: Head | None
    """None if only the model's own head gives its logits."""
    plain_attention: str
    """The model's attention implementation without forests, by its name in transformers."""
    why_not: str
    """Why the model does not support forests; empty if it does."""
    capability: Capability | None = None
    """Of a CUDA device that computes attention over all segments in one call."""
    attention: tuple[str, ...] = ()
    """The attention backends of the layers in the trial."""


def plain_head(model: Any) -> Head | None:
    """The model's head as data; None if it is not a linear layer (such as one with LoRA), or sharded and trained.

    Scale and cap are read from the config by transformers' names. The check at loading compares the result with the
    model's own logits; a model with another kind of head uses its own forward.
    """
    layer, config = model.get_output_embeddings(), model.config
    if own_class(layer) is not nn.Linear:
        return None
    if layer.weight.requires_grad and is_sharded(model):  # FSDP2 sums gradients of modules that are called
        return None
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    chunk = CUDA_CHUNK_BYTES if layer.weight.device.type == "cuda" else None
    return Head(layer.weight, layer.bias, factor / divisor, cap, chunk)


@dataclass(frozen=True, eq=False)
class ForestInputs:
    """What a forward pass over a forest reads besides the weights, on the model's device."""

    forest: Forest
    keywords: Mapping[str, Any]
    """Of the model's forward."""
    source_U: torch.Tensor
    target_U: torch.Tensor
    pair_N: torch.Tensor


def batch_inputs(
    model: Any, support: ForestSupport, batch: Batch, *, share_prefix: bool = True
) -> ForestInputs | None:
    """What `batch_logprobs` prepares before the forward pass; None without forest support."""
    if not support.forest:
        return None
    forest = lay_out(
        batch.token_ids,
        batch.trained,
        share_prefix=share_prefix,
        units=batch.units_E,
        input_keys=batch.input_keys,
        rotary_lengths=rotary_lengths(model, batch.token_ids),
    )
    return _forest_inputs(forest, layout(forest, model.device, support.capability), model.device)


def batch_logprobs(
    model: Any,
    support: ForestSupport,
    batch: Batch,
    *,
    share_prefix: bool = True,
    squares: bool = False,
    inputs: ForestInputs | None = None,
) -> torch.Tensor:
    """logprob_N of a batch's trained tokens, example by example, in float32 and with its gradient.

    `inputs`: those of `batch_inputs`, if they are there already. With `squares`, shape (2, N): below it, without
    gradient, the log of the sum of the squares of all tokens' probabilities at the same place. Raises UserError for an
    example that exceeds the model's positions.
    """
    positions, longest = model_positions(model.config), int(batch.lengths_E.max())
    if positions is not None and longest > positions:
        what = tr(
            "an example has {longest} tokens, but the model only {positions} positions",
            longest=longest,
            positions=positions,
        )
        raise UserError(
            what, place="cutoff_len", cure=tr("shorten it to {positions} tokens", positions=positions)
        )
    if inputs is not None:
        return trained_logprobs(model, inputs.forest, support.head, inputs=inputs, squares=squares)
    return example_logprobs(
        model,
        support,
        batch.token_ids,
        batch.trained,
        share_prefix=share_prefix,
        units=batch.units_E,
        input_keys=batch.input_keys,
        squares=squares,
    )


def example_logprobs(
    model: Any,
    support: ForestSupport,
    token_ids: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    *,
    share_prefix: bool,
    units: Sequence[int] | np.ndarray | None = None,
    input_keys: Sequence[np.ndarray] | None = None,
    squares: bool = False,
) -> torch.Tensor:
    """logprob_N of the examples' trained tokens, example by example: over one forest if `support` allows it, otherwise
    sequence by sequence. `units` and `input_keys` as in `lay_out`, `squares` as in `batch_logprobs`."""
    if support.forest:
        forest = lay_out(
            token_ids,
            trained,
            share_prefix=share_prefix,
            units=units,
            input_keys=input_keys,
            rotary_lengths=rotary_lengths(model, token_ids),
        )
        return trained_logprobs(model, forest, support.head, support.capability, squares=squares)
    sequences = []
    for ids, mask in zip(token_ids, trained, strict=True):
        on_device = to_device(ids.astype(np.int64), model.device)
        sequences.append(sequence_logprobs(model, on_device, torch.from_numpy(mask.copy()), squares=squares))
    return torch.cat(sequences, dim=-1)


@dataclass(frozen=True)
class TokenScores:
    """The log-probabilities of tokens, and the K most likely tokens in their places, the most likely first."""

    logprob_N: torch.Tensor
    top_id_NK: torch.Tensor
    top_logprob_NK: torch.Tensor

    @staticmethod
    def of(logits_NV: torch.Tensor, target_N: torch.Tensor, top: int) -> TokenScores:
        """In float32. A token's own number and that among the most likely ones are the same."""
        logprob_NV = torch.log_softmax(logits_NV.float(), dim=-1)
        own = logprob_NV.gather(1, target_N.unsqueeze(1)).squeeze(1)
        best = logprob_NV.topk(min(top, logprob_NV.shape[1]), dim=1)
        return TokenScores(own, best.indices, best.values)

    def at(self, index: torch.Tensor | slice) -> TokenScores:
        """Those of some of the tokens."""
        return TokenScores(self.logprob_N[index], self.top_id_NK[index], self.top_logprob_NK[index])


def example_scores(
    model: Any,
    support: ForestSupport,
    token_ids: Sequence[np.ndarray],
    top: int,
    *,
    scored: Sequence[np.ndarray] | None = None,
    units: Sequence[int] | None = None,
) -> list[TokenScores]:
    """The scores of all tokens but the first, for each sequence, without gradients: over one forest if `support` allows
    it, otherwise sequence by sequence. The log-probabilities are those of training.

    `scored`: which tokens of each sequence have scores, never the first one. Its last token is then predicted only, as
    in a forward pass over the tokens before it. `units` as in `lay_out`.
    """
    trained = [np.arange(len(ids)) > 0 for ids in token_ids] if scored is None else list(scored)
    with torch.no_grad():
        if not support.forest:
            return [
                _sequence_scores(model, ids, top).at(to_device(np.flatnonzero(mask[1:]), model.device))
                for ids, mask in zip(token_ids, trained, strict=True)
            ]
        inputs = list(token_ids) if scored is None else [ids[:-1] for ids in token_ids]
        forest = lay_out(
            token_ids,
            trained,
            units=units,
            rotary_lengths=rotary_lengths(model, inputs),
            last_is_input=scored is None,
        )
        device = model.device
        source_U = to_device(forest.source_U, device)
        target_U = to_device(forest.target_U, device)
        batch = _model_inputs(forest, layout(forest, device, support.capability), device)
        if support.head is None or is_sharded(model):
            scores = TokenScores.of(model(**batch, logits_to_keep=source_U).logits[0], target_U, top)
        else:
            hidden = model.get_decoder()(**batch).last_hidden_state[0].index_select(0, source_U)
            scores = _head_scores(hidden, target_U, support.head, top)
        per_pair = scores.at(to_device(forest.pair_N, device))
    ends = np.cumsum([int(mask.sum()) for mask in trained]).tolist()
    return [per_pair.at(slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _sequence_scores(model: Any, token_ids: np.ndarray, top: int) -> TokenScores:
    ids = to_device(token_ids.astype(np.int64), model.device)
    mask = torch.ones_like(ids).unsqueeze(0)
    logits = model(input_ids=ids.unsqueeze(0), attention_mask=mask, use_cache=False).logits[0]
    return TokenScores.of(logits[:-1], ids[1:], top)


def _head_scores(hidden_UH: torch.Tensor, target_U: torch.Tensor, head: Head, top: int) -> TokenScores:
    rows = _rows_of_chunk(head)
    chunks = [
        TokenScores.of(
            _head_logits(hidden_UH[start : start + rows], head)[0], target_U[start : start + rows], top
        )
        for start in range(0, max(1, len(target_U)), rows)
    ]
    return TokenScores(
        torch.cat([chunk.logprob_N for chunk in chunks]),
        torch.cat([chunk.top_id_NK for chunk in chunks]),
        torch.cat([chunk.top_logprob_NK for chunk in chunks]),
    )


def _rows_of_chunk(head: Head) -> int:
    """How many rows of logits are computed at once."""
    return max(1, (head.chunk_bytes or HEAD_CHUNK_BYTES) // (4 * head.weight_VH.shape[0]))


def _head_logits(
    hidden: torch.Tensor, head: Head, *, with_slope: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits in float32, and the slope of the cap there, if there is one and it is wanted."""
    logits = float32_product(hidden, head.weight_VH, head.bias_V)
    if head.scale != 1.0:
        logits *= head.scale
    slope = None
    if head.cap is not None:
        logits.div_(head.cap).tanh_()
        slope = 1 - logits * logits if with_slope else None
        logits *= head.cap
    return logits, slope


def _model_inputs(forest: Forest, attention_layout: ForestLayout, device: torch.device) -> dict[str, Any]:
    """The keyword arguments of the model's forward pass over a forest."""
    return {
        "input_ids": to_device(forest.token_ids_T, device).unsqueeze(0),
        "position_ids": position_ids(forest.position_T, forest.rotary_length_T, device),
        "forest": attention_layout,
        "use_cache": False,
    }


def rotary_lengths(model: Any, token_ids: Sequence[Sequence[int] | np.ndarray]) -> list[int] | None:
    """For every sequence, a length with its rotary frequencies; None if the model's do not depend on the length."""
    borders = length_borders(model.config)
    return [borders.rotary_length(len(ids)) for ids in token_ids] if borders else None


def _forest_inputs(forest: Forest, attention_layout: ForestLayout, device: torch.device) -> ForestInputs:
    read = np.unique(forest.source_U)
    is_all = len(read) == len(forest.token_ids_T)
    return ForestInputs(
        forest=forest,
        keywords={
            **_model_inputs(forest, attention_layout, device),
            READ_POSITIONS: None if is_all else to_device(read, device),
        },
        source_U=to_device(forest.source_U, device),
        target_U=to_device(forest.target_U, device),
        pair_N=to_device(forest.pair_N, device),
    )


def trained_logprobs(
    model: Any,
    forest: Forest,
    head: Head | None,
    capability: Capability | None = None,
    attention_layout: ForestLayout | None = None,
    *,
    inputs: ForestInputs | None = None,
    squares: bool = False,
    **keywords: Any,
) -> torch.Tensor:
    """logprob_N: the log-probability of every trained token of the forest, in float32, with its gradient; `squares` as
    in `batch_logprobs`.

    With a `head`, only a chunk of logits is in memory at a time. Without it, the model's own head runs at the source
    positions (`logits_to_keep`) and returns U x V logits. `attention_layout` replaces the one for the model's device,
    and `inputs`, if given, is used for both. `keywords` go to the model's forward.
    """
    device = model.device
    if inputs is None:
        inputs = _forest_inputs(forest, attention_layout or layout(forest, device, capability), device)
    batch, source_U, target_U = {**inputs.keywords, **keywords}, inputs.source_U, inputs.target_U
    if head is None:
        logits = model(**batch, logits_to_keep=source_U).logits[0]
        logprob_U = _gather_logprobs(logits, target_U, squares=squares)
    else:
        by_head = partial(_logprobs_by_head, model, batch, source_U, target_U, head, squares=squares)
        logprob_U = run_as_forward(model, by_head)
    return logprob_U[..., inputs.pair_N]


def _logprobs_by_head(
    model: Any,
    batch: dict[str, Any],
    source_U: torch.Tensor,
    target_U: torch.Tensor,
    head: Head,
    *,
    squares: bool,
) -> torch.Tensor:
    hidden = model.get_decoder()(**batch).last_hidden_state[0].index_select(0, source_U)
    if not is_sharded(model):
        return head_logprobs(hidden, target_U, head, squares=squares)
    layer = model.get_output_embeddings()
    with gathered(layer):  # gathering creates new tensors, other than those in `head`
        own_head = replace(head, weight_VH=layer.weight, bias_V=layer.bias)
        return head_logprobs(hidden, target_U, own_head, squares=squares)


def sequence_logprobs(
    model: Any, token_ids: torch.Tensor, trained: torch.Tensor, *, squares: bool = False
) -> torch.Tensor:
    """Log-probabilities for one sequence, by the model's own causal forward, for models without forest support.

    token_ids (T,), trained (T,) bool, preferably on the CPU -> log-probabilities of the trained tokens, in order;
    `squares` as in `batch_logprobs`.
    """
    predicted = torch.nonzero(trained[1:]).squeeze(1) + 1
    if predicted.device != token_ids.device:
        predicted = to_device(predicted.numpy(), token_ids.device)
    mask = torch.ones_like(token_ids).unsqueeze(0)
    logits = model(
        input_ids=token_ids.unsqueeze(0), attention_mask=mask, use_cache=False, logits_to_keep=predicted - 1
    ).logits[0]
    if len(logits) != len(predicted):  # a few models ignore `logits_to_keep`
        logits = logits[predicted - 1]
    return _gather_logprobs(logits, token_ids[predicted], squares=squares)


def _gather_logprobs(logits: torch.Tensor, target: torch.Tensor, *, squares: bool) -> torch.Tensor:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, target.unsqueeze(1)).squeeze(1)
    return torch.stack([chosen, (2 * logprobs.detach()).logsumexp(dim=1)]) if squares else chosen


def head_logprobs(
    hidden_UH: torch.Tensor, target_U: torch.Tensor, head: Head, *, squares: bool = False
) -> torch.Tensor:
    """logprob_U of the targets, without U x V numbers in memory; `squares` as in `batch_logprobs`. Only a head that is
    trained itself is computed a second time, for its gradient."""
    if head.weight_VH.requires_grad and torch.is_grad_enabled():
        return _TrainedHeadLogprobs.apply(hidden_UH, head.weight_VH, head.bias_V, target_U, head, squares)
    return _HeadLogprobs.apply(hidden_UH, target_U, head, squares)


class _HeadLogprobs(torch.autograd.Function):
    """A log-probability depends only on its own row of hidden states. So the forward pass computes its gradient as
    well, and the backward pass only scales it. This works for any loss. Each pass reads the head once."""

    @staticmethod
    def forward(
        ctx: Any, hidden_UH: torch.Tensor, target_U: torch.Tensor, head: Head, squares: bool
    ) -> torch.Tensor:
        needs_gradient = hidden_UH.requires_grad
        rows = _rows_of_chunk(head)
        logprob = torch.empty(len(target_U), dtype=torch.float32, device=hidden_UH.device)
        log_square = torch.empty_like(logprob) if squares else None
        gradient = torch.empty_like(hidden_UH) if needs_gradient else None
        for start in range(0, len(target_U), rows):
            chunk = slice(start, start + rows)
            _head_chunk(
                hidden_UH[chunk],
                target_U[chunk],
                head,
                logprob[chunk],
                None if gradient is None else gradient[chunk],
                None if log_square is None else log_square[chunk],
            )
        if needs_gradient:
            ctx.save_for_backward(gradient)
        return logprob if log_square is None else torch.stack([logprob, log_square])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        upstream_U = upstream if upstream.ndim == 1 else upstream[0]
        return (gradient * upstream_U.unsqueeze(1)).to(gradient.dtype), None, None, None


class _TrainedHeadLogprobs(torch.autograd.Function):
    """With a gradient for the head as well, which depends on the loss: the backward pass computes the logits again, a
    chunk at a time. The log-probabilities are those of a frozen head, bit for bit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_U: torch.Tensor,
        head: Head,
        squares: bool,
    ) -> torch.Tensor:
        ctx.head = replace(head, weight_VH=weight_VH, bias_V=bias_V)
        ctx.save_for_backward(hidden_UH, target_U)
        with torch.no_grad():
            return _HeadLogprobs.apply(hidden_UH.detach(), target_U, ctx.head, squares)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        hidden_UH, target_U = ctx.saved_tensors
        head: Head = ctx.head
        upstream_U = upstream if upstream.ndim == 1 else upstream[0]
        rows = _rows_of_chunk(head)
        hidden_gradient = torch.empty_like(hidden_UH)
        weight_gradient = torch.zeros_like(head.weight_VH, dtype=torch.float32)
        bias_gradient = None if head.bias_V is None else torch.zeros_like(head.bias_V, dtype=torch.float32)
        for start in range(0, len(target_U), rows):
            chunk = slice(start, start + rows)
            hidden, target = hidden_UH[chunk], target_U[chunk].unsqueeze(1)
            logits, slope = _head_logits(hidden, head, with_slope=True)
            logits = torch.softmax(logits, dim=1).neg_()
            gradient = logits.scatter_add_(1, target, torch.ones_like(target, dtype=logits.dtype))
            if slope is not None:
                gradient *= slope
            gradient *= (upstream_U[chunk] * head.scale).unsqueeze(1)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(dim=0)
            gradient = gradient.to(hidden.dtype)
            hidden_gradient[chunk] = product(gradient, head.weight_VH.t())
            weight_gradient += product(gradient.t(), hidden.t())
        dtype = head.weight_VH.dtype
        return hidden_gradient, weight_gradient.to(dtype), bias_gradient, None, None, None


def _head_chunk(
    hidden: torch.Tensor,
    target: torch.Tensor,
    head: Head,
    logprob: torch.Tensor,
    gradient: torch.Tensor | None,
    log_square: torch.Tensor | None,
) -> None:
    """Fill `logprob`, and `gradient` = d logprob / d hidden = scale * (1 - tanh^2) * (onehot - softmax) @ weight, and
    `log_square` = the log of the sum of the squared softmax."""
    logits, slope = _head_logits(hidden, head, with_slope=gradient is not None)
    chosen = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    highest = logits.amax(dim=1, keepdim=True)
    logits.sub_(highest).exp_()
    total = logits.sum(dim=1, keepdim=True)
    torch.sub(chosen, (highest + total.log()).squeeze(1), out=logprob)
    if log_square is not None:
        log_square.copy_(torch.log(logits.square().sum(dim=1)) - 2 * total.log().squeeze(1))
    if gradient is None:
        return
    logits.div_(-total)
    logits.scatter_add_(1, target.unsqueeze(1), torch.ones_like(target, dtype=logits.dtype).unsqueeze(1))
    if slope is not None:
        logits *= slope
    if head.scale != 1.0:
        logits *= head.scale
    gradient.copy_(product(logits.to(hidden.dtype), head.weight_VH.t()))
