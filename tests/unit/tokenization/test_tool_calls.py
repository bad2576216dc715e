"""Tool calls in generated text, in the formats of the common chat templates; anything else stays text."""

from __future__ import annotations

import json

import pytest

from yeonma.tokenization.tool_calls import call_finder

HERMES, MISTRAL, LLAMA = "<tool_call>\n</tool_call>", "[TOOL_CALLS] [", "<|python_tag|>"
ARGUMENTS = {"city": "서울", "days": 2}
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("template", "text", "content", "names"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", ["weather"]),
        (
            HERMES,
            f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}",
            "I look.",
            ["weather", "weather"],
        ),
        (HERMES, f"  I look.  \n\n<tool_call>{CALL}</tool_call>", "  I look.  \n", ["weather"]),
        (MISTRAL, f" Now. \n[TOOL_CALLS] [{CALL}]", " Now. \n", ["weather"]),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", ["weather", "weather"]),
        (MISTRAL, f"Now.[TOOL_CALLS]weather[ARGS]{json.dumps(ARGUMENTS)}", "Now.", ["weather"]),
        (LLAMA, CALL.replace("arguments", "parameters"), "", ["weather"]),
        (LLAMA, f"<|python_tag|>{CALL}; {CALL}", "", ["weather", "weather"]),
    ],
)
def test_calls_are_found_and_leave_the_text(template: str, text: str, content: str, names: list[str]) -> None:
    find = call_finder(template)
    assert find is not None
    rest, calls = find(text)
    assert (rest, [call.name for call in calls]) == (content, names)
    assert all(json.loads(call.arguments) == ARGUMENTS for call in calls)


@pytest.mark.parametrize("template", [HERMES, MISTRAL, LLAMA])
@pytest.mark.parametrize(
    "text",
    ["", "It rains.", '{"city": 1}', "[1]", "<tool_call>\nnot JSON\n</tool_call>", "[TOOL_CALLS] x", "3"],
)
def test_text_that_is_no_call_stays_as_it_is(template: str, text: str) -> None:
    find = call_finder(template)
    assert find is not None
    assert find(text) == (text, ())


def test_templates_of_unknown_formats_have_no_finder() -> None:
    assert call_finder("{{ m.content }}") is None
    assert call_finder("<tool_call>\n<function=name>") is None
