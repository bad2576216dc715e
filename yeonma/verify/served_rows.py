"""What a server makes of the sample rows: their prompts, their greedy answers, and how likely it finds given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from yeonma.adapter.adapter_folder import AdapterFolder
from yeonma.adapter.sample_answers import SampleAnswer, ScoredIds
from yeonma.adapter.samples import SampleRow, Samples
from yeonma.tokenization.chat_template_export import chat_ids
from yeonma.tokenization.conversation import Conversation
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.verify.compatibility import asks_by_messages, sample_as_messages
from yeonma.verify.server_client import ServedAnswer, ServedScore, Server, ServerFailed

MOST_ROWS = 8
"""Sample rows that are asked."""
MORE_TOKENS = 16
"""That a server may generate beyond the trained model's answer, so that an answer which does not end is seen."""
MOST_ONE_BY_ONE = 12
"""Tokens of an answer that are scored where each takes a request: about a hundred in all."""
NO_PENALTY: Mapping[str, Any] = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""vLLM's and SGLang's parameter, and llama.cpp's."""


PromptCause = Literal["double_bos", "added_bos", "no_bos", "added_eos", "base_template"]
"""Why a prompt has other ids."""


@dataclass(frozen=True)
class AskedRow:
    """A sample row as other tools are asked it."""

    expected: SampleAnswer
    conversation: Conversation | None
    """None if messages cannot stand for the prompt: another template, a shortened prompt, special-token text."""
    wrong_prompts: Sequence[tuple[PromptCause, Sequence[int]]] = ()
    """Causes, each with ids that the prompt could have by it."""


@dataclass(frozen=True)
class ComparedTokens:
    """Log-probabilities of the same tokens by the server, the trained model and the base."""

    served: list[ServedScore]
    trained: list[float]
    base: list[float] | None


@dataclass(frozen=True)
class ServedRow:
    asked: AskedRow
    by_messages: ServedAnswer | None = None
    by_ids: ServedAnswer | None = None
    without_penalty: ServedAnswer | None = None
    """Once more by messages, where the answer was another one: with the server's penalty on repetitions turned off."""
    scores: ComparedTokens | None = None
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
    rows = []
    for answer in answers[:MOST_ROWS]:
        sample = by_row.get(answer.row_number)
        if sample is None or sample.prompt_ids != answer.prompt_ids:
            continue
        conversation = _conversation(adapter, samples, sample, own, exported) if takes_messages else None
        wrong = tuple(_wrong_prompts(answer.prompt_ids, conversation, own))
        rows.append(AskedRow(answer, conversation, wrong))
    return rows


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
    ids: Sequence[int], conversation: Conversation | None, own: Any
) -> Iterator[tuple[PromptCause, Sequence[int]]]:
    bos, eos = own.bos_token_id, own.eos_token_id
    if bos is not None:
        yield "double_bos" if ids[0] == bos else "added_bos", [bos, *ids]
        if ids[0] == bos and len(ids) > 1:
            yield "no_bos", ids[1:]
    if eos is not None:
        yield "added_eos", [*ids, eos]
    if conversation is None or not own.chat_template:
        return
    with suppress(Exception):  # whatever Jinja raises
        by_base = chat_ids(own, conversation)
        if by_base != list(ids):
            yield "base_template", by_base
            if bos is not None and by_base[:1] == [bos]:
                yield "base_template", [bos, *by_base]


def ask(server: Server, rows: Sequence[AskedRow]) -> list[ServedRow]:
    """Asks the server all rows, one after the other. A refused request is part of the result."""
    return [_ask_row(server, row) for row in rows]


def _ask_row(server: Server, row: AskedRow) -> ServedRow:
    expected, conversation = row.expected, row.conversation
    most = max(1, len(expected.trained.token_ids)) + (MORE_TOKENS if expected.trained.ended else 0)
    served = ServedRow(row)
    if conversation is not None:
        given: dict[str, Any] = {"tools": conversation.tools, "arguments": conversation.kwargs}
        try:
            served = replace(served, by_messages=server.chat(conversation.messages, most, **given))
            if not is_same(served.by_messages, expected):
                again = _without_penalty(server, conversation, most, given)
                served = replace(served, without_penalty=again)
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


def _without_penalty(
    server: Server, conversation: Conversation, most: int, given: Mapping[str, Any]
) -> ServedAnswer | None:
    try:
        return server.chat(conversation.messages, most, **given, more=NO_PENALTY)
    except ServerFailed:  # it does not know the parameters
        return None


def _with_scores(server: Server, served: ServedRow) -> ServedRow:
    expected = served.asked.expected
    parts = [expected.wanted_ids, expected.greedy_ids, expected.base_ids]
    if server.kind == "llamacpp":
        own = expected.wanted_ids if expected.wanted_ids.token_ids else expected.greedy_ids
        parts = [one.at(range(len(one.token_ids))[:MOST_ONE_BY_ONE]) for one in (own, expected.base_ids)]
    base = server.base()
    scores, base_scores = [], []
    for part in parts:
        numbers = server.scores(expected.prompt_ids, part.token_ids)
        if numbers is None:
            continue  # not told, or not for these ids
        scores.append(_told(numbers, part))
        if base is not None and (numbers := base.scores(expected.prompt_ids, part.token_ids)) is not None:
            base_scores.append(_told(numbers, part))
    return replace(served, scores=joined(scores), base_scores=joined(base_scores))


def _told(numbers: Sequence[ServedScore | None], part: ScoredIds) -> ComparedTokens:
    """The tokens whose log-probabilities the server tells."""
    told = part.at([place for place, number in enumerate(numbers) if number is not None])
    return ComparedTokens([number for number in numbers if number is not None], told.trained, told.base)


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
    return ComparedTokens(served, [number for part in given for number in part.trained], base)


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
