"""Rendered rows -> examples, and prompts for generation by the same functions.

A row's text is encoded up to every border of an answer and fitted into `cutoff_len`: one field of the prompt is
shortened, never the frame and never the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from yeonma.data.columns import row_weight
from yeonma.data.rows import Row
from yeonma.data.template import Rendered, field_lengths, shorten
from yeonma.data.template_syntax import Piece, joined
from yeonma.data.text_checks import NOT_GIVEN_BACK, TRIMMED
from yeonma.errors import Problem, UserError
from yeonma.messages import counted, tr, translated
from yeonma.tokenization.chat_template import Chat, chat_of
from yeonma.tokenization.example import (
    NOT_TRAINED,
    WEIGHTLESS,
    WITHIN_LIMIT,
    Example,
    LeftOut,
    TokenRules,
    check_tokenizer,
)
from yeonma.tokenization.lost_turns import check_turns
from yeonma.tokenization.round_trip import Losses, answer_ids, gives_back, losses_of, parts_of, takes_blanks
from yeonma.tokenization.text_encoder import Span, TextEncoder
from yeonma.tokenization.trained_turns import likely_conversations, prompt_part, split_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AHEAD = 64
"""How many rows the chat template writes at once."""

MAX_FITS = 8
"""How often a prompt is fitted: a shorter prompt may change the number of tokens of the answer."""


def encode(
    rendered: Sequence[Rendered], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rules: TokenRules
) -> list[Example | LeftOut]:
    """The examples of rendered rows, in order. A turn list may give several.

    Short texts go through the tokenizer in one call, on all cores: pass a few thousand rows at a time.
    Raises UserError with a problem for every row that the model's chat template refuses or, with `over_limit` "error",
    that is over the limit; and as `check_tokenizer`.
    """
    check_tokenizer(tokenizer, rules)
    with encoder_for(tokenizer, rules, rendered) as encoder:
        return [result.outcome for result in encoder.encode(rendered, rows)]


def encode_prompts(
    rendered: Sequence[Rendered],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    max_new_tokens: int,
) -> list[NDArray[np.int32]]:
    """Prompt ids for generation. They leave `max_new_tokens` of `cutoff_len` free.

    They equal `token_ids[:prompt_length]` of the row's (last) example if neither is shortened, or if `max_new_tokens`
    is the number of tokens of the answer, so that both are fitted into the same budget. A final assistant turn of a
    turn list is not part of the prompt. Raises UserError with a problem for every row whose prompt does not fit even
    with one character left of its field.
    """
    if max_new_tokens >= rules.cutoff_len:
        problem = counted(
            max_new_tokens,
            "new token leaves no room for a prompt in cutoff_len {cutoff_len}",
            "new tokens leave no room for a prompt in cutoff_len {cutoff_len}",
            cutoff_len=rules.cutoff_len,
        )
        raise UserError(problem, place="--max_new_tokens", cure=tr("lower it"))
    with encoder_for(tokenizer, rules, rendered) as encoder:
        return encoder.prompts(rendered, rows, rules.cutoff_len - max_new_tokens)


def encode_prompt(
    rendered: Rendered, row: Row, tokenizer: PreTrainedTokenizerBase, rules: TokenRules, max_new_tokens: int
) -> NDArray[np.int32]:
    """`encode_prompts` for one row."""
    return encode_prompts([rendered], [row], tokenizer, rules, max_new_tokens)[0]


@contextmanager
def encoder_for(
    tokenizer: PreTrainedTokenizerBase, rules: TokenRules, rendered: Sequence[Rendered]
) -> Iterator[ExampleEncoder]:
    """An encoder for these rows, for use within the block, in this thread. Raises UserError as `chat_of`."""
    encoder = TextEncoder.of(tokenizer)
    if any(text.answer_role is not None for text in rendered):
        with chat_of(encoder, rules.thinking, rules.chat_template_kwargs) as chat:
            yield ExampleEncoder(encoder, chat, rules)
    else:
        yield ExampleEncoder(encoder, None, rules)


@dataclass(frozen=True)
class PromptText:
    """A prompt as text. `data`: the character spans of data; None if they contain no special-token text."""

    text: str
    data: tuple[Span, ...] | None


@dataclass(frozen=True)
class ExampleText:
    """An example as text. `answers` are the character spans to train on; the last one ends the text.

    `ended`: the text contains its end token; otherwise EOS may follow. `rendered` has only the turns of this example,
    so that it can be shortened and rendered again.
    """

    rendered: Rendered
    row: Row
    text: str
    answers: tuple[Span, ...]
    ended: bool
    data: tuple[Span, ...] | None
    weights: tuple[float, ...] = ()
    """The weights of the answers in the loss; empty if all are 1."""
    parts: tuple[tuple[int, int, Literal["reasoning", "call"]], ...] = ()
    """The spans within answers that are reasoning or tool calls."""
    flags: int = 0
    """What the chat template did with the answers, as bits of `Notes.flags`."""

    @property
    def last_answer(self) -> ExampleText:
        """The same text with only its last answer trained."""
        return replace(self, answers=self.answers[-1:], weights=self.weights[-1:])


@dataclass(frozen=True)
class TokenIds:
    """The ids of an ExampleText. `answers`: start and end of its answers in tokens."""

    ids: list[int]
    answers: list[tuple[int, int]]
    straddles: bool = False
    special_text: int = 0
    flags: int = 0
    """Bits of `Notes.flags`."""

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
    """The example, or why it is left out, and the text that was tokenised, after shortening."""

    text: ExampleText
    outcome: Example | LeftOut


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits into its budget of tokens."""

    rendered: Rendered
    cut_characters: int
    ids: list[int]
    dropped_turns: int = 0


@dataclass(frozen=True)
class ExampleEncoder:
    """Encodes rows with one tokenizer and its rules. `chat` is None if no row needs a chat template."""

    encoder: TextEncoder
    chat: Chat | None
    rules: TokenRules

    @property
    def losses(self) -> Losses:
        return losses_of(self.encoder)

    def encode(self, rendered: Sequence[Rendered], rows: Sequence[Row]) -> list[EncodeResult]:
        """Raises UserError with a problem for every faulty row, as the function `encode`."""
        texts: list[ExampleText] = []
        untrained: list[EncodeResult] = []
        problems: list[Problem] = []
        for number, (row_text, row) in enumerate(zip(rendered, rows, strict=True)):
            if number % AHEAD == 0:
                self.render_ahead(rendered[number : number + AHEAD])
            try:
                row_texts = self.texts(row_text, row)
                if row_weight(row, self.rules.row_weights) == 0:
                    untrained.append(self._untrained(row_text, row, WEIGHTLESS))
                    continue
                texts += row_texts
                untrained += [] if row_texts else [self._untrained(row_text, row, NOT_TRAINED)]
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        results: list[EncodeResult] = []
        for text, ids in zip(texts, self.ids_of(texts), strict=True):
            try:
                results += self.results_of(text, ids)
            except UserError as error:
                problems += error.problems
        if self.rules.over_limit == "error":
            problems += over_limit_problems([result.outcome for result in results])
        if untrained:
            results = sorted([*results, *untrained], key=lambda result: result.outcome.row)
        if problems:
            raise UserError(problems)
        return results

    def prompts(
        self, rendered: Sequence[Rendered], rows: Sequence[Row], budget: int
    ) -> list[NDArray[np.int32]]:
        """Prompt ids, at most `budget` per prompt. Raises UserError with a problem for every row that does not fit."""
        problems: list[Problem] = []
        prompts = []
        for number, (text, row) in enumerate(zip(rendered, rows, strict=True)):
            if number % AHEAD == 0:
                self.render_ahead([prompt_part(part) for part in rendered[number : number + AHEAD]])
            try:
                fitted = self.fit_prompt(text, row, budget, self.prompt_ids(text, row))
                if isinstance(fitted, LeftOut):
                    cure = tr("shorten the row, or lower max_new_tokens")
                    problems.append(Problem(translated(fitted.reason), row.place, cure))
                else:
                    prompts.append(np.array(fitted.ids, dtype=np.int32))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return prompts

    def render_ahead(self, rendered: Sequence[Rendered]) -> None:
        """Lets the chat template write many rows at once. It changes no result: what else is needed is rendered when
        it is needed."""
        if self.chat is not None and len(rendered) > 1:
            self.chat.render_ahead(
                part for text in rendered for part in likely_conversations(text, self.chat, self.rules)
            )

    def texts(self, rendered: Rendered, row: Row) -> list[ExampleText]:
        """The row's examples as text; none if no turn is trained. Raises UserError with the row's place if there is no
        turn to train."""
        if self.rules.train_on_inputs and any(
            turn.turn and turn.turn.weight is not None for turn in rendered.turns
        ):
            cure = tr("remove the weights, or leave --train_on_inputs out")
            raise UserError(
                tr("turns have weights, and --train_on_inputs trains every token"), place=row.place, cure=cure
            )
        texts = example_texts(rendered, row, self.encoder, self.chat, self.rules)
        if not texts and any(turn.role == "assistant" for turn in rendered.turns[1:]):
            return []
        if not texts:
            raise UserError(tr("the turn list has no assistant turn after another turn"), place=row.place)
        if self.rules.parse_special_tokens:
            return [replace(text, data=None) for text in texts]
        for text in texts:
            self._check_special_text(text.data, row)
        return texts

    def _untrained(self, rendered: Rendered, row: Row, reason: str) -> EncodeResult:
        """The result of a row of which nothing is trained."""
        whole = rendered
        if rendered.answer_role is not None and not rendered.answer:
            last = max(index for index, turn in enumerate(rendered.turns) if turn.role == "assistant")
            whole = replace(rendered, turns=rendered.turns[: last + 1])
        text = _text_of_last_answer(whole, row, self.encoder, self.chat)
        return EncodeResult(text, LeftOut(row.number, row.place, reason))

    def ids_of(self, texts: Sequence[ExampleText]) -> list[TokenIds | None]:
        """The ids of the texts; None for a turn list whose answers do not begin and end at borders of tokens."""
        borders = [
            text.text[:end]
            for text in texts
            if text.data is None
            for answer in text.answers
            for end in answer
        ]
        encoded = iter(self.encoder.batch(borders))
        return [self._token_ids(text, encoded) for text in texts]

    def results_of(self, text: ExampleText, ids: TokenIds | None) -> list[EncodeResult]:
        """The text's example, shortened if it is too long. If `ids` is None, one example per answer."""
        if ids is None:
            split = split_turns(text.rendered, self.rules.train_on)
            parts = [self.texts(part, text.row)[-1].last_answer for part in split]
            pairs = zip(parts, self.ids_of(parts), strict=True)
            return [result for part, part_ids in pairs for result in self.results_of(part, part_ids)]
        if text.rendered.is_text:
            return self._pieces(text, ids)
        if len(ids.ids) <= self.rules.cutoff_len:
            return [EncodeResult(text, self.example(text, ids))]
        return self._shortened(text, ids)

    def _pieces(self, text: ExampleText, ids: TokenIds) -> list[EncodeResult]:
        """A whole text in pieces of at most `cutoff_len` tokens, in order. A piece begins with the last token of the
        one before it, so that each of the text's tokens but the first is trained once."""
        step = max(self.rules.cutoff_len - 1, 1)
        starts = range(0, max(len(ids.ids) - 1, 1), step)
        if len(starts) == 1:
            whole = self.example(text, replace(ids, answers=[(0, len(ids.ids))]))
            return [EncodeResult(text, whole)]
        results = []
        for start in starts:
            piece_ids = ids.ids[start : start + step + 1]
            piece = TokenIds(piece_ids, [(0, len(piece_ids))])
            decoded = self.encoder.decode(piece_ids)
            piece_text = replace(text, text=decoded, answers=((0, len(decoded)),), data=None)
            results.append(EncodeResult(piece_text, self.example(piece_text, piece)))
        return results

    def fit_prompt(self, rendered: Rendered, row: Row, budget: int, ids: list[int]) -> FittedPrompt | LeftOut:
        """The prompt, whose full ids are `ids`, made to fit into `budget` tokens by shortening one field.

        If half of a turn would not be enough, a conversation loses its oldest exchanges, as few as are needed, and only
        the last one is shortened further.
        """
        if len(ids) <= budget:
            return FittedPrompt(rendered, 0, ids)
        if exchanges := old_exchanges(rendered):
            shorter = self._with_shorter_field(rendered, row, budget, ids)
            length = max(field_lengths(rendered).values(), default=0)
            if isinstance(shorter, FittedPrompt) and 2 * shorter.cut_characters <= length:
                return shorter
            fitted = self._without_exchanges(rendered, row, budget, exchanges)
            if len(fitted.ids) <= budget:
                return fitted
            shortened = self._with_shorter_field(fitted.rendered, row, budget, fitted.ids)
            if isinstance(shortened, LeftOut):
                return shortened
            return replace(shortened, dropped_turns=fitted.dropped_turns)
        return self._with_shorter_field(rendered, row, budget, ids)

    def _without_exchanges(
        self, rendered: Rendered, row: Row, budget: int, exchanges: Sequence[int]
    ) -> FittedPrompt:
        """The prompt without its oldest exchanges: as few as fit into the budget, or all but the last."""
        low, high = 0, len(exchanges)  # dropping `low` of them is too few
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(self.prompt_ids(drop_exchanges(rendered, exchanges[middle - 1]), row)) <= budget
            low, high = (low, middle) if fits else (middle, high)
        short = drop_exchanges(rendered, exchanges[high - 1])
        dropped = len(rendered.turns) - len(short.turns)
        return FittedPrompt(short, 0, self.prompt_ids(short, row), dropped)

    def _with_shorter_field(
        self, rendered: Rendered, row: Row, budget: int, ids: list[int]
    ) -> FittedPrompt | LeftOut:
        """The prompt, whose full ids are `ids`, with one field shortened to fit into `budget` tokens."""
        field, side = field_to_shorten(rendered, self.rules.shrink), self.rules.shrink_side
        if field is None:
            shrink = self.rules.shrink
            none = (
                tr('there is no field "{shrink}" to shorten', shrink=shrink)
                if shrink
                else tr("there is no prompt field to shorten")
            )
            return LeftOut(row.number, row.place, none)
        length = field_lengths(rendered)[field]

        def short_ids(keep: int) -> list[int]:
            return self.prompt_ids(shorten(rendered, field, keep, side), row)

        keep = largest_keep(lambda keep: len(short_ids(keep)), length, len(ids), budget)
        short = shorten(rendered, field, keep, side)
        characters = field_lengths(short)[field]
        if characters == 0:
            return LeftOut(row.number, row.place, tr('too long with one character of "{field}"', field=field))
        return FittedPrompt(short, length - characters, short_ids(keep))

    def prompt_ids(self, rendered: Rendered, row: Row) -> list[int]:
        prompt = prompt_of(rendered, row, self.encoder, self.chat)
        if self.rules.parse_special_tokens:
            prompt = replace(prompt, data=None)
        self._check_special_text(prompt.data, row)
        if prompt.data is None:
            return self.encoder.batch([prompt.text])[0]
        return self.encoder.with_data(prompt.text, prompt.data)[0]

    def example(
        self, text: ExampleText, ids: TokenIds, cut_characters: int = 0, dropped_turns: int = 0
    ) -> Example:
        trained = np.full(len(ids.ids), self.rules.train_on_inputs, dtype=np.bool_)
        for start, end in ids.answers:
            trained[start:end] = True
        trained[:1] = False
        weights = None
        of_row = row_weight(text.row, self.rules.row_weights)
        if text.weights or of_row != 1:
            weights = np.full(len(ids.ids), of_row if self.rules.train_on_inputs else 1.0, dtype=np.float32)
            of_answers = text.weights or (1.0,) * len(ids.answers)
            for (start, end), weight in zip(ids.answers, of_answers, strict=True):
                weights[start:end] = weight * of_row
        return Example(
            token_ids=np.array(ids.ids, dtype=np.int32),
            trained=trained,
            prompt_length=ids.answers[-1][0],
            row=text.row.number,
            variant=text.rendered.variant,
            cut_characters=cut_characters,
            dropped_turns=dropped_turns,
            straddles=ids.straddles,
            special_text=ids.special_text,
            weights=weights,
            flags=text.flags | ids.flags,
        )

    def _check_special_text(self, data: Sequence[Span] | None, row: Row) -> None:
        if data is not None and self.encoder.backend is None:
            problem = tr("special-token text, which this kind of tokenizer cannot encode as ordinary text")
            cure = tr("use a model with a fast tokenizer (tokenizer.json), or remove the text from the row")
            raise UserError(problem, place=row.place, cure=cure)

    def _token_ids(self, text: ExampleText, encoded: Iterator[list[int]]) -> TokenIds | None:
        """The ids of a text. Without special-token text, `encoded` yields the ids up to each of its borders."""
        ids = self._encoded(text, encoded)
        if ids is None or not self.losses.may_change(text.text):
            return ids
        is_back = gives_back(self.encoder, text.text, ids.ids, parts_of(text.rendered))
        return ids if is_back else replace(ids, flags=NOT_GIVEN_BACK)

    def _encoded(self, text: ExampleText, encoded: Iterator[list[int]]) -> TokenIds | None:
        ends = [end for answer in text.answers for end in answer]
        special_text = 0
        if text.data is None:
            parts = [next(encoded) for _ in ends]
        else:
            parts_of = [self.encoder.with_data(text.text[:end], text.data) for end in ends]
            parts, special_text = [ids for ids, _ in parts_of], parts_of[-1][1]
        full_ids = parts[-1]
        if any(full_ids[: len(part)] != part for part in parts):
            return None if len(text.answers) > 1 else self._continued(text, parts[0], special_text)
        if text.data is None and any(takes_blanks(self.losses, text.text, answer) for answer in text.answers):
            if len(text.answers) > 1:
                return None
            answer_text = text.text[text.answers[0][0] :]
            full_ids = [*parts[0], *answer_ids(self.encoder, parts[0], answer_text)]
            return self._with_eos(text, TokenIds(full_ids, [(len(parts[0]), len(full_ids))]))
        counts = [len(part) for part in parts]
        answers = list(zip(counts[::2], counts[1::2], strict=True))
        return self._with_eos(text, TokenIds(full_ids, answers, False, special_text))

    def _continued(self, text: ExampleText, prompt: list[int], special_text: int) -> TokenIds:
        """Ids whose answer is encoded as a continuation of the prompt, because a token would straddle their border."""
        start = text.answers[0][0]
        answer = text.text[start:]
        if text.data is None:
            ids = self.encoder.continuation(prompt, answer)
        else:
            data = [(max(left - start, 0), right - start) for left, right in text.data if right > start]
            ids, _ = self.encoder.with_data(answer, data, before=prompt)
        full_ids = prompt + ids
        return self._with_eos(text, TokenIds(full_ids, [(len(prompt), len(full_ids))], True, special_text))

    def _with_eos(self, text: ExampleText, ids: TokenIds) -> TokenIds:
        eos = self.encoder.eos_id
        if not self.rules.add_eos_token or text.ended or eos is None or ids.ids[-1:] == [eos]:
            return ids
        start, end = ids.answers[-1]
        return replace(ids, ids=[*ids.ids, eos], answers=[*ids.answers[:-1], (start, end + 1)])

    def _shortened(self, text: ExampleText, ids: TokenIds) -> list[EncodeResult]:
        """The example, with its prompt shortened to the budget that the answer leaves.

        A shorter prompt may change the first tokens of the answer and so their number. Then it is fitted again, until
        the budget matches the answer. This is the budget that generation uses for an answer of that length.
        """
        cutoff_len, tried = self.rules.cutoff_len, set[int]()
        best: EncodeResult | None = None
        budget = cutoff_len - ids.answer_length
        while budget not in tried and len(tried) < MAX_FITS:
            tried.add(budget)
            fitted = self.fit_prompt(text.rendered, text.row, budget, ids.ids[: ids.answers[-1][0]])
            if isinstance(fitted, LeftOut):
                reason = tr(
                    "{ids} tokens, and {reason}; cutoff_len is {cutoff_len}",
                    ids=len(ids.ids),
                    reason=fitted.reason,
                    cutoff_len=cutoff_len,
                )
                return [best or EncodeResult(text, replace(fitted, reason=reason))]
            short = self._rendered_again(text, fitted.rendered)
            short_ids = None if short is None else self.ids_of([short])[0]
            if short is None or short_ids is None:
                return self.results_of(text, None)
            if len(short_ids.ids) <= cutoff_len:
                example = self.example(short, short_ids, fitted.cut_characters, fitted.dropped_turns)
                best = EncodeResult(short, example)
            budget = cutoff_len - short_ids.answer_length
        reason = tr(
            "{ids} tokens, and no shorter prompt fits; cutoff_len is {cutoff_len}",
            ids=len(ids.ids),
            cutoff_len=cutoff_len,
        )
        return [best or EncodeResult(text, LeftOut(text.row.number, text.row.place, reason))]

    def _rendered_again(self, text: ExampleText, rendered: Rendered) -> ExampleText | None:
        """The shortened row with the answers of `text`; None if they are no longer one example."""
        texts = self.texts(rendered, text.row)
        if len(text.answers) == 1:
            return texts[-1].last_answer
        return texts[0] if len(texts) == 1 else None


OVER_LIMIT_CURE = tr("raise --cutoff_len, or leave such rows out with --over_limit drop")


def over_limit_problems(outcomes: Sequence[object]) -> list[Problem]:
    """A problem for every row that is left out for its length, when `over_limit` is "error"."""
    return [
        Problem(translated(row.reason), row.place, OVER_LIMIT_CURE)
        for row in outcomes
        if isinstance(row, LeftOut) and row.reason not in WITHIN_LIMIT
    ]


# Text


def prompt_of(rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None) -> PromptText:
    """The prompt for generation; a final assistant turn of a turn list is not part of it."""
    if rendered.answer_role is None:
        return _plain_text(rendered.prompt_pieces, encoder)
    assert chat is not None
    conversation = chat.conversation(prompt_part(rendered), row.place)
    text = chat.prompt(conversation, row.place)
    check_turns(chat, conversation, text, row.place)
    has_special = chat.has_special(conversation, row.place)
    return PromptText(text, tuple(chat.data_spans(conversation, text, row.place)) if has_special else None)


def example_texts(
    rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None, rules: TokenRules
) -> list[ExampleText]:
    """The row's examples: one, or one per answer of a turn list if the chat template rewrites earlier turns.

    Where an answer needs an EOS of its own, one per answer, too. None if no turn of the list is trained. Raises
    UserError with the row's place if the model's chat template refuses the row.
    """
    if rendered.answer_role is None or rendered.answer:
        return [_text_of_last_answer(rendered, row, encoder, chat)]
    parts = split_turns(rendered, rules.train_on)
    texts = [_text_of_last_answer(part, row, encoder, chat) for part in parts]
    merged = _merged(texts) if len(texts) > 1 else None
    if merged is not None and not (rules.add_eos_token and not all(text.ended for text in texts)):
        return [merged]
    return texts


def _text_of_last_answer(
    rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None
) -> ExampleText:
    prompt = prompt_of(rendered, row, encoder, chat)
    start = len(prompt.text)
    if rendered.answer_role is None:
        plain = _plain_text([*rendered.prompt_pieces, *rendered.answer], encoder)
        return ExampleText(rendered, row, plain.text, ((start, len(plain.text)),), False, plain.data)
    assert chat is not None
    conversation = chat.conversation(rendered, row.place, with_answer=True)
    answer = chat.answer(conversation, prompt.text, row.place)
    text = prompt.text + answer.text
    data = prompt.data
    if data is not None or chat.has_special(conversation, row.place):
        before = conversation.before_last
        data = data if data is not None else tuple(chat.data_spans(before, prompt.text, row.place))
        for left, right in (answer.reasoning, answer.content):
            data = (*data, *chat.without_marks(text, (start + left, start + right)))
    turn = rendered.answer_turn if rendered.answer else rendered.turns[-1].turn
    weights = () if turn is None or turn.weight in (None, 0, 1) else (turn.weight or 0.0,)
    spans: tuple[tuple[Span, Literal["reasoning", "call"]], ...] = (
        (answer.reasoning, "reasoning"),
        (answer.calls, "call"),
    )
    parts = tuple((start + left, start + right, kind) for (left, right), kind in spans if left < right)
    flags = TRIMMED if answer.trimmed else 0
    return ExampleText(rendered, row, text, ((start, len(text)),), answer.ended, data, weights, parts, flags)


def _merged(texts: Sequence[ExampleText]) -> ExampleText | None:
    """One text with all answers of a turn list; None unless every text is a prefix of the next prompt."""
    last = texts[-1]
    if not all(last.text.startswith(text.text) for text in texts):
        return None
    prompts = [text.text[: text.answers[0][0]] for text in texts]
    if not all(later.startswith(earlier.text) for later, earlier in zip(prompts[1:], texts, strict=False)):
        return None
    weights = [text.weights[0] if text.weights else 1.0 for text in texts]
    return replace(
        last,
        answers=tuple(text.answers[0] for text in texts),
        weights=tuple(weights) if any(weight != 1 for weight in weights) else (),
        parts=tuple(part for text in texts for part in text.parts),
        flags=TRIMMED if any(text.flags & TRIMMED for text in texts) else 0,
    )


def _plain_text(pieces: Sequence[Piece], encoder: TextEncoder) -> PromptText:
    """The pieces as text, without a chat template."""
    text = joined(pieces)
    if not encoder.has_special(text):
        return PromptText(text, None)
    data, position = [], 0
    for piece in pieces:
        if piece.field is not None:
            data.append((position, position + len(piece.text)))
        position += len(piece.text)
    return PromptText(text, tuple(data) if encoder.specials_in(text, data) else None)


# Fitting


def old_exchanges(rendered: Rendered) -> list[int]:
    """The turns at which a conversation may begin instead, ascending: those at which an exchange begins, without the
    first one. An exchange begins with a user's turn after another role's."""
    if rendered.answer_role is None:
        return []
    roles = [turn.role for turn in rendered.turns]
    starts = [
        index
        for index, role in enumerate(roles)
        if role == "user" and (index == 0 or roles[index - 1] != "user")
    ]
    return starts[1:]


def drop_exchanges(rendered: Rendered, start: int) -> Rendered:
    """The conversation from the turn `start` on, with the system turns at its beginning."""
    system = next((i for i, turn in enumerate(rendered.turns) if turn.role != "system"), 0)
    first_answer = max(rendered.first_answer - (start - system), 0)
    return replace(
        rendered,
        turns=(*rendered.turns[:system], *rendered.turns[start:]),
        first_answer=min(rendered.first_answer, max(first_answer, system)),
    )


def field_to_shorten(rendered: Rendered, shrink: str | None) -> str | None:
    """The prompt field to shorten: the one that `shrink` names, else the longest; None if the row has none."""
    lengths = field_lengths(rendered)
    if shrink is not None:
        return shrink if shrink in lengths else None
    return max(lengths, key=lengths.__getitem__, default=None)


def largest_keep(count: Callable[[int], int], length: int, tokens: int, budget: int) -> int:
    """The largest number of characters of a field, below `length`, with which the prompt fits; 0 if even one does not.

    `count(keep)`: tokens of the prompt with `keep` characters of the field. `tokens`: those with all `length` of them
    (over `budget`). The count of the result is known to fit. A text hardly ever has fewer tokens than its beginning; if
    it does, a larger result may exist. Every count is a tokenization, so it interpolates to need few, and bisects where
    that converges slowly.
    """
    if length < 2:
        return 0
    low, high = 1, length
    low_tokens, high_tokens = count(low), tokens
    if low_tokens > budget:
        return 0
    slow = False
    while high - low > 1:
        fraction = (budget - low_tokens) / max(high_tokens - low_tokens, 1)
        guess = (low + high) // 2 if slow else low + round(fraction * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        gap = high - low
        if (guess_tokens := count(guess)) <= budget:
            low, low_tokens = guess, guess_tokens
        else:
            high, high_tokens = guess, guess_tokens
        slow = not slow and high - low > gap // 2
    return low
