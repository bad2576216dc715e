"""Rendered rows to examples, in one place for training and generation.

Both take prompt ids from the same function, so that a model is asked with the tokens it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from yeonma.errors import Problem, UserError
from yeonma.text.rows import Row
from yeonma.text.template import Rendered, field_lengths, shorten
from yeonma.tokens.chat import Chat, chat_of
from yeonma.tokens.draft import Draft, drafts_of, prompt_of, split_turns
from yeonma.tokens.encode import Span, TextEncoder
from yeonma.tokens.example import Example, LeftOut, TokenRules, check_tokenizer
from yeonma.tokens.truncate import largest_keep, shrinkable


def encode(
    rendered: Sequence[Rendered], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rules: TokenRules
) -> list[Example | LeftOut]:
    """Examples of rendered rows, in order. A turn list may give several, next to each other.

    All short texts go through the tokenizer in one call, on all cores; give a few thousand rows at a time.
    Raises UserError with a problem for every row that the model's chat template refuses or, with `over_limit`
    "error", that is over the limit; and as `check_tokenizer`.
    """
    check_tokenizer(tokenizer, rules)
    with desk_for(tokenizer, rules, rendered) as desk:
        return [made.outcome for made in desk.encode(rendered, rows)]


def encode_prompts(
    rendered: Sequence[Rendered],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    max_new_tokens: int,
) -> list[NDArray[np.int32]]:
    """Prompt ids for generation, which leave `max_new_tokens` of `cutoff_len` free.

    Equal to `token_ids[:prompt_length]` of the row's (last) example where neither is shortened, and where both were
    fitted into the same room: `max_new_tokens` is the number of the answer's tokens. A final assistant turn of a turn
    list is not part of the prompt. Raises UserError with a problem for every row whose prompt does not fit with its
    field cut to one character.
    """
    if max_new_tokens >= rules.cutoff_len:
        what = f"{max_new_tokens} new tokens leave no room for a prompt in cutoff_len {rules.cutoff_len}"
        raise UserError(what, place="--max_new_tokens", cure="lower it, or raise --cutoff_len")
    with desk_for(tokenizer, rules, rendered) as desk:
        return desk.prompts(rendered, rows, rules.cutoff_len - max_new_tokens)


def encode_prompt(
    rendered: Rendered, row: Row, tokenizer: PreTrainedTokenizerBase, rules: TokenRules, max_new_tokens: int
) -> NDArray[np.int32]:
    """`encode_prompts` of one row."""
    return encode_prompts([rendered], [row], tokenizer, rules, max_new_tokens)[0]


@dataclass(frozen=True)
class TokenIds:
    """A draft's ids and, for each of its answers, the tokens before it and through it."""

    ids: list[int]
    answers: list[tuple[int, int]]
    straddles: bool = False
    special_text: int = 0

    @property
    def prompt_length(self) -> int:
        """Tokens before the first answer."""
        return self.answers[0][0]

    @property
    def answer_length(self) -> int:
        """Tokens of the last answer."""
        return len(self.ids) - self.answers[-1][0]


@dataclass(frozen=True)
class Made:
    """What came of a draft. `draft` is the text as it was tokenised, shortened where it was too long."""

    draft: Draft
    outcome: Example | LeftOut


@dataclass(frozen=True)
class _Fitted:
    rendered: Rendered
    cut_characters: int
    ids: list[int]


@dataclass(frozen=True)
class Desk:
    """What the steps below share. `chat` is None where no row needs a chat template."""

    encoder: TextEncoder
    chat: Chat | None
    rules: TokenRules

    def encode(self, rendered: Sequence[Rendered], rows: Sequence[Row]) -> list[Made]:
        """Raises UserError with a problem for every row that is wrong, as the function `encode`."""
        drafts: list[Draft] = []
        problems: list[Problem] = []
        for text, row in zip(rendered, rows, strict=True):
            try:
                drafts += self.drafts(text, row)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        found: list[Made] = []
        for draft, ids in zip(drafts, self.ids_of(drafts), strict=True):
            try:
                found += self.finished(draft, ids)
            except UserError as error:
                problems += error.problems
        if self.rules.over_limit == "error":
            left_out = [made.outcome for made in found if isinstance(made.outcome, LeftOut)]
            cure = "raise --cutoff_len, or leave such rows out with --over_limit drop"
            problems += [Problem(one.reason, one.place, cure) for one in left_out]
        if problems:
            raise UserError(problems)
        return found

    def prompts(
        self, rendered: Sequence[Rendered], rows: Sequence[Row], budget: int
    ) -> list[NDArray[np.int32]]:
        problems: list[Problem] = []
        found = []
        for text, row in zip(rendered, rows, strict=True):
            try:
                fitted = self.fitted(text, row, budget, self.prompt_ids(text, row))
                if isinstance(fitted, LeftOut):
                    problems.append(
                        Problem(fitted.reason, row.place, "raise --cutoff_len or lower max_new_tokens")
                    )
                else:
                    found.append(np.array(fitted.ids, dtype=np.int32))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return found

    def drafts(self, rendered: Rendered, row: Row) -> list[Draft]:
        drafts = drafts_of(rendered, row, self.encoder, self.chat, end_needed=self.rules.add_eos_token)
        if not drafts:
            raise UserError("the turn list has no assistant turn after another turn", place=row.place)
        for draft in drafts:
            self._check_special(draft.data, row)
        return drafts

    def _check_special(self, data: Sequence[Span] | None, row: Row) -> None:
        if data is not None and self.encoder.backend is None:
            what = "special-token text, which this kind of tokenizer cannot encode as ordinary text"
            cure = "use a model with a fast tokenizer (tokenizer.json), or take the text out of the row"
            raise UserError(what, place=row.place, cure=cure)

    def ids_of(self, drafts: Sequence[Draft]) -> list[TokenIds | None]:
        """Ids of each draft; None where the answers of a turn list do not fall on borders of its tokens."""
        clean = [draft for draft in drafts if draft.data is None]
        texts = [draft.text[:end] for draft in clean for answer in draft.answers for end in answer]
        encoded = iter(self.encoder.batch(texts))
        return [self._assembled(draft, encoded) for draft in drafts]

    def _assembled(self, draft: Draft, encoded: Iterator[list[int]]) -> TokenIds | None:
        ends = [end for answer in draft.answers for end in answer]
        special_text = 0
        if draft.data is None:
            parts = [next(encoded) for _ in ends]
        else:
            counted = [self.encoder.with_data(draft.text[:end], draft.data) for end in ends]
            parts, special_text = [ids for ids, _ in counted], counted[-1][1]
        whole = parts[-1]
        if any(whole[: len(part)] != part for part in parts):
            return None if len(draft.answers) > 1 else self._continued(draft, parts[0], special_text)
        counts = [len(part) for part in parts]
        return self._ended(
            draft, TokenIds(whole, list(zip(counts[::2], counts[1::2], strict=True)), False, special_text)
        )

    def _continued(self, draft: Draft, prompt: list[int], special_text: int) -> TokenIds:
        """The answer as a continuation of the prompt: a token of the whole text straddles their border."""
        start = draft.answers[0][0]
        answer = draft.text[start:]
        if draft.data is None:
            ids = self.encoder.continuation(prompt, answer)
        else:
            data = [(max(left - start, 0), right - start) for left, right in draft.data if right > start]
            ids, _ = self.encoder.with_data(answer, data, before=prompt)
        return self._ended(
            draft, TokenIds(prompt + ids, [(len(prompt), len(prompt + ids))], True, special_text)
        )

    def _ended(self, draft: Draft, ids: TokenIds) -> TokenIds:
        eos = self.encoder.eos_id
        if not self.rules.add_eos_token or draft.ended or eos is None or ids.ids[-1:] == [eos]:
            return ids
        start, end = ids.answers[-1]
        return replace(ids, ids=[*ids.ids, eos], answers=[*ids.answers[:-1], (start, end + 1)])

    def finished(self, draft: Draft, ids: TokenIds | None) -> list[Made]:
        """The draft's example, shortened where it is too long; several where its answers must stand alone."""
        if ids is None:
            parts = [self._last(self.drafts(text, draft.row)) for text in split_turns(draft.rendered)]
            found = zip(parts, self.ids_of(parts), strict=True)
            return [one for part, own in found for one in self.finished(part, own)]
        if len(ids.ids) <= self.rules.cutoff_len:
            return [Made(draft, self.example(draft, ids, 0))]
        return self._shortened(draft, ids)

    def _shortened(self, draft: Draft, ids: TokenIds) -> list[Made]:
        """The example with as much prompt as its answer leaves room for.

        A shorter prompt may change the first tokens of the answer and so their number; then it is fitted again, until
        the room given is the room left, which is what generation gives for an answer of that length.
        """
        cutoff_len, tried = self.rules.cutoff_len, set[int]()
        best: Made | None = None
        budget = cutoff_len - ids.answer_length
        while budget not in tried and len(tried) < 8:
            tried.add(budget)
            fitted = self.fitted(draft.rendered, draft.row, budget, ids.ids[: ids.answers[-1][0]])
            if isinstance(fitted, LeftOut):
                reason = f"{len(ids.ids)} tokens, and {fitted.reason}; cutoff_len is {cutoff_len}"
                return [best or Made(draft, replace(fitted, reason=reason))]
            short = self._redrafted(draft, fitted.rendered)
            found = None if short is None else self.ids_of([short])[0]
            if short is None or found is None:
                return self.finished(draft, None)
            if len(found.ids) <= cutoff_len:
                best = Made(short, self.example(short, found, fitted.cut_characters))
            budget = cutoff_len - found.answer_length
        reason = f"{len(ids.ids)} tokens, and no shorter prompt fits; cutoff_len is {cutoff_len}"
        return [best or Made(draft, LeftOut(draft.row.number, draft.row.place, reason))]

    def _redrafted(self, draft: Draft, rendered: Rendered) -> Draft | None:
        """The shortened text with the same answers as `draft`; None where they no longer go into one example."""
        drafts = self.drafts(rendered, draft.row)
        if len(draft.answers) == 1:
            return self._last(drafts)
        return drafts[0] if len(drafts) == 1 else None

    def _last(self, drafts: Sequence[Draft]) -> Draft:
        return replace(drafts[-1], answers=drafts[-1].answers[-1:])

    def fitted(self, rendered: Rendered, row: Row, budget: int, ids: list[int]) -> _Fitted | LeftOut:
        """The prompt, whose ids are `ids`, with as much of its shrinkable field as `budget` tokens hold."""
        if len(ids) <= budget:
            return _Fitted(rendered, 0, ids)
        field, side = shrinkable(rendered, self.rules.shrink), self.rules.shrink_side
        if field is None:
            named = f'field "{self.rules.shrink}"' if self.rules.shrink else "prompt field"
            return LeftOut(row.number, row.place, f"there is no {named} to shorten")
        length = field_lengths(rendered)[field]

        def short_ids(keep: int) -> list[int]:
            return self.prompt_ids(shorten(rendered, field, keep, side), row)

        keep = largest_keep(lambda keep: len(short_ids(keep)), length, len(ids), budget)
        short = shorten(rendered, field, keep, side)
        kept = field_lengths(short)[field]
        if kept == 0:
            return LeftOut(row.number, row.place, f'too long with one character of "{field}"')
        return _Fitted(short, length - kept, short_ids(keep))

    def prompt_ids(self, rendered: Rendered, row: Row) -> list[int]:
        prompt = prompt_of(rendered, row, self.encoder, self.chat)
        self._check_special(prompt.data, row)
        if prompt.data is None:
            return self.encoder.batch([prompt.text])[0]
        return self.encoder.with_data(prompt.text, prompt.data)[0]

    def example(self, draft: Draft, ids: TokenIds, cut_characters: int) -> Example:
        trained = np.full(len(ids.ids), self.rules.train_on_inputs, dtype=np.bool_)
        for start, end in ids.answers:
            trained[start:end] = True
        trained[:1] = False
        return Example(
            token_ids=np.array(ids.ids, dtype=np.int32),
            trained=trained,
            prompt_length=ids.answers[-1][0],
            row=draft.row.number,
            variant=draft.rendered.variant,
            cut_characters=cut_characters,
            straddles=ids.straddles,
            special_text=ids.special_text,
        )


@contextmanager
def desk_for(
    tokenizer: PreTrainedTokenizerBase, rules: TokenRules, rendered: Sequence[Rendered]
) -> Iterator[Desk]:
    encoder = TextEncoder.of(tokenizer)
    if any(text.answer_role is not None for text in rendered):
        with chat_of(encoder) as chat:
            yield Desk(encoder, chat, rules)
    else:
        yield Desk(encoder, None, rules)
