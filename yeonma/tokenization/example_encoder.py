"""Fitting a prompt under a limit: which field loses text, and how much of it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from yeonma.data.rows import Row
from yeonma.data.template import Piece, Rendered, field_lengths, shorten
from yeonma.errors import Problem, UserError
from yeonma.tokenization.chat_template import Chat, Message, chat_of
from yeonma.tokenization.example import Example, LeftOut, TokenRules, check_tokenizer
from yeonma.tokenization.text_encoder import Span, TextEncoder


def shrinkable(rendered: Rendered, shrink: str | None) -> str | None:
    """The prompt field that may lose text: the one named, else the longest; None where the row has none."""
    lengths = field_lengths(rendered)
    if shrink is not None:
        return shrink if shrink in lengths else None
    return max(lengths, key=lengths.__getitem__, default=None)


def largest_keep(count: Callable[[int], int], length: int, tokens: int, budget: int) -> int:
    """The most characters, from 1 to `length` - 1, that can stay of a field so that the prompt fits; 0 for none.

    `count(keep)` is the prompt's tokens with `keep` characters of the field, `tokens` those with all `length` of them
    (over `budget`). The answer's own count was taken and fits. Tokens hardly ever shrink with more text; where they
    do, a larger answer may exist. Guesses by proportion, halves where that is slow: few counts, each a tokenisation.
    """
    if length < 2:
        return 0
    low, high = 1, length
    low_tokens, high_tokens = count(low), tokens
    if low_tokens > budget:
        return 0
    slow = False
    while high - low > 1:
        share = (budget - low_tokens) / max(high_tokens - low_tokens, 1)
        guess = (low + high) // 2 if slow else low + round(share * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        gap = high - low
        if (found := count(guess)) <= budget:
            low, low_tokens = guess, found
        else:
            high, high_tokens = guess, found
        slow = not slow and high - low > gap // 2
    return low


@dataclass(frozen=True)
class PromptText:
    """What is asked, as text. `data`: character spans of data, or None where no special-token text is in it."""

    text: str
    data: tuple[Span, ...] | None


@dataclass(frozen=True)
class ExampleText:
    """One example as text. `answers` are the character spans of what is trained; the last one ends the text.

    `ended`: the text holds the end token already; otherwise EOS may follow. `rendered` holds just the turns that this
    example needs, so that it can be shortened and drafted again.
    """

    rendered: Rendered
    row: Row
    text: str
    answers: tuple[Span, ...]
    ended: bool
    data: tuple[Span, ...] | None


def prompt_of(rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None) -> PromptText:
    """The prompt that generation feeds; a final assistant turn of a turn list is not part of it."""
    if rendered.answer_role is None:
        pieces = _pieces(rendered)
        return _plain(pieces, encoder)
    assert chat is not None
    messages = _messages(rendered)
    if not rendered.answer and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = chat.prompt(messages, row.place)
    tainted = any(encoder.has_special(message["content"]) for message in messages)
    return PromptText(text, tuple(chat.data_of(messages, text, row.place)) if tainted else None)


def example_texts(
    rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None, *, end_needed: bool
) -> list[ExampleText]:
    """The row's examples: one, or for a turn list that its chat template rewrites as it grows one for each answer.

    `end_needed`: every answer must end with a token of its own. Raises UserError with the row's place where the
    model's chat template refuses the row.
    """
    if rendered.answer_role is None or rendered.answer:
        return [_single(rendered, row, encoder, chat)]
    asked = split_turns(rendered)
    drafts = [_single(part, row, encoder, chat) for part in asked]
    joint = _joint(drafts) if len(drafts) > 1 else None
    if joint is not None and not (end_needed and not all(draft.ended for draft in drafts)):
        return [joint]
    return drafts


def split_turns(rendered: Rendered) -> list[Rendered]:
    """A turn list up to each of its assistant turns that something stands before."""
    roles = [turn.role for turn in rendered.turns]
    return [
        replace(rendered, turns=rendered.turns[: number + 1])
        for number, role in enumerate(roles)
        if role == "assistant" and number > 0
    ]


def data_spans(draft: ExampleText, chat: Chat | None) -> list[tuple[int, int, str]]:
    """Start and end in the draft's text of each stretch of a prompt field's data, with the field's name.

    In turns, contents that the chat template changes by more than blanks at their edges are left out.
    """
    turns = draft.rendered.turns
    if draft.rendered.answer_role is None:
        return _spans_of(_pieces(draft.rendered), 0, draft.answers[0][0], draft.text)
    assert chat is not None
    messages = _messages(draft.rendered)
    if not draft.rendered.answer:
        turns, messages = turns[:-1], messages[:-1]
    prompt = draft.text[: draft.answers[-1][0]]
    contents = chat.data_of(messages, prompt, draft.row.place)
    if len(contents) != len(turns):
        return []
    return [
        span
        for turn, (start, end) in zip(turns, contents, strict=True)
        for span in _spans_of(turn.pieces, start, end, draft.text)
    ]


def _spans_of(pieces: Sequence[Piece], start: int, end: int, text: str) -> list[tuple[int, int, str]]:
    """The fields' spans where `pieces`, perhaps without blanks at their edges, stand at `start` to `end` of `text`."""
    at = start - _joined(pieces).find(text[start:end])
    spans = []
    for piece in pieces:
        left, right = max(at, start), min(at + len(piece.text), end)
        if piece.field is not None and left < right:
            spans.append((left, right, piece.field))
        at += len(piece.text)
    return spans


def _single(rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None) -> ExampleText:
    """The draft of one answer: the last."""
    prompt = prompt_of(rendered, row, encoder, chat)
    if rendered.answer_role is None:
        whole = _plain([*_pieces(rendered), *rendered.answer], encoder)
        return ExampleText(
            rendered, row, whole.text, ((len(prompt.text), len(whole.text)),), False, whole.data
        )
    assert chat is not None
    messages = _messages(rendered)
    if rendered.answer:
        messages.append({"role": "assistant", "content": _joined(rendered.answer)})
    answer = chat.answer(messages, prompt.text, row.place)
    text = prompt.text + answer.text
    data = prompt.data
    if data is not None or encoder.has_special(messages[-1]["content"]):
        data = data if data is not None else tuple(chat.data_of(messages[:-1], prompt.text, row.place))
        data = (*data, (len(prompt.text) + answer.content[0], len(prompt.text) + answer.content[1]))
    return ExampleText(rendered, row, text, ((len(prompt.text), len(text)),), answer.ended, data)


def _joint(drafts: Sequence[ExampleText]) -> ExampleText | None:
    """The drafts of a turn list as one, where each is how the next begins."""
    last = drafts[-1]
    if not all(last.text.startswith(draft.text) for draft in drafts):
        return None
    prompts = [draft.text[: draft.answers[0][0]] for draft in drafts]
    if not all(later.startswith(earlier.text) for later, earlier in zip(prompts[1:], drafts, strict=False)):
        return None
    return replace(last, answers=tuple(draft.answers[0] for draft in drafts))


def _plain(pieces: Sequence[Piece], encoder: TextEncoder) -> PromptText:
    text = _joined(pieces)
    if not encoder.has_special(text):
        return PromptText(text, None)
    data, at = [], 0
    for piece in pieces:
        if piece.field is not None:
            data.append((at, at + len(piece.text)))
        at += len(piece.text)
    return PromptText(text, tuple(data) if encoder.specials_in(text, data) else None)


def _pieces(rendered: Rendered) -> list[Piece]:
    return [piece for turn in rendered.turns for piece in turn.pieces]


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join([piece.text for piece in pieces])


def _messages(rendered: Rendered) -> list[Message]:
    return [{"role": str(turn.role), "content": _joined(turn.pieces)} for turn in rendered.turns]


def encode(
    rendered: Sequence[Rendered], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rules: TokenRules
) -> list[Example | LeftOut]:
    """Examples of rendered rows, in order. A turn list may give several, next to each other.

    All short texts go through the tokenizer in one call, on all cores; give a few thousand rows at a time.
    Raises UserError with a problem for every row that the model's chat template refuses or, with `over_limit`
    "error", that is over the limit; and as `check_tokenizer`.
    """
    check_tokenizer(tokenizer, rules)
    with encoder_for(tokenizer, rules, rendered) as desk:
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
    with encoder_for(tokenizer, rules, rendered) as desk:
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
class EncodeResult:
    """What came of a draft. `draft` is the text as it was tokenised, shortened where it was too long."""

    draft: ExampleText
    outcome: Example | LeftOut


@dataclass(frozen=True)
class _Fitted:
    rendered: Rendered
    cut_characters: int
    ids: list[int]


@dataclass(frozen=True)
class ExampleEncoder:
    """What the steps below share. `chat` is None where no row needs a chat template."""

    encoder: TextEncoder
    chat: Chat | None
    rules: TokenRules

    def encode(self, rendered: Sequence[Rendered], rows: Sequence[Row]) -> list[EncodeResult]:
        """Raises UserError with a problem for every row that is wrong, as the function `encode`."""
        drafts: list[ExampleText] = []
        problems: list[Problem] = []
        for text, row in zip(rendered, rows, strict=True):
            try:
                drafts += self.drafts(text, row)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        found: list[EncodeResult] = []
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

    def drafts(self, rendered: Rendered, row: Row) -> list[ExampleText]:
        drafts = example_texts(rendered, row, self.encoder, self.chat, end_needed=self.rules.add_eos_token)
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

    def ids_of(self, drafts: Sequence[ExampleText]) -> list[TokenIds | None]:
        """Ids of each draft; None where the answers of a turn list do not fall on borders of its tokens."""
        clean = [draft for draft in drafts if draft.data is None]
        texts = [draft.text[:end] for draft in clean for answer in draft.answers for end in answer]
        encoded = iter(self.encoder.batch(texts))
        return [self._assembled(draft, encoded) for draft in drafts]

    def _assembled(self, draft: ExampleText, encoded: Iterator[list[int]]) -> TokenIds | None:
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

    def _continued(self, draft: ExampleText, prompt: list[int], special_text: int) -> TokenIds:
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

    def _ended(self, draft: ExampleText, ids: TokenIds) -> TokenIds:
        eos = self.encoder.eos_id
        if not self.rules.add_eos_token or draft.ended or eos is None or ids.ids[-1:] == [eos]:
            return ids
        start, end = ids.answers[-1]
        return replace(ids, ids=[*ids.ids, eos], answers=[*ids.answers[:-1], (start, end + 1)])

    def finished(self, draft: ExampleText, ids: TokenIds | None) -> list[EncodeResult]:
        """The draft's example, shortened where it is too long; several where its answers must stand alone."""
        if ids is None:
            parts = [self._last(self.drafts(text, draft.row)) for text in split_turns(draft.rendered)]
            found = zip(parts, self.ids_of(parts), strict=True)
            return [one for part, own in found for one in self.finished(part, own)]
        if len(ids.ids) <= self.rules.cutoff_len:
            return [EncodeResult(draft, self.example(draft, ids, 0))]
        return self._shortened(draft, ids)

    def _shortened(self, draft: ExampleText, ids: TokenIds) -> list[EncodeResult]:
        """The example with as much prompt as its answer leaves room for.

        A shorter prompt may change the first tokens of the answer and so their number; then it is fitted again, until
        the room given is the room left, which is what generation gives for an answer of that length.
        """
        cutoff_len, tried = self.rules.cutoff_len, set[int]()
        best: EncodeResult | None = None
        budget = cutoff_len - ids.answer_length
        while budget not in tried and len(tried) < 8:
            tried.add(budget)
            fitted = self.fitted(draft.rendered, draft.row, budget, ids.ids[: ids.answers[-1][0]])
            if isinstance(fitted, LeftOut):
                reason = f"{len(ids.ids)} tokens, and {fitted.reason}; cutoff_len is {cutoff_len}"
                return [best or EncodeResult(draft, replace(fitted, reason=reason))]
            short = self._redrafted(draft, fitted.rendered)
            found = None if short is None else self.ids_of([short])[0]
            if short is None or found is None:
                return self.finished(draft, None)
            if len(found.ids) <= cutoff_len:
                best = EncodeResult(short, self.example(short, found, fitted.cut_characters))
            budget = cutoff_len - found.answer_length
        reason = f"{len(ids.ids)} tokens, and no shorter prompt fits; cutoff_len is {cutoff_len}"
        return [best or EncodeResult(draft, LeftOut(draft.row.number, draft.row.place, reason))]

    def _redrafted(self, draft: ExampleText, rendered: Rendered) -> ExampleText | None:
        """The shortened text with the same answers as `draft`; None where they no longer go into one example."""
        drafts = self.drafts(rendered, draft.row)
        if len(draft.answers) == 1:
            return self._last(drafts)
        return drafts[0] if len(drafts) == 1 else None

    def _last(self, drafts: Sequence[ExampleText]) -> ExampleText:
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

    def example(self, draft: ExampleText, ids: TokenIds, cut_characters: int) -> Example:
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
def encoder_for(
    tokenizer: PreTrainedTokenizerBase, rules: TokenRules, rendered: Sequence[Rendered]
) -> Iterator[ExampleEncoder]:
    encoder = TextEncoder.of(tokenizer)
    if any(text.answer_role is not None for text in rendered):
        with chat_of(encoder) as chat:
            yield ExampleEncoder(encoder, chat, rules)
    else:
        yield ExampleEncoder(encoder, None, rules)
