"""How to use what a run leaves behind, for its card: Python for PEFT and transformers, commands for vLLM, SGLang,
Ollama.

Each is named only where it asks with the tokens of training: the card's own example prompt is tried first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yeonma.adapter.adapter_folder import CHAT_TEMPLATE, AdapterFolder
from yeonma.adapter.lora_ranks import VLLM_LACKS, highest_rank, lora_config, vllm_rank
from yeonma.data.rows import Row
from yeonma.data.template import Template
from yeonma.data.template_syntax import Piece
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.shown import code, code_block, json_text, shell_word
from yeonma.tokenization.chat_template_export import (
    MARK,
    chat_ids,
    conversation_of,
    full_prompt_ids,
    prompt_fields,
)
from yeonma.tokenization.example import TokenRules

MOST_CHARACTERS = 200
"""Of a field in the example prompt."""
PLACEHOLDER = "..."
"""A field of the example prompt where the card shows no rows."""
NEW_TOKENS = 128
"""The most that the code and the request generate."""
PORT, SGLANG_PORT = 8000, 30000
"""Where vLLM and SGLang listen by default."""


@dataclass(frozen=True)
class ExamplePrompt:
    """A prompt as other tools take it: messages, else the whole text. Neither if both give other ids than training."""

    messages: Sequence[Mapping[str, Any]] = ()
    text: str = ""


@dataclass(frozen=True)
class Usage:
    """What the code on a card must say about the model."""

    base: str
    """Name of the base on the hub, or a placeholder for the folder that it is in."""
    prompt: ExamplePrompt
    stop_ids: tuple[int, ...]
    """The tokens that end an answer."""
    ends_elsewhere: bool
    """Whether they are all among the tokenizer's EOS and those of the base's generation config, by which other tools
    end an answer."""
    repeats_penalised: bool = False
    """Whether the base's generation config has a repetition penalty, which training did not have."""
    model_class: str = ""
    """transformers' class of a base that also reads images or sound; empty for others."""


def example_prompt(
    template: Template,
    rules: TokenRules,
    tokenizer: Any,
    chat_template: str | None,
    values: Mapping[str, str] | None = None,
) -> ExamplePrompt:
    """A prompt with these values of the template's fields, of which the beginnings are taken; without values, with a
    placeholder. `tokenizer` has the base's own chat template; `chat_template` is the one in the adapter folder."""
    fields = _fields(template, values)
    try:
        if template.is_text:
            return ExamplePrompt(text=next(iter(fields.values())))
        row = Row(1, fields, "the card's example")
        if template.takes_turns:
            turns = [{"role": "user", "content": next(iter(fields.values()))}]
            row = Row(1, template.row_of_turns(turns), "the card's example")
        rendered = template.render(row, None, with_answer=False)
        ids = full_prompt_ids(rendered, row, tokenizer, rules)
        if chat_template is not None:
            conversation = conversation_of(template, row, None, rendered, tokenizer, rules)
            if _gives(ids, lambda: chat_ids(tokenizer, conversation, chat_template)):
                return ExamplePrompt(messages=conversation.messages)
        text = "".join(piece.text for piece in rendered.prompt_pieces)
        if not template.has_turns and _gives(ids, lambda: list(tokenizer(text)["input_ids"])):
            return ExamplePrompt(text=text)
    except UserError:  # the base's chat template refuses the example
        pass
    return ExamplePrompt()


def _fields(template: Template, values: Mapping[str, str] | None) -> dict[str, str]:
    if values:
        return {name: _beginning(text) for name, text in values.items()}
    names = template.variants[0].prompt_fields or (template.answer_field,)
    return dict.fromkeys(names, PLACEHOLDER)


def _beginning(text: str) -> str:
    """The text, or its first words if it is long."""
    if len(text) <= MOST_CHARACTERS:
        return text
    cut = text[:MOST_CHARACTERS]
    return cut[: cut.rfind(" ")] if " " in cut else cut


def _gives(ids: Sequence[int], other: Any) -> bool:
    try:
        return list(other()) == list(ids)
    except Exception:  # a chat template or a tokenizer may raise anything
        return False


def folder_chat_template(output: Path) -> str | None:
    """The chat template that other tools find in the folder."""
    path = output / CHAT_TEMPLATE
    return path.read_bytes().decode() if path.is_file() else None


def python_lines(output: Path, adapter: AdapterFolder, usage: Usage) -> list[str]:
    """Code that answers the example prompt with PEFT, or with transformers alone if the folder is a whole model."""
    prompt = usage.prompt
    if not prompt.messages and not prompt.text:
        return []
    trust = ", trust_remote_code=True" if adapter.trust_remote_code else ""
    folder = json_text(output.resolve().name)
    tools = ["AutoTokenizer"]
    load = [f"model = AutoPeftModelForCausalLM.from_pretrained(folder{trust})"]
    peft = "AutoPeftModelForCausalLM"
    if usage.model_class:
        peft, tools = "PeftModel", [usage.model_class, "AutoTokenizer"]
        load = [
            f"base = {usage.model_class}.from_pretrained({json_text(usage.base)}{trust})",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    if adapter.is_full:
        tools = [usage.model_class or "AutoModelForCausalLM", "AutoTokenizer"]
        load = [f"model = {tools[0]}.from_pretrained(folder{trust})"]
    if prompt.messages:
        ask = [
            f"messages = {json_text(list(prompt.messages))}",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        ask = [f'inputs = tokenizer({json_text(prompt.text)}, return_tensors="pt")']
    more = ", repetition_penalty=1.0" if usage.repeats_penalised else ""
    lines = [
        *([] if adapter.is_full else [f"from peft import {peft}"]),
        f"from transformers import {', '.join(tools)}",
        "",
        f"folder = {folder}  # {tr('this folder, or its name on the hub')}",
        *load,
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        *ask,
        "answer = model.generate(",
        f"    **inputs.to(model.device), max_new_tokens={NEW_TOKENS}, do_sample=False,",
        f"    eos_token_id={list(usage.stop_ids)}{more},",
        ")",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    quantised = []
    if not adapter.is_full and adapter.quantization != "none":
        quantised = [
            tr(
                "Training quantised the base to {quantization}; this code loads the base as it is published, so that "
                "answers may differ.",
                quantization=adapter.quantization,
            ),
            "",
        ]
    return [tr("In Python:"), "", *code_block("\n".join(lines), "python"), "", *quantised]


def _served_rank(output: Path, adapter: AdapterFolder, usage: Usage) -> int | None:
    """vLLM's limit for the ranks of the adapter, 0 for a whole model; None if a server does not answer as trained."""
    if not usage.prompt.messages or folder_chat_template(output) is None or adapter.quantization != "none":
        return None
    if any(isinstance(part, Piece) for variant in adapter.template.variants for part in variant.answer):
        return None  # the server would not remove the text around the answer
    if adapter.is_full:
        return 0
    config = lora_config(output)
    lacks = any(config.get(key) for key in VLLM_LACKS)
    return None if lacks or not usage.ends_elsewhere else vllm_rank(highest_rank(output))


def vllm_lines(output: Path, adapter: AdapterFolder, usage: Usage) -> list[str]:
    """The command that serves the folder by vLLM with the prompts of training, and a request; none if vLLM cannot."""
    name = output.resolve().name
    chat_template = folder_chat_template(output) or ""
    rank = _served_rank(output, adapter, usage)
    if rank is None:
        return []
    if adapter.is_full:
        command = f"vllm serve {shell_word(name)}"
    else:
        command = f"vllm serve {shell_word(usage.base)} --enable-lora --max-lora-rank {rank}"
        command += f" \\\n  --lora-modules {shell_word(f'{name}={name}')} --tokenizer {shell_word(name)}"
    if adapter.trust_remote_code:
        command += " --trust-remote-code"
    remark = []
    if chat_template.startswith(MARK):
        command += f" \\\n  --chat-template {shell_word(f'{name}/{CHAT_TEMPLATE}')}"
        if not adapter.is_full:
            remark = [
                tr(
                    "The template of training is in that file. One vLLM server has one chat template, for the base and "
                    "for all its adapters: an adapter with another template needs a server of its own."
                ),
                "",
            ]
    request = _request(PORT, name, usage)
    return [tr("With vLLM:"), "", *code_block(f"{command}\n{request}", "sh"), "", *remark]


def sglang_lines(output: Path, adapter: AdapterFolder, usage: Usage) -> list[str]:
    """The same for SGLang, where vLLM answers as trained. Reference: SGLang's pages on LoRA serving and on server
    arguments; a request names the base and the adapter. It needs a GPU and was not run."""
    name = output.resolve().name
    if _served_rank(output, adapter, usage) is None:
        return []
    command, model = f"sglang serve --model-path {shell_word(name)}", name
    if not adapter.is_full:
        command = f"sglang serve --model-path {shell_word(usage.base)} \\\n  --enable-lora"
        command += f" --lora-paths {shell_word(f'{name}={name}')} --tokenizer-path {shell_word(name)}"
        model = f"{usage.base}:{name}"
    if adapter.trust_remote_code:
        command += " --trust-remote-code"
    command += f" \\\n  --chat-template {shell_word(f'{name}/{CHAT_TEMPLATE}')}"
    request = _request(SGLANG_PORT, model, usage)
    about = tr("With SGLang, by its documentation; it was not run:")
    return [about, "", *code_block(f"{command}\n{request}", "sh"), ""]


def _request(port: int, model: str, usage: Usage) -> str:
    body: dict[str, Any] = {"model": model, "messages": list(usage.prompt.messages)}
    body |= {"max_tokens": NEW_TOKENS, "temperature": 0}
    if usage.repeats_penalised:
        body["repetition_penalty"] = 1.0
    return (
        f"curl http://localhost:{port}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d {shell_word(json_text(body))}"
    )


def ollama_lines(output: Path, adapter: AdapterFolder, usage: Usage) -> list[str]:
    """The commands that export the folder for Ollama and ask it; nothing where a message cannot fill the template."""
    template = adapter.template
    if not usage.prompt.messages or not (template.takes_turns or len(prompt_fields(template)) == 1):
        return []
    name = output.resolve().name
    exported = f"{name}-ollama"
    content = str(usage.prompt.messages[-1]["content"])
    commands = [
        f"yeonma export {shell_word(name)} --output_dir {shell_word(exported)} --format ollama",
        f"ollama create {shell_word(exported.lower())} -f {shell_word(f'{exported}/Modelfile')}",
        f"ollama run {shell_word(exported.lower())} {shell_word(content)}",
    ]
    about = tr("With Ollama, if llama.cpp knows the architecture of {base}:", base=code(usage.base))
    return [about, "", *code_block("\n".join(commands), "sh"), ""]
