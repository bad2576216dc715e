"""Prompts -> answers, in batches: by transformers' own generation loop or, for a model that takes forests, by ours.

In transformers' loop prompts are padded on the left and the padding is masked, so that an answer does not depend on
what else is in its batch, to rounding: numbers that differ in their last bits can part two tokens that are equally
likely.
Shapes: B prompts, S answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, SupportsInt

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from yeonma.errors import UserError
from yeonma.generation.forest_decode import decode
from yeonma.generation.sampling import SamplingParams, drawn, uniforms
from yeonma.model.forest_support import attention
from yeonma.model.sharding import is_sharded

CONTEXT = 32  # tokens before an answer that decide how its first one is written

Ids = Sequence[SupportsInt] | np.ndarray


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt."""

    text: str
    """What decoding the prompt and the answer adds to decoding the prompt, without white space at the end."""
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    ended: bool
    """By one of the stop tokens, not by `max_new_tokens`."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    batch_size: int = 8,
    seed: int = 42,
    plain_attention: str | None = None,
    by_forest: bool = False,
    on_answer: Callable[[int, Answer], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The answers' texts, in the order of the prompts, which are token ids as `encode_prompts` gives them.

    At `temperature` 0 greedily; above it the draws of an answer depend on its prompt and `seed` alone, not on the
    batch or the other prompts. The longest prompts go first, so that too little memory shows at once; a batch that
    does not fit is halved. The model may be a PeftModel. Its own generation settings play no part, and it is in eval
    mode meanwhile.

    `plain_attention`: transformers' name of the attention to generate with, for a model that is set up for forests.
    `by_forest`: such a model answers in `decode`'s way instead, `batch_size` prompts at once, the next as soon as one
    has ended; with `on_text` it does not. `on_answer` gets each answer with its prompt's index as it comes. `on_text`
    gets the text of an answer bit by bit, for a single prompt. Raises UserError where one prompt alone does not fit
    into memory.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt")
    if on_text is not None and len(prompts) != 1:
        raise ValueError("text is streamed for one prompt at a time")
    asked = model.get_base_model() if hasattr(model, "get_base_model") else model
    style = SamplingParams(
        tuple(stop_ids), max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed
    )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [""] * len(prompts)
    if by_forest and on_text is None:

        def done(index: int, generated: list[int]) -> None:
            answer = _answer(tokenizer, [int(number) for number in prompts[index]], generated, style)
            texts[index] = answer.text
            if on_answer is not None:
                on_answer(index, answer)

        with quiet(asked):
            _decode_all(asked, prompts, order, style, batch_size, done)
        return texts
    with quiet(asked), attention(asked, plain_attention) if plain_attention else nullcontext():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = [[int(number) for number in prompts[index]] for index in batch]
            for index, answer in zip(batch, _answers(asked, tokenizer, ids, style, on_text), strict=True):
                texts[index] = answer.text
                if on_answer is not None:
                    on_answer(index, answer)
    return texts


def _decode_all(
    model: Any,
    prompts: Sequence[Ids],
    order: Sequence[int],
    style: SamplingParams,
    most_rows: int,
    on_done: Callable[[int, list[int]], None],
) -> None:
    """`decode` of the prompts in this order; where memory is short, of those left with half as many at once."""
    waiting = list(order)

    def done(at: int, generated: list[int]) -> None:
        finished.append(at)
        on_done(asked[at], generated)

    while waiting:
        asked, finished = waiting, list[int]()
        try:
            ids = [[int(number) for number in prompts[index]] for index in asked]
            decode(model, ids, style, most_rows=most_rows, on_done=done)
        except torch.OutOfMemoryError as error:
            if most_rows == 1:
                raise _no_room(max(len(prompts[index]) for index in asked)) from error
            most_rows = (most_rows + 1) // 2
        waiting = [index for at, index in enumerate(asked) if at not in set(finished)]


def _no_room(tokens: int) -> UserError:
    what = f"a prompt of {tokens} tokens and its answer do not fit into the device's memory"
    return UserError(what, cure="lower --max_new_tokens, or use --dtype bfloat16 or --device cpu")


def continued_text(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to the text of `before`; special tokens among `ids` give none.

    Decoded by themselves, SentencePiece's ids would lose the blank that they begin with.
    """
    special = special_ids(tokenizer)
    before, ids = list(before[-CONTEXT:]), [number for number in ids if number not in special]
    head, whole = _decoded(tokenizer, before), _decoded(tokenizer, [*before, *ids])
    return whole[len(head) :] if whole.startswith(head) else _decoded(tokenizer, ids)


def special_ids(tokenizer: Any) -> frozenset[int]:
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _config(picking: SamplingParams) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=picking.max_new_tokens,
        do_sample=False,  # draws are made by _Draws
        repetition_penalty=picking.repetition_penalty,
        eos_token_id=list(picking.stop_ids) or None,
        pad_token_id=picking.stop_ids[0] if picking.stop_ids else 0,  # fills answers that have ended
        use_cache=True,
    )


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    style: SamplingParams,
    on_text: Callable[[str], None] | None,
) -> list[Answer]:
    """Of a batch, or where memory is short of its halves."""
    try:
        generated_BS = _generated(model, tokenizer, prompts, style, on_text)
        return [_answer(tokenizer, *each, style) for each in zip(prompts, generated_BS, strict=True)]
    except torch.OutOfMemoryError as error:
        if len(prompts) == 1 or is_sharded(model):  # whose processes go on together or not at all
            raise _no_room(len(prompts[0])) from error
    half = (len(prompts) + 1) // 2
    parts = (prompts[:half], prompts[half:])
    return [answer for part in parts for answer in _answers(model, tokenizer, part, style, on_text)]


def _answer(tokenizer: Any, prompt: list[int], generated: list[int], style: SamplingParams) -> Answer:
    end = next((at for at, number in enumerate(generated) if number in style.stop_ids), None)
    kept = generated[: end if end is not None else style.max_new_tokens]
    return Answer(continued_text(tokenizer, prompt, kept).rstrip(), tuple(kept), end is not None)


def _generated(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    style: SamplingParams,
    on_text: Callable[[str], None] | None,
    criteria: StoppingCriteriaList | None = None,
) -> list[list[int]]:
    """The ids after each prompt, with what fills up those that end before others."""
    longest = max(map(len, prompts))
    # A prompt's own first token pads it: not every transformers hides the padding from the repetition penalty.
    padded = [[prompt[0]] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    processors = LogitsProcessorList()
    if style.temperature > 0:
        uniform_BS = np.stack([uniforms(prompt, style.seed, style.max_new_tokens + 1) for prompt in prompts])
        draws = torch.from_numpy(uniform_BS).to(model.device)
        processors.append(_Draws(draws, longest, style.temperature, style.top_p, style.top_k))
    sequences = model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=_config(style),
        logits_processor=processors,
        stopping_criteria=criteria,
        streamer=_Stream(tokenizer, prompts[0], style.stop_ids, on_text) if on_text is not None else None,
    )
    return sequences[:, longest:].tolist()


def answer_alone(
    model: Any, prompt: Sequence[int], style: SamplingParams, on_token: Callable[[list[int]], bool]
) -> list[int]:
    """The ids after a prompt by transformers' loop, with the stop token that ended it, if one did.

    For a model that takes no forests, without an adapter around it. `on_token` gets the answer's ids so far after each
    that has not ended it, and says whether to end it there.
    """

    def heard(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        ids = input_ids[0, len(prompt) :].tolist()
        return torch.tensor([ids[-1] not in style.stop_ids and on_token(ids)], device=input_ids.device)

    ids = [int(number) for number in prompt]
    with quiet(model):
        criteria = StoppingCriteriaList([heard])
        return _generated(model, None, [ids], style, None, criteria)[0]


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Eval mode, and none of the generation settings that the model brings, which would fill in what is left open."""
    own, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


@dataclass(frozen=True)
class _Draws:
    """Leaves one token possible at each step: the one drawn by that prompt's own number for that step."""

    uniform_BS: torch.Tensor
    prompt_length: int
    temperature: float
    top_p: float
    top_k: int

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = min(input_ids.shape[1] - self.prompt_length, self.uniform_BS.shape[1] - 1)
        ids_B = drawn(scores, self.uniform_BS[:, step], self.temperature, self.top_p, self.top_k)
        return torch.full_like(scores, float("-inf")).scatter(1, ids_B.unsqueeze(1), 0.0)


@dataclass
class _Stream:
    """Hands on an answer's text as it grows, as transformers' streamers do, but as it continues the prompt."""

    tokenizer: Any
    prompt: Sequence[int]
    stop_ids: Sequence[int]
    on_text: Callable[[str], None]
    ids: list[int] | None = None
    shown: str = ""
    ended: bool = False

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the first call brings the prompt
            self.ids = []
            return
        new = [int(number) for number in value.reshape(-1)]
        self.ended = self.ended or any(number in self.stop_ids for number in new)
        if not self.ended:
            self.ids += new
            text = continued_text(self.tokenizer, self.prompt, self.ids)
            self._show(
                text.rstrip("\ufffd").rstrip()
            )  # half a character, or white space that may be the end's

    def end(self) -> None:
        self._show(continued_text(self.tokenizer, self.prompt, self.ids or []).rstrip())

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text
