"""A model ready to use: the base, its adapters, forest support and faster kernels.

`build_policy` builds one for training or generation, `load_policy` one for an adapter folder. No other module patches
models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from yeonma.adapter.adapter_folder import BaseIdentity, base_identity, check_continued
from yeonma.adapter.base_check import check_content
from yeonma.adapter.found_adapter import BASE_CURE
from yeonma.adapter.prompt_builder import Prompt, PromptBuilder, open_prompt_builder, quantization_for
from yeonma.batch.batch import Batch
from yeonma.config.parse import config_from_keywords
from yeonma.config.settings import (
    AnswerSettings,
    Checkpointing,
    GenerateSettings,
    Quantization,
    QuantizationOrAuto,
    TorchCompile,
)
from yeonma.data.columns import Columns
from yeonma.data.python_rows import is_table, rows_of_table
from yeonma.data.rows import Row
from yeonma.errors import Log, UserError, either, first_line
from yeonma.generation.completion import Answer, Ids, generate
from yeonma.generation.sampling import SamplingParams
from yeonma.generation.token_scores import ScoreLog
from yeonma.messages import counted, tr
from yeonma.model import load
from yeonma.model.adapter_file import read_header
from yeonma.model.adapter_weights import (
    add_lora_of,
    add_rows,
    added_rows,
    check_fits,
    load_adapter,
    load_additional_adapter,
)
from yeonma.model.attention.backend import Capability
from yeonma.model.attention.dispatch import FOREST, capability_of
from yeonma.model.forest_support import attention, check_forest_support
from yeonma.model.gradient_check import check_input_gradients
from yeonma.model.kernels.elementwise import PLAIN, Kernels
from yeonma.model.kernels.patch import KernelReport, patch_kernels, pick_kernels
from yeonma.model.language_part import build_empty
from yeonma.model.logprobs import (
    CUDA_CHUNK_BYTES,
    ForestSupport,
    TokenScores,
    batch_logprobs,
    example_scores,
    plain_head,
)
from yeonma.model.memory_trace import Blueprint
from yeonma.model.packed_experts import pack_experts_on_meta
from yeonma.model.published import published_in
from yeonma.model.quantized import (
    hold_in_parameters,
    pack_on_meta,
    pack_taken,
    packed_layers,
    quantise_on_meta,
    quantised_layers,
    take_weights_to_pack,
)
from yeonma.model.sharding import gathered_bytes, is_sharded, shard_weights
from yeonma.model.source import BaseSource
from yeonma.model.train_mode import train_adapter
from yeonma.tokenization.reasoning import AnswerParts


@dataclass(frozen=True, eq=False)
class Policy:
    """A model ready for training or generation; see `build_policy` and `load_policy`.

    `dataclasses.replace(policy, adapter_weights=False)` is the base without its adapter, and shares its memory.
    """

    model: Any
    """A PeftModel, or the transformers model itself if there is no adapter or if it is merged."""
    source: BaseSource
    base: BaseIdentity
    support: ForestSupport
    """Whether the model supports forests, and how its log-probabilities are computed."""
    kernels: KernelReport
    """Which layers use faster kernels."""
    prompt_builder: PromptBuilder | None = None
    """Turns rows into prompts. Without one, prompts must be token ids."""
    adapter_name: str = "default"
    """PEFT's name of the adapter to use; see `adapter_names`."""
    adapter_weights: bool = True
    """Whether to use the adapter; False for the base alone."""

    @property
    def transformers_model(self) -> Any:
        """The model without PEFT's wrapper. Its layers contain the adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def vocabulary_size(self) -> int:
        """The number of rows of the embedding."""
        rows: int = self.transformers_model.get_input_embeddings().weight.shape[0]
        return rows

    @contextmanager
    def active(self) -> Iterator[None]:
        """Activates this policy's adapter, or none, within the block. Policies with one base share its layers.

        Raises UserError if `adapter_weights` is False and the adapter is merged into the base.
        """
        if self.model is self.transformers_model:
            if not self.adapter_weights:
                self._check_base_is_apart()
            yield
        elif not self.adapter_weights:
            with self.model.disable_adapter():
                yield
        else:
            if self.model.active_adapter != self.adapter_name:
                self.model.set_adapter(self.adapter_name, inference_mode=True)
            yield

    def without_adapter(self) -> Policy:
        """The base alone, in the same memory.

        Raises UserError if the adapter is merged into the base, or has tokens that the base does not know.
        """
        self._check_base_is_apart()
        if self.prompt_builder is not None and self.model is not self.transformers_model:
            adapter = self.prompt_builder.adapter
            if adapter.new_tokens:
                raise _unknown_to_base(len(adapter.new_tokens), str(adapter.path))
            check_outline(self.source, [str(adapter.path)], adapter_weights=False)
        return replace(self, adapter_weights=False)

    def _check_base_is_apart(self) -> None:
        """Raises UserError if the base's own weights are not there any more."""
        builder = self.prompt_builder
        if self.model is self.transformers_model and builder is not None and builder.adapter.is_whole:
            what, cure = tr("the adapter is merged into this model"), tr("use the adapter's folder instead")
            if builder.adapter.is_full:
                what, cure = tr("all weights of this model were trained"), tr("use the base model itself")
            raise UserError(what, place=str(builder.adapter.path), cure=cure)

    def logprobs(self, batch: Batch, *, share_prefix: bool = True) -> torch.Tensor:
        """logprob_N of the batch's trained tokens, example by example, in float32 and with its gradient.

        The whole batch goes through the model at once. `share_prefix` False computes common beginnings once per
        example.
        """
        model = self.transformers_model
        with self.active(), attention(model, FOREST) if self.support.forest else nullcontext():
            return batch_logprobs(model, self.support, batch, share_prefix=share_prefix)

    def token_scores(
        self,
        token_ids: Sequence[NDArray[Any]],
        scored: Sequence[NDArray[np.bool_]],
        *,
        top: int,
        units: Sequence[int] | None = None,
    ) -> list[TokenScores]:
        """For each sequence, the log-probabilities of its scored tokens and the `top` most likely ones in their places,
        without gradients; as `example_scores`. All sequences go through the model at once; if memory runs out, half of
        them. Raises UserError if a single one does not fit into memory."""
        model, middle = self.transformers_model, len(token_ids) // 2
        implementation = FOREST if self.support.forest else self.support.plain_attention
        try:
            with self.active(), attention(model, implementation):
                return example_scores(model, self.support, token_ids, top, scored=scored, units=units)
        except torch.OutOfMemoryError as error:
            if not middle or is_sharded(model):  # its processes must stay in step
                what = tr(
                    "a request of {tokens} does not fit into the device's memory",
                    tokens=counted(max(map(len, token_ids)), "token"),
                )
                raise UserError(what, cure=tr("use --dtype bfloat16 or --device cpu")) from error
        return [
            scores
            for half in (slice(middle), slice(middle, None))
            for scores in self.token_scores(
                token_ids[half], scored[half], top=top, units=None if units is None else units[half]
            )
        ]

    def generate_from_ids(
        self,
        prompts: Sequence[Ids],
        tokenizer: Any,
        sampling: SamplingParams,
        *,
        batch_size: int = GenerateSettings.batch_size,
        on_answer: Callable[[int, Answer], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        seeds: Sequence[int] | None = None,
        scores: Sequence[ScoreLog] | None = None,
        is_over: Callable[[int, Sequence[int]], bool] | None = None,
    ) -> list[Answer]:
        """Generates answers to prompts of token ids, in the order of the prompts. Parameters and errors as
        `yeonma.generation.completion.generate`."""
        with self.active():
            return generate(
                self.transformers_model,
                tokenizer,
                prompts,
                sampling,
                by_forest=self.support.forest,
                batch_size=batch_size,
                on_answer=on_answer,
                on_text=on_text,
                seeds=seeds,
                scores=scores,
                is_over=is_over,
            )

    @overload
    def generate(
        self, row: Mapping[str, object], *, columns: Columns = ..., batch_size: int = ..., **options: Any
    ) -> str: ...
    @overload
    def generate(
        self,
        row: Any,
        *,
        columns: Columns = ...,
        batch_size: int = ...,
        **options: Any,
    ) -> list[str]: ...
    def generate(
        self,
        row: Any,
        *,
        columns: Columns = None,
        batch_size: int = GenerateSettings.batch_size,
        **options: Any,
    ) -> str | list[str]:
        """Generates the answer to one row, or a list of answers to several: `policy.generate({"document": "..."})`.

        Several rows are a list of dicts, a pandas or polars DataFrame, or a `datasets.Dataset`. A row needs the
        template's prompt fields, under the column names of training or the template's own field names; `columns` maps
        fields to other columns. `options` are those of `yeonma generate`: max_new_tokens, temperature,
        top_p, top_k, repetition_penalty, seed. Raises UserError for rows that do not fit the template and for unknown
        options.
        """
        settings = _answer_settings(options)
        rows = _rows([row] if isinstance(row, Mapping) else row)
        prompts = self._builder().prompts(rows, columns, max_new_tokens=settings.max_new_tokens)
        answers = [answer.content for answer in self.answers(prompts, settings, batch_size=batch_size)]
        return answers[0] if isinstance(row, Mapping) else answers

    def complete(self, text: str, **options: Any) -> str:
        """Continues a plain text, without the template. Options as for `generate`."""
        settings = _answer_settings(options)
        return self.answers([self.text_prompt(text, settings.max_new_tokens)], settings)[0].content

    def prompt_ids(
        self, row: Mapping[str, object], *, columns: Columns = None, max_new_tokens: int = 128
    ) -> NDArray[np.int32]:
        """The token ids of a row's prompt, the same as in training, of shape (tokens,)."""
        (prompt,) = self._builder().prompts(_rows([row]), columns, max_new_tokens=max_new_tokens)
        return prompt.token_ids

    def text_prompt(self, text: str, max_new_tokens: int, place: str = "prompt") -> Prompt:
        """As `PromptBuilder.text_prompt`."""
        return self._builder().text_prompt(text, place, max_new_tokens)

    def answers(
        self,
        prompts: Sequence[Prompt],
        settings: AnswerSettings,
        *,
        batch_size: int = GenerateSettings.batch_size,
        on_answer: Callable[[int], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[AnswerParts]:
        """Generates answers as text, in the order of the prompts, without the template's text around them.

        `on_answer` is called with the prompt's index as soon as its answer is complete. `on_text`, for a single prompt,
        is called with each new piece of the generated text, with all that the template puts around the answer.
        """
        builder = self._builder()

        def call_on_answer(index: int, answer: Answer) -> None:
            if on_answer is not None:
                on_answer(index)

        answers = self.generate_from_ids(
            [prompt.token_ids for prompt in prompts],
            builder.tokenizer,
            SamplingParams.of(settings, builder.stop_ids, builder.shown_ids),
            batch_size=batch_size,
            on_answer=call_on_answer,
            on_text=on_text,
        )
        return [
            AnswerParts(prompt.reasoning(answer.text), prompt.answer(answer.text))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def with_adapters(self, folders: Sequence[str]) -> Policy:
        """Replaces the adapters by those in `folders`, which may be empty, and keeps the base in memory. Do not use the
        old policy afterwards."""
        base = self.transformers_model
        base.set_attn_implementation(self.support.plain_attention)
        if self.model is not base:
            base = self.model.unload()
        return _assemble(base, self.source, folders, PLAIN)

    def _builder(self) -> PromptBuilder:
        if self.prompt_builder is None:
            raise ValueError("this policy has no prompt builder; use generate_from_ids")
        return self.prompt_builder


def build_policy(
    source: BaseSource,
    adapters: Sequence[str] | load.LoraShape | Literal["full"] = (),
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    trainable: bool = False,
    seed: int = 42,
    dropout: float | None = None,
    checkpointing: Checkpointing = False,
    torch_compile: TorchCompile = False,
    shard: bool = False,
    log: Log = lambda _: None,
) -> Policy:
    """Loads a base model, puts adapters on it and applies the kernels.

    `adapters`: folders of adapters of this base, of which the first is active (`adapter_names` gives their names in
    PEFT), or the shape of a new adapter, initialised from `seed`, or "full" for none, with all weights trained.
    `trainable`: prepare the one adapter, or the weights, for training.
    `dropout`: its LoRA dropout, by default the one in its config. `checkpointing`, `torch_compile` and `shard` are as
    in the settings; `log` gets warnings about kernels.

    Raises UserError if the base cannot be loaded, if a trainable base gives no gradients or wrong ones, if an adapter
    belongs to another base, if target modules do not exist, and if kernels cannot be compiled.
    """
    kernels = pick_kernels(torch_compile, device, dtype, log)
    base = load.load_base(source, None if shard else device, dtype, quantization)
    if trainable and adapters != "full":
        check_input_gradients(base, source.name)
    return _assemble(
        base,
        source,
        adapters,
        kernels,
        trainable=trainable,
        seed=seed,
        dropout=dropout,
        checkpointing=checkpointing,
        shard_on=device if shard else None,
        quantise=quantization if shard else "none",
    )


def check_outline(source: BaseSource, adapters: Sequence[str], *, adapter_weights: bool = True) -> int:
    """Checks the tensors of adapter folders against their base without its weights, if it can be built so.
    `adapter_weights`: whether the adapters are used. Returns the most rows that one of them adds to the embedding.

    Raises UserError as `build_policy`, and for an adapter with tokens of its own whose base is to answer alone.
    """
    most = 0
    for folder in adapters:
        try:
            config = load.load_config(source)
        except UserError:  # which loading the weights will report
            return most
        model = load.outline(config, source)
        if model is None:
            return most
        added = added_rows(model, folder)
        if added > 0 and not adapter_weights:
            raise _unknown_to_base(added, folder)
        check_fits(model, folder)
        most = max(most, added)
    return most


def _unknown_to_base(tokens: int, folder: str) -> UserError:
    what = tr(
        "it has {tokens} of its own, which the base alone does not know", tokens=counted(tokens, "token")
    )
    return UserError(what, place=folder, cure=tr("leave adapter_weights as it is, or ask the base itself"))


def adapter_names(count: int) -> list[str]:
    """PEFT's names of `count` adapters on one base."""
    return [f"adapter{number}" if number else "default" for number in range(count)]


def _assemble(
    base: Any,
    source: BaseSource,
    adapters: Sequence[str] | load.LoraShape | Literal["full"],
    kernels: Kernels,
    *,
    trainable: bool = False,
    seed: int = 42,
    dropout: float | None = None,
    checkpointing: Checkpointing = False,
    shard_on: torch.device | None = None,
    quantise: Quantization = "none",
) -> Policy:
    """`shard_on`: the device on which a base that lies on the CPU is sharded. `quantise`: what its layers are held in
    from then on."""
    identity = base_identity(base, source)
    taken: dict[torch.nn.Module, torch.Tensor] = {}
    if quantise != "none":
        taken = take_weights_to_pack(base, quantise, source.name)
    model = base
    if isinstance(adapters, load.LoraShape):
        model = load.add_lora(base, adapters, seed)
    elif adapters == "full":
        base.requires_grad_(True)
    elif adapters:
        for folder in adapters:
            check_continued(folder, identity)
        first, *others = adapters
        model = load_adapter(base, first, trainable=trainable, dropout=dropout)
        for folder, name in zip(others, adapter_names(len(adapters))[1:], strict=True):
            load_additional_adapter(model, folder, name)
        if not trainable:
            model.eval()
    if shard_on is not None:
        shard_weights(
            base, shard_on, partial(_quantise_part, base, source.name, taken, quantise, shard_on, base.dtype)
        )
        load.check_finite(base, source.name)
    support = _check_support(base)  # after the adapter, which may change the head
    if checkpointing:
        load.checkpoint_activations(base, checkpointing)
    report = patch_kernels(base, kernels, support=support, trim_last=trainable)
    return Policy(model, source, identity, support, report)


def _quantise_part(
    base: Any,
    name: str,
    taken: dict[torch.nn.Module, torch.Tensor],
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    part: torch.nn.Module,
) -> None:
    """Quantises the layers of a part whose weights were taken, checks their gradients, and lets FSDP2 find the bits."""
    packed = pack_taken(part, taken, quantization, device, dtype)
    if packed:
        check_input_gradients(base, name, packed)
    hold_in_parameters(part)


def _check_support(base: Any) -> ForestSupport:
    """The trial of forests. Raises UserError if the model's code fails on weights in fewer bits, because it reads them
    itself."""
    try:
        return check_forest_support(base)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code may raise anything
        if not any(True for _ in packed_layers(base)):
            raise
        what = tr(
            "this model's code does not run with weights held in fewer bits ({error})",
            error=first_line(error),
        )
        cure = tr("leave it out, and give a base that is not quantised")
        raise UserError(what, place="quantization", cure=cure) from error


def load_policy(
    adapter: str | Path | PromptBuilder,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: QuantizationOrAuto = "auto",
    adapter_weights: bool = True,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    data_set: str | None = None,
    template: str | None = None,
    log: Log = lambda _: None,
) -> Policy:
    """Loads an adapter and its base model for generation, in eval mode.

    `adapter`: an adapter folder or a checkpoint, or the result of `open_prompt_builder`, in which case `base_model`,
    `trust_remote_code`, `data_set` and `template` are ignored. `data_set`: the one of several data sets whose template
    asks, by default the first. `template`: that of an adapter which another tool made. `quantization`: auto uses that
    of training. `adapter_weights`: False loads the base alone. `base_model`: where the base is now, if it has moved
    since training. `log` gets a line if reading the base for its SHA-256 takes long.

    Raises UserError if the folder is not an adapter folder, or if the base is missing or another model.
    """
    builder = adapter
    if not isinstance(builder, PromptBuilder):
        builder = open_prompt_builder(
            builder,
            base_model=base_model,
            trust_remote_code=trust_remote_code,
            data_set=data_set,
            template=template,
        )
        if builder.remark:
            warnings.warn(builder.remark, stacklevel=2)
    adapters = [] if builder.adapter.is_whole else [str(builder.adapter.path)]
    source, target = builder.source, load.pick_device(device)
    check_content(builder.adapter, source, log=log, download=False)
    if builder.adapter.new_tokens and adapters and not adapter_weights:
        raise _unknown_to_base(len(builder.adapter.new_tokens), adapters[0])
    check_outline(source, adapters, adapter_weights=adapter_weights)
    try:
        base = load.load_base(
            source, target, load.pick_dtype(dtype, target), quantization_for(quantization, builder.adapter)
        )
    except UserError as error:
        if Path(source.name).is_dir():
            raise
        problems = [replace(problem, cure=either(problem.cure, BASE_CURE)) for problem in error.problems]
        raise UserError(problems) from error
    check_content(builder.adapter, source, log=log)
    policy = _assemble(base, source, adapters, PLAIN)
    if builder.remark:
        load.check_vocabulary(builder.tokenizer, policy.vocabulary_size, source.name)
    # a direct call of the model, as in a notebook, should compute what transformers and PEFT do
    policy.transformers_model.set_attn_implementation(policy.support.plain_attention)
    return replace(policy, prompt_builder=builder, adapter_weights=adapter_weights)


def _answer_settings(options: Mapping[str, Any]) -> AnswerSettings:
    return config_from_keywords(AnswerSettings, options).config


def _rows(rows: Any) -> list[Row]:
    rows = list(rows_of_table(rows, "row") if is_table(rows) else rows)
    for row in rows:
        if not isinstance(row, Mapping):
            cure = tr('give {{"field": "text"}}, or a list of such rows; complete() continues plain text')
            raise UserError(
                tr("a row is a mapping of fields, not {name}", name=type(row).__name__), cure=cure
            )
    return [Row(number, row, tr("row {number}", number=number)) for number, row in enumerate(rows, start=1)]


def blueprint(
    config: Any,
    dtype: torch.dtype,
    lora: load.LoraShape | str | None,
    *,
    trust_remote_code: bool = False,
    gradient_checkpointing: Checkpointing = False,
    device: torch.device | None = None,
    quantization: Quantization = "none",
    by_device: bool = False,
    planned: Capability | None = None,
) -> Blueprint:
    """The model that a run will train, on the meta device without weights, for `yeonma.model.memory_trace.trace`.

    `lora`: the shape of a new adapter, the folder of an adapter to continue, or None to train all weights. `device`:
    the device of the run, by default the CPU. `by_device`: whether that device multiplies fp8 natively. `planned`: the
    compute capability of a device that is not here. Uses no random numbers.

    Raises UserError if the model does not have the target modules, or cannot be built without its weights.
    """
    load.hide_loading_noise()
    config = deepcopy(config)  # building a model writes its dtype and attention into the config
    published = published_in(config.to_dict(), "base_model")
    load.remove_quantization(config)
    with torch.random.fork_rng(devices=[]):
        try:
            base = build_empty(config, trust_remote_code, dtype=dtype)
        except UserError:
            raise
        except Exception as error:  # a model's code may compute with its weights while it is built
            what = tr("this model cannot be built without its weights ({error})", error=first_line(error))
            raise UserError(what, place="base_model") from error
        base.requires_grad_(False)
        base.published = published
        frozen = sum(parameter.numel() for parameter in base.parameters())
        dense = sum(layer.weight.numel() for layer in quantised_layers(base, "int8"))
        if published is not None and published.stays_packed:
            pack_on_meta(base, published)
        elif quantization != "none":
            if published is not None and published.packs_experts(quantization):
                pack_experts_on_meta(base)
            quantise_on_meta(base, quantization, by_device)
        if isinstance(lora, load.LoraShape):
            load.add_lora(base, lora, seed=0)
        elif lora is not None:
            header = read_header(lora)
            add_rows(base, header, lora)
            add_lora_of(base, lora, header=header)
        else:
            base.requires_grad_(True)
            frozen = 0
    base.set_attn_implementation(FOREST)
    head, device = plain_head(base), device or torch.device("cpu")
    if head is not None and device.type == "cuda":
        head = replace(head, chunk_bytes=CUDA_CHUNK_BYTES)
    if gradient_checkpointing:
        load.checkpoint_activations(base, gradient_checkpointing)
    patch_kernels(base, support=ForestSupport(True, head, "sdpa", ""), trim_last=True)
    train_adapter(base)
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    # weights in half precision stay beside the float32 copies that are trained
    has_copies = lora is None and dtype != torch.float32
    weights = {
        tensor for tensor in [*base.parameters(), *base.buffers()] if has_copies or not tensor.requires_grad
    }
    trained_bytes = sum(parameter.untyped_storage().nbytes() for parameter in trained)
    return Blueprint(
        model=base,
        head=head,
        trained=sum(parameter.numel() for parameter in trained),
        frozen=frozen,
        dense=dense,
        weight_bytes=sum(tensor.untyped_storage().nbytes() for tensor in weights),
        trained_bytes=trained_bytes * torch.float32.itemsize // dtype.itemsize
        if has_copies
        else trained_bytes,
        gathered_bytes=gathered_bytes(base),
        capability=capability_of(device, dtype, planned),
        on_cpu=device.type == "cpu",
    )
