"""The card's command for vLLM names the template of training; it is left out where vLLM cannot serve the adapter."""

from __future__ import annotations

import json
from pathlib import Path

from tests.adapters import adapter_on, tiny_base
from tests.tokenizers import CHATML, byte_level
from yeonma.train.model_card import vllm_lines


def test_command_names_the_chat_template_of_a_text_template(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", byte_level(CHATML))
    text = "\n".join(vllm_lines(adapter_on(base, tmp_path / "my titles", "title", r=9), "some/base"))
    assert "vllm serve some/base --enable-lora --max-lora-rank 16" in text
    assert "--lora-modules 'my titles=my titles' --tokenizer 'my titles'" in text
    assert "--chat-template 'my titles/chat_template.jinja'" in text
    assert "One vLLM server has one chat template" in text


def test_conversations_need_no_template_by_name_and_dora_has_no_command(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", byte_level(CHATML))
    folder = adapter_on(base, tmp_path / "chat", "chat")
    text = "\n".join(vllm_lines(folder, "some/base"))
    assert "vllm serve some/base" in text
    assert "--chat-template" not in text
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for more in ({"use_dora": True}, {"r": 1000}):
        path.write_text(json.dumps({**config, **more}))
        assert vllm_lines(folder, "some/base") == []
    path.write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink()
    assert vllm_lines(folder, "some/base") == []
