"""What a request may contain: depth and number of values, lengths of texts; and whose turn it is to be tokenised."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.runs import characters
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.serve.one_at_a_time import BYTES_PER_SECOND, Full, OneAtATime
from yeonma.serve.openai_api import ChatRequest, RequestError, TextRequest, read_request
from yeonma.serve.request_bounds import ALWAYS_READ_BYTES, check_length, longest_token_bytes, texts_in

HELLO = {"role": "user", "content": "hello"}


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def refusal(kind: type[ChatRequest] | type[TextRequest], **body: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read_request(json.dumps({"model": "a", **body}).encode(), kind)
    assert caught.value.status == 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [HELLO], "tools": [{"a": nested(62)}]}, "more than 64 levels"),
        ({"messages": [HELLO], "user": nested(500)}, "more than 64 levels"),
        ({"messages": [HELLO], "user": [[]] * 20_000}, "more than 20,000 of objects and lists"),
        ({"messages": [{}] * 30_000}, "more than 20,000"),
        ({"messages": [HELLO] * 4097}, "messages must be a list of 1 to 4096"),
        ({"messages": [HELLO], "tools": [{"type": "function"}] * 129}, "tools must be a list of at most 128"),
        ({"messages": [HELLO], "stop": "a" * 1001}, "stop must be"),
        ({"messages": [HELLO], "logit_bias": {str(n): 1 for n in range(4097)}}, "logit_bias must be"),
    ],
)
def test_a_request_with_too_much_of_something_is_refused(body: dict[str, Any], message: str) -> None:
    assert message in refusal(ChatRequest, **body)


def test_json_that_is_too_deep_for_the_parser_is_refused() -> None:
    for content in (b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(RequestError, match="the body is not JSON"):
            read_request(content, ChatRequest)


def test_what_is_just_within_the_bounds_is_read() -> None:
    tools = [{"a": nested(60)}] * 128
    body = {"model": "a", "messages": [HELLO] * 4096, "tools": tools, "stop": ["a" * 1000] * 4}
    assert len(read_request(json.dumps(body).encode(), ChatRequest).messages) == 4096
    ids = {"model": "a", "prompt": list(range(150_000))}  # numbers are no matter of depth
    assert len(read_request(json.dumps(ids).encode(), TextRequest).prompt[0]) == 150_000


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, unigram, characters])
def test_no_text_that_fits_is_refused(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    longest = longest_token_bytes(tokenizer)
    for text in (
        "a question. " * 9000,
        " " * 200_000,
        "가나다" * 30_000,
        "\U0010fffd" * 40_000,
        "\n" * 90_000,
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if longest is not None:
            assert len(ids) * longest >= len(text.encode())
        check_length([text], tokenizer, len(ids), "prompt")


def test_a_text_that_cannot_fit_is_refused_and_not_tokenised() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        []
    )  # it composes characters: a text loses bytes
    longest = longest_token_bytes(tokenizer)
    assert longest is not None and longest < 100
    positions = ALWAYS_READ_BYTES // longest + 1
    text = "a" * (positions * longest)
    check_length([text], tokenizer, positions, "prompt")
    check_length([text, " " * 999], tokenizer, positions, "prompt")  # a chat template may remove blanks
    check_length([text + "a"], tokenizer, None, "prompt")

    with pytest.raises(RequestError, match="positions hold at most") as caught:
        check_length([text, "가"], tokenizer, positions, "messages")
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert caught.value.code == "context_length_exceeded"


def test_short_texts_are_always_tokenised() -> None:
    check_length(["a" * ALWAYS_READ_BYTES], byte_level(), 1, "prompt")


def test_a_tokenizer_that_loses_text_has_no_bound() -> None:
    assert longest_token_bytes(byte_level()) is None  # e and an accent become one character
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert longest_token_bytes(tokenizer) is None
    check_length(["a " + " " * 500_000 + "a"], tokenizer, 4, "prompt")


def test_texts_are_found_wherever_they_are() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "b", "tool_calls": [{"function": {"name": "c"}}]}]
    assert sorted(texts_in(["d", turns, 1, None])) == ["a", "b", "c", "d", "user"]


def test_small_requests_pass_large_ones_and_none_waits_for_ever() -> None:
    order: list[str] = []

    async def one(lock: OneAtATime, name: str, size: int) -> None:
        async with lock.turn(size):
            order.append(name)
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        lock = OneAtATime(4)
        async with lock.turn(1):
            waiting = [
                asyncio.create_task(one(lock, name, size))
                for name, size in (("large", 900_000), ("left", 10), ("small", 100), ("next", 100))
            ]
            await asyncio.sleep(0)
            waiting[1].cancel()
            await asyncio.sleep(0)
            late = asyncio.create_task(one(lock, "late", 900_000 + 10 * BYTES_PER_SECOND))
            await asyncio.sleep(0)
            with pytest.raises(Full):
                async with lock.turn(10_000_000):
                    raise AssertionError
            first = asyncio.create_task(one(lock, "first", 0))  # the last one makes room for it
            await asyncio.sleep(0)
        with pytest.raises(Full):
            await late
        await asyncio.gather(*waiting[:1], *waiting[2:], first)
        async with lock.turn(1):
            order.append("again")

    asyncio.run(all_of_them())
    assert order == ["first", "small", "next", "large", "again"]


def test_a_turn_that_had_come_when_its_request_was_cancelled_is_passed_on() -> None:
    async def enter(lock: OneAtATime) -> None:
        async with lock.turn(1):
            pass

    async def cancelled_at_its_turn() -> None:
        lock = OneAtATime(4)

        async def wait() -> None:
            async with lock.turn(1):
                raise AssertionError

        async with lock.turn(1):
            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0)
        waiting.cancel()  # its future is done, and it has not run
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(enter(lock), 5)

    asyncio.run(cancelled_at_its_turn())
