"""The recurrent rules of transformers' models over a forest, with their arguments and numbers.

They replace functions of the same names in transformers' modules. Numbers are computed in float32, as there.

Shapes: T tokens, H heads of values, G heads of keys and queries (or groups), K width of keys, V width of values, S
segments, P pieces, C places of a piece, R = H / G.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from yeonma.model.recurrence.pieces import Pieces, to_pieces, to_tokens
from yeonma.model.recurrence.scan import PieceInputs, pairwise_decay, scan

EPSILON = 1e-6  # of the norms of keys and queries
BLOCK = 16
"""Tokens of a piece whose decays per channel are computed pair by pair."""


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    pieces: Pieces,
    initial: torch.Tensor | None = None,
    *,
    normed: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated DeltaNet, and Kimi Delta Attention. query and key (1, T, G, K), value (1, T, H, V), beta (1, T, H), g
    (1, T, H), or (1, T, H, K) with G = H -> (1, T, H, V), and the states (S, G, R, K, V) behind the segments if the
    layout keeps them.

    g: the logarithm of the decay, of a head or of each channel of its key. beta: the strength of the update. normed:
    queries and keys are normed first. initial: the states that segments without a parent start from.
    """
    by_channel = g.ndim == key.ndim
    decay_THN = g if by_channel else g.unsqueeze(-1)
    q, k, v, decay, strength = _delta_inputs(query, key, value, decay_THN, beta, pieces, normed=normed)
    fading = decay.cumsum(-2)
    if by_channel:
        read, system = _read_by_channel(q, k, fading), _read_by_channel(k, k, fading) * strength
    else:
        pairs = pairwise_decay(fading)
        read = (q @ k.transpose(-1, -2)) * pairs
        system = (k @ k.transpose(-1, -2)) * pairs * strength
    inputs = PieceInputs(q, k, v * strength, fading, read, system, strength)
    return _outputs(*scan(inputs, pieces, initial), pieces, query.dtype)


def mamba2_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    pieces: Pieces,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mamba2. x (1, T, H, V), dt (1, T, H) the size of a step, a (H,) the rate of decay, b and c (1, T, G, K), d (H,)
    the weight of the input in the output -> (1, T, H, V) in float32, and the states as `delta_rule`."""
    groups = b.shape[2]
    values, step = x[0].float(), dt[0].float().unsqueeze(-1)
    q, k = (_by_group(states[0].float(), pieces, states.shape[2]) for states in (c, b))
    inputs_by_group = _by_group(values * step, pieces, groups)
    fading = _by_group(step * a.float().unsqueeze(-1), pieces, groups).cumsum(-2)
    read = (q @ k.transpose(-1, -2)) * pairwise_decay(fading)
    output, behind = scan(PieceInputs(q, k, inputs_by_group, fading, read), pieces, initial)
    result, behind = _outputs(output, behind, pieces, torch.float32)
    return result if d is None else result + values * d.float().unsqueeze(-1), behind


def _delta_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    pieces: Pieces,
    *,
    normed: bool,
) -> tuple[torch.Tensor, ...]:
    """The arguments of a delta rule in float32, in pieces and by group."""
    q, k, scale = query[0].float(), key[0].float(), query.shape[-1] ** -0.5
    if normed:
        q, k = _Normed.apply(q, scale), _Normed.apply(k, 1.0)
    else:
        q = q * scale
    groups = q.shape[1]
    others = (value[0].float(), g[0].float(), beta[0].float().unsqueeze(-1))
    return (
        _by_group(q, pieces, groups),
        _by_group(k, pieces, groups),
        *(_by_group(x, pieces, groups) for x in others),
    )


def _by_group(x_T: torch.Tensor, pieces: Pieces, groups: int) -> torch.Tensor:
    """(T, heads, N) -> (P, G, heads / G, C, N)."""
    return to_pieces(x_T, pieces).unflatten(1, (groups, -1))


def _outputs(
    output: torch.Tensor, behind: torch.Tensor | None, pieces: Pieces, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return to_tokens(output.flatten(1, 2), pieces).unsqueeze(0).to(dtype), behind


class _Normed(torch.autograd.Function):
    """Rows (..., K) over their length, times `scale`: two passes over memory in either direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        factor = torch.linalg.vecdot(x, x).add_(EPSILON).rsqrt_().mul_(scale).unsqueeze(-1)
        result = x * factor
        ctx.save_for_backward(result, factor)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        result, factor = ctx.saved_tensors
        along = torch.linalg.vecdot(upstream, result).div_(ctx.scale**2).unsqueeze(-1)
        return torch.addcmul(upstream, result, along, value=-1).mul_(factor), None


def _read_by_channel(query: torch.Tensor, key: torch.Tensor, fading: torch.Tensor) -> torch.Tensor:
    """(..., C, C), lower triangular: products of queries and keys (..., C, K), each channel faded by the decays between
    them.

    Decays over a block's start are the product of those up to it and from it on, none of which exceeds 1. Within a
    block, every pair has its own.
    """
    length = query.shape[-2]
    result = []
    for start in range(0, length, BLOCK):
        rows = slice(start, min(start + BLOCK, length))
        q, k, own = query[..., rows, :], key[..., rows, :], fading[..., rows, :]
        later = torch.ones(own.shape[-2], own.shape[-2], dtype=torch.bool, device=own.device).triu(1)
        between = (own.unsqueeze(-2) - own.unsqueeze(-3)).masked_fill(later.unsqueeze(-1), float("-inf"))
        parts = [(q.unsqueeze(-2) * k.unsqueeze(-3) * between.exp()).sum(-1)]
        if start:
            border = fading[..., start - 1 : start, :]
            before = key[..., :start, :] * (border - fading[..., :start, :]).exp()
            parts.insert(0, (q * (own - border).exp()) @ before.transpose(-1, -2))
        result.append(F.pad(torch.cat(parts, -1), (0, length - rows.stop)))
    return torch.cat(result, -2)
