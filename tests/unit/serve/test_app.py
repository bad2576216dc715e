"""Requests that the server refuses because of what the model's chat template does with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters import tiny_adapter
from tests.tokenizers import byte_level
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.serve.app import _prompts
from yeonma.serve.openai_api import ChatRequest, RequestError, read_request

USER_ALONE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_message_of_which_the_chat_template_writes_nothing_is_refused(tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, byte_level(USER_ALONE), template="chat")
    builder = open_prompt_builder(folders.adapter)
    user = {"role": "user", "content": "Who is it?"}

    def ask(*messages: dict[str, str]) -> int:
        body = json.dumps({"model": "OUT", "messages": list(messages)}).encode()
        return len(_prompts(read_request(body, ChatRequest), 4, builder, None))

    assert ask(user) == 1
    for role, name in (("system", "system or developer"), ("developer", "system or developer")):
        with pytest.raises(RequestError, match=f"writes nothing of the {name} turn, turn 1") as caught:
            ask({"role": role, "content": "Be kind."}, user)
        assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(RequestError, match="writes nothing of the tool or function turn, turn 2"):
        ask(user, {"role": "tool", "content": "42", "tool_call_id": "1"})
