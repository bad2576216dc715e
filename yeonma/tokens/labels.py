"""Labelled answers as tokens: each a unit, with another row's answer to its prompt beside it, to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from yeonma.text.pairs import RenderedLabel
from yeonma.text.rows import Row
from yeonma.tokens.desk import encode
from yeonma.tokens.example import Example, LeftOut, Role, TokenRules, Unit


def encode_labelled(
    labelled: Sequence[RenderedLabel],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
) -> list[Unit | LeftOut]:
    """One unit, or why it is left out, for each row, tokenised as for supervised training. Raises as `desk.encode`.

    The mismatched answer is that of the next row that is kept, after the last one the first's. Where there is no other
    row the unit has none.
    """
    found = encode([label.rendered for label in labelled], rows, tokenizer, rules)
    kept = [number for number, one in enumerate(found) if isinstance(one, Example)]
    following = dict(zip(kept, [*kept[1:], *kept[:1]], strict=True))
    units: list[Unit | LeftOut] = []
    for number, (label, one) in enumerate(zip(labelled, found, strict=True)):
        if isinstance(one, LeftOut):
            units.append(one)
            continue
        members = [(Role.DESIRABLE if label.desirable else Role.UNDESIRABLE, one)]
        other = found[following[number]]
        if isinstance(other, Example) and other is not one:
            members.append((Role.MISMATCHED, _mismatched(one, other, rules.cutoff_len)))
        units.append(Unit(tuple(members)))
    return units


def _mismatched(asked: Example, other: Example, cutoff_len: int) -> Example:
    """The prompt of one with the answer of another. It is only measured, so its end may be cut to fit."""
    prompt, answer = asked.token_ids[: asked.prompt_length], other.token_ids[other.prompt_length :]
    token_ids = np.concatenate([prompt, answer])[:cutoff_len]
    trained = np.arange(len(token_ids)) >= max(asked.prompt_length, 1)
    return replace(asked, token_ids=token_ids, trained=trained)
