"""Prompts -> answers. No prompt is padded.

A model that supports forests answers many prompts at once, as one growing forest (`yeonma.generation.forest_decode`).
Any other answers one prompt at a time, with transformers' own generation loop. In both cases an answer depends only on
its prompt and the sampling parameters, up to rounding, which may decide between two equally likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, SupportsInt

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from yeonma.config.settings import GenerateSettings
from yeonma.errors import UserError
from yeonma.generation.forest_decode import DecodeRequest, decode
from yeonma.generation.logit_rules import LogitRules, TokenMask
from yeonma.generation.sampling import SamplingParams, sample, uniforms
from yeonma.generation.token_scores import ScoreLog
from yeonma.generation.unfinished import REPLACEMENT, unfinished_bytes
from yeonma.messages import counted, tr
from yeonma.model.forest_support import in_eval_mode
from yeonma.model.position_limits import check_fits, model_positions
from yeonma.model.sharding import is_sharded

CONTEXT = 32  # tokens before an answer that may affect how its first token is decoded

Ids = Sequence[SupportsInt] | np.ndarray


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a prompt."""

    text: str
    """What the answer's tokens add to the decoded prompt: every blank and line end, but no part of a character."""
    token_ids: tuple[int, ...]
    """Without the stop token."""
    ended: bool
    """Whether a stop token ended it, rather than `max_new_tokens`."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    sampling: SamplingParams,
    *,
    by_forest: bool,
    batch_size: int = GenerateSettings.batch_size,
    on_answer: Callable[[int, Answer], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    seeds: Sequence[int] | None = None,
    scores: Sequence[ScoreLog] | None = None,
    is_over: Callable[[int, Sequence[int]], bool] | None = None,
) -> list[Answer]:
    """The answers, in the order of the prompts. Prompts are token ids, as from `encode_prompts`.

    `model` may be a PeftModel. It is put into eval mode for the call, and its own generation config is ignored.
    `by_forest` is its `ForestSupport.forest`. If true, `batch_size` prompts are answered at once, and the next one
    starts as soon as one has ended; if memory runs out, half as many. The longest prompts go first, so that too little
    memory shows early.

    `on_answer` is called with a prompt's index and its answer as soon as it has ended; `on_text`, with pieces of the
    text of a single answer. `is_over` is asked with a prompt's index and the ids of its answer so far, after every
    token that does not end it; it returns True to end it there. `seeds`: one for each prompt, in place of the
    sampling's own. `scores`: one for each prompt, which gets the tokens of its answer. Raises UserError if a prompt and
    its answer exceed the model's positions, and if a single prompt does not fit into memory.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty")
    longest = max(map(len, prompts), default=0)
    check_fits(longest, sampling.max_new_tokens, model_positions(model.config), "prompt")
    if on_text is not None and len(prompts) != 1:
        raise ValueError("text is streamed for one prompt at a time")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    token_ids = [[int(number) for number in prompt] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    stream = None if on_text is None else _TextStream(tokenizer, token_ids[0], sampling.shown_ids, on_text)

    def token(index: int, ids: list[int]) -> bool:
        if stream is not None:
            stream.add(ids)
        return is_over is not None and is_over(index, ids)

    def done(index: int, ids: list[int]) -> None:
        answers[index] = answer = _answer(tokenizer, token_ids[index], ids, sampling)
        if stream is not None:
            stream.show(answer.text)
        if on_answer is not None:
            on_answer(index, answer)

    def request(index: int) -> DecodeRequest:
        own = sampling if seeds is None else replace(sampling, seed=seeds[index])
        if scores is None:
            return DecodeRequest(token_ids[index], own)
        scores[index].tokens.clear()  # of an answer that memory had no room for
        return DecodeRequest(token_ids[index], own, scores=scores[index])

    with generation_mode(base):
        if by_forest:
            _decode_all(base, token_ids, order, request, batch_size, token, done)
        else:
            for index in order:
                asked = request(index)
                try:
                    ids = answer_alone(
                        base, asked.prompt, asked.sampling, partial(token, index), scores=asked.scores
                    )
                except torch.OutOfMemoryError as error:
                    raise _out_of_memory(len(token_ids[index])) from error
                done(index, ids)
    return [answers[index] for index in range(len(prompts))]


def _decode_all(
    model: Any,
    prompts: Sequence[list[int]],
    order: Sequence[int],
    request: Callable[[int], DecodeRequest],
    max_rows: int,
    on_token: Callable[[int, list[int]], bool],
    on_done: Callable[[int, list[int]], None],
) -> None:
    """`decode` the prompts in `order`, each by its request. If memory runs out, continue with half as many at once."""
    waiting = list(order)
    ended: set[int] = set()

    def token(at: int, ids: list[int]) -> bool:
        return on_token(waiting[at], ids)

    def done(at: int, ids: list[int]) -> None:
        ended.add(waiting[at])
        on_done(waiting[at], ids)

    while waiting:
        try:
            decode(
                model, [request(index) for index in waiting], max_rows=max_rows, on_done=done, on_token=token
            )
        except torch.OutOfMemoryError as error:
            if max_rows == 1 or is_sharded(model):  # its processes must stay in step
                raise _out_of_memory(max(len(prompts[index]) for index in waiting)) from error
            max_rows = (max_rows + 1) // 2
        waiting = [index for index in waiting if index not in ended]


def _out_of_memory(tokens: int) -> UserError:
    problem = tr(
        "a prompt of {tokens} and its answer do not fit into the device's memory",
        tokens=counted(tokens, "token"),
    )
    return UserError(problem, cure=tr("lower --max_new_tokens, or use --dtype bfloat16 or --device cpu"))


def answer_alone(
    model: Any,
    prompt: Sequence[int],
    sampling: SamplingParams,
    on_token: Callable[[list[int]], bool],
    *,
    mask: TokenMask | None = None,
    scores: ScoreLog | None = None,
) -> list[int]:
    """The answer to one prompt from transformers' generation loop: its ids, including the stop token if there is one.

    For models without forest support. `model` is not a PeftModel, but its layers may contain an adapter. After every
    token that does not end the answer, `on_token` is called with the ids so far; it returns True to end the answer.
    `mask` and `scores` as in `DecodeRequest`.
    """
    ids = [int(number) for number in prompt]
    rules = LogitRules.of(sampling, ids, mask)

    def stop(input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        answer = input_ids[0, len(ids) :].tolist()
        is_over = rules is not None and rules.is_over
        ended = answer[-1] not in sampling.stop_ids and (is_over or on_token(answer))
        return torch.tensor([ended], device=input_ids.device)

    input_ids = torch.tensor([ids], device=model.device)
    processors = LogitsProcessorList()
    if sampling.temperature > 0 or rules is not None or scores is not None:
        uniform = uniforms(ids, sampling.seed, sampling.max_new_tokens + 1)
        uniform_S = torch.from_numpy(uniform).to(model.device)
        processors.append(_Sampler(uniform_S, len(ids), sampling, rules, scores))
    with generation_mode(model):
        sequences = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # _Sampler samples
                eos_token_id=list(sampling.stop_ids) or None,
                pad_token_id=sampling.stop_ids[0]
                if sampling.stop_ids
                else 0,  # avoids a warning of transformers
                use_cache=True,
            ),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    answer: list[int] = sequences[0, len(ids) :].tolist()
    return answer


@contextmanager
def generation_mode(model: Any) -> Iterator[None]:
    """Eval mode, with an empty generation config instead of the model's own, whose values would be used as defaults."""
    generation_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with in_eval_mode(model):
            yield
    finally:
        model.generation_config = generation_config


@dataclass(frozen=True)
class _Sampler:
    """A logits processor that chooses the token, by the step's random number unless decoding is greedy: only this token
    stays possible."""

    uniform_S: torch.Tensor
    prompt_length: int
    sampling: SamplingParams
    rules: LogitRules | None
    log: ScoreLog | None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = min(input_ids.shape[1] - self.prompt_length, len(self.uniform_S) - 1)
        sampling = self.sampling
        logits_BV = scores if self.rules is None else self.rules.apply(scores[0]).unsqueeze(0)
        if sampling.temperature == 0:
            ids_B = logits_BV.argmax(dim=1)
        else:
            uniform_B = self.uniform_S[step : step + 1]
            min_p = sampling.changes.min_p
            ids_B = sample(logits_BV, uniform_B, sampling.temperature, sampling.top_p, sampling.top_k, min_p)
        if self.log is not None:
            self.log.add(scores[0], int(ids_B))
        if self.rules is not None:
            self.rules.accept(int(ids_B))
        return torch.full_like(scores, float("-inf")).scatter(1, ids_B.unsqueeze(1), 0.0)


def continued_text(
    tokenizer: Any, before: Sequence[int], ids: Sequence[int], shown_ids: Sequence[int] = ()
) -> str:
    """The text that `ids` add to the text of `before`, without special tokens other than `shown_ids`. If they end
    within a character, the text ends before it.

    Decoded on their own, SentencePiece ids would lose a leading space.
    """
    special = special_ids(tokenizer).difference(shown_ids)
    before, ids = list(before[-CONTEXT:]), [number for number in ids if number not in special]
    text = _text_after(tokenizer, before, ids)
    if not text.endswith(REPLACEMENT):
        return text
    tokens, characters = unfinished_bytes(tokenizer, ids)
    if tokens:
        return _text_after(tokenizer, before, ids[: len(ids) - tokens])
    return text[: len(text) - characters]


def _text_after(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    prefix, text = _decoded(tokenizer, before), _decoded(tokenizer, [*before, *ids])
    return text[len(prefix) :] if text.startswith(prefix) else _decoded(tokenizer, ids)


def special_ids(tokenizer: Any) -> frozenset[int]:
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _answer(tokenizer: Any, prompt: list[int], generated: list[int], sampling: SamplingParams) -> Answer:
    end = next((at for at, number in enumerate(generated) if number in sampling.stop_ids), None)
    ids = generated[: end if end is not None else sampling.max_new_tokens]
    text = continued_text(tokenizer, prompt, ids, sampling.shown_ids)
    return Answer(text, tuple(ids), end is not None)


@dataclass
class _TextStream:
    """Streams an answer's text as it grows, without half a character."""

    tokenizer: Any
    prompt: Sequence[int]
    shown_ids: Sequence[int]
    on_text: Callable[[str], None]
    shown: str = ""

    def add(self, ids: Sequence[int]) -> None:
        """`ids`: the answer so far."""
        text = continued_text(self.tokenizer, self.prompt, ids, self.shown_ids)
        self.show(text)

    def show(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text
