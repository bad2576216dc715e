"""What a server makes of the sample rows: their prompts, their greedy answers, and how likely it finds given tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

from yeonma.adapter.adapter_folder import AdapterFolder
from yeonma.adapter.sample_answers import SampleAnswer, ScoredIds
from yeonma.adapter.samples import SampleRow, Samples
from yeonma.tokenization.chat_template_export import chat_ids
from yeonma.tokenization.conversation import Conversation
from yeonma.tokenization.explain import common_length
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.verify.compatibility import asks_by_messages, sample_as_messages
from yeonma.verify.server_client import ServedAnswer, ServedScore, Server, ServerFailed

MOST_ROWS = 8
"""Sample rows that are asked."""
MORE_TOKENS = 16
"""That a server may generate beyond the trained model's answer, so that an answer which does not end is seen."""
MOST_ONE_BY_ONE = 12
"""Tokens of an answer that are scored where each takes a request: about a hundred in all."""
MOST_FRESH = 6
"""Tokens of an answer that are scored once more without what the server cached of the prompt."""
MOST_AGAIN = 2
"""Rows that are asked again, with other parameters, where the answer was another one."""
CLOSE_CALL = 1.0
"""Nats between the most likely token and the next one, below which rounding may choose the other."""
NO_SAMPLING: Mapping[str, Any] = {"top_k": 1}
"""Greedy whatever the temperature."""
NO_PENALTY: Mapping[str, Any] = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""vLLM's and SGLang's parameter, and llama.cpp's."""


PromptCause = Literal["double_bos", "added_bos", "no_bos", "added_eos", "base_template", "reasoning_mode"]
"""Why a prompt has other ids."""


@dataclass(frozen=True)
class AskedRow:
    """A sample row as other tools are asked it."""

    expected: SampleAnswer
    conversation: Conversation | None
    """None if messages cannot stand for the prompt: another template, a shortened prompt, special-token text."""
    wrong_prompts: Sequence[tuple[PromptCause, Sequence[int]]] = ()
    """Causes, each with ids that the prompt could have by it."""
    text_of: Callable[[Sequence[int]], str] = lambda ids: ""
    """The text of token ids by the tokenizer of training."""
    new_ids: frozenset[int] = frozenset()
    """Of the tokens that training added."""


@dataclass(frozen=True)
class ComparedTokens:
    """Log-probabilities of the same tokens by the server, the trained model and the base."""

    served: list[ServedScore]
    trained: list[float]
    base: list[float] | None
    scaled: Mapping[str, list[float]] | None = None
    """As in `ScoredIds`."""
    by_new: Sequence[bool] = ()
    """Which are tokens that training added, or stand behind one."""


@dataclass(frozen=True)
class ServedRow:
    asked: AskedRow
    by_messages: ServedAnswer | None = None
    by_ids: ServedAnswer | None = None
    without_penalty: ServedAnswer | None = None
    """Once more by messages, where the answer was another one: with the server's penalty on repetitions turned off."""
    without_sampling: ServedAnswer | None = None
    """Likewise, with only the most likely token to choose from."""
    scores: ComparedTokens | None = None
    fresh_scores: ComparedTokens | None = None
    """Of a few tokens, where `scores` differ from training: once more, without what the server cached."""
    base_scores: ComparedTokens | None = None
    """Of the base, where the server has it beside the adapter."""
    failure: ServerFailed | None = None
    """Of the request by messages, or by ids if there was none."""


def rows_to_ask(
    adapter: AdapterFolder, samples: Samples, answers: Sequence[SampleAnswer], own: Any, exported: Any
) -> list[AskedRow]:
    """The sample rows with their messages. `own`: the folder's tokenizer with the base's chat template; `exported`: the
    same with the chat template that the folder has for other tools."""
    by_row = {sample.row_number: sample for sample in samples.rows}
    takes_messages = asks_by_messages(adapter, exported)
    new_ids = frozenset(own.convert_tokens_to_ids(list(adapter.new_tokens)))

    def text_of(ids: Sequence[int]) -> str:
        return str(own.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    rows = []
    for answer in _in_turn(answers)[:MOST_ROWS]:
        sample = by_row.get(answer.row_number)
        conversation = None
        # samples.json has the rows of the first data set alone, for whose template the messages are
        if takes_messages and sample is not None and sample.prompt_ids == answer.prompt_ids:
            conversation = _conversation(adapter, samples, sample, own, exported)
        wrong = tuple(_wrong_prompts(answer.prompt_ids, conversation, own, exported))
        rows.append(AskedRow(answer, conversation, wrong, text_of, new_ids))
    return rows


def _in_turn(answers: Sequence[SampleAnswer]) -> list[SampleAnswer]:
    """One of each data set after the other."""
    by_set: dict[str, list[SampleAnswer]] = {}
    for answer in answers:
        by_set.setdefault(answer.data_set, []).append(answer)
    rounds = zip_longest(*by_set.values())
    return [answer for one_of_each in rounds for answer in one_of_each if answer is not None]


def _conversation(
    adapter: AdapterFolder, samples: Samples, sample: SampleRow, own: Any, exported: Any
) -> Conversation | None:
    """The row's messages, if they give the ids of training by the folder's own chat template."""
    try:
        asked = sample_as_messages(adapter, samples, sample, TextEncoder.of(own))
        if asked is None:
            return None
        conversation, ids = asked
        is_whole = ids == sample.prompt_ids  # else it was shortened in training
        return conversation if is_whole and chat_ids(exported, conversation) == ids else None
    except Exception:  # UserError, or whatever Jinja raises; `yeonma verify` without --served says so
        return None


def _wrong_prompts(
    ids: Sequence[int], conversation: Conversation | None, own: Any, exported: Any
) -> Iterator[tuple[PromptCause, Sequence[int]]]:
    bos, eos = own.bos_token_id, own.eos_token_id
    if bos is not None:
        yield "double_bos" if ids[0] == bos else "added_bos", [bos, *ids]
        if ids[0] == bos and len(ids) > 1:
            yield "no_bos", ids[1:]
    if eos is not None:
        yield "added_eos", [*ids, eos]
    if conversation is None:
        return
    for thinks in (False, True):
        with suppress(Exception):  # whatever Jinja raises
            kwargs = {**conversation.kwargs, "enable_thinking": thinks}
            by_mode = chat_ids(exported, replace(conversation, kwargs=kwargs))
            if by_mode != list(ids):
                yield "reasoning_mode", by_mode
    if not own.chat_template:
        return
    with suppress(Exception):  # whatever Jinja raises
        by_base = chat_ids(own, conversation)
        if by_base != list(ids):
            yield "base_template", by_base
            if bos is not None and by_base[:1] == [bos]:
                yield "base_template", [bos, *by_base]


def ask(server: Server, rows: Sequence[AskedRow]) -> list[ServedRow]:
    """Asks the server all rows, one after the other. A refused request is part of the result."""
    served: list[ServedRow] = []
    for row in rows:
        asked_again = sum(one.without_sampling is not None for one in served)
        served.append(_ask_row(server, row, may_ask_again=asked_again < MOST_AGAIN))
    return served


def _ask_row(server: Server, row: AskedRow, *, may_ask_again: bool) -> ServedRow:
    expected, conversation = row.expected, row.conversation
    most = max(1, len(expected.trained.token_ids)) + (MORE_TOKENS if expected.trained.ended else 0)
    served = ServedRow(row)
    if conversation is not None:
        try:
            served = replace(served, by_messages=_answer_to(server, conversation, most))
            if may_ask_again and not is_same(served.by_messages, expected):
                served = _asked_again(server, conversation, most, served)
        except ServerFailed as failed:
            served = replace(served, failure=failed)
    try:
        served = replace(served, by_ids=server.complete(expected.prompt_ids, most))
    except ServerFailed as failed:
        if conversation is None:
            served = replace(served, failure=failed)
        return served
    try:
        return _with_scores(server, served)
    except ServerFailed:
        return served


def _answer_to(
    server: Server,
    conversation: Conversation,
    most: int,
    more: Mapping[str, Any] | None = None,
    *,
    is_greedy: bool = True,
) -> ServedAnswer:
    given: dict[str, Any] = {"tools": conversation.tools, "arguments": conversation.kwargs, "more": more}
    return server.chat(conversation.messages, most, **given, is_greedy=is_greedy)


def answers_by_itself(server: Server, rows: Sequence[ServedRow]) -> bool | None:
    """Whether a request that names no temperature gets the answer of temperature 0, by one row; None if none was
    answered by messages."""
    for row in rows:
        conversation, greedy = row.asked.conversation, row.by_messages
        if conversation is None or greedy is None or not greedy.text:
            continue
        with suppress(ServerFailed):
            most = max(1, len(row.asked.expected.trained.token_ids))
            own = _answer_to(server, conversation, most, is_greedy=False)
            return own.text.startswith(greedy.text) or greedy.text.startswith(own.text)
    return None


def _asked_again(server: Server, conversation: Conversation, most: int, served: ServedRow) -> ServedRow:
    """With the answers to the same messages with other parameters; without them if the server does not know these."""
    with suppress(ServerFailed):
        served = replace(served, without_sampling=_answer_to(server, conversation, most, NO_SAMPLING))
    with suppress(ServerFailed):
        served = replace(served, without_penalty=_answer_to(server, conversation, most, NO_PENALTY))
    return served


def _with_scores(server: Server, served: ServedRow) -> ServedRow:
    expected = served.asked.expected
    parts = [expected.wanted_ids, expected.greedy_ids, expected.base_ids]
    if server.kind == "llamacpp":
        own = expected.wanted_ids if expected.wanted_ids.token_ids else expected.greedy_ids
        parts = [one.at(range(len(one.token_ids))[:MOST_ONE_BY_ONE]) for one in (own, expected.base_ids)]
    base = server.base()
    scores, fresh, base_scores = [], [], []
    for part in parts:
        numbers = server.scores(expected.prompt_ids, part.token_ids)
        if numbers is None:
            continue  # not told, or not for these ids
        scores.append(_told(numbers, part, served.asked))
        if _is_off(scores[-1]):
            few = part.at(range(len(part.token_ids))[:MOST_FRESH])
            if (numbers := server.scores(expected.prompt_ids, few.token_ids, from_cache=False)) is not None:
                fresh.append(_told(numbers, few, served.asked))
        if base is not None and (numbers := base.scores(expected.prompt_ids, part.token_ids)) is not None:
            base_scores.append(_told(numbers, part, served.asked))
    return replace(served, scores=joined(scores), fresh_scores=joined(fresh), base_scores=joined(base_scores))


def _is_off(scores: ComparedTokens) -> bool:
    """Whether some numbers are clearly not those of training, so that it is worth asking again."""
    return any(
        abs(score.logprob - trained) > CLOSE_CALL and not score.is_upper_bound
        for score, trained in zip(scores.served, scores.trained, strict=True)
    )


def _told(numbers: Sequence[ServedScore | None], part: ScoredIds, asked: AskedRow) -> ComparedTokens:
    """The tokens whose log-probabilities the server tells."""
    new = asked.new_ids
    behind = any(token in new for token in asked.expected.prompt_ids)
    by_new = [(behind := behind or token in new) for token in part.token_ids]
    places = [place for place, number in enumerate(numbers) if number is not None]
    told = part.at(places)
    return ComparedTokens(
        [number for number in numbers if number is not None],
        told.trained,
        told.base,
        told.scaled,
        [by_new[place] for place in places],
    )


def joined(parts: Sequence[ComparedTokens | None]) -> ComparedTokens | None:
    """All tokens one after the other; None if there are none."""
    given = [part for part in parts if part is not None]
    served = [score for part in given for score in part.served]
    if not served:
        return None
    bases = [part.base for part in given]
    base = None
    if all(one is not None for one in bases):
        base = [number for one in bases for number in one or ()]
    parts_scaled = [part.scaled for part in given]
    scaled = None
    if all(one is not None for one in parts_scaled):
        scaled = {
            scale: [number for one in parts_scaled for number in (one or {})[scale]]
            for scale in parts_scaled[0] or ()
        }
    trained = [number for part in given for number in part.trained]
    return ComparedTokens(served, trained, base, scaled, [one for part in given for one in part.by_new])


def is_same(answer: ServedAnswer | None, expected: SampleAnswer) -> bool:
    """Whether a server's answer is that of the trained model: the ids where it tells them, else the text. One that the
    number of tokens ended may go on."""
    if answer is None:
        return False
    trained = expected.trained
    if answer.token_ids is not None:
        ids, more = answer.token_ids, answer.token_ids[len(trained.token_ids) :]
        # some servers list the token that ended the answer
        ends_there = not trained.ended or not more or (len(more) == 1 and answer.finish == "stop")
        return ids[: len(trained.token_ids)] == trained.token_ids and ends_there
    if not trained.ended:
        return answer.text.startswith((trained.text, trained.content))
    return answer.text in (trained.text, trained.content)


def where_it_goes_on(answer: ServedAnswer, expected: SampleAnswer) -> str:
    """What a server's answer has beyond the trained model's; empty if it is another one, or not longer."""
    for text in (expected.trained.text, expected.trained.content):
        if answer.text.startswith(text) and len(answer.text) > len(text):
            return answer.text[len(text) :]
    return ""


def stops_early(answer: ServedAnswer, expected: SampleAnswer) -> bool:
    """Whether a server's answer is only the beginning of the trained model's, and ended by a stop."""
    return (
        answer.finish == "stop"
        and len(answer.text) < len(expected.trained.content)
        and expected.trained.text.startswith(answer.text)
    )


def is_cut_short(answer: ServedAnswer, expected: SampleAnswer) -> bool:
    """Whether a number of tokens ended a server's answer before that of the trained model, although more were asked
    for."""
    return (
        answer.finish == "length"
        and len(answer.text) < len(expected.trained.content)
        and expected.trained.text.startswith(answer.text)
    )


def is_close_call(answer: ServedAnswer, asked: AskedRow) -> bool:
    """Whether a server's answer leaves the trained model's at a token that rounding may choose otherwise, because the
    trained model's next token is not much more likely than all others together. True where that cannot be told."""
    expected = asked.expected
    ids, logprobs = expected.trained.token_ids, expected.greedy_ids.trained
    same = _common_tokens(answer, asked)
    if same is None or same >= len(ids) or ids != expected.greedy_ids.token_ids:
        return True
    others = math.log(max(-math.expm1(logprobs[same]), 1e-9))
    return logprobs[same] - others <= CLOSE_CALL


def _common_tokens(answer: ServedAnswer, asked: AskedRow) -> int | None:
    """How many tokens a server's answer has in common with the trained model's; None if the texts do not tell."""
    ids = asked.expected.trained.token_ids
    if answer.token_ids is not None:
        return common_length(answer.token_ids, ids)
    text = asked.expected.trained.text
    for count in range(1, len(ids) + 1):
        beginning = asked.text_of(ids[:count])
        if not text.startswith(beginning):
            return None
        if not answer.text.startswith(beginning):
            return count - 1
    return len(ids)
