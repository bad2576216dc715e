"""`yeonma export`: writes an adapter with its base, or a merged model, as a file for llama.cpp or Ollama."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yeonma.adapter.adapter_folder import CHAT_TEMPLATE
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.config.settings import ExportSettings, MergeSettings
from yeonma.errors import UserError
from yeonma.export.gguf_converter import CONVERTER, adds_start, convert
from yeonma.export.gguf_quantiser import K_QUANTS, QUANTISER, QuantisedTypes, quantise
from yeonma.export.llama_cpp_check import check_answers, check_prompts, check_texts, is_installed
from yeonma.export.lora_gguf import LORA_CONVERTER, check_lora, convert_lora
from yeonma.export.merged_model import MergePlan, merge, prepare_merge
from yeonma.export.ollama_modelfile import modelfile
from yeonma.export.tool_folder import install_tool
from yeonma.files import delete, hidden_path, move_into_place, new_output_folder, staging_folder
from yeonma.messages import tr
from yeonma.model.language_part import multimodal_class
from yeonma.model.load import load_config
from yeonma.model.weight_files import weight_files
from yeonma.shown import one_line, shell_word
from yeonma.streams import say
from yeonma.tokenization.text_encoder import TextEncoder


@dataclass(frozen=True)
class ExportedFiles:
    """The folder that was written, and lines about it: its files with their sizes, and what to do next."""

    folder: Path
    lines: Sequence[str]


def run(settings: ExportSettings) -> int:
    """Returns 0 if the files are written, 1 if the merged model does not agree with the adapter on its base.

    Raises UserError as `export`.
    """
    exported = export(settings)
    if exported is None:
        return 1
    for line in exported.lines:
        say(line)
    return 0


def export(settings: ExportSettings) -> ExportedFiles | None:
    """Writes the files. None, after a message, if the merged model does not agree with the adapter on its base.

    Raises UserError as merging, and if the converter cannot be installed or does not support the model.
    """
    output = new_output_folder(settings.output_dir)
    prompt_builder = open_prompt_builder(
        settings.model_dir,
        base_model=settings.base_model,
        trust_remote_code=settings.trust_remote_code,
        template=settings.template,
    )
    if settings.format == "lora":
        return _export_lora(settings, prompt_builder, output)
    if settings.format == "ollama":
        prompt_builder.check_template()
    plan = None if prompt_builder.adapter.is_whole else _merge_plan(settings)
    install_tool(CONVERTER)
    if settings.outtype in K_QUANTS:
        install_tool(QUANTISER)
    least_bytes = sum(path.stat().st_size for path in weight_files(prompt_builder.source))
    with staging_folder(output, tr("the exported model"), least_bytes) as folder:
        model = prompt_builder.adapter.path if plan is None else _merged_model(plan, folder)
        if model is None:
            return None
        gguf = _write(settings, prompt_builder, model, folder, one_line(output.absolute().name))
        if is_installed() and prompt_builder.adapter.has_template:
            check_prompts(gguf, prompt_builder, say)
            check_answers(gguf, prompt_builder.adapter.path, say)
        move_into_place(folder, output)
    lines = _sizes(output)
    if multimodal_class(load_config(prompt_builder.source)) is not None:
        lines.append(
            tr(
                "the GGUF file holds the language model alone; its towers for images and sound are not "
                "exported"
            )
        )
    if settings.format == "ollama":
        name, file = shell_word(output.absolute().name.lower()), shell_word(str(output / "Modelfile"))
        lines.append(f"ollama create {name} -f {file}")
    return ExportedFiles(output, tuple(lines))


def _merge_plan(settings: ExportSettings) -> MergePlan:
    return prepare_merge(
        MergeSettings(
            adapter_dir=settings.model_dir,
            output_dir=settings.output_dir,
            base_model=settings.base_model,
            trust_remote_code=settings.trust_remote_code,
            template=settings.template,
            dtype=settings.dtype,
            device=settings.device,
        ),
        say,
    )


def _merged_model(plan: MergePlan, folder: Path) -> Path | None:
    """The folder of the merged model, beside `folder`. None if it does not agree with the adapter on its base."""
    merged = hidden_path(folder, "merged")
    delete(merged)
    return merged if merge(plan, merged, say).is_close else None


def _write(
    settings: ExportSettings, prompt_builder: PromptBuilder, model: Path, folder: Path, name: str
) -> Path:
    """Returns the path of the GGUF file."""
    gguf, is_k_quant = f"{name}-{settings.outtype}.gguf", settings.outtype in K_QUANTS
    whole = hidden_path(folder / gguf, "whole") if is_k_quant else folder / gguf
    try:
        convert(model, whole, "auto" if is_k_quant else settings.outtype, name)
    finally:
        if not prompt_builder.adapter.is_whole:
            delete(model)
    if is_k_quant:
        _say_fallback(quantise(whole, folder / gguf, settings.outtype), settings.outtype)
        delete(whole)
    if settings.format == "ollama":
        written = modelfile(
            prompt_builder.adapter.template,
            TextEncoder.of(prompt_builder.tokenizer),
            gguf,
            prompt_builder.stop_ids,
            prompt_builder.rules,
            adds_start(folder / gguf),
        )
        (folder / "Modelfile").write_text(written.text, encoding="utf-8")
        for remark in written.remarks:
            say(remark)
        if is_installed():
            check_texts(folder / gguf, written.trials, say)
    return folder / gguf


def _sizes(output: Path) -> list[str]:
    return [f"{path}  {path.stat().st_size / 1e6:,.1f} MB" for path in sorted(output.iterdir())]


def _say_fallback(types: QuantisedTypes, outtype: str) -> None:
    """A warning if many matrices are of a larger type than the one that was asked for."""
    if 2 * types.fallen_back > types.matrices:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(types.counts.items()))
        say(
            tr(
                "warning: {fallen_back} of {matrices} matrices cannot be {outtype}, whose rows must be multiples of "
                "256: the file has {counts}",
                fallen_back=types.fallen_back,
                matrices=types.matrices,
                outtype=outtype,
                counts=counts,
            )
        )


def _export_lora(settings: ExportSettings, prompt_builder: PromptBuilder, output: Path) -> ExportedFiles:
    """The adapter alone, with the chat template that a server needs beside it."""
    if settings.outtype in K_QUANTS:
        cure = tr("take f16, bf16, f32 or q8_0")
        raise UserError(
            tr("an adapter cannot be a k-quant"), place=f"--outtype {settings.outtype}", cure=cure
        )
    check_lora(prompt_builder)
    install_tool(LORA_CONVERTER)
    adapter = prompt_builder.adapter
    with staging_folder(output, tr("the exported adapter"), 0) as folder:
        gguf = folder / f"{one_line(output.absolute().name)}-lora-{settings.outtype}.gguf"
        convert_lora(prompt_builder, gguf, settings.outtype, hidden_path(folder, "adapter"))
        template = adapter.path / CHAT_TEMPLATE
        if template.is_file():
            shutil.copyfile(template, folder / CHAT_TEMPLATE)
        move_into_place(folder, output)
    lines = _sizes(output)
    command = f"llama-server -m BASE.gguf --lora {shell_word(str(output / gguf.name))} --jinja"
    if (output / CHAT_TEMPLATE).is_file():
        command += f" --chat-template-file {shell_word(str(output / CHAT_TEMPLATE))}"
    lines += [tr("serve it with the GGUF file of its base, {base}:", base=adapter.base.name), command]
    return ExportedFiles(output, tuple(lines))
