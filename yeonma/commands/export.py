"""`yeonma export`: writes an adapter with its base, or a merged model, as a file for llama.cpp or Ollama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.config.settings import ExportSettings, MergeSettings
from yeonma.export.gguf_converter import convert, install_converter
from yeonma.export.llama_cpp_check import check_prompts, is_installed
from yeonma.export.merged_model import MergePlan, merge, prepare_merge
from yeonma.export.ollama_modelfile import modelfile
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
    if settings.format == "ollama":
        prompt_builder.check_template()
    plan = None if prompt_builder.adapter.is_whole else _merge_plan(settings)
    install_converter()
    least_bytes = sum(path.stat().st_size for path in weight_files(prompt_builder.source))
    with staging_folder(output, tr("the exported model"), least_bytes) as folder:
        model = prompt_builder.adapter.path if plan is None else _merged_model(plan, folder)
        if model is None:
            return None
        gguf = _write(settings, prompt_builder, model, folder, one_line(output.absolute().name))
        if is_installed() and prompt_builder.adapter.has_template:
            check_prompts(gguf, prompt_builder, say)
        move_into_place(folder, output)
    lines = [f"{path}  {path.stat().st_size / 1e6:,.1f} MB" for path in sorted(output.iterdir())]
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
    gguf = f"{name}-{settings.outtype}.gguf"
    try:
        convert(model, folder / gguf, settings.outtype, name)
    finally:
        if not prompt_builder.adapter.is_whole:
            delete(model)
    if settings.format == "ollama":
        context_tokens = prompt_builder.rules.cutoff_len
        encoder = TextEncoder.of(prompt_builder.tokenizer)
        template, stop_ids = prompt_builder.adapter.template, prompt_builder.stop_ids
        written = modelfile(template, encoder, gguf, stop_ids, context_tokens)
        (folder / "Modelfile").write_text(written.text, encoding="utf-8")
        for remark in written.remarks:
            say(remark)
    return folder / gguf
