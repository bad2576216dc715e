"""Preference data as tokens: two answers that continue one prompt, which is fitted once for the longer of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from yeonma.data.preference_pairs import RenderedLabel, RenderedPair
from yeonma.data.rows import Row
from yeonma.data.template import Rendered
from yeonma.errors import Problem, UserError
from yeonma.tokenization.example import AnswerRole, Example, LeftOut, TokenRules, Unit, check_tokenizer
from yeonma.tokenization.example_encoder import ExampleEncoder, ExampleText, TokenIds, encode, encoder_for

EQUAL = "chosen equals rejected"
EQUAL_AS_TOKENS = "chosen and rejected are equal as tokens, after the prompt was fitted"
NOTHING_TO_CHOOSE = (EQUAL, EQUAL_AS_TOKENS)
"""Reasons of pairs that are left out whatever `over_limit` says."""


@dataclass(frozen=True)
class PairResult:
    """What came of a pair, and the texts of both answers as they were tokenised (whole, where it is left out)."""

    outcome: Unit | LeftOut
    drafts: tuple[ExampleText, ExampleText]


def encode_pairs(
    pairs: Sequence[RenderedPair],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
) -> list[Unit | LeftOut]:
    """One unit, or the reason why it is left out, for each pair. Prompt ids are those that generation feeds.

    Raises UserError with a problem for every row that the model's chat template refuses or, with `over_limit` "error",
    that is over the limit; and as `check_tokenizer`.
    """
    check_tokenizer(tokenizer, rules)
    with encoder_for(tokenizer, rules, [pair.chosen for pair in pairs]) as desk:
        return [made.outcome for made in make_pairs(desk, pairs, rows)]


def make_pairs(desk: ExampleEncoder, pairs: Sequence[RenderedPair], rows: Sequence[Row]) -> list[PairResult]:
    """`encode_pairs` with the texts beside the tokens."""
    sides: list[tuple[_Side, _Side] | None] = []
    problems: list[Problem] = []
    for pair, row in zip(pairs, rows, strict=True):
        try:
            sides.append(_drafts(desk, pair, row))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    ids = iter(desk.ids_of([side.draft for both in sides if both is not None for side in both]))
    found: list[PairResult] = []
    for pair, row, both in zip(pairs, rows, sides, strict=True):
        try:
            if both is None:
                found.append(_left_out(desk, pair, row, _REWRITTEN))
            elif pair.chosen == pair.rejected:
                next(ids), next(ids)
                found.append(_left_out(desk, pair, row, EQUAL))
            else:
                found.append(_finished(desk, pair, row, both, (next(ids), next(ids))))
        except UserError as error:
            problems += error.problems
    if desk.rules.over_limit == "error":
        cure = "raise --cutoff_len, or leave such rows out with --over_limit drop"
        left_out = (made.outcome for made in found if isinstance(made.outcome, LeftOut))
        problems += [
            Problem(one.reason, one.place, cure) for one in left_out if one.reason not in NOTHING_TO_CHOOSE
        ]
    if problems:
        raise UserError(problems)
    return found


@dataclass(frozen=True)
class _Side:
    """One answer of a pair after its prompt; the draft's answers are those after the prompt alone."""

    rendered: Rendered
    draft: ExampleText


def _drafts(desk: ExampleEncoder, pair: RenderedPair, row: Row) -> tuple[_Side, _Side] | None:
    chosen, rejected = (_side(desk, side, pair.prompt_turns, row) for side in (pair.chosen, pair.rejected))
    return None if chosen is None or rejected is None else (chosen, rejected)


def _left_out(desk: ExampleEncoder, pair: RenderedPair, row: Row, reason: str) -> PairResult:
    chosen, rejected = (desk.drafts(side, row)[-1] for side in (pair.chosen, pair.rejected))
    return PairResult(LeftOut(row.number, row.place, reason), (chosen, rejected))


_REWRITTEN = "the model's chat template rewrites earlier turns: answers of several turns are not one text"


def _side(desk: ExampleEncoder, rendered: Rendered, prompt_turns: int, row: Row) -> _Side | None:
    """None where the answer has several turns that the chat template does not write one after the other."""
    drafts = desk.drafts(rendered, row)
    answered = sum(turn.role == "assistant" for turn in rendered.turns[prompt_turns:])
    if rendered.answer or answered == 1:
        return _Side(rendered, replace(drafts[-1], answers=drafts[-1].answers[-1:]))
    if len(drafts) > 1:
        return None
    return _Side(rendered, replace(drafts[0], answers=drafts[0].answers[-answered:]))


def _finished(
    desk: ExampleEncoder,
    pair: RenderedPair,
    row: Row,
    sides: tuple[_Side, _Side],
    encoded: tuple[TokenIds | None, TokenIds | None],
) -> PairResult:
    """The pair, its prompt shortened so that it and the longer answer fit.

    As for one answer (`Desk.finished`), a shorter prompt may change the answers' first tokens and so their number;
    then it is fitted again, until the room given is the room left.
    """
    cutoff_len = desk.rules.cutoff_len
    chosen, rejected = encoded
    if chosen is None or rejected is None:
        return _left_out(desk, pair, row, _REWRITTEN)
    longest = max(len(chosen.ids), len(rejected.ids))
    if longest <= cutoff_len:
        return _unit(desk, row, sides, (chosen, rejected), 0)
    prompt = replace(pair.chosen, turns=pair.chosen.turns[: pair.prompt_turns], answer=())
    prompt_ids = chosen.ids[: chosen.prompt_length]
    tried = set[int]()
    best: PairResult | None = None
    budget = cutoff_len - _longer(chosen, rejected)
    while budget not in tried and len(tried) < 8:
        tried.add(budget)
        fitted = desk.fitted(prompt, row, budget, prompt_ids)
        if isinstance(fitted, LeftOut):
            reason = f"{longest} tokens, and {fitted.reason}; cutoff_len is {cutoff_len}"
            return best or _left_out(desk, pair, row, reason)
        short = [
            _side(desk, _with_prompt(side, fitted.rendered, pair.prompt_turns), pair.prompt_turns, row)
            for side in (pair.chosen, pair.rejected)
        ]
        if short[0] is None or short[1] is None:
            return _left_out(desk, pair, row, _REWRITTEN)
        short_chosen, short_rejected = desk.ids_of([short[0].draft, short[1].draft])
        if short_chosen is None or short_rejected is None:
            return _left_out(desk, pair, row, _REWRITTEN)
        if max(len(short_chosen.ids), len(short_rejected.ids)) <= cutoff_len:
            cut = fitted.cut_characters
            best = _unit(desk, row, (short[0], short[1]), (short_chosen, short_rejected), cut)
        budget = cutoff_len - _longer(short_chosen, short_rejected)
    reason = f"{longest} tokens, and no shorter prompt fits; cutoff_len is {cutoff_len}"
    return best or _left_out(desk, pair, row, reason)


def _longer(chosen: TokenIds, rejected: TokenIds) -> int:
    """Tokens of the longer answer."""
    return max(len(each.ids) - each.prompt_length for each in (chosen, rejected))


def _with_prompt(side: Rendered, prompt: Rendered, prompt_turns: int) -> Rendered:
    return replace(side, turns=(*prompt.turns, *side.turns[prompt_turns:]))


def _unit(
    desk: ExampleEncoder,
    row: Row,
    sides: tuple[_Side, _Side],
    encoded: tuple[TokenIds, TokenIds],
    cut_characters: int,
) -> PairResult:
    drafts = sides[0].draft, sides[1].draft
    if encoded[0].ids == encoded[1].ids:
        return PairResult(LeftOut(row.number, row.place, EQUAL_AS_TOKENS), drafts)
    chosen, rejected = (
        _example(desk, side, ids, cut_characters) for side, ids in zip(sides, encoded, strict=True)
    )
    return PairResult(Unit(((AnswerRole.CHOSEN, chosen), (AnswerRole.REJECTED, rejected))), drafts)


def _example(desk: ExampleEncoder, side: _Side, ids: TokenIds, cut_characters: int) -> Example:
    return replace(desk.example(side.draft, ids, cut_characters), prompt_length=ids.prompt_length)


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
        members = [(AnswerRole.DESIRABLE if label.desirable else AnswerRole.UNDESIRABLE, one)]
        other = found[following[number]]
        if isinstance(other, Example) and other is not one:
            members.append((AnswerRole.MISMATCHED, _mismatched(one, other, rules.cutoff_len)))
        units.append(Unit(tuple(members)))
    return units


def _mismatched(asked: Example, other: Example, cutoff_len: int) -> Example:
    """The prompt of one with the answer of another. It is only measured, so its end may be cut to fit."""
    prompt, answer = asked.token_ids[: asked.prompt_length], other.token_ids[other.prompt_length :]
    token_ids = np.concatenate([prompt, answer])[:cutoff_len]
    trained = np.arange(len(token_ids)) >= max(asked.prompt_length, 1)
    return replace(asked, token_ids=token_ids, trained=trained)
