"""Preference data -> examples: pairs, whose answers continue one prompt, and labelled answers.

A pair's prompt is fitted once, for the longer answer, so that both answers continue the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yeonma.data.preference_pairs import RenderedLabel, RenderedPair
from yeonma.data.rows import Row
from yeonma.data.template import Rendered
from yeonma.errors import Problem, UserError
from yeonma.messages import tr
from yeonma.tokenization.example import (
    EQUAL,
    EQUAL_AS_TOKENS,
    AnswerRole,
    LeftOut,
    TokenRules,
    Unit,
    check_tokenizer,
)
from yeonma.tokenization.example_encoder import (
    AHEAD,
    MAX_FITS,
    ExampleEncoder,
    ExampleText,
    FittedPrompt,
    TokenIds,
    encode,
    encoder_for,
    over_limit_problems,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REWRITTEN = tr("the model's chat template rewrites earlier turns: answers of several turns are not one text")


@dataclass(frozen=True)
class PairResult:
    """A pair's unit, or why it is left out, and the texts of its answers as tokenised (unshortened if left out)."""

    texts: tuple[ExampleText, ExampleText]
    outcome: Unit | LeftOut


def encode_pairs(
    pairs: Sequence[Sequence[RenderedPair]],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
) -> list[Unit | LeftOut]:
    """One unit per pair of every row, or why it is left out. Prompt ids are those of generation.

    Raises UserError with a problem for every row that the model's chat template refuses or, with `over_limit` "error",
    that is over the limit; and as `check_tokenizer`.
    """
    check_tokenizer(tokenizer, rules)
    with encoder_for(tokenizer, rules, [of_row[0].chosen for of_row in pairs]) as encoder:
        return [result.outcome for result in encode_pair_results(encoder, pairs, rows)]


def encode_pair_results(
    encoder: ExampleEncoder, pairs: Sequence[Sequence[RenderedPair]], rows: Sequence[Row]
) -> list[PairResult]:
    """Like `encode_pairs`, with the texts in addition to the tokens. All turns of the answers are trained."""
    encoder = replace(encoder, rules=replace(encoder.rules, train_on="all"))
    placed = [(pair, row) for of_row, row in zip(pairs, rows, strict=True) for pair in of_row]
    all_texts: list[tuple[ExampleText, ExampleText] | None] = []
    problems: list[Problem] = []
    for number, (pair, row) in enumerate(placed):
        if number % AHEAD == 0:
            some = placed[number : number + AHEAD]
            encoder.render_ahead([side for one, _ in some for side in (one.chosen, one.rejected)])
        try:
            all_texts.append(_pair_texts(encoder, pair.chosen, pair.rejected, pair.prompt_turns, row))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    ids = iter(encoder.ids_of([text for texts in all_texts if texts is not None for text in texts]))
    results: list[PairResult] = []
    for (pair, row), texts in zip(placed, all_texts, strict=True):
        try:
            if texts is None:
                results.append(_left_out(encoder, pair, row, _REWRITTEN))
                continue
            chosen, rejected = next(ids), next(ids)
            if pair.chosen == pair.rejected:
                results.append(_left_out(encoder, pair, row, EQUAL))
            else:
                results.append(_pair_result(encoder, pair, row, texts, chosen, rejected))
        except UserError as error:
            problems += error.problems
    if encoder.rules.over_limit == "error":
        problems += over_limit_problems([result.outcome for result in results])
    if problems:
        raise UserError(problems)
    return results


def encode_labelled(
    labelled: Sequence[RenderedLabel],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
) -> list[Unit | LeftOut]:
    """One unit per row, or why it is left out, tokenised as for supervised training. Raises UserError as `encode`."""
    outcomes = encode([label.rendered for label in labelled], rows, tokenizer, rules)
    units: list[Unit | LeftOut] = []
    for label, outcome in zip(labelled, outcomes, strict=True):
        if isinstance(outcome, LeftOut):
            units.append(outcome)
        else:
            role = AnswerRole.DESIRABLE if label.desirable else AnswerRole.UNDESIRABLE
            units.append(Unit(((role, outcome),)))
    return units


def _pair_texts(
    encoder: ExampleEncoder, chosen: Rendered, rejected: Rendered, prompt_turns: int, row: Row
) -> tuple[ExampleText, ExampleText] | None:
    """Both answers as text; None if one has several turns and the chat template rewrites earlier ones."""
    texts = [_answer_text(encoder, side, prompt_turns, row) for side in (chosen, rejected)]
    return None if texts[0] is None or texts[1] is None else (texts[0], texts[1])


def _answer_text(
    encoder: ExampleEncoder, rendered: Rendered, prompt_turns: int, row: Row
) -> ExampleText | None:
    """One answer of a pair after its prompt, with all of its assistant turns trained."""
    texts = encoder.texts(rendered, row)
    answers = sum(turn.role == "assistant" for turn in rendered.turns[prompt_turns:])
    if rendered.answer or answers == 1:
        return texts[-1].last_answer
    if len(texts) > 1:
        return None
    return replace(texts[0], answers=texts[0].answers[-answers:])


def _left_out(encoder: ExampleEncoder, pair: RenderedPair, row: Row, reason: str) -> PairResult:
    chosen, rejected = (encoder.texts(side, row)[-1] for side in (pair.chosen, pair.rejected))
    return PairResult((chosen, rejected), LeftOut(row.number, row.place, reason))


def _pair_result(
    encoder: ExampleEncoder,
    pair: RenderedPair,
    row: Row,
    texts: tuple[ExampleText, ExampleText],
    chosen: TokenIds | None,
    rejected: TokenIds | None,
) -> PairResult:
    """The pair, with its prompt shortened to the budget that the longer answer leaves.

    As for one answer (`ExampleEncoder._shortened`), a shorter prompt may change the answers' first tokens and so their
    number. Then it is fitted again, until the budget matches the answers.
    """
    cutoff_len = encoder.rules.cutoff_len
    if chosen is None or rejected is None:
        return _left_out(encoder, pair, row, _REWRITTEN)
    longest = max(len(chosen.ids), len(rejected.ids))
    if longest <= cutoff_len:
        return _unit(encoder, row, texts, (chosen, rejected), FittedPrompt(pair.chosen, 0, []))
    prompt = replace(pair.chosen, turns=pair.chosen.turns[: pair.prompt_turns], answer=())
    prompt_ids = chosen.ids[: chosen.prompt_length]
    tried = set[int]()
    best: PairResult | None = None
    budget = cutoff_len - _longer_answer(chosen, rejected)
    while budget not in tried and len(tried) < MAX_FITS:
        tried.add(budget)
        fitted = encoder.fit_prompt(prompt, row, budget, prompt_ids)
        if isinstance(fitted, LeftOut):
            reason = tr(
                "{longest} tokens, and {reason}; cutoff_len is {cutoff_len}",
                longest=longest,
                reason=fitted.reason,
                cutoff_len=cutoff_len,
            )
            return best or _left_out(encoder, pair, row, reason)
        short_chosen, short_rejected = (
            replace(side, turns=(*fitted.rendered.turns, *side.turns[pair.prompt_turns :]))
            for side in (pair.chosen, pair.rejected)
        )
        prompt_turns = len(fitted.rendered.turns)
        short = _pair_texts(encoder, short_chosen, short_rejected, prompt_turns, row)
        if short is None:
            return _left_out(encoder, pair, row, _REWRITTEN)
        chosen_ids, rejected_ids = encoder.ids_of(short)
        if chosen_ids is None or rejected_ids is None:
            return _left_out(encoder, pair, row, _REWRITTEN)
        if max(len(chosen_ids.ids), len(rejected_ids.ids)) <= cutoff_len:
            best = _unit(encoder, row, short, (chosen_ids, rejected_ids), fitted)
        budget = cutoff_len - _longer_answer(chosen_ids, rejected_ids)
    reason = tr(
        "{longest} tokens, and no shorter prompt fits; cutoff_len is {cutoff_len}",
        longest=longest,
        cutoff_len=cutoff_len,
    )
    return best or _left_out(encoder, pair, row, reason)


def _longer_answer(chosen: TokenIds, rejected: TokenIds) -> int:
    """Tokens of the longer answer."""
    return max(len(ids.ids) - ids.prompt_length for ids in (chosen, rejected))


def _unit(
    encoder: ExampleEncoder,
    row: Row,
    texts: tuple[ExampleText, ExampleText],
    both_ids: tuple[TokenIds, TokenIds],
    fitted: FittedPrompt,
) -> PairResult:
    if both_ids[0].ids == both_ids[1].ids:
        return PairResult(texts, LeftOut(row.number, row.place, EQUAL_AS_TOKENS))
    chosen, rejected = (
        replace(
            encoder.example(text, ids, fitted.cut_characters, fitted.dropped_turns),
            prompt_length=ids.prompt_length,
        )
        for text, ids in zip(texts, both_ids, strict=True)
    )
    return PairResult(texts, Unit(((AnswerRole.CHOSEN, chosen), (AnswerRole.REJECTED, rejected))))
