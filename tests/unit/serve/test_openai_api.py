"""Messages become the rows of training: conversations, parts, fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters import tiny_adapter
from tests.tokenizers import byte_level
from yeonma.adapter.prompt_builder import open_folder
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.serve.openai_api import Refused, row_of_messages
from yeonma.tokenization.example import Example
from yeonma.tokenization.example_encoder import encode

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why do boats wait?"},
    {"role": "assistant", "content": "A storm."},
    {"role": "user", "content": "When does it end? 언제?"},
]


def test_a_conversation_is_asked_with_the_trained_tokens(tmp_path: Path) -> None:
    asker = open_folder(tiny_adapter(tmp_path, byte_level(), template="chat").adapter)
    template = asker.adapter.template
    (question,) = asker.questions([row_of_messages(template, TALK)], max_new_tokens=8)
    row = Row(1, {"messages": [*TALK, {"role": "assistant", "content": "Soon."}]}, "row")
    (example,) = encode([template.render(row)], [row], asker.tokenizer, asker.adapter.rules)
    assert isinstance(example, Example)
    begins = np.flatnonzero(np.diff(example.trained.astype(int)) == 1) + 1
    assert len(begins) == 2  # two answers; the last one is not asked
    assert question.token_ids.tolist() == example.token_ids[: begins[-1]].tolist()


def test_a_messages_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "Forty "}, {"type": "text", "text": "boats"}]
    row = row_of_messages(load_template("title"), [{"role": "user", "content": parts}])
    assert row.values == {"document": "Forty boats"}


def test_a_message_for_several_fields_is_json_or_the_one_fields_text() -> None:
    alpaca = load_template("alpaca")
    json_row = row_of_messages(alpaca, [{"role": "user", "content": '{"instruction": "a", "input": null}'}])
    assert json_row.values == {"instruction": "a", "input": None}
    assert row_of_messages(alpaca, [{"role": "user", "content": "a"}]).values == {"instruction": "a"}
    both = Template.parse("{first} {second}: {answer}")
    with pytest.raises(Refused, match="JSON object with the texts of first, second"):
        row_of_messages(both, [{"role": "user", "content": "a"}])
    one = Template.parse("{first}: {answer}")  # JSON is a text like others there
    assert row_of_messages(one, [{"role": "user", "content": '{"a": 1}'}]).values == {"first": '{"a": 1}'}


@pytest.mark.parametrize(
    "messages", [[], {}, "x", [1], TALK[:3], [{"role": "user"}], [{"role": "user", "content": 1}]]
)
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(Refused) as caught:
        row_of_messages(load_template("chat"), messages)
    assert caught.value.status == 400
