"""Decoding over a forest that grows by one token per row and step.

The prefix that all prompts share is computed and stored once. No prompt is padded. When a row has ended, the next
prompt takes its place, and its tokens go through the model together with the next step of the other rows.

Where rotary frequencies depend on the length, a row has those of its own length so far. Rows with other frequencies
than the shared prefix keep a copy of it in their own tokens. A row that grows beyond a border of LongRoPE is computed
again from its first token, as transformers' Phi-3 does, so that an answer's next token is always that of a plain
forward pass over all tokens before it. With dynamic NTK scaling cached keys stay as they are, as in transformers.

Shapes: B rows answered at once, T tokens of a forward pass, P shared tokens, S slots for a row's own tokens, D head
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from yeonma.batch.forest import MIN_SHARED_TOKENS
from yeonma.generation.fixed_shapes import FixedSteps, current_fixed_shapes, rounded_rows
from yeonma.generation.logit_rules import LogitRules, TokenMask
from yeonma.generation.recurrent_states import RecurrentStates
from yeonma.generation.sampling import SamplingParams, sample, uniforms
from yeonma.generation.token_scores import ScoreLog
from yeonma.model.attention.sdpa import segment_attention
from yeonma.model.forest_support import attention
from yeonma.model.kernels.linear import decoding_products
from yeonma.model.position_limits import LengthBorders, length_borders
from yeonma.model.rotary_lengths import position_ids
from yeonma.model.transfer import to_device

DECODING = "yeonma_decoding"
MAX_PROMPT_TOKENS = 2048  # of new prompts in one step; a single longer prompt is not split
SLOTS = 64  # the buffers for a row's own keys and values grow by this many tokens


@dataclass(eq=False)
class _LayerCache:
    """Keys and values of one layer: shared (1, key heads, P, D), and the rows' own (rows, key heads, S, D)."""

    shared_key: torch.Tensor | None = None
    shared_value: torch.Tensor | None = None
    own_key: torch.Tensor | None = None
    own_value: torch.Tensor | None = None

    def reserve(self, rows: int, slots: int, like_key: torch.Tensor, like_value: torch.Tensor) -> None:
        """Make room for `rows` rows of `slots` tokens."""
        self.own_key = _enlarged(self.own_key, rows, slots, like_key)
        self.own_value = _enlarged(self.own_value, rows, slots, like_value)


def _enlarged(tensor: torch.Tensor | None, rows: int, slots: int, like: torch.Tensor) -> torch.Tensor:
    if tensor is not None and tensor.shape[0] >= rows and tensor.shape[2] >= slots:
        return tensor
    old_rows, old_slots = (0, 0) if tensor is None else (tensor.shape[0], tensor.shape[2])
    slots = max(old_slots, -(-slots // SLOTS) * SLOTS)
    larger = like.new_zeros(max(old_rows, rows), like.shape[1], slots, like.shape[3])
    if tensor is not None:
        larger[:old_rows, :, :old_slots] = tensor
    return larger


@dataclass(eq=False)
class ForestCache:
    """Keys and values of all layers, and the layout of the forward pass that reads and extends them.

    A forward pass has one token for every row that continues, then the prompts of the rows that start. If `lengths` is
    empty, it has the prefix that all rows share.
    """

    layers: dict[int, _LayerCache] = field(default_factory=dict)
    shared: int = 0
    own_B: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Number of own tokens of the continuing rows before this forward pass, on the device."""
    own_prefix: tuple[bool, ...] = ()
    """Per row of this forward pass, whether all its tokens are its own, and it does not see the shared prefix."""
    lengths: tuple[int, ...] = ()
    """Tokens per row in this forward pass: 1 for rows that continue."""
    continuing: int = 0
    slots: int = 0
    """The largest number of own tokens of a row after this forward pass."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """Sliding window -> mask, computed once per forward pass."""
    recurrence: RecurrentStates = field(default_factory=RecurrentStates)
    """For models with recurrent layers."""

    def copy_rows(self, source: torch.Tensor, start: int) -> None:
        """Give the rows from `start` on the keys and values of the rows `source`."""
        for layer in self.layers.values():
            assert layer.own_key is not None and layer.own_value is not None
            layer.reserve(start + len(source), self.slots, layer.own_key, layer.own_value)
            for tensor in (layer.own_key, layer.own_value):
                tensor[start : start + len(source), :, : self.slots] = tensor[source, :, : self.slots]
        self.recurrence.copy_rows(source)


def decoding_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forest_cache: ForestCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D), as `forest_attention`."""
    cache = forest_cache
    if attention_mask is not None:
        raise ValueError("the model made its own attention mask")
    options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
    layer = cache.layers.setdefault(module.layer_idx, _LayerCache())  # type: ignore[arg-type]
    if not cache.lengths:
        layer.shared_key, layer.shared_value = key, value
        return segment_attention(query, key, value, **options).transpose(1, 2), None  # type: ignore[arg-type]
    layer.reserve(len(cache.lengths), cache.slots, key, value)
    assert layer.own_key is not None and layer.own_value is not None
    outputs = []
    if count := cache.continuing:
        row_B = torch.arange(count, device=query.device)
        layer.own_key[row_B, :, cache.own_B] = key[0, :, :count].transpose(0, 1)
        layer.own_value[row_B, :, cache.own_B] = value[0, :, :count].transpose(0, 1)
        outputs.append(
            _attend_one_token_per_row(
                query[:, :, :count], layer, cache, scaling, sliding_window, softcap, s_aux
            )
        )
    start = count
    for row, length in enumerate(cache.lengths[count:], start=count):
        part = slice(start, start + length)
        k, v, start = key[:, :, part], value[:, :, part], start + length
        layer.own_key[row, :, :length], layer.own_value[row, :, :length] = k[0], v[0]
        if not cache.own_prefix[row] and layer.shared_key is not None and layer.shared_value is not None:
            k, v = torch.cat([layer.shared_key, k], dim=2), torch.cat([layer.shared_value, v], dim=2)
        outputs.append(segment_attention(query[:, :, part], k, v, **options).transpose(1, 2))  # type: ignore[arg-type]
    return torch.cat(outputs, dim=1), None


def _attend_one_token_per_row(
    query: torch.Tensor,
    layer: _LayerCache,
    cache: ForestCache,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """query (1, heads, B, D) -> (1, B, heads, D). One product per head reads the shared keys for all rows at once; the
    rows' own keys are read row by row."""
    assert layer.own_key is not None and layer.own_value is not None
    _, heads, rows, size = query.shape
    key, value = layer.own_key[:rows, :, : cache.slots], layer.own_value[:rows, :, : cache.slots]
    groups = heads // key.shape[1]
    query = query[0].transpose(0, 1).reshape(rows, key.shape[1], groups, size)
    scores = query @ key.transpose(2, 3)
    if cache.shared:
        assert layer.shared_key is not None
        all_rows = query.transpose(0, 1).reshape(key.shape[1], rows * groups, size)
        shared = all_rows @ layer.shared_key[0].transpose(1, 2)
        shared = shared.view(key.shape[1], rows, groups, cache.shared).transpose(0, 1)
        scores = torch.cat([shared, scores], dim=3)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill_(~_visible(cache, rows, window), float("-inf"))
    if s_aux is not None:  # attention sinks: a learned score per head in the softmax, without a value
        sink = s_aux.float().reshape(1, key.shape[1], groups, 1).expand(rows, -1, -1, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=3), dim=3)[..., :-1].to(query.dtype)
    else:
        weights = torch.softmax(scores, dim=3).to(query.dtype)
    output = weights[..., cache.shared :] @ value
    if cache.shared:
        assert layer.shared_value is not None
        all_rows = weights[..., : cache.shared].transpose(0, 1)
        all_rows = all_rows.reshape(key.shape[1], rows * groups, cache.shared) @ layer.shared_value[0]
        output = output + all_rows.view(key.shape[1], rows, groups, -1).transpose(0, 1)
    return output.reshape(1, rows, heads, -1)


def _visible(cache: ForestCache, rows: int, window: int | None) -> torch.Tensor:
    """(B, 1, 1, P + S): whether a row's newest token sees a shared or own token."""
    if window not in cache.masks:
        own_B = cache.own_B[:rows, None]
        position = torch.arange(cache.shared + cache.slots, device=own_B.device) - cache.shared
        visible = position <= own_B
        if any(cache.own_prefix[:rows]):
            own_prefix_B = to_device(cache.own_prefix[:rows], own_B.device)[:, None]
            visible &= ~own_prefix_B | (position >= 0)
        if window is not None:
            visible &= position > own_B - window
        cache.masks[window] = visible[:, None, None]
    return cache.masks[window]


@dataclass(frozen=True)
class DecodeRequest:
    """A prompt and its sampling parameters."""

    prompt: Sequence[int]
    sampling: SamplingParams
    mask: TokenMask | None = None
    """The tokens that a grammar allows. It follows one answer, so every request needs its own."""
    scores: ScoreLog | None = None
    """Gets the log-probability of every token of the answer, the stop token included, before `on_token` is called."""


@dataclass(eq=False)
class _LiveRow:
    """A prompt that is being answered."""

    index: int
    prompt: list[int]
    sampling: SamplingParams
    uniform: Any  # random numbers in [0, 1), one per token; None for greedy decoding
    rules: LogitRules | None = None
    scores: ScoreLog | None = None
    generated: list[int] = field(default_factory=list)
    own_prefix: bool = False
    """Whether the row does not see the shared prefix, because its rotary frequencies differ."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def start(self) -> tuple[bool, tuple[int, ...]]:
        """Rows that start with the same are computed once."""
        return self.own_prefix, (*self.prompt, *self.generated)


def decode(
    model: Any,
    requests: Sequence[DecodeRequest],
    *,
    max_rows: int,
    on_done: Callable[[int, list[int]], None],
    on_token: Callable[[int, list[int]], bool] | None = None,
    more: Callable[[int, list[int]], Sequence[DecodeRequest]] | None = None,
) -> None:
    """Answer the requests in order, at most `max_rows` at once. The next one starts as soon as a row has ended.

    `model` is a transformers model in eval mode that passed `check_forest_support`. Its layers may contain an adapter,
    but it is not a PeftModel. The common prefix of all prompts, without anyone's last token, is computed once (where
    rotary frequencies depend on the length, that of the prompts with the most frequent ones), and so is a prompt of
    several rows that start together.

    on_done: called with a request's index and the ids of its answer, including the stop token if there is one.
    on_token: called with a request's index and the ids of its answer so far, after every token that does not end it. It
        returns True to end the answer.
    more: called with the number of free rows and the ids of the common prefix, before a step with free rows. It returns
        at most so many requests, whose indices follow on. Their prompts must begin with the prefix and be longer.
    """
    borders = length_borders(model.config)
    sharing, rotary_length = _sharing(requests, borders)
    shared = _shared_length([request.prompt for request in sharing])
    cache, live = ForestCache(shared=shared), list[_LiveRow]()
    mode = None if borders else current_fixed_shapes()
    fixed = None if mode is None else FixedSteps(mode, model.device)
    waiting, count = list(enumerate(requests))[::-1], len(requests)
    prefix = [int(number) for number in sharing[0].prompt[:shared]] if sharing else []

    def new_row(index: int, request: DecodeRequest) -> _LiveRow:
        row = _new_row(index, request)
        row.own_prefix = bool(borders) and borders.rotary_length(row.length) != rotary_length
        return row

    with torch.no_grad(), attention(model, DECODING), decoding_products(model):
        if shared:
            cache.recurrence.begin_prefix()
            _forward(
                model,
                cache,
                prefix,
                range(shared),
                [shared - 1],
                [rotary_length] * shared if borders else None,
            )
        while True:
            if more is not None and not waiting and len(live) < max_rows:
                waiting = list(enumerate(more(max_rows - len(live), prefix), start=count))[::-1]
                count += len(waiting)
            if not live and not waiting:
                return
            restarted = _take_out_beyond_border(cache, live, borders)
            continuing = len(live)
            live += restarted
            budget = MAX_PROMPT_TOKENS - sum(row.length for row in restarted)
            while waiting and len(live) < max_rows:
                row = new_row(*waiting[-1])
                if not any(row.start == other.start for other in live[continuing:]):
                    budget -= row.length - (0 if row.own_prefix else shared)
                if budget < 0 and len(live) > continuing:
                    break
                live.append(row)
                waiting.pop()
            logits_BV = _step(model, cache, live, continuing, borders, fixed)
            ids = _next_tokens(logits_BV, live).tolist()
            ended = []
            for row_index, (row, number) in enumerate(zip(live, ids, strict=True)):
                row.generated.append(number)
                if row.scores is not None:
                    row.scores.add(logits_BV[row_index], number)
                if row.rules is not None:
                    row.rules.accept(number)
                stopped = number in row.sampling.stop_ids or len(row.generated) == row.sampling.max_new_tokens
                stopped = stopped or (row.rules is not None and row.rules.is_over)
                if stopped or (on_token is not None and on_token(row.index, row.generated)):
                    ended.append(row_index)
            done = sorted((live[row_index] for row_index in ended), key=lambda row: row.index)
            for row_index in reversed(ended):  # backwards, so that the row moved into the gap has not ended
                _remove(cache, live, row_index)
            for row in done:
                on_done(row.index, row.generated)


def _new_row(index: int, request: DecodeRequest) -> _LiveRow:
    sampling, prompt = request.sampling, [int(number) for number in request.prompt]
    greedy = sampling.temperature == 0
    uniform = None if greedy else uniforms(prompt, sampling.seed, sampling.max_new_tokens)
    rules = LogitRules.of(sampling, prompt, request.mask)
    return _LiveRow(index, prompt, sampling, uniform, rules, request.scores)


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """The length of the prefix of all prompts, without anyone's last token; 0 if it is too short to share."""
    if len(prompts) < 2:
        return 0
    # In lexicographic order, all other prompts are between these two.
    lowest, highest = min(prompts, key=list), max(prompts, key=list)
    limit = min(map(len, prompts)) - 1
    length = next((i for i in range(limit) if lowest[i] != highest[i]), limit)
    return length if length >= MIN_SHARED_TOKENS else 0


def _sharing(
    requests: Sequence[DecodeRequest], borders: LengthBorders
) -> tuple[Sequence[DecodeRequest], int]:
    """The requests whose prompts may share a prefix, and a length with their rotary frequencies: the most frequent."""
    if not borders or not requests:
        return requests, 1
    lengths = [borders.rotary_length(len(request.prompt)) for request in requests]
    most = max(sorted(set(lengths)), key=lengths.count)
    return [request for request, length in zip(requests, lengths, strict=True) if length == most], most


def _take_out_beyond_border(
    cache: ForestCache, live: list[_LiveRow], borders: LengthBorders
) -> list[_LiveRow]:
    """Takes out the rows whose last token gave them other rotary frequencies. They start again, with all tokens."""
    taken: list[_LiveRow] = []
    if not borders.switches:
        return taken
    for row_index in reversed(range(len(live))):
        row = live[row_index]
        if borders.switches_between(row.length - 1, row.length):
            row.own_prefix = True
            taken.append(row)
            _remove(cache, live, row_index)
    return taken


def _step(
    model: Any,
    cache: ForestCache,
    live: list[_LiveRow],
    continuing: int,
    borders: LengthBorders,
    fixed: FixedSteps | None,
) -> torch.Tensor:
    """logits_BV of the next tokens. The rows from index `continuing` on start with this step; those that start with the
    tokens of another one are moved to the end, and get its numbers."""
    first_of: dict[tuple[bool, tuple[int, ...]], int] = {}
    twins = [row for row in live[continuing:] if first_of.setdefault(row.start, row.index) != row.index]
    if twins:
        live[continuing:] = [row for row in live[continuing:] if row not in twins] + twins
    computed = len(live) - len(twins)
    tokens: list[int] = []
    positions: list[int] = []
    rotary_lengths: list[int] = []
    ends, lengths, own = list[int](), list[int](), list[int]()
    for row_index, row in enumerate(live[:computed]):
        shared = 0 if row.own_prefix else cache.shared
        starts = row_index >= continuing
        new = [*row.prompt, *row.generated][shared:] if starts else row.generated[-1:]
        before = shared if starts else row.length - 1
        tokens += new
        positions += range(before, before + len(new))
        if borders:
            rotary_lengths += [borders.rotary_length(row.length)] * len(new)
        ends.append(len(tokens) - 1)
        lengths.append(len(new))
        own.append(before - shared)
    if fixed is not None and continuing == len(live) and not cache.recurrence.calls:
        return _fixed_step(model, cache, fixed, tokens, positions, own)
    cache.lengths, cache.continuing, cache.masks = tuple(lengths), continuing, {}
    cache.own_prefix = tuple(row.own_prefix for row in live)
    cache.own_B = to_device(own[:continuing], model.device, torch.long)
    cache.slots = max(before + new for before, new in zip(own, lengths, strict=True))
    cache.recurrence.begin_step(lengths, continuing, cache.own_prefix[continuing:computed])
    logits_BV = _forward(model, cache, tokens, positions, ends, rotary_lengths if borders else None)
    if not twins:
        return logits_BV
    row_of = {row.index: row_index for row_index, row in enumerate(live)}
    source = to_device([row_of[first_of[row.start]] for row in twins], logits_BV.device)
    cache.copy_rows(source, computed)
    return torch.cat([logits_BV, logits_BV[source]])


def _fixed_step(
    model: Any,
    cache: ForestCache,
    fixed: FixedSteps,
    tokens: list[int],
    positions: Sequence[int],
    own: list[int],
) -> torch.Tensor:
    """logits_BV of a step in which all rows continue, with fixed shapes."""
    rows, slots = rounded_rows(len(tokens)), -(-(max(own) + 1) // SLOTS) * SLOTS
    cache.lengths, cache.continuing = (1,) * rows, rows
    cache.own_prefix, cache.slots = (False,) * rows, slots
    addresses = []
    for layer in cache.layers.values():
        assert layer.own_key is not None and layer.own_value is not None
        layer.reserve(rows, slots, layer.own_key, layer.own_value)
        addresses += [layer.own_key.data_ptr(), layer.own_value.data_ptr()]

    def compute(
        token_ids: torch.Tensor, position: torch.Tensor, own_R: torch.Tensor, keep_R: torch.Tensor
    ) -> torch.Tensor:
        cache.own_B, cache.masks = own_R, {}
        output = model(
            input_ids=token_ids,
            position_ids=position,
            use_cache=False,
            logits_to_keep=keep_R,
            forest_cache=cache,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    return fixed.logits(compute, (rows, slots, *addresses), tokens, positions, own)


def _forward(
    model: Any,
    cache: ForestCache,
    tokens: list[int],
    positions: Sequence[int],
    ends: list[int],
    rotary_lengths: Sequence[int] | None,
) -> torch.Tensor:
    device = model.device
    output = model(
        input_ids=to_device([tokens], device),
        position_ids=position_ids(
            positions, None if rotary_lengths is None else np.asarray(rotary_lengths), device
        ),
        use_cache=False,
        logits_to_keep=to_device(ends, device),
        forest_cache=cache,
    )
    logits: torch.Tensor = output.logits[0]
    return logits.float()


def _next_tokens(logits_BV: torch.Tensor, live: Sequence[_LiveRow]) -> torch.Tensor:
    """ids_B, with one call per group of rows with equal sampling parameters. `logits_BV` stays as it is."""
    changed = {
        row_index: row.rules.apply(logits_BV[row_index])
        for row_index, row in enumerate(live)
        if row.rules is not None
    }
    if changed:
        logits_BV = logits_BV.clone()
        for row_index, logits_V in changed.items():
            logits_BV[row_index] = logits_V
    groups: dict[tuple[float, float, int, float], list[int]] = {}
    for row_index, row in enumerate(live):
        sampling = row.sampling
        key = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.changes.min_p)
        groups.setdefault(key, []).append(row_index)
    if len(groups) == 1:
        return _next_tokens_of_group(logits_BV, live)
    ids_B = torch.empty(len(live), dtype=torch.long, device=logits_BV.device)
    for row_indices in groups.values():
        index = to_device(row_indices, logits_BV.device)
        ids_B[index] = _next_tokens_of_group(logits_BV[index], [live[row_index] for row_index in row_indices])
    return ids_B


def _next_tokens_of_group(logits_BV: torch.Tensor, rows: Sequence[_LiveRow]) -> torch.Tensor:
    sampling = rows[0].sampling
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=1)
    uniform = [float(row.uniform[len(row.generated)]) for row in rows]
    uniform_B = to_device(uniform, logits_BV.device, torch.float64)
    return sample(
        logits_BV, uniform_B, sampling.temperature, sampling.top_p, sampling.top_k, sampling.changes.min_p
    )


def _remove(cache: ForestCache, live: list[_LiveRow], row_index: int) -> None:
    """Remove a row. The last row moves into its place, so that live rows are always the first ones of the cache."""
    last = len(live) - 1
    if row_index != last:
        for layer in cache.layers.values():
            for tensor in (layer.own_key, layer.own_value):
                assert tensor is not None
                tensor[row_index, :, : cache.slots] = tensor[last, :, : cache.slots]
        live[row_index] = live[last]
    cache.recurrence.remove(row_index)
    live.pop()


AttentionInterface.register(DECODING, decoding_attention)
