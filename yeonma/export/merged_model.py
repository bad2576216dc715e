"""`yeonma merge`: an adapter and its base as one whole model, which is then asked whether it still says the same."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yeonma.adapter.adapter_folder import (
    MANIFEST,
    MERGED,
    TEMPLATE,
    AdapterFolder,
    base_identity,
    check_base,
    config_hash,
    save_tokenizer,
)
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.adapter.samples import SAMPLES, Samples, prompts_now, read_samples
from yeonma.config.settings import MergeSettings
from yeonma.errors import Log, UserError
from yeonma.export import merge_weights as weights
from yeonma.export.agreement import Agreement, GreedyAnswers, answers_of, compare, logits_along
from yeonma.files import files_in, move_into_place, staging_folder, user_path
from yeonma.model.load import (
    load_adapter,
    load_base,
    load_config,
    load_tokenizer,
    outline,
    pick_device,
    pick_dtype,
)
from yeonma.model.source import BaseSource, find_base
from yeonma.tokenization.chat_template_export import export_chat_template
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.train.memory_budget import free_memory

MEMORY_SHARE = 0.7
"""Of the memory that is free, what a model in float32 may take; the rest is for its activations."""
ALLOWANCE_BYTES = 64 << 20
"""For the tokenizer and the small files."""
CARD = "README.md"


@dataclass(frozen=True)
class Merging:
    """What is merged, and what it is asked with."""

    asker: PromptBuilder
    files: Sequence[Path]
    samples: Samples | None
    prompts: Sequence[Sequence[int]]
    max_shard_bytes: int
    device: torch.device
    weights_dtype: torch.dtype
    dtype: torch.dtype
    """What both models compute in as they are asked."""


def run(settings: MergeSettings) -> int:
    """0 where the merged model says what the adapter on its base says, else 1, with nothing left behind.

    Raises UserError for an adapter of another base, a base that lacks files, and where the disk is full.
    """
    asked = settings
    output = check_output(asked.output_dir)
    merging = prepare(asked)
    agreement = merge(merging, output, lambda text: print(text, flush=True))
    if agreement.is_close:
        print(f"{output} is a whole model; the adapter's folder is not needed to load it")
    return 0 if agreement.is_close else 1


def check_output(written: str) -> Path:
    """The folder to make. Raises UserError where there is something already."""
    output = user_path(written, f"output_dir {written}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(
            "it is there already", place=f"output_dir {output}", cure="give another, or remove it"
        )
    return output


def prepare(asked: MergeSettings) -> Merging:
    """All that may be wrong, before any weights are loaded. Raises UserError."""
    asker = open_prompt_builder(
        asked.adapter_dir, base_model=asked.base_model, trust_remote_code=asked.trust_remote_code
    )
    if asker.adapter.is_merged:
        raise UserError("it is merged already", place=asked.adapter_dir, cure="give the adapter's folder")
    config = load_config(asker.source)
    if getattr(config, "quantization_config", None) is not None:
        cure = "name the unquantised model that it was made of with --base_model"
        raise UserError("the base's weights are quantised", place=asker.source.name, cure=cure)
    model = outline(config, asker.source)
    if model is not None:
        check_unquantised(asker.adapter, model, asker.source)
    samples = read_samples(asker.adapter.path)
    files = weights.weight_files(asker.source)
    device, own = pick_device(asked.device), weights.dtype_of(config, files)
    return Merging(
        asker=asker,
        files=files,
        samples=samples,
        prompts=_prompts(asker, samples),
        max_shard_bytes=asked.max_shard_bytes,
        device=device,
        weights_dtype=own,
        dtype=dtype_to_ask_in(asked.dtype, own, files, device),
    )


def dtype_to_ask_in(dtype: str, own: torch.dtype, files: Sequence[Path], device: torch.device) -> torch.dtype:
    """auto: float32, in which computing makes no noise of its own, where the device's memory holds it; else the base's
    own number format, whose weights the CPU reads from its files as it needs them."""
    if dtype != "auto":
        return pick_dtype(dtype, device)
    needed = sum(path.stat().st_size for path in files) * torch.float32.itemsize // own.itemsize
    free = free_memory(device)
    return torch.float32 if free is None or needed <= MEMORY_SHARE * free else own


def check_unquantised(adapter: AdapterFolder, model: Any, source: BaseSource) -> None:
    """As `check_base`, but a base may also be the unquantised form of the quantised one that was trained on."""
    mine = base_identity(model, source)
    try:
        check_base(adapter, mine)
    except UserError:
        if mine.config_sha256 != _unquantised_hash(adapter):
            raise


def _unquantised_hash(adapter: AdapterFolder) -> str | None:
    """Of the config that the adapter was trained on without its quantisation; None where that cannot be told."""
    try:
        config = load_config(find_base(adapter.base.name, adapter.base.revision, adapter.trust_remote_code))
    except UserError:
        return None
    if (
        getattr(config, "quantization_config", None) is None
        or config_hash(config) != adapter.base.config_sha256
    ):
        return None
    del config.quantization_config
    return config_hash(config)


def _prompts(asker: PromptBuilder, samples: Samples | None) -> list[list[int]]:
    """The sample rows' prompts; without any, the template's own text."""
    rows = samples.rows if samples is not None else ()
    if rows:
        return [row.prompt_ids for row in rows]
    return TextEncoder.of(asker.tokenizer).batch([asker.adapter.template.text])


def merge(merging: Merging, output: Path, say: Log) -> Agreement:
    """Merge beside `output`, ask both models, and give the folder its name where they agree.

    Raises UserError where the disk is full or fails, or memory is short. Whatever ends it, nothing half-written stays.
    """
    needed = sum(path.stat().st_size for path in merging.files) + ALLOWANCE_BYTES
    with staging_folder(output, "the merged model", needed, needed_bytes=needed) as folder:
        before, base = _ask_unmerged(merging)
        _write(merging, folder, say)
        after = _ask_merged(merging, folder, before)
        agreement = compare(before, after, base, merging.weights_dtype, merging.dtype)
        _tell(merging, agreement, say)
        if agreement.is_close:
            move_into_place(folder, output)
    return agreement


def _ask_unmerged(merging: Merging) -> tuple[GreedyAnswers, tuple[torch.Tensor, ...]]:
    """What the adapter on its base says, and the base alone along the same answers."""
    asker = merging.asker
    model = load_base(asker.source, merging.device, merging.dtype)
    peft_model = load_adapter(model, str(asker.adapter.path), trainable=False).eval()
    said = answers_of(peft_model, asker.tokenizer, merging.prompts, asker.stop_ids)
    return said, logits_along(peft_model, merging.prompts, said.answers, adapter=False)


def _write(merging: Merging, folder: Path, say: Log) -> None:
    """The whole folder of the merged model."""
    asker = merging.asker
    adapter, cpu = str(asker.adapter.path), torch.device("cpu")
    gc.collect()  # the model that was just asked
    try:
        weights.merge_by_shard(asker.source, merging.files, adapter, folder, merging.max_shard_bytes)
    except weights.OnlyInMemory as why:
        say(f"the base is held in memory as a whole: {why}")
        for path in files_in(folder):
            path.unlink()
        model = load_adapter(load_base(asker.source, cpu, merging.weights_dtype), adapter, trainable=False)
        weights.merge_in_memory(model, folder, merging.max_shard_bytes)
        del model
        gc.collect()
    weights.write_generation_config(asker.source, folder, asker.stop_ids)
    weights.copy_code(asker.source, folder)
    _write_around(asker, folder)


def _write_around(asker: PromptBuilder, folder: Path) -> None:
    """What makes the merged model ask with the trained tokens: tokenizer, template, yeonma.json, sample rows, card."""
    adapter = asker.adapter
    save_tokenizer(asker.tokenizer, export_chat_template(adapter.template, asker.tokenizer), folder)
    for name in (TEMPLATE, SAMPLES):
        if (adapter.path / name).is_file():
            shutil.copyfile(adapter.path / name, folder / name)
    details = {**adapter.details, MERGED: True}
    (folder / MANIFEST).write_text(json.dumps(details, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(adapter), encoding="utf-8")


def _card(adapter: AdapterFolder) -> str:
    on = adapter.details.get("trained_on", {})
    about = (
        f", trained with Yeonma on {on['examples']:,} examples of `{on['data']}`" if on.get("data") else ""
    )
    fence = "````" if "```" in adapter.template.text else "```"
    lines = [
        "---",
        f"base_model: {adapter.base.name}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
    ]
    lines += [
        "tags: [yeonma]",
        "---",
        "",
        f"`{adapter.base.name}` with a LoRA adapter merged into it{about}.",
        "",
    ]
    lines += ["## Template", "", f"{fence}text", adapter.template.text.rstrip("\n"), fence, ""]
    lines += [
        "`chat_template.jinja` carries it: one user message holds the field, several come as a JSON object.",
        "",
    ]
    return "\n".join(lines)


def _ask_merged(merging: Merging, folder: Path, before: GreedyAnswers) -> GreedyAnswers:
    """What the folder's own model says, as another tool would load it. Raises UserError where its tokenizer asks
    otherwise."""
    adapter, source = (
        merging.asker.adapter,
        BaseSource(str(folder), None, merging.asker.source.trust_remote_code),
    )
    tokenizer = load_tokenizer(source)
    if merging.samples is not None:
        now = prompts_now(merging.samples, adapter.template, adapter.columns, tokenizer, adapter.rules)
        if now != [row.prompt_ids for row in merging.samples.rows]:
            cure = f"look at it with `yeonma verify {adapter.path}`"
            raise UserError(
                "its tokenizer does not ask with the trained tokens", place=str(adapter.path), cure=cure
            )
    model = load_base(source, merging.device, merging.dtype)
    said = answers_of(model, tokenizer, merging.prompts, merging.asker.stop_ids)
    return GreedyAnswers(said.answers, logits_along(model, merging.prompts, before.answers))


def _tell(merging: Merging, found: Agreement, say: Log) -> None:
    rows = merging.samples is not None and merging.samples.rows
    asked = f"{found.rows} sample rows" if rows else "the template's own text (there are no sample rows)"
    own, computed = (str(each).removeprefix("torch.") for each in (merging.weights_dtype, merging.dtype))
    say(f"merged in {own}; merged and unmerged asked {asked}, computing in {computed}:")
    say(
        f"  the largest difference of a logit is {found.largest:.2g}, where up to {found.tolerance:.2g} is rounding; "
        f"the adapter itself makes {found.effect:.2g}"
    )
    parted = f"; others part where two tokens are {found.parted_at:.2g} apart" if found.parted_at else ""
    say(f"  {found.same_answers} of {found.rows} greedy answers are the same{parted}")
    if found.effect <= found.tolerance:
        say("  that is so little that these rows cannot show whether the adapter was merged")
    if not found.is_close:
        say("the merged model does not say what the adapter on its base says: nothing was written")
