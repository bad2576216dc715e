"""Base model and tokenizer from a name or folder, and the adapter on top, through transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from yeonma.errors import UserError, did_you_mean


@dataclass(frozen=True)
class BaseSource:
    """Where a base model comes from; `adapter` is set where an adapter folder was named as base."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None


def find_base(base_model: str, revision: str | None = None, trust_remote_code: bool = False) -> BaseSource:
    """Check a local folder before anything is loaded; a name that is no folder is left to the hub.

    Raises UserError for a folder without config or weights, pickled weights alone, or missing shards.
    """
    folder = Path(base_model).expanduser()
    if not folder.is_dir():
        if folder.is_file() or base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
            raise UserError("no such model folder", place=base_model, cure="give a folder or a name on the hub")
        return BaseSource(base_model, revision, trust_remote_code)
    if (folder / "adapter_config.json").is_file():
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        under = find_base(config["base_model_name_or_path"], config.get("revision"), trust_remote_code)
        return BaseSource(under.name, under.revision, trust_remote_code, adapter=str(folder))
    if not (folder / "config.json").is_file():
        raise UserError("the folder has no config.json", place=base_model, cure="give the folder of a whole model")
    _check_config(folder, trust_remote_code)
    _check_weights(folder)
    return BaseSource(str(folder), revision, trust_remote_code)


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"not valid JSON ({error})", place=str(folder / "config.json")) from error
    if "auto_map" in config and not trust_remote_code:
        raise UserError(
            "the model brings Python code of its own",
            place=str(folder / "config.json"),
            cure="read that code, then give --trust_remote_code true",
        )


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise UserError(f"it names a file outside the folder ({outside[0]})", place=str(index))
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise UserError(f"missing shards: {', '.join(missing)}", place=str(folder), cure="download them again")
    elif any(folder.glob("*.safetensors")):
        return
    elif any(folder.glob("*.bin")):
        raise UserError(
            "the weights are pickled (.bin), which can run code when loaded",
            place=str(folder),
            cure="load them once with transformers where you trust them and save_pretrained() to a new folder",
        )
    else:
        raise UserError("the folder has no safetensors weights", place=str(folder))


def load_tokenizer(source: BaseSource) -> Any:
    """The base's tokenizer. Raises UserError where there is none or it cannot be reached."""
    try:
        return AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", source, error) from error


def load_config(source: BaseSource) -> Any:
    try:
        return AutoConfig.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load("config", source, error) from error


def _cannot_load(what: str, source: BaseSource, error: Exception) -> UserError:
    first = str(error).strip().split("\n")[0]
    cure = "check the name, your network and, for a gated model, `hf auth login`"
    if Path(source.name).is_dir():
        cure = "give the folder of a whole model, with its tokenizer"
    return UserError(f"cannot load the model's {what} ({first})", place=source.name, cure=cure)


def pick_device(device: str) -> torch.device:
    """auto: this process's GPU where there is one (LOCAL_RANK under torchrun), else the CPU."""
    import os

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no usable CUDA device", place="device", cure="use --device cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU that has it, float16 on one that has not, float32 on the CPU."""
    has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if dtype == "bfloat16" and not has_bfloat16:
        raise UserError("the device has no bfloat16", place="dtype", cure="use --dtype float32 or float16")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_base(source: BaseSource, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen base model, in eval mode. Raises UserError for truncated or unreachable weights."""
    from safetensors import SafetensorError

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code, dtype=dtype
        )
    except SafetensorError as error:
        raise UserError(f"the weights cannot be read ({error})", place=source.name, cure="download them again") from error
    except (OSError, ValueError) as error:
        raise _cannot_load("weights", source, error) from error
    model.requires_grad_(False)
    return model.to(device).eval()


def check_vocabulary(tokenizer: Any, vocabulary: int, name: str) -> None:
    """Raises UserError where the tokenizer has ids that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocabulary:
        raise UserError(
            f"the tokenizer has ids up to {highest}, the model's embedding only {vocabulary} rows",
            place=name,
            cure="use the tokenizer that belongs to the model",
        )


@dataclass(frozen=True)
class LoraShape:
    r: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | str
    use_rslora: bool = False
    use_dora: bool = False


def add_lora(model: Any, shape: LoraShape, seed: int) -> Any:
    """A PeftModel with a fresh adapter, drawn from `seed`; weights in float32. Raises UserError for unknown targets."""
    from peft import LoraConfig, get_peft_model

    targets = shape.target_modules
    if not isinstance(targets, str):
        targets = list(targets)
        _check_targets(model, targets)
    elif targets != "all-linear":
        targets = [targets]
        _check_targets(model, targets)
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]
        lora_dropout=shape.dropout,
        target_modules=targets,
        use_rslora=shape.use_rslora,
        use_dora=shape.use_dora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    known = sorted({name.rsplit(".", 1)[-1] for name in names})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f'no layer of the model is called "{target}"; it has {", ".join(known)}',
                place="lora_target_modules",
                cure=did_you_mean(target, known) or "or use all-linear",
            )


def load_adapter(model: Any, folder: str, *, trainable: bool) -> Any:
    """A PeftModel with the adapter of a folder. Raises UserError where its shapes do not fit the model."""
    from peft import PeftModel

    config = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the adapter was made for {config.get('base_model_name_or_path')} and does not fit {model.name_or_path}",
            place=folder,
            cure="give the base model that the adapter was trained on",
        ) from error
