"""Prompts -> answers over a forest that grows by a token a row and step.

What all prompts begin with is computed and held once. No row is padded in computation. A row that has ended makes room
for the next prompt, whose tokens go through the model together with the next step of the others.
Shapes: B rows answered at once, T tokens of a forward, P shared tokens, S places for a row's own, D of a head, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from yeonma.batch.forest import LEAST_SHARED
from yeonma.generation.sampling import SamplingParams, drawn, penalised, uniforms
from yeonma.model.attention.dispatch import no_mask, segment_attention
from yeonma.model.forest_support import attention

GROWING = "yeonma_growing"
PROMPT_TOKENS = 2048  # that join one step at most; one longer prompt still goes whole
PLACES = 64  # that a row's own keys grow by


@dataclass(eq=False)
class _Layer:
    """Keys and values of one layer. Shared (1, key heads, P, D); own (rows, key heads, S, D)."""

    shared_key: torch.Tensor | None = None
    shared_value: torch.Tensor | None = None
    own_key: torch.Tensor | None = None
    own_value: torch.Tensor | None = None

    def room(self, rows: int, places: int, like_key: torch.Tensor, like_value: torch.Tensor) -> None:
        """See that so many rows have so many places."""
        self.own_key = _grown(self.own_key, rows, places, like_key)
        self.own_value = _grown(self.own_value, rows, places, like_value)


def _grown(held: torch.Tensor | None, rows: int, places: int, like: torch.Tensor) -> torch.Tensor:
    if held is not None and held.shape[0] >= rows and held.shape[2] >= places:
        return held
    had = (0, 0) if held is None else (held.shape[0], held.shape[2])
    places = max(had[1], -(-places // PLACES) * PLACES)
    fresh = like.new_zeros(max(had[0], rows), like.shape[1], places, like.shape[3])
    if held is not None:
        fresh[: had[0], :, : had[1]] = held
    return fresh


@dataclass(eq=False)
class Growing:
    """What attention needs to know of one forward pass, and what it keeps for those that follow.

    In the forward's sequence stand one token of each row that goes on, then the tokens of the rows that begin. With
    `lengths` empty it is what all rows share.
    """

    layers: dict[int, _Layer] = field(default_factory=dict)
    shared: int = 0
    own_B: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Own tokens that each row has before this forward, on the device."""
    lengths: tuple[int, ...] = ()
    """Of the rows in this forward: 1 for those that go on."""
    going_on: int = 0
    places: int = 0
    """The most own tokens of a row after this forward."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


def growing_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    growing: Growing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D), as `forest_attention`."""
    if attention_mask is not None:
        raise ValueError("the model made an attention mask of its own")
    options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
    layer = growing.layers.setdefault(module.layer_idx, _Layer())  # type: ignore[arg-type]
    if not growing.lengths:
        layer.shared_key, layer.shared_value = key, value
        return segment_attention(query, key, value, **options).transpose(1, 2), None  # type: ignore[arg-type]
    layer.room(len(growing.lengths), growing.places, key, value)
    assert layer.own_key is not None and layer.own_value is not None
    outputs = []
    if count := growing.going_on:
        row_B = torch.arange(count, device=query.device)
        layer.own_key[row_B, :, growing.own_B] = key[0, :, :count].transpose(0, 1)
        layer.own_value[row_B, :, growing.own_B] = value[0, :, :count].transpose(0, 1)
        outputs.append(
            _one_token_each(query[:, :, :count], layer, growing, scaling, sliding_window, softcap, s_aux)
        )
    start = count
    for row, length in enumerate(growing.lengths[count:], start=count):
        part = slice(start, start + length)
        k, v, start = key[:, :, part], value[:, :, part], start + length
        layer.own_key[row, :, :length], layer.own_value[row, :, :length] = k[0], v[0]
        if layer.shared_key is not None and layer.shared_value is not None:
            k, v = torch.cat([layer.shared_key, k], dim=2), torch.cat([layer.shared_value, v], dim=2)
        outputs.append(segment_attention(query[:, :, part], k, v, **options).transpose(1, 2))  # type: ignore[arg-type]
    return torch.cat(outputs, dim=1), None


def _one_token_each(
    query: torch.Tensor,
    layer: _Layer,
    growing: Growing,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """query (1, heads, B, D) -> (1, B, heads, D). The shared keys are read once for all rows, by one product a head;
    each row's own by itself."""
    assert layer.own_key is not None and layer.own_value is not None
    _, heads, rows, size = query.shape
    key, value = layer.own_key[:rows, :, : growing.places], layer.own_value[:rows, :, : growing.places]
    groups = heads // key.shape[1]
    query = query[0].transpose(0, 1).reshape(rows, key.shape[1], groups, size)
    scores = query @ key.transpose(2, 3)
    if growing.shared:
        assert layer.shared_key is not None
        together = query.transpose(0, 1).reshape(key.shape[1], rows * groups, size)
        shared = together @ layer.shared_key[0].transpose(1, 2)
        shared = shared.view(key.shape[1], rows, groups, growing.shared).transpose(0, 1)
        scores = torch.cat([shared, scores], dim=3)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill_(~_seen(growing, rows, window), float("-inf"))
    if s_aux is not None:  # a learned score per head that takes part in the softmax and leads nowhere
        sink = s_aux.float().reshape(1, key.shape[1], groups, 1).expand(rows, -1, -1, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=3), dim=3)[..., :-1].to(query.dtype)
    else:
        weights = torch.softmax(scores, dim=3).to(query.dtype)
    output = weights[..., growing.shared :] @ value
    if growing.shared:
        assert layer.shared_value is not None
        together = weights[..., : growing.shared].transpose(0, 1)
        together = together.reshape(key.shape[1], rows * groups, growing.shared) @ layer.shared_value[0]
        output = output + together.view(key.shape[1], rows, groups, -1).transpose(0, 1)
    return output.reshape(1, rows, heads, -1)


def _seen(growing: Growing, rows: int, window: int | None) -> torch.Tensor:
    """(B, 1, 1, P + S): which of the shared and of its own tokens each row's newest one sees."""
    if window not in growing.masks:
        own_B = growing.own_B[:rows, None]
        at = torch.arange(growing.shared + growing.places, device=own_B.device) - growing.shared
        seen = at <= own_B
        if window is not None:
            seen &= at > own_B - window
        growing.masks[window] = seen[:, None, None]
    return growing.masks[window]


@dataclass(frozen=True)
class DecodeRequest:
    """A prompt, and how it is to be answered."""

    prompt: Sequence[int]
    picking: SamplingParams


@dataclass(eq=False)
class _Row:
    """A prompt that is being answered."""

    index: int
    prompt: list[int]
    picking: SamplingParams
    uniform: Any  # numbers in [0, 1), one a token; None where nothing is drawn
    generated: list[int] = field(default_factory=list)
    seen_V: torch.Tensor | None = None
    """Which tokens it holds, where that makes them less likely."""


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    picking: SamplingParams,
    *,
    most_rows: int,
    on_done: Callable[[int, list[int]], None],
) -> None:
    """`grow` of prompts that are known from the beginning and answered alike."""
    grow(model, [DecodeRequest(prompt, picking) for prompt in prompts], most_rows=most_rows, on_done=on_done)


def grow(
    model: Any,
    wanted: Sequence[DecodeRequest],
    *,
    most_rows: int,
    on_done: Callable[[int, list[int]], None],
    on_token: Callable[[int, list[int]], bool] | None = None,
    more: Callable[[int, list[int]], Sequence[DecodeRequest]] | None = None,
) -> None:
    """Answer the prompts, in their order as room comes free, at most `most_rows` at once.

    `on_done` gets each prompt's index and the ids of its answer, with the stop token that ended it, if one did. The
    model is one that `check_forward` found fit for forests, without an adapter around it or with one inside, and in
    eval mode. What the prompts share from the first token, but for their last, is computed once.

    `on_token` gets an answer's ids so far after each that has not ended it, and says whether to end it there. `more`
    is asked before a step with room for so many more prompts, numbered on from those before; each must begin with the
    ids that it is given and be longer.
    """
    shared = _shared([each.prompt for each in wanted])
    growing, live = Growing(shared=shared), list[_Row]()
    waiting, known = list(enumerate(wanted))[::-1], len(wanted)
    frame = [int(number) for number in wanted[0].prompt[:shared]] if wanted else []
    with torch.no_grad(), attention(model, GROWING):
        if shared:
            _forward(model, growing, frame, range(shared), [shared - 1])
        while True:
            if more is not None and not waiting and len(live) < most_rows:
                waiting = list(enumerate(more(most_rows - len(live), frame), start=known))[::-1]
                known += len(waiting)
            if not live and not waiting:
                return
            going_on, budget = len(live), PROMPT_TOKENS
            while waiting and len(live) < most_rows:
                budget -= len(waiting[-1][1].prompt) - shared
                if budget < 0 and len(live) > going_on:
                    break
                live.append(_begun(*waiting.pop()))
            ids = _picked(_step(model, growing, live, going_on), live).tolist()
            ended = []
            for place, (row, number) in enumerate(zip(live, ids, strict=True)):
                row.generated.append(number)
                if row.seen_V is not None:
                    row.seen_V[number] = True
                stopped = number in row.picking.stop_ids or len(row.generated) == row.picking.max_new_tokens
                if stopped or (on_token is not None and on_token(row.index, row.generated)):
                    ended.append(place)
            for place in reversed(ended):  # from behind: what is moved into a gap has not ended
                row = live[place]
                _remove(growing, live, place)
                on_done(row.index, row.generated)


def _begun(index: int, wanted: DecodeRequest) -> _Row:
    picking, prompt = wanted.picking, [int(number) for number in wanted.prompt]
    drawn_from = uniforms(prompt, picking.seed, picking.max_new_tokens) if picking.temperature > 0 else None
    return _Row(index, prompt, picking, drawn_from)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with; 0 where there is too little to share. Every prompt keeps its last for itself."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts, key=list), max(prompts, key=list)  # in order, so that all others lie between
    most = min(map(len, prompts)) - 1
    same = next((at for at in range(most) if first[at] != last[at]), most)
    return same if same >= LEAST_SHARED else 0


def _step(model: Any, growing: Growing, live: list[_Row], going_on: int) -> torch.Tensor:
    """logits_BV of the next token of every row; the last ones, from `going_on`, begin here."""
    tokens: list[int] = []
    positions: list[int] = []
    ends, lengths, own = list[int](), list[int](), list[int]()
    for place, row in enumerate(live):
        begins = place >= going_on
        new = row.prompt[growing.shared :] if begins else row.generated[-1:]
        before = growing.shared if begins else len(row.prompt) + len(row.generated) - 1
        tokens += new
        positions += range(before, before + len(new))
        ends.append(len(tokens) - 1)
        lengths.append(len(new))
        own.append(before - growing.shared)
    growing.lengths, growing.going_on, growing.masks = tuple(lengths), going_on, {}
    growing.own_B = torch.tensor(own[:going_on], dtype=torch.long, device=model.device)
    growing.places = max(had + new for had, new in zip(own, lengths, strict=True))
    return _forward(model, growing, tokens, positions, ends)


def _forward(
    model: Any, growing: Growing, tokens: list[int], positions: Sequence[int], ends: list[int]
) -> torch.Tensor:
    device = model.device
    output = model(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([list(positions)], device=device),
        use_cache=False,
        logits_to_keep=torch.tensor(ends, device=device),
        growing=growing,
    )
    logits: torch.Tensor = output.logits[0]
    return logits.float()


def _picked(logits_BV: torch.Tensor, live: Sequence[_Row]) -> torch.Tensor:
    """ids_B; rows that are picked alike together."""
    styles: dict[tuple[float, float, int, float], list[int]] = {}
    for place, row in enumerate(live):
        how = row.picking
        style = (how.temperature, how.top_p, how.top_k, how.repetition_penalty)
        styles.setdefault(style, []).append(place)
    if len(styles) == 1:
        return _picked_alike(logits_BV, live)
    ids_B = torch.empty(len(live), dtype=torch.long, device=logits_BV.device)
    for places in styles.values():
        at = torch.tensor(places, device=logits_BV.device)
        ids_B[at] = _picked_alike(logits_BV[at], [live[place] for place in places])
    return ids_B


def _picked_alike(scores_BV: torch.Tensor, rows: Sequence[_Row]) -> torch.Tensor:
    picking = rows[0].picking
    if picking.repetition_penalty != 1.0:
        seen_BV = torch.stack([_seen_tokens(row, scores_BV) for row in rows])
        scores_BV = penalised(scores_BV, seen_BV, picking.repetition_penalty)
    if picking.temperature == 0:
        return scores_BV.argmax(dim=1)
    uniform = [float(row.uniform[len(row.generated)]) for row in rows]
    uniform_B = torch.tensor(uniform, dtype=torch.float64, device=scores_BV.device)
    return drawn(scores_BV, uniform_B, picking.temperature, picking.top_p, picking.top_k)


def _seen_tokens(row: _Row, like_BV: torch.Tensor) -> torch.Tensor:
    """(V,): the row's own record, begun with its prompt."""
    if row.seen_V is None:
        row.seen_V = torch.zeros(like_BV.shape[1], dtype=torch.bool, device=like_BV.device)
        row.seen_V[torch.tensor(row.prompt, device=like_BV.device)] = True
    return row.seen_V


def _remove(growing: Growing, live: list[_Row], place: int) -> None:
    """Take a row out; the last one moves to its place, so that the rows stay the first ones of what is held."""
    last = len(live) - 1
    if place != last:
        for layer in growing.layers.values():
            for held in (layer.own_key, layer.own_value):
                assert held is not None
                held[place, :, : growing.places] = held[last, :, : growing.places]
        live[place] = live[last]
    live.pop()


AttentionInterface.register(GROWING, growing_attention)
AttentionMaskInterface.register(GROWING, no_mask)
