"""Example: token ids and their trained mask; the settings that determine them, and checks of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from yeonma.data.template import Template
from yeonma.errors import UserError, did_you_mean
from yeonma.messages import in_english, later, tr
from yeonma.tokenization.answer_shape import shape_of
from yeonma.tokenization.chat_template import chat_of
from yeonma.tokenization.reasoning import PLAIN, AnswerShape
from yeonma.tokenization.text_encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerRole(IntEnum):
    """The role of an example's answer: the only one, the better or worse of two, or one labelled desirable or not."""

    ANSWER = 0
    CHOSEN = 1
    REJECTED = 2
    DESIRABLE = 3
    UNDESIRABLE = 4


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
    dropped_turns: int = 0
    """Old turns of a conversation that were dropped to fit into `cutoff_len`."""
    weights: NDArray[np.float32] | None = None
    """Shape (tokens,): the weight of each token in the loss, at least 0; None if all weigh 1."""
    flags: int = 0
    """What encoding found out about the row, as bits of `Notes.flags`."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Examples of one prompt that a step counts as one and no micro-batch splits, such as those of a pair."""

    members: tuple[tuple[AnswerRole, Example], ...]


NOT_TRAINED = later("no assistant turn is trained (train_on, weight 0)")
EQUAL = later("chosen equals rejected")
EQUAL_AS_TOKENS = later("chosen and rejected are equal as tokens, after the prompt was fitted")
WEIGHTLESS = later("weight 0 in the column that --row_weights names")
NOTHING_TO_CHOOSE = (EQUAL, EQUAL_AS_TOKENS)
WITHIN_LIMIT = (*NOTHING_TO_CHOOSE, NOT_TRAINED, WEIGHTLESS)
"""Reasons for which rows are left out whatever `over_limit` is. Shown with `translated`, as all reasons are."""


@dataclass(frozen=True)
class LeftOut:
    """A row, or an answer of a turn list, that exceeds the limit even with its prompt field cut to one character; or a
    pair with equal answers; or a turn list without a trained turn; or a row with weight 0; or a bad row."""

    row: int
    place: str
    reason: str
    fault: str = ""
    """What is wrong with a bad row, in words that are the same for all rows with that fault; else empty."""

    def __post_init__(self) -> None:
        """What is stored and compared is English in every language."""
        for name in ("place", "reason", "fault"):
            object.__setattr__(self, name, in_english(getattr(self, name)))


@dataclass(frozen=True)
class TokenRules:
    """The settings that determine an example's tokens."""

    cutoff_len: int
    shrink: str | None = None
    shrink_side: Literal["end", "start", "middle"] = "end"
    over_limit: Literal["drop", "error"] = "drop"
    train_on_inputs: bool = False
    add_eos_token: bool = True
    thinking: Literal["auto", "keep", "drop", "empty"] = "auto"
    train_on: Literal["all", "last", "marked"] = "all"
    row_weights: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    parse_special_tokens: bool = False

    def within(self, positions: int | None) -> TokenRules:
        """These rules with a `cutoff_len` of at most so many tokens."""
        return self if positions is None else replace(self, cutoff_len=min(self.cutoff_len, positions))


DEFAULT_RULES = TokenRules(2048)
_PROMPT_END = 32  # tokens


def check_rules(template: Template, rules: TokenRules) -> None:
    """Raises UserError if `shrink` is not a prompt field of the template."""
    prompt_fields = sorted(template.fields - {template.answer_field})
    if rules.shrink is None or (rules.shrink in prompt_fields and not template.is_chat):
        return
    if template.is_chat:
        cure = tr("leave it out: the longest turn that is not the assistant's is shortened")
        raise UserError(tr("turn lists have no fields to shorten"), place="--shrink", cure=cure)
    cure = did_you_mean(rules.shrink, prompt_fields) or tr(
        "the template uses {prompt_fields}", prompt_fields=", ".join(prompt_fields)
    )
    raise UserError(
        tr('"{shrink}" is not a prompt field of the template', shrink=rules.shrink),
        place="--shrink",
        cure=cure,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rules: TokenRules) -> None:
    """Raises UserError if answers need an EOS token that the tokenizer does not have."""
    if rules.add_eos_token and tokenizer.eos_token_id is None:
        raise UserError(
            tr("the tokenizer has no end-of-sequence token"),
            place="--base_model",
            cure=tr("set eos_token in its tokenizer_config.json, or give --add_eos_token false"),
        )


@dataclass(frozen=True)
class AnswerTokens:
    """What a model's answers consist of, as tokens and as text."""

    stop_ids: tuple[int, ...]
    """The tokens that end an answer."""
    shown_ids: tuple[int, ...] = ()
    """Special tokens within answers: those around reasoning."""
    shape: AnswerShape = PLAIN


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, rules: TokenRules | None, generation_eos: Sequence[int] = ()
) -> AnswerTokens:
    """The tokens that end an answer: EOS, those of the model's generation config (`generation_eos`) and, with the
    `rules` of training with turns, the end token of the chat template's assistant turns. `rules` None: plain text."""
    ids = {tokenizer.eos_token_id, *generation_eos}
    if rules is None:
        return AnswerTokens(_sorted(ids))
    encoder = TextEncoder.of(tokenizer)
    with chat_of(encoder, rules.thinking, rules.chat_template_kwargs) as chat:
        ids.add(chat.end_id())
        shape = shape_of(chat)
    special = encoder.special
    texts = {mark for text in shape.texts for mark in (special.findall(text) if special else ())}
    shown = {encoder.token_id(text) for text in texts} - ids
    return AnswerTokens(_sorted(ids), _sorted(shown), shape)


def end_of_prompt(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt's last tokens, which show whether it opens a block of reasoning."""
    return str(tokenizer.decode(list(ids[-_PROMPT_END:]), clean_up_tokenization_spaces=False))


def _sorted(ids: set[int | None]) -> tuple[int, ...]:
    return tuple(sorted(token_id for token_id in ids if token_id is not None))
