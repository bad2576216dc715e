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

from yeonma.model.attention import no_mask, segment_attention
from yeonma.model.check import attention
from yeonma.model.draw import drawn, penalised, uniforms
from yeonma.tokens.forest import LEAST_SHARED

GROWING = "yeonma_growing"
PROMPT_TOKENS = 2048  # that join one step at most; one longer prompt still goes whole
PLACES = 64  # that a row's own keys grow by


@dataclass(frozen=True)
class Picking:
    """How the next token is chosen, and what ends an answer. `stop_ids` may be empty."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int


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


@dataclass(eq=False)
class _Row:
    """A prompt that is being answered."""

    index: int
    prompt: list[int]
    uniform: Any  # numbers in [0, 1), one a token; None where nothing is drawn
    generated: list[int] = field(default_factory=list)


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    picking: Picking,
    *,
    most_rows: int,
    on_done: Callable[[int, list[int]], None],
) -> None:
    """Answer the prompts, in their order as room comes free, at most `most_rows` at once.

    `on_done` gets each prompt's index and the ids of its answer, with the stop token that ended it, if one did. The
    model is one that `check_forward` found fit for forests, without an adapter around it or with one inside, and in
    eval mode. What the prompts share from the first token, but for their last, is computed once.
    """
    shared = _shared(prompts)
    growing, live = Growing(shared=shared), list[_Row]()
    waiting = list(enumerate(prompts))[::-1]
    seen = _Seen(model, picking.repetition_penalty)
    with torch.no_grad(), attention(model, GROWING):
        if shared:
            _forward(model, growing, list(prompts[0][:shared]), range(shared), [shared - 1])
        while live or waiting:
            going_on, budget = len(live), PROMPT_TOKENS
            while waiting and len(live) < most_rows:
                index, prompt = waiting[-1]
                budget -= len(prompt) - shared
                if budget < 0 and len(live) > going_on:
                    break
                waiting.pop()
                numbers = (
                    uniforms(prompt, picking.seed, picking.max_new_tokens)
                    if picking.temperature > 0
                    else None
                )
                live.append(_Row(index, [int(number) for number in prompt], numbers))
            logits_BV = _step(model, growing, live, going_on)
            seen.begin([row.prompt for row in live[going_on:]], logits_BV)
            ids = _picked(logits_BV, live, picking, seen)
            seen.add(ids)
            ended = []
            for place, (row, number) in enumerate(zip(live, ids.tolist(), strict=True)):
                row.generated.append(number)
                if number in picking.stop_ids or len(row.generated) == picking.max_new_tokens:
                    ended.append(place)
            for place in reversed(ended):  # from behind: what is moved into a gap has not ended
                row = live[place]
                _remove(growing, seen, live, place)
                on_done(row.index, row.generated)


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


def _picked(logits_BV: torch.Tensor, live: Sequence[_Row], picking: Picking, seen: _Seen) -> torch.Tensor:
    scores_BV = seen.penalised(logits_BV)
    if picking.temperature == 0:
        return scores_BV.argmax(dim=1)
    uniform = [float(row.uniform[len(row.generated)]) for row in live]
    uniform_B = torch.tensor(uniform, dtype=torch.float64, device=scores_BV.device)
    return drawn(scores_BV, uniform_B, picking.temperature, picking.top_p, picking.top_k)


def _remove(growing: Growing, seen: _Seen, live: list[_Row], place: int) -> None:
    """Take a row out; the last one moves to its place, so that the rows stay the first ones of what is held."""
    last = len(live) - 1
    if place != last:
        for layer in growing.layers.values():
            for held in (layer.own_key, layer.own_value):
                assert held is not None
                held[place, :, : growing.places] = held[last, :, : growing.places]
        live[place] = live[last]
    seen.remove(place)
    live.pop()


@dataclass(eq=False)
class _Seen:
    """Which tokens each row holds already, where that makes them less likely."""

    model: Any
    penalty: float
    seen_BV: torch.Tensor | None = None

    def begin(self, prompts: Sequence[list[int]], logits_BV: torch.Tensor) -> None:
        if self.penalty == 1.0 or not prompts:
            return
        fresh = torch.zeros(len(prompts), logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
        for row, prompt in zip(fresh, prompts, strict=True):
            row[torch.tensor(prompt, device=row.device)] = True
        self.seen_BV = fresh if self.seen_BV is None else torch.cat([self.seen_BV, fresh])

    def add(self, ids_B: torch.Tensor) -> None:
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, ids_B.unsqueeze(1), True)

    def penalised(self, scores_BV: torch.Tensor) -> torch.Tensor:
        return scores_BV if self.seen_BV is None else penalised(scores_BV, self.seen_BV, self.penalty)

    def remove(self, place: int) -> None:
        if self.seen_BV is not None:
            self.seen_BV[place] = self.seen_BV[-1].clone()
            self.seen_BV = self.seen_BV[:-1]


AttentionInterface.register(GROWING, growing_attention)
AttentionMaskInterface.register(GROWING, no_mask)
