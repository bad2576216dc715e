"""vLLM in our place: whether it would ask as the adapters were trained, and the command that runs it.

https://docs.vllm.ai/en/latest/features/lora.html and .../serving/openai_compatible_server.html have the flags.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from yeonma.adapter.adapter_folder import CHAT_TEMPLATE
from yeonma.adapter.prompt_builder import PromptBuilder, held_as
from yeonma.config.settings import AskedQuantization
from yeonma.tokenization.chat_template_export import why_not_carried

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes, but for 1, which not every version does."""


def is_there() -> bool:
    """Whether vLLM is installed and there is a GPU for it."""
    if find_spec("vllm") is None:
        return False
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class VllmPlan:
    """What vLLM is to serve. `adapters`: by their names in requests, the folders and LoRA ranks."""

    base: str
    base_name: str
    revision: str | None
    adapters: Mapping[str, tuple[Path, int]]
    host: str
    port: int
    dtype: str
    trust_remote_code: bool
    temperature: float
    max_new_tokens_limit: int


def vllm_command(plan: VllmPlan) -> list[str]:
    """The words of the command line. The key is not among them: vLLM takes it from $VLLM_API_KEY."""
    folders = [folder for folder, _ in plan.adapters.values()]
    highest = max(rank for _, rank in plan.adapters.values())
    # a server of requests as they are: none of the settings that the base's own file brings
    sampling = {
        "temperature": plan.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": plan.max_new_tokens_limit,  # a bound for all requests
    }
    modules = [json.dumps({"name": name, "path": str(path)}) for name, (path, _) in plan.adapters.items()]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", plan.base]
    words += ["--served-model-name", plan.base_name]
    words += ["--tokenizer", str(folders[0]), "--chat-template", str(folders[0] / CHAT_TEMPLATE)]
    words += ["--enable-lora", "--lora-modules", *modules, "--max-loras", str(len(modules))]
    words += ["--max-lora-rank", str(next(rank for rank in RANKS if rank >= highest))]
    words += ["--override-generation-config", json.dumps(sampling)]
    words += ["--host", plan.host, "--port", str(plan.port), "--dtype", plan.dtype]
    if plan.revision is not None:
        words += ["--revision", plan.revision]
    return [*words, "--trust-remote-code"] if plan.trust_remote_code else words


def why_not(askers: Sequence[PromptBuilder], quantization: AskedQuantization = "auto") -> str:
    """Why vLLM would not answer as the adapters were trained, or cannot at all; empty where nothing speaks against it.

    It has one chat template for all of them, which must give the trained tokens.
    """
    held = next((kind for each in askers if (kind := held_as(quantization, each.adapter)) != "none"), None)
    if held is not None:
        return f"it would not hold the base in {held} as Yeonma does"
    templates = {_chat_template(asker) for asker in askers}
    if len(templates) > 1:
        return "the adapters have different chat templates, and it has one for all"
    return next((reason for asker in askers if (reason := _why_not(asker, next(iter(templates))))), "")


def rank_of(asker: PromptBuilder) -> int:
    """The highest rank of the adapter's layers."""
    config = _adapter_config(asker)
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def _adapter_config(asker: PromptBuilder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((asker.adapter.path / "adapter_config.json").read_text("utf-8"))
    return found


def _chat_template(asker: PromptBuilder) -> str | None:
    path = asker.adapter.path / CHAT_TEMPLATE
    return path.read_bytes().decode() if path.is_file() else None


def _why_not(asker: PromptBuilder, chat_template: str | None) -> str:
    path = asker.adapter.path
    if _adapter_config(asker).get("use_dora"):
        return f"it has no DoRA, which {path} is"
    if rank_of(asker) > RANKS[-1]:
        return f"it has no ranks above {RANKS[-1]}, and {path} has {rank_of(asker)}"
    if not set(asker.stop_ids) <= _own_stops(asker):
        return f"it would not end answers where {path} does"
    if chat_template is None:
        return f"{path} has no {CHAT_TEMPLATE}"
    template = asker.adapter.template
    if any(asker.frame(variant) != ("", "") for variant in range(len(template.variants))):
        return f"the template of {path} goes on after the answer's beginning, which it would show"
    if why_not_carried(template, asker.tokenizer, chat_template):
        return f"the chat template in {path} does not give the trained tokens"
    return ""


def _own_stops(asker: PromptBuilder) -> set[int]:
    """The tokens at which vLLM ends an answer: the tokenizer's and those of the base's generation config."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(asker.source.name, revision=asker.source.revision or "main")
        own = config.eos_token_id
    except (OSError, ValueError):
        own = None
    listed = own if isinstance(own, list) else [own]
    return {number for number in [*listed, asker.tokenizer.eos_token_id] if number is not None}
