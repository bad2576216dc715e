"""Requests are validated, and messages become rows as in training: conversations, parts, fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters import tiny_adapter
from tests.tokenizers import byte_level
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.serve.openai_api import ChatRequest, RequestError, TextRequest, read_request, row_of_messages
from yeonma.tokenization.example import Example
from yeonma.tokenization.example_encoder import encode

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why do boats wait?"},
    {"role": "assistant", "content": "A storm."},
    {"role": "user", "content": "When does it end? 언제?"},
]


def row_of(template: Template, messages: Any) -> Row:
    body = json.dumps({"model": "m", "messages": messages}).encode()
    return row_of_messages(template, read_request(body, ChatRequest).messages)


def test_conversation_prompt_has_the_same_token_ids_as_in_training(tmp_path: Path) -> None:
    prompt_builder = open_prompt_builder(tiny_adapter(tmp_path, byte_level(), template="chat").adapter)
    template = prompt_builder.adapter.template
    (prompt,) = prompt_builder.prompts([row_of(template, CONVERSATION)], max_new_tokens=8)
    row = Row(1, {"messages": [*CONVERSATION, {"role": "assistant", "content": "Soon."}]}, "row")
    (example,) = encode([template.render(row)], [row], prompt_builder.tokenizer, prompt_builder.adapter.rules)
    assert isinstance(example, Example)
    answer_starts = np.flatnonzero(np.diff(example.trained.astype(int)) == 1) + 1
    assert len(answer_starts) == 2  # the prompt ends before the second answer
    assert prompt.token_ids.tolist() == example.token_ids[: answer_starts[-1]].tolist()


def test_the_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "Forty "}, {"type": "text", "text": "boats"}]
    row = row_of(load_template("title"), [{"role": "user", "content": parts}])
    assert row.values == {"document": "Forty boats"}


def test_message_for_several_fields_is_json_or_the_text_of_one_field() -> None:
    alpaca = load_template("alpaca")
    json_row = row_of(alpaca, [{"role": "user", "content": '{"instruction": "a", "input": null}'}])
    assert json_row.values == {"instruction": "a", "input": None}
    assert row_of(alpaca, [{"role": "user", "content": "a"}]).values == {"instruction": "a"}
    two_fields = Template.parse("{first} {second}: {answer}")
    with pytest.raises(RequestError, match="JSON object with these string fields: first, second"):
        row_of(two_fields, [{"role": "user", "content": "a"}])
    one_field = Template.parse("{first}: {answer}")  # with one field, JSON is ordinary text
    assert row_of(one_field, [{"role": "user", "content": '{"a": 1}'}]).values == {"first": '{"a": 1}'}


@pytest.mark.parametrize(
    "messages", [[], {}, "x", [1], CONVERSATION[:3], [{"role": "user"}], [{"role": "user", "content": 1}]]
)
def test_invalid_conversations_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        row_of(load_template("chat"), messages)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("parameters", "message_start", "param"),
    [
        ({"temperature": True}, "temperature must be a number of at least 0", "temperature"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0", "temperature"),
        ({"top_k": 1.0}, "top_k must be a whole number of at least 0", "top_k"),
        ({"max_tokens": "9"}, "max_tokens must be a whole number of at least 1", "max_tokens"),
        ({"n": True}, "n must be a whole number from 1 to 64", "n"),
        ({"n": 65}, "n must be a whole number from 1 to 64", "n"),
        ({"echo": 0}, "echo is not supported with this value: leave it out", "echo"),
        ({"stop": [""]}, "stop must be a string, or a list of at most 4 strings, none of them empty", "stop"),
        ({"stream_options": 1}, "stream_options must be an object", "stream_options"),
        (
            {"stream_options": {"include_usage": 1}},
            "stream_options.include_usage must be true or false",
            "stream_options",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing", "messages"),
        ({"messages": [*CONVERSATION[:1], {"role": "user"}]}, "messages[1].content is missing", "messages"),
        ({"model": None}, "model is missing", "model"),
        ({"model": 1}, "model must be a string", "model"),
        ({"stream": True, "return_token_ids": True}, "a stream contains no token ids", "return_token_ids"),
        ({"max_token": 9}, "max_token is not supported", "max_token"),
        ({"\udc00": 9}, "? is not supported", "?"),
    ],
)
def test_invalid_or_unsupported_parameter_is_refused_by_name(
    parameters: dict[str, Any], message_start: str, param: str
) -> None:
    body = json.dumps({"model": "m", "messages": CONVERSATION, **parameters}).encode()
    with pytest.raises(RequestError) as caught:
        read_request(body, ChatRequest)
    error = caught.value.body["error"]
    assert error["message"].startswith(message_start)
    assert (caught.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["code"] == ("unsupported_parameter" if "not supported" in message_start else None)


def test_neutral_parameters_are_accepted_and_null_counts_as_absent() -> None:
    neutral = {"n": 1.0, "user": {"any": 1}, "frequency_penalty": 0.0, "tools": [], "tool_choice": "auto"}
    neutral |= {"response_format": {"type": "text"}, "min_p": None, "temperature": None, "stop": "."}
    request = read_request(
        json.dumps({"model": "m", "messages": CONVERSATION, **neutral}).encode(), ChatRequest
    )
    assert (request.temperature, request.stop, request.stream) == (None, ["."], False)


@pytest.mark.parametrize("prompt", [[], 1, [True], [-1], [1.5], [[]], [["a"]], ["a"] * 65, [[1]] * 65, {}])
def test_prompt_must_be_text_or_token_ids_or_1_to_64_of_these(prompt: Any) -> None:
    with pytest.raises(
        RequestError, match="prompt must be a string, a list of token ids, or a list of 1 to 64 of these"
    ):
        read_request(json.dumps({"model": "m", "prompt": prompt}).encode(), TextRequest)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_are_texts_or_token_ids(prompt: Any, prompts: Any) -> None:
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert read_request(body, TextRequest).prompt == prompts
