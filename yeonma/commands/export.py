"""`yeonma export`: an adapter with its base, or a merged model, as a file that llama.cpp and Ollama run."""

from __future__ import annotations

from pathlib import Path

from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.config.settings import ExportSettings, MergeSettings
from yeonma.errors import Log
from yeonma.export.gguf_converter import convert, converter
from yeonma.export.merge_weights import weight_files
from yeonma.export.merged_model import check_output, merge, prepare
from yeonma.export.ollama_modelfile import modelfile
from yeonma.files import delete, hidden_path, move_into_place, staging_folder
from yeonma.model.load import load_config
from yeonma.tokenization.text_encoder import TextEncoder


def run(settings: ExportSettings) -> int:
    """0 where the files are written, 1 where the merged model does not say what the adapter does.

    Raises UserError as merging, where the converter cannot be had or does not take the model, and for a full disk.
    """
    asked = settings
    output = check_output(asked.output_dir)
    asker = open_prompt_builder(
        asked.model_dir, base_model=asked.base_model, trust_remote_code=asked.trust_remote_code
    )
    converter()
    least = sum(path.stat().st_size for path in weight_files(asker.source))
    with staging_folder(output, "the exported model", least) as folder:
        model = _whole_model(asked, asker, folder, _say)
        if model is None:
            return 1
        _write(asked, asker, model, folder, output.absolute().name)
        move_into_place(folder, output)
    _tell(asked, output)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _whole_model(asked: ExportSettings, asker: PromptBuilder, folder: Path, say: Log) -> Path | None:
    """The merged model's folder, made where an adapter was given; None where it does not say what the adapter does."""
    if asker.adapter.is_merged:
        return asker.adapter.path
    merged = hidden_path(folder, "merged")
    merging = prepare(
        MergeSettings(
            adapter_dir=asked.model_dir,
            output_dir=str(merged),
            base_model=asked.base_model,
            trust_remote_code=asked.trust_remote_code,
            dtype=asked.dtype,
            device=asked.device,
        )
    )
    delete(merged)
    return merged if merge(merging, merged, say).is_close else None


def _write(asked: ExportSettings, asker: PromptBuilder, model: Path, folder: Path, name: str) -> None:
    gguf = f"{name}-{asked.outtype}.gguf"
    try:
        convert(model, folder / gguf, asked.outtype, name)
    finally:
        if not asker.adapter.is_merged:
            delete(model)
    if asked.format == "ollama":
        positions = getattr(load_config(asker.source).get_text_config(), "max_position_embeddings", None)
        context = min(filter(None, (asker.adapter.rules.cutoff_len, positions)))
        made = modelfile(
            asker.adapter.template, TextEncoder.of(asker.tokenizer), gguf, asker.stop_ids, context
        )
        (folder / "Modelfile").write_text(made.text, encoding="utf-8")
        for remark in made.remarks:
            _say(remark)


def _tell(asked: ExportSettings, output: Path) -> None:
    for path in sorted(output.iterdir()):
        _say(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    if asked.format == "ollama":
        _say(f"ollama create {output.absolute().name.lower()} -f {output / 'Modelfile'}")
