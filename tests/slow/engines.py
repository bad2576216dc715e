"""What tests of other engines share.

A tiny model with SmolLM2's tokenizer, an adapter for each kind of template, sixteen rows, and the prompts and greedy
answers that Yeonma gives to them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.adapters import adapter_on
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.data.rows import Row
from yeonma.generation.completion import generate
from yeonma.generation.sampling import SamplingParams
from yeonma.model.adapter_weights import load_adapter
from yeonma.model.load import load_base, load_tokenizer
from yeonma.model.source import BaseSource, find_base
from yeonma.tokenization.chat_template_export import conversation_of, full_prompt_ids

KINDS = {
    "plain": "### Text:\n{document}\n\n### Title:\n{title}\n",
    "several fields": "A task and its input.\n\n### Task:\n{task}\n\n### Input:\n{document}\n\n### Answer:\n{title}\n",
    "chat": "chat",
    "system": '[system]\nBe "brief" and kind.\n[user]\nTitle for: {document}\n[assistant]\n{title}\n',
}
"""Templates by kind. That of several fields has no variant with one field."""
TEXTS = (
    "A storm closed the harbour on Monday.",
    "월요일에 폭풍이 항구를 닫았다.",
    "😀 emoji 👩‍🔬 and é, ½, ²",
    "She said \"no\" \\ and \\n, 'yes'.\tA tab, a slash /",
    "  two blanks before and after  ",
    "{braces} {{more}} {% raw %} {# note #}",
    "line one\n\nline three\n",
    "한글과 English, 日本語 and 中文.",
    "1234 5,678.9 ٢٣ Ⅷ",
    '{"task": "looks like JSON"}',
    "<b>tags</b> & &amp; <|no_token|>",
    "a" * 300,
    "서울의 아침 기온이 영하 3 °C까지 떨어졌다.",
    "\u3000wide blank",
    "\u2028 separator \u0301 accent",
    "The end.",
)
NEW_TOKENS = 12
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Asked:
    """A row as other engines are asked it, and what Yeonma makes of it."""

    messages: list[dict[str, Any]]
    prompt: str
    prompt_ids: list[int]
    answer_ids: list[int]


def engine_python(variable: str, environment: str, missing: str) -> str:
    """A Python that has another engine: the one that a variable names, or that of an environment in the checkout."""
    python = os.environ.get(variable, str(ROOT / environment / "bin" / "python"))
    if not Path(python).is_file():
        pytest.skip(missing)
    return python


def engine_base(folder: Path, smollm2: str) -> Path:
    """A llama of a shape that vLLM's kernels for CPUs and llama.cpp take."""
    tokenizer = load_tokenizer(find_base(smollm2))
    torch.manual_seed(0)
    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.15,
        rope_theta=500000.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapters(base: Path, folder: Path) -> dict[str, Path]:
    """An adapter on the base for each kind of template."""
    made = {}
    for number, (kind, template) in enumerate(KINDS.items()):
        path = folder / f"{kind.replace(' ', '-')}.txt"
        path.write_text(template)
        named = template if kind == "chat" else str(path)
        made[kind] = adapter_on(base, folder / path.stem, named, seed=number)
    return made


def rows_of(kind: str) -> list[Row]:
    values: list[Mapping[str, Any]] = [{"document": text} for text in TEXTS]
    if kind == "several fields":
        values = [{"document": text, "task": TEXTS[-number - 1]} for number, text in enumerate(TEXTS)]
    if kind == "chat":
        values = [
            {
                "messages": [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": TEXTS[number - 1]},
                    {"role": "user", "content": TEXTS[number - 2]},
                ]
            }
            for number, text in enumerate(TEXTS)
        ]
    return [Row(number, dict(row), f"row {number}") for number, row in enumerate(values, 1)]


def asked(folder: Path, kind: str, like: Path | None = None) -> list[Asked]:
    """Every row, answered greedily in float32 on the CPU, without stops.

    `folder`: an adapter, or a merged model that is asked with the prompts of the adapter `like`.
    """
    builder = open_prompt_builder(str(like or folder))
    conversations = [_conversation(builder, row) for row in rows_of(kind)]
    ids = [full_prompt_ids(_rendered(builder, row), row, builder.tokenizer) for row in rows_of(kind)]
    source = find_base(str(folder)) if like else builder.source
    model: Any = load_base(source, torch.device("cpu"), torch.float32)
    if not like:
        model = load_adapter(model, str(folder), trainable=False)
    sampling = SamplingParams((), NEW_TOKENS)
    answers = generate(model.eval(), builder.tokenizer, ids, sampling, by_forest=False)
    exported = load_tokenizer(BaseSource(str(like or folder)), keep_exported=True)
    return [
        Asked(
            messages,
            exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            prompt,
            list(answer.token_ids),
        )
        for messages, prompt, answer in zip(conversations, ids, answers, strict=True)
    ]


def _rendered(builder: PromptBuilder, row: Row) -> Any:
    return builder.adapter.template.render(row, None, with_answer=False)


def _conversation(builder: PromptBuilder, row: Row) -> list[dict[str, Any]]:
    """The messages; every second object of several fields with its characters escaped, as Python writes it."""
    said = conversation_of(builder.adapter.template, row, None, _rendered(builder, row), builder.tokenizer)
    messages = [dict(message) for message in said.messages]
    if "task" in row.values and row.number % 2:
        messages[0]["content"] = json.dumps(json.loads(messages[0]["content"]))
    return messages
