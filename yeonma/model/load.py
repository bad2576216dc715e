"""Loads base model, tokenizer and adapter with transformers and PEFT."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from yeonma.config.settings import Checkpointing, Quantization
from yeonma.errors import Problem, UserError, either, first_line
from yeonma.messages import tr
from yeonma.model.config_numbers import CURE
from yeonma.model.device_check import CURE_WITHOUT_CUDA, NO_CUDA
from yeonma.model.language_part import build_empty, multimodal_class, without_towers
from yeonma.model.native_tokenizers import (
    check_tokenizer_package,
    native_tokenizer_file,
    read_native_tokenizer,
)
from yeonma.model.packed_experts import check_not_adapted, hold_packed_experts, packing_class
from yeonma.model.peft_targets import exact_targets, target_fields
from yeonma.model.published import (
    QUANTIZATION_KEYS,
    Published,
    check_not_packed,
    check_package,
    published_in,
    published_in_folder,
    quantization_of,
    unquantised_base,
)
from yeonma.model.quantization import check_installed
from yeonma.model.quantized import bitsandbytes_config, pack_bitsandbytes_layers, packed_layers, to_fp8
from yeonma.model.sharding import any_process, local_shard, trains_all
from yeonma.model.source import BaseSource as BaseSource
from yeonma.model.source import check_numbers
from yeonma.model.source import find_base as find_base
from yeonma.model.target_choice import TargetChoice, chosen_layers
from yeonma.model.targets import HEAD, TargetLayer, adapted
from yeonma.model.token_rows import begin_token_rows, check_token_rows, token_fields
from yeonma.model.weight_files import file_of, weight_files
from yeonma.model.whole_modules import begin_whole_modules, whole_fields, whole_modules
from yeonma.model.whole_weights import whole_tensors
from yeonma.tokenization.chat_template_export import BASE_CHAT_TEMPLATE, MARK, base_chat_template
from yeonma.tokenization.tokenizer_files import TOKENIZER, splits_otherwise
from yeonma.tokenization.tokenizer_trial import OTHERS, check_size, try_tokenizer


def load_tokenizer(source: BaseSource, *, keep_exported: bool = False) -> Any:
    """The tokenizer, with the base's own chat template even if the folder has an exported training template.

    `keep_exported`: keep the exported one. Raises UserError if there is no tokenizer, if it cannot be reached, and if
    the package that reads its file is not installed.
    """
    _try_files(source)
    file = native_tokenizer_file(source)
    if file is not None:
        check_tokenizer_package(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        if file is not None:
            tokenizer = read_native_tokenizer(file, tokenizer)
        tokenizer = _as_published(tokenizer, source)
        if not keep_exported and base_chat_template(tokenizer).startswith(MARK):
            _restore_chat_template(tokenizer, source)
        ordinary_tokens = len(tokenizer) - len(set(tokenizer.all_special_ids))
        tokenizer.decode(tokenizer("x")["input_ids"])  # some faults in its files show only in use
        # fails for lone surrogates
        json.dumps(tokenizer.chat_template, ensure_ascii=False, default=str).encode()
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception; values of a wrong type may raise anything
        raise _cannot_load(tr("tokenizer"), source, error) from error
    if ordinary_tokens <= 0:  # transformers returns such a tokenizer if there are no files
        raise _cannot_load(tr("tokenizer"), source, ValueError(tr("it has no vocabulary")))
    return tokenizer


def _try_files(source: BaseSource) -> None:
    """Raises UserError for a tokenizer that takes more time or memory than any real one."""
    for name in OTHERS:
        if (of_folder := Path(source.name) / name).exists():  # the hub has limits of its own
            check_size(of_folder)
    try:
        path = file_of(source, TOKENIZER)
    except UserError as error:
        raise _cannot_load(tr("tokenizer"), source, error) from error
    if path is not None:
        try_tokenizer(path)


def _as_published(tokenizer: Any, source: BaseSource) -> Any:
    """The tokenizer of tokenizer.json, should transformers' class for it split text in a way of its own."""
    path = file_of(source, TOKENIZER)
    if path is None or not splits_otherwise(tokenizer, path):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(source.name, revision=source.revision or "main")


def generation_eos(source: BaseSource) -> tuple[int, ...]:
    """The tokens that end an answer by the model's generation config; none if it has no such config."""
    try:
        return eos_tokens(GenerationConfig.from_pretrained(source.name, revision=source.revision or "main"))
    except (OSError, ValueError, TypeError, AttributeError):
        return ()


def eos_tokens(config: Any) -> tuple[int, ...]:
    """The EOS tokens of a generation config, which may be one, several or none."""
    eos = getattr(config, "eos_token_id", None)
    ids = eos if isinstance(eos, list | tuple) else [eos]
    return tuple(number for number in ids if isinstance(number, int) and not isinstance(number, bool))


def _restore_chat_template(tokenizer: Any, source: BaseSource) -> None:
    """Replace an exported training template by the base's own chat template, from the file next to it."""
    path = cached_file(source.name, BASE_CHAT_TEMPLATE, revision=source.revision)  # raises if it is missing
    text = Path(str(path)).read_bytes().decode() or None
    if isinstance(tokenizer.chat_template, dict):
        others = {name: text for name, text in tokenizer.chat_template.items() if name != "default"}
        tokenizer.chat_template = {**others, "default": text} if text else others
    else:
        tokenizer.chat_template = text


def load_config(source: BaseSource) -> Any:
    """The base's config, without what only says how someone else ran the model. Raises UserError."""
    if not Path(source.name).is_dir():  # a folder is checked by `find_base`
        try:
            path = file_of(source, "config.json")
        except UserError as error:
            raise _cannot_load("config", source, error) from error
        if path is not None:
            check_numbers(path)
    try:
        config = AutoConfig.from_pretrained(
            source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            output_attentions=False,  # with an implementation of attention it would be refused
        )
        _forget_run_settings(config)
    except Exception as error:  # values of a wrong type may raise anything in transformers
        raise _cannot_load("config", source, error) from error
    return config


_RUN_SETTINGS: dict[str, Any] = {
    "_attn_implementation_internal": None,
    "_experts_implementation_internal": None,
    "_output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": True,
    "chunk_size_feed_forward": 0,
    "problem_type": None,
    "gradient_checkpointing": False,
    "pretraining_tp": 1,
    "torchscript": False,
    "pruned_heads": {},
}
"""What a config says of how a model is run, and not of what it is, with the values that are meant here."""


def _forget_run_settings(config: Any) -> None:
    """Values of others' files that would change how the model is run here."""
    for name, value in _RUN_SETTINGS.items():
        if getattr(config, name, value) != value:
            setattr(config, name, value)
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            _forget_run_settings(part)


def outline(config: Any, source: BaseSource) -> Any:
    """The model without weights, on the meta device: its layers, names and shapes. Takes hardly any time or memory.

    None if that fails: a model's code may compute with its weights while it is built.
    """
    hide_loading_noise()
    try:
        return build_empty(config, source.trust_remote_code)
    except Exception:  # if something is wrong, loading the weights will report it
        return None


def _check_size(config: Any, source: BaseSource) -> None:
    """Raises UserError for a model that is far larger than the weights of its folder. Nothing of it takes memory."""
    folder = Path(source.name)
    bytes_there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if bytes_there and (model := outline(config, source)) is not None:
        numbers = sum(parameter.numel() for parameter in model.parameters())
        if numbers > 4 * bytes_there + 10**6:
            problem = tr(
                "it asks for {numbers:,} numbers, but the weights have {bytes_there:,} bytes",
                numbers=numbers,
                bytes_there=bytes_there,
            )
            raise UserError(problem, place=str(folder / "config.json"), cure=CURE)


def _check_can_be_built(config: Any, source: BaseSource) -> None:
    """Raises UserError if no model can be built from the config."""
    try:
        build_empty(config, source.trust_remote_code)
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        place = str(Path(source.name) / "config.json") if Path(source.name).is_dir() else source.name
        raise UserError(
            tr("no model can be built from it ({reason})", reason=reason), place=place, cure=CURE
        ) from error


def _cannot_load(part: str, source: BaseSource, error: Exception) -> UserError:
    first, _, second = str(error).strip().partition("\n")
    reason = f"{first} {second.strip()}".splitlines()[0].strip() if first.endswith(":") else first
    cure = tr("check the name, your network and, for a gated model, `hf auth login`")
    if Path(source.name).is_dir():
        cure = tr("give the folder of a complete model, with its tokenizer")
    return UserError(
        tr("cannot load the model's {part} ({reason})", part=part, reason=reason),
        place=source.name,
        cure=cure,
    )


def pick_device(device: str) -> torch.device:
    """auto: this process's GPU if there is one (LOCAL_RANK under torchrun), else the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(NO_CUDA, place="device", cure=CURE_WITHOUT_CUDA)
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_dtype(dtype: str, device: torch.device, *, has_bfloat16: bool | None = None) -> torch.dtype:
    """auto: bfloat16 on a GPU that supports it, float16 on other GPUs, float32 on the CPU. `has_bfloat16`: whether the
    device supports it, by default as its driver says."""
    if has_bfloat16 is None:
        has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if dtype == "bfloat16" and not has_bfloat16:
        raise UserError(
            tr("the device has no bfloat16"), place="dtype", cure=tr("use --dtype float32 or float16")
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_base(
    source: BaseSource,
    device: torch.device | None,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    *,
    whole: bool = False,
) -> Any:
    """The frozen base model, in eval mode. Its attribute `published` says how its files are quantised, or is None.

    Of a checkpoint that also reads images or sound, the language model alone is loaded, unless `whole`.
    Weights that bitsandbytes packed stay packed, unless `whole`; those of other kinds are dequantised as they are read.
    Without a `device` the model stays on the CPU as transformers loads it, unchecked for NaN and not yet quantised: for
    sharding, which quantises part by part. Raises UserError for weights that are truncated, unreachable, missing, of
    another shape or not finite, for weights to quantise that are packed already, and if a package is not installed.
    """
    check_installed(quantization)
    hide_loading_noise()
    model_config = load_config(source)
    published = published_weights(model_config, source)
    packed = published is not None and published.stays_packed and not whole
    check_not_packed(published if packed else None, quantization, source.name)
    _check_size(model_config, source)
    bnb_config = None if device is None else bitsandbytes_config(quantization, dtype)
    options: dict[str, Any] = {
        "trust_remote_code": source.trust_remote_code,
        "dtype": dtype,
        "ignore_mismatched_sizes": True,  # reported below
        "output_loading_info": True,
    }
    if packed or bnb_config is not None:  # bitsandbytes quantises on the device, weight by weight
        options["device_map"] = {"": device or torch.device("cpu")}
    if bnb_config is not None:
        options["quantization_config"] = bnb_config
    try:
        if published is None or packed:
            found = multimodal_class(model_config)
            reading_class: Any = found or AutoModelForCausalLM
            if found is not None and not whole:
                reading_class = without_towers(found)
            loaded: Any = reading_class.from_pretrained(
                source.name, config=model_config, revision=source.revision, use_safetensors=True, **options
            )
            if found is not None:
                loaded[0].__class__ = found
        else:
            loaded = _load_dequantised(
                source, model_config, published, options, pack_experts=quantization != "none", whole=whole
            )
    except SafetensorError as error:
        raise UserError(
            tr("the weights cannot be read ({error})", error=error),
            place=source.name,
            cure=tr("download them again"),
        ) from error
    except (OSError, ValueError) as error:
        raise _cannot_load(tr("weights"), source, error) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError):
        _check_can_be_built(model_config, source)
        raise
    model, loading_info = loaded
    _check_complete(loading_info, source.name)
    model.requires_grad_(False)
    model.eval()
    model.published = published
    if packed or bnb_config is not None:
        remove_quantization(model.config)  # the model's config should not say how its weights are stored
        pack_bitsandbytes_layers(model, dtype)
        _cast_whole_weights(model, dtype)
    elif quantization == "fp8" and device is not None:
        to_fp8(model, device, source.name)
    if device is not None:
        model = model if packed or bnb_config is not None else model.to(device)
        check_finite(model, source.name)
    return model


def _cast_whole_weights(model: Any, dtype: torch.dtype) -> None:
    """Casts the weights that are not packed, which transformers leaves in the format of such files."""
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, weight in model.named_parameters():
        is_packed = hasattr(weight, "quant_state") or not weight.is_floating_point()
        if not is_packed and weight.dtype != dtype and not any(part in name for part in kept):
            weight.data = weight.data.to(dtype)


def _load_dequantised(
    source: BaseSource,
    config: Any,
    published: Published,
    options: Mapping[str, Any],
    *,
    pack_experts: bool,
    whole: bool,
) -> tuple[Any, Any]:
    """Loads a model from the whole weights that its files stand for, each as it is needed, and quantises them again if
    `options` say so. `pack_experts`: hold experts in MXFP4 as they are. `whole`: with its towers."""
    empty = outline(config, source)
    if empty is None:
        what = tr("its weights are {published}, and it cannot be built without them", published=published)
        raise UserError(what, place=source.name, cure=tr("give the unquantised model"))
    model_class, files = type(empty), weight_files(source)
    pack_experts = pack_experts and published.method == "mxfp4"
    tensors = whole_tensors(files, published, transposed_weights(empty), pack_experts=pack_experts)
    plain = deepcopy(config)
    remove_quantization(plain)
    reading_class = model_class if whole or multimodal_class(config) is None else without_towers(model_class)
    reading_class = packing_class(reading_class) if pack_experts else reading_class
    loaded: tuple[Any, Any] = reading_class.from_pretrained(None, config=plain, state_dict=tensors, **options)
    model = loaded[0]
    model.__class__ = model_class
    if pack_experts:
        hold_packed_experts(model)
    model.name_or_path = model.config.name_or_path = source.name
    with suppress(OSError, ValueError):
        model.generation_config = GenerationConfig.from_pretrained(
            source.name, revision=source.revision or "main"
        )
    return loaded


def transposed_weights(model: Any) -> set[str]:
    """The names, in files, of the weights that the model's layers hold as (inputs, outputs)."""
    names = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Conv1D)]
    return {*names, *(name.removeprefix(f"{model.base_model_prefix}.") for name in names)}


def published_weights(config: Any, source: BaseSource) -> Published | None:
    """How the base's weights are quantised in its files; None if they are not.

    Raises UserError for a kind that Yeonma does not read, and if the package that reads it is not installed.
    """
    folder = Path(source.name)
    if folder.is_dir():
        return published_in_folder(folder)  # also reads its model card
    content = config.to_dict()
    if quantization_of(content) is None:
        return None
    card = None
    with suppress(UserError):  # a missing card is no fault
        card = file_of(source, "README.md")
    found = published_in(content, source.name, unquantised_base(card.parent, {}) if card else None)
    if found is not None:
        check_package(found, source.name)
    return found


def remove_quantization(config: Any) -> None:
    """Removes what a config says about quantised weights."""
    for part in (config, config.get_text_config()):
        for key in QUANTIZATION_KEYS:
            if hasattr(part, key):
                delattr(part, key)


def _check_complete(loading_info: Mapping[str, Any], name: str) -> None:
    """Raises UserError for missing or misshapen weights, which transformers would initialise at random."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise UserError(
            tr("the weights lack {missing}", missing=_some(missing)),
            place=name,
            cure=tr("download them again"),
        )
    shapes = [
        tr("{key} {stored} for {expected}", key=key, stored=tuple(stored), expected=tuple(expected))
        for key, stored, expected in sorted(loading_info["mismatched_keys"])
    ]
    if shapes:
        raise UserError(
            tr("the weights do not have the shapes of config.json: {shapes}", shapes=_some(shapes)),
            place=name,
        )


def check_finite(model: nn.Module, name: str) -> None:
    """Raises UserError, in all processes, if a weight of the base contains NaN or infinity.

    Sums of the weights show it, in one pass. Of a sharded model, every process checks its own shards.
    """
    is_full = trains_all(model)
    frozen = {
        key: weight.detach()
        for key, weight in model.named_parameters()
        if (is_full or not weight.requires_grad)
        and not hasattr(weight, "quant_state")  # bits, whatever their type says
    }
    frozen |= {key: weight.scale for key, weight in packed_layers(model)}
    flags = any_process(model, [_is_not_finite(local_shard(weight)) for weight in frozen.values()])
    not_finite = [key for key, flag in zip(frozen, flags, strict=True) if flag]
    if not_finite:
        raise UserError(
            tr("NaN or infinity in {not_finite}", not_finite=_some(not_finite)),
            place=name,
            cure=tr("download the weights again"),
        )


def _is_not_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or weight.element_size() == 1:
        return False
    return not weight.sum(dtype=torch.float32).isfinite() and not bool(weight.isfinite().all())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return tr("{names} and {more} more", names=shown, more=len(names) - 3) if len(names) > 3 else shown


def checkpoint_activations(model: Any, checkpointing: Checkpointing = True) -> None:
    """Save only the layers' inputs for the backward pass and recompute the rest (Chen et al. 2016, arXiv:1604.06174).

    `selective`: only in every other layer. Raises UserError for a model whose code does not offer it.
    """
    # newer versions of transformers warn about the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        what, cure = tr("this model's code keeps all activations"), tr("use --gradient_checkpointing false")
        raise UserError(what, place="gradient_checkpointing", cure=cure) from error
    if checkpointing == "selective":
        from transformers.modeling_layers import GradientCheckpointingLayer  # imports torch's compiler

        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[1::2]:
            layer.gradient_checkpointing = False


def hide_loading_noise() -> None:
    """Hide the progress bar of loading weights, but not of downloads, and warnings about PEFT's internals."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_towers)
    if os.environ.get("RANK", "0") == "0" and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings(
        "ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`", UserWarning
    )
    # PEFT itself adds these patterns for layers of fused experts, and they match nothing
    warnings.filterwarnings(
        "ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning
    )


def _is_not_about_towers(record: logging.LogRecord) -> bool:
    """Not the warning that a tower which is left out could not be asked about implementations of attention."""
    return "without finding the associated sub-model" not in str(record.msg)


def check_vocabulary(tokenizer: Any, vocabulary: int, name: str) -> None:
    """Raises UserError if the tokenizer has ids without an embedding in the model."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocabulary:
        raise UserError(
            tr(
                "the tokenizer has ids up to {highest}, the model's embedding only {vocabulary} rows",
                highest=highest,
                vocabulary=vocabulary,
            ),
            place=name,
            cure=tr("use the model's own tokenizer"),
        )


@dataclass(frozen=True)
class LoraShape:
    """The arguments of a new adapter, as in PEFT's LoraConfig."""

    r: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | str
    use_rslora: bool = False
    use_dora: bool = False
    experts: bool = True
    """Whether `all-linear`, and names that routed experts share with other layers, reach routed experts."""
    layers: Sequence[int] | int | str | None = None
    """Numbers of layers, as the setting `lora_layers` has them."""
    exclude: Sequence[str] | str | None = None
    """Names of layers that get no adapter."""
    new_token_ids: Sequence[int] = ()
    """Tokens whose rows of embedding and head are trained too, and are added where they are lacking."""
    whole: Sequence[str] | str | None = None
    """Names of modules that are trained whole."""

    @property
    def choice(self) -> TargetChoice:
        return TargetChoice(self.target_modules, self.experts, self.layers, self.exclude)


def add_lora(model: Any, shape: LoraShape, seed: int) -> Any:
    """A PeftModel with a new adapter in float32, initialised from `seed`. Raises UserError for unknown targets."""
    from peft import LoraConfig, get_peft_model

    reached = chosen_layers(model, shape.choice)
    check_not_adapted(model, reached)
    _check_parameters(reached, shape)
    whole = whole_modules(model, shape.whole, reached)
    if shape.new_token_ids:
        _check_head(reached)
        begin_token_rows(model, shape.new_token_ids)
    torch.manual_seed(seed)
    try:
        config = LoraConfig(
            r=shape.r,
            lora_alpha=shape.alpha,  # type: ignore[arg-type]
            lora_dropout=shape.dropout,
            use_rslora=shape.use_rslora,
            use_dora=shape.use_dora,
            task_type="CAUSAL_LM",
            **target_fields(model, reached, shape.choice.names, shape.r, shape.alpha),
            **token_fields(model, shape.new_token_ids, whole),
            **whole_fields(model, whole),
        )
        with exact_targets():
            peft_model: Any = get_peft_model(model, config)
    except (TypeError, OverflowError, RuntimeError) as error:  # sizes beyond PyTorch's integers
        problem = tr(
            "an adapter of rank {r} cannot be created ({error:.100})",
            r=shape.r,
            error=str(error).splitlines()[0],
        )
        raise UserError(problem, place="lora_r", cure=tr("lower it")) from error
    except ValueError as error:  # PEFT refuses some layers of some models
        problem = tr("PEFT cannot put LoRA on these layers ({error})", error=first_line(error))
        raise UserError(problem, place="lora_target_modules", cure=tr("name others")) from error
    check_token_rows(model, shape.new_token_ids)
    if whole:
        begin_whole_modules(model, whole, shared=peft_model.peft_config["default"].ensure_weight_tying)
    planned = {layer.adapted for layer in reached}
    if adapted(model) != planned:
        raise RuntimeError(f"PEFT put adapters on other layers: {sorted(adapted(model) ^ planned)[:5]}")
    return peft_model


def _check_head(reached: Sequence[TargetLayer]) -> None:
    """Raises UserError for a head with an adapter, whose rows PEFT cannot train beside it."""
    for layer in reached:
        if layer.part == HEAD:
            what = tr("{path} has an adapter, and PEFT trains no rows of it beside that", path=layer.path)
            cure = tr("leave {leaf} out of lora_target_modules, or leave out new_tokens", leaf=layer.leaf)
            raise UserError(what, place="new_tokens", cure=cure)


def _check_parameters(reached: Sequence[TargetLayer], shape: LoraShape) -> None:
    """Raises UserError for options that PEFT does not have for an adapter within a parameter."""
    within = [layer for layer in reached if layer.kind != "linear"]
    problems = []
    for name, is_set, cure in (
        ("lora_dropout", shape.dropout > 0, tr("use --lora_dropout 0")),
        ("use_dora", shape.use_dora, tr("leave out use_dora")),
    ):
        if within and is_set:
            parts = tr(" and ").join(tr(part) for part in dict.fromkeys(layer.part for layer in within))
            what = tr(
                "PEFT has none for the {parts} ({parameter}), whose adapter is added to the weight",
                parts=parts,
                parameter=within[0].parameter,
            )
            leave = tr("use --lora_experts false") if shape.experts else tr("name other layers")
            problems.append(Problem(what, name, either(cure, leave)))
    if problems:
        raise UserError(problems)
