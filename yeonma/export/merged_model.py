"""Merges an adapter and its base into one model, and checks that both give the same answers.

The check compares greedy answers to a few prompts, and the logits along the unmerged model's answers.
Shapes: A answer tokens of a row, V vocabulary.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yeonma.adapter.adapter_folder import (
    MANIFEST,
    MERGED,
    PUBLISHED,
    TEMPLATE,
    AdapterFolder,
    base_identity,
    check_base,
    config_hash,
    describe,
    hub_name,
    save_tokenizer,
)
from yeonma.adapter.base_check import check_content
from yeonma.adapter.base_licence import licence_note
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.adapter.samples import SAMPLES, Samples, prompts_now, read_samples
from yeonma.config.settings import MergeSettings
from yeonma.config.yaml_text import front_matter
from yeonma.errors import Log, UserError
from yeonma.export.merge_weights import (
    FORMATS,
    NeedsWholeModel,
    copy_processor,
    dtype_of,
    merge_by_shard,
    merge_in_memory,
)
from yeonma.files import files_in, move_into_place, staging_folder
from yeonma.generation.completion import generate
from yeonma.generation.sampling import SamplingParams
from yeonma.messages import counted, tr
from yeonma.model.adapter_weights import check_fits, load_adapter
from yeonma.model.language_part import absent_parameters
from yeonma.model.load import (
    load_base,
    load_config,
    load_tokenizer,
    outline,
    pick_device,
    pick_dtype,
    published_weights,
    remove_quantization,
)
from yeonma.model.position_limits import model_positions
from yeonma.model.published import Published, quantization_of
from yeonma.model.saved_config import copy_code, keep_config_keys, write_generation_config
from yeonma.model.source import BaseSource, find_base
from yeonma.model.weight_files import stored_tensors, weight_files
from yeonma.shown import code, code_block, json_text, markdown
from yeonma.tokenization.chat_template_export import export_chat_template
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.tokenization.tokenizer_files import save_tokenizer_files
from yeonma.train.memory_budget import free_memory

MEMORY_SHARE = 0.7
"""The share of free memory that a model in float32 may take; the rest is for its activations."""
ALLOWANCE_BYTES = 64 << 20
"""Disk space for the tokenizer and other small files."""
CARD = "README.md"
PLAIN_TEXTS = (
    "Question: Which city is the capital of Korea?\nAnswer:",
    "한국의 수도는",
    "def add(a, b):\n    return",
)
"""What an adapter without a template is compared on."""
MAX_NEW_TOKENS = 32
WEIGHT_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""What rounding the weights to a number format may change in a logit, with float32 arithmetic, as a fraction of the
largest logit. On SmolLM2 it changes at most a third of that."""
COMPUTE_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""The same for arithmetic in the format."""


@dataclass(frozen=True)
class MergePlan:
    """What is merged, and the prompts that check the result."""

    prompt_builder: PromptBuilder
    files: Sequence[Path]
    samples: Samples | None
    prompts: Sequence[Sequence[int]]
    max_shard_bytes: int
    device: torch.device
    weights_dtype: torch.dtype
    compute_dtype: torch.dtype
    """In which both models answer the prompts."""
    size_bytes: int
    """Of the merged weights."""
    published: Published | None
    """How the base's files are quantised."""


def prepare_merge(settings: MergeSettings, log: Log = lambda _: None) -> MergePlan:
    """Opens and checks everything before weights are loaded. Raises UserError, also if the base is another model. `log`
    gets a line if reading the base for its SHA-256 takes long."""
    prompt_builder = open_prompt_builder(
        settings.adapter_dir,
        base_model=settings.base_model,
        trust_remote_code=settings.trust_remote_code,
        template=settings.template,
    )
    source = prompt_builder.source
    if prompt_builder.adapter.is_whole:
        cure = tr("give the adapter's folder")
        if prompt_builder.adapter.is_full:
            what, cure = (
                tr("all of its weights were trained: there is no adapter to merge"),
                tr("use it as it is"),
            )
            raise UserError(what, place=settings.adapter_dir, cure=cure)
        raise UserError(tr("it is merged already"), place=settings.adapter_dir, cure=cure)
    config = load_config(source)
    published = published_weights(config, source)
    model = outline(config, source)
    parameters = prompt_builder.adapter.base.parameters
    if model is not None:
        check_unquantised(prompt_builder.adapter, model, source)
        parameters = absent_parameters(model) + sum(parameter.numel() for parameter in model.parameters())
    if (
        published is not None or PUBLISHED not in prompt_builder.adapter.details
    ):  # else it is the unquantised model
        check_content(prompt_builder.adapter, source, config=config, log=log)
    if model is not None:
        check_fits(model, str(prompt_builder.adapter.path))
    samples = read_samples(prompt_builder.adapter.path)
    files = weight_files(source)
    device, base_dtype = pick_device(settings.device), dtype_of(config, files)
    size = sum(path.stat().st_size for path in files)
    if published is not None:  # the files are smaller than what they stand for
        size = parameters * base_dtype.itemsize
    return MergePlan(
        prompt_builder=prompt_builder,
        files=files,
        samples=samples,
        prompts=_prompts(prompt_builder, samples),
        max_shard_bytes=settings.max_shard_bytes,
        device=device,
        weights_dtype=base_dtype,
        compute_dtype=pick_compute_dtype(settings.dtype, base_dtype, size, device),
        size_bytes=size,
        published=published,
    )


def pick_compute_dtype(
    dtype: str, base_dtype: torch.dtype, size_bytes: int, device: torch.device
) -> torch.dtype:
    """Resolves `auto`: float32, whose arithmetic adds no noise, if it fits into the device's memory; else the base's
    format, in which the CPU can map the weights from their files. `size_bytes`: of the weights in that format."""
    if dtype != "auto":
        return pick_dtype(dtype, device)
    needed = size_bytes * torch.float32.itemsize // base_dtype.itemsize
    free = free_memory(device)
    return torch.float32 if free is None or needed <= MEMORY_SHARE * free else base_dtype


def check_unquantised(adapter: AdapterFolder, model: Any, source: BaseSource) -> None:
    """As `check_base`, but also accepts the unquantised form of the quantised base of training."""
    identity = base_identity(model, source)
    try:
        check_base(adapter, identity)
    except UserError:
        if identity.config_sha256 != _unquantised_hash(adapter):
            raise


def _unquantised_hash(adapter: AdapterFolder) -> str | None:
    """Hash of the config of training without its quantisation, or None if that config is not available."""
    try:
        config = load_config(find_base(adapter.base.name, adapter.base.revision, adapter.trust_remote_code))
    except UserError:
        return None
    is_quantised = quantization_of(config.to_dict()) is not None
    if not is_quantised or config_hash(config) != adapter.base.config_sha256:
        return None
    remove_quantization(config)
    return config_hash(config)


def _prompts(prompt_builder: PromptBuilder, samples: Samples | None) -> list[list[int]]:
    """The sample rows' prompts, or else the template's own text. Without a template, a few plain texts."""
    if samples is not None and samples.rows:
        return [row.prompt_ids for row in samples.rows]
    adapter = prompt_builder.adapter
    texts = [adapter.template.text] if adapter.has_template else list(PLAIN_TEXTS)
    return TextEncoder.of(prompt_builder.tokenizer).batch(texts)


def merge(plan: MergePlan, output: Path, log: Log) -> Agreement:
    """Merges into a folder beside `output`, compares the answers of both models, and renames the folder if they agree.

    Raises UserError if the disk or the memory is full or the disk fails. Nothing incomplete stays in any case.
    """
    if plan.prompt_builder.remark:
        log(plan.prompt_builder.remark)
    needed = plan.size_bytes + ALLOWANCE_BYTES
    with staging_folder(output, tr("the merged model"), needed, needed_bytes=needed) as folder:
        unmerged, base_logits = _answers_unmerged(plan)
        _write_model(plan, folder, log)
        merged = _answers_merged(plan, folder, unmerged)
        agreement = measure_agreement(unmerged, merged, base_logits, plan.weights_dtype, plan.compute_dtype)
        _report(plan, agreement, log)
        if agreement.is_close:
            move_into_place(folder, output)
    return agreement


def _answers_unmerged(plan: MergePlan) -> tuple[GreedyAnswers, tuple[torch.Tensor, ...]]:
    """The answers of the adapter on its base, and the logits of the base alone along them."""
    prompt_builder = plan.prompt_builder
    model = load_base(prompt_builder.source, plan.device, plan.compute_dtype)
    peft_model = load_adapter(model, str(prompt_builder.adapter.path), trainable=False).eval()
    answers = greedy_answers(peft_model, prompt_builder.tokenizer, plan.prompts, prompt_builder.stop_ids)
    return answers, logits_along(peft_model, plan.prompts, answers.answers, adapter=False)


def _write_model(plan: MergePlan, folder: Path, log: Log) -> None:
    """Writes the whole folder of the merged model."""
    source, stop_ids = plan.prompt_builder.source, plan.prompt_builder.stop_ids
    adapter = str(plan.prompt_builder.adapter.path)
    gc.collect()  # the unmerged model
    try:
        merge_by_shard(
            source,
            plan.files,
            adapter,
            folder,
            plan.max_shard_bytes,
            plan.published,
            plan.weights_dtype,
        )
    except NeedsWholeModel as reason:
        log(tr("loading the whole base into memory: {reason}", reason=reason))
        formats = {tensor.dtype for tensor in stored_tensors(plan.files).values()} & FORMATS.keys()
        if plan.published is None and len(formats) > 1:
            written = str(plan.weights_dtype).removeprefix("torch.")
            log(
                tr(
                    "its files have weights in {formats}; all are written in {written}",
                    formats=tr(" and ").join(sorted(formats)),
                    written=written,
                )
            )
        for path in files_in(folder):
            path.unlink()
        base = load_base(source, torch.device("cpu"), plan.weights_dtype, whole=True)
        model = load_adapter(base, adapter, trainable=False)
        merge_in_memory(model, folder, plan.max_shard_bytes)
        del base, model
        gc.collect()
    keep_config_keys(source, folder)
    write_generation_config(source, folder, stop_ids)
    copy_code(source, folder)
    _write_other_files(plan, folder)
    copy_processor(source, folder)


def _write_other_files(plan: MergePlan, folder: Path) -> None:
    """Writes tokenizer, template, yeonma.json, sample rows and card, so that prompts are those of training."""
    prompt_builder = plan.prompt_builder
    adapter = prompt_builder.adapter
    if adapter.has_template:
        exported = export_chat_template(adapter.template, prompt_builder.tokenizer, adapter.rules)
        save_tokenizer(prompt_builder.tokenizer, exported, folder)
        (folder / TEMPLATE).write_bytes(adapter.template.text.encode())
        details = {**(adapter.details or _details(prompt_builder)), MERGED: True}
        details.pop(PUBLISHED, None)  # the merged weights are whole
        content = json_text(details, indent=2) + "\n"
        (folder / MANIFEST).write_text(content, encoding="utf-8")
    else:
        save_tokenizer_files(prompt_builder.tokenizer, folder)
    if (adapter.path / SAMPLES).is_file():
        shutil.copyfile(adapter.path / SAMPLES, folder / SAMPLES)
    (folder / CARD).write_text(_card(adapter, _dequantised_from(plan)), encoding="utf-8")


def _details(prompt_builder: PromptBuilder) -> dict[str, Any]:
    """yeonma.json for an adapter that another tool made."""
    adapter, source = prompt_builder.adapter, prompt_builder.source
    model = outline(load_config(source), source)
    return describe(
        adapter.base if model is None else base_identity(model, source),
        adapter.template,
        adapter.columns,
        adapter.rules,
        tokenizer=prompt_builder.tokenizer,
        trust_remote_code=source.trust_remote_code,
        trained_on={},
    )


def _dequantised_from(plan: MergePlan) -> str:
    """A sentence about a base whose files are quantised; empty for others."""
    if plan.published is None:
        return ""
    base, dtype = plan.prompt_builder.source.name, str(plan.weights_dtype).removeprefix("torch.")
    published = markdown(str(plan.published))
    name = hub_name(base) or Path(base).name
    return tr(
        " {name} is published as {published}; its weights were dequantised and are {dtype} here.",
        name=code(name),
        published=published,
        dtype=dtype,
    )


def _card(adapter: AdapterFolder, dequantised_from: str) -> str:
    trained_on = adapter.details.get("trained_on", {})
    base = hub_name(adapter.base.name)
    name = code(base or Path(adapter.base.name).name)
    about = tr("{name} with a LoRA adapter merged into it.", name=name)
    if trained_on.get("data"):
        data = Path(trained_on["data"]).name if Path(trained_on["data"]).is_absolute() else trained_on["data"]
        about = tr(
            "{name} with a LoRA adapter merged into it, trained with Yeonma on {examples} of {data}.",
            name=name,
            examples=counted(trained_on["examples"], "example"),
            data=code(data),
        )
    head = {
        **({} if base is None else {"base_model": base}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["yeonma"],
    }
    lines = [
        *front_matter(head),
        about + dequantised_from,
        "",
        *licence_note(adapter.base.name),
    ]
    if adapter.has_template:
        lines += [
            tr("## Template"),
            "",
            *code_block(adapter.template.text.rstrip("\n")),
            "",
            tr(
                "`chat_template.jinja` contains it: one user message holds the field, several come as a "
                "JSON object."
            ),
            "",
        ]
    return "\n".join(lines)


def _answers_merged(plan: MergePlan, folder: Path, unmerged: GreedyAnswers) -> GreedyAnswers:
    """The merged model's answers, loaded as another tool would load it, with its logits along the unmerged answers.

    Raises UserError if its tokenizer does not give the prompts of training.
    """
    prompt_builder = plan.prompt_builder
    adapter = prompt_builder.adapter
    source = BaseSource(str(folder), None, prompt_builder.source.trust_remote_code)
    tokenizer = load_tokenizer(source)
    if plan.samples is not None:
        now = prompts_now(plan.samples, adapter.template, adapter.columns, tokenizer, adapter.rules)
        if now != [row.prompt_ids for row in plan.samples.rows]:
            what = tr("its tokenizer does not give the token ids of training")
            cure = tr("check it with `yeonma verify {path}`", path=adapter.path)
            raise UserError(what, place=str(adapter.path), cure=cure)
    model = load_base(source, plan.device, plan.compute_dtype)
    own = greedy_answers(model, tokenizer, plan.prompts, prompt_builder.stop_ids)
    return GreedyAnswers(own.answers, logits_along(model, plan.prompts, unmerged.answers))


def _report(plan: MergePlan, agreement: Agreement, log: Log) -> None:
    has_rows = plan.samples is not None and plan.samples.rows
    prompts = (
        tr("{rows} sample rows", rows=agreement.rows)
        if has_rows
        else tr("the template's own text (no sample rows)")
    )
    if not plan.prompt_builder.adapter.has_template:
        prompts = tr("{rows} plain texts (no template)", rows=agreement.rows)
    weights_dtype, compute_dtype = (
        str(dtype).removeprefix("torch.") for dtype in (plan.weights_dtype, plan.compute_dtype)
    )
    log(
        tr(
            "merged in {weights_dtype}; compared with the unmerged model on {prompts}, in {compute_dtype}:",
            weights_dtype=weights_dtype,
            prompts=prompts,
            compute_dtype=compute_dtype,
        )
    )
    log(
        tr(
            "  largest difference of a logit {max_difference:.2g}, rounding explains up to "
            "{tolerance:.2g}; the adapter itself changes up to {adapter_effect:.2g}",
            max_difference=agreement.max_difference,
            tolerance=agreement.tolerance,
            adapter_effect=agreement.adapter_effect,
        )
    )
    counts = {"same": agreement.same_answers, "rows": agreement.rows}
    log(
        tr(
            "  {same} of {rows} greedy answers are the same; others diverge between tokens {gap:.2g} apart",
            gap=agreement.max_gap,
            **counts,
        )
        if agreement.max_gap
        else tr("  {same} of {rows} greedy answers are the same", **counts)
    )
    if agreement.adapter_effect <= agreement.tolerance:
        log(tr("  the adapter changes so little that these rows cannot show whether it was merged"))
    if not agreement.is_close:
        log(tr("the merged model does not answer as the adapter on its base does: nothing was written"))


@dataclass(frozen=True)
class GreedyAnswers:
    """A model's greedy answer to each prompt."""

    answers: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]
    """One float32 tensor of shape (A + 1, V) a prompt, on the CPU: before the answer's first token, and after each."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree. Differences are the largest of any single logit."""

    rows: int
    same_answers: int
    max_difference: float
    tolerance: float
    adapter_effect: float
    """The difference that the adapter itself makes."""
    max_gap: float
    """Where answers diverge: the largest gap, in the first model's logits, between the two tokens chosen."""

    @property
    def is_close(self) -> bool:
        """False for NaN, too. Answers may diverge only where the two tokens are almost equally likely."""
        return self.max_difference <= self.tolerance and self.max_gap <= 2 * self.tolerance


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]
) -> GreedyAnswers:
    """Answers the prompts one by one, and takes the logits along the answers.

    Raises UserError if the device's memory does not hold the model.
    """
    positions = model_positions(model.config) or 2**31
    max_new_tokens = max(1, min(MAX_NEW_TOKENS, positions - max(map(len, prompts))))
    sampling = SamplingParams(tuple(stop_ids), max_new_tokens)
    try:
        answers = generate(model, tokenizer, prompts, sampling, by_forest=False)
    except torch.OutOfMemoryError as error:
        raise UserError(
            tr("the model does not fit into the device's memory"), cure=tr("use --device cpu")
        ) from error
    token_ids = tuple(answer.token_ids for answer in answers)
    return GreedyAnswers(token_ids, logits_along(model, prompts, token_ids))


def logits_along(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, adapter: bool = True
) -> tuple[torch.Tensor, ...]:
    """Logits of shape (A + 1, V) a row. Without `adapter`, those of a PeftModel's base alone."""
    rows = []
    with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            count = len(answer) + 1
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0, -count:]
            rows.append(logits.float().cpu())
    return tuple(rows)


def measure_agreement(
    first: GreedyAnswers,
    second: GreedyAnswers,
    base: Sequence[torch.Tensor],
    weights_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Agreement:
    """Compares two models. The logits of `second`, and those of the base alone, are along the answers of `first`.

    The tolerance follows from the number formats of the merged weights and of the arithmetic.
    """
    pairs = list(zip(first.logits, second.logits, strict=True))
    largest_logit = max(float(logits.abs().max()) for logits in first.logits)
    gaps = [
        _gap(logits, one, other)
        for logits, one, other in zip(first.logits, first.answers, second.answers, strict=True)
        if one != other
    ]
    rounding = max(WEIGHT_ROUNDING.get(weights_dtype, 1e-4), COMPUTE_ROUNDING[compute_dtype])
    return Agreement(
        rows=len(pairs),
        same_answers=len(pairs) - len(gaps),
        max_difference=_max_difference(pairs),
        tolerance=rounding * max(1.0, largest_logit),
        adapter_effect=_max_difference(list(zip(first.logits, base, strict=True))),
        max_gap=max(gaps, default=0.0),
    )


def _max_difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """NaN if there is one, which Python's max() would lose."""
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())


def _gap(logits: torch.Tensor, one: Sequence[int], other: Sequence[int]) -> float:
    """By how much, in logits, the first token where two answers diverge exceeds the other answer's token.

    If one answer is the beginning of the other, the token that ended it is not known here: the gap of the two best.
    """
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if at is None:
        best_two = torch.topk(logits[min(len(one), len(other))], 2).values
        return float(best_two[0] - best_two[1])
    return float(logits[at, one[at]] - logits[at, other[at]])
