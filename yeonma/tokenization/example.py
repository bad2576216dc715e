"""Example: token ids and their trained mask; the settings that determine them, and checks of these."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from yeonma.data.template import Template
from yeonma.errors import UserError, did_you_mean
from yeonma.tokenization.chat_template import chat_of
from yeonma.tokenization.text_encoder import TextEncoder


class AnswerRole(IntEnum):
    """The role of an example's answer: the only one, the better or worse of two, or one labelled desirable or not."""

    ANSWER = 0
    CHOSEN = 1
    REJECTED = 2
    DESIRABLE = 3
    UNDESIRABLE = 4
    MISMATCHED = 5
    """The answer of another row: never trained, only measured."""


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids of one prompt with its answer, or of a turn list with its answers."""

    token_ids: NDArray[np.int32]
    """Shape (tokens,): prompt, answer, end token."""
    trained: NDArray[np.bool_]
    """Shape (tokens,): whether the token is a training target; the first token never is."""
    prompt_length: int
    """Tokens before the answer, or before the last answer of a turn list: the prompt of generation."""
    row: int
    variant: int
    cut_characters: int
    """Characters cut from a prompt field to fit into `cutoff_len`."""
    straddles: bool
    """Whether a token would straddle the border of prompt and answer, so the answer was encoded as a continuation."""
    special_text: int
    """Special-token texts in the data that were encoded as ordinary text."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Examples of one prompt that a step counts as one and no micro-batch splits, such as those of a pair."""

    members: tuple[tuple[AnswerRole, Example], ...]


@dataclass(frozen=True)
class LeftOut:
    """A row, or an answer of a turn list, that exceeds the limit even with its prompt field cut to one character; or a
    pair with equal answers; or a bad row."""

    row: int
    place: str
    reason: str
    fault: str = ""
    """What is wrong with a bad row, in words that are the same for all rows with that fault; else empty."""


@dataclass(frozen=True)
class TokenRules:
    """The settings that determine an example's tokens."""

    cutoff_len: int
    shrink: str | None = None
    shrink_side: Literal["end", "start", "middle"] = "end"
    over_limit: Literal["drop", "error"] = "drop"
    train_on_inputs: bool = False
    add_eos_token: bool = True


def check_rules(template: Template, rules: TokenRules) -> None:
    """Raises UserError if `shrink` is not a prompt field of the template."""
    prompt_fields = sorted(template.fields - {template.answer_field})
    if rules.shrink is None or (rules.shrink in prompt_fields and not template.is_chat):
        return
    if template.is_chat:
        cure = "leave it out: the longest turn that is not the assistant's is shortened"
        raise UserError("turn lists have no fields to shorten", place="--shrink", cure=cure)
    cure = did_you_mean(rules.shrink, prompt_fields) or f"the template uses {', '.join(prompt_fields)}"
    raise UserError(f'"{rules.shrink}" is not a prompt field of the template', place="--shrink", cure=cure)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rules: TokenRules) -> None:
    """Raises UserError if answers need an EOS token that the tokenizer does not have."""
    if rules.add_eos_token and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token",
            place="--base_model",
            cure="set eos_token in its tokenizer_config.json, or give --add_eos_token false",
        )


def stop_ids(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> tuple[int, ...]:
    """The ids that end an answer: EOS and, with `chat`, the end token of the chat template's assistant turns."""
    ids = {tokenizer.eos_token_id}
    if chat:
        with chat_of(TextEncoder.of(tokenizer)) as template:
            ids.add(template.end_id())
    return tuple(sorted(token_id for token_id in ids if token_id is not None))
