"""PEFT's config in an adapter folder, whoever wrote it: read strictly, checked against a list of known keys.

A key is supported, or has no effect on a trained adapter and is dropped, or is refused by its name. What PEFT gets is
only what stands in `AdapterConfig.keys`. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yeonma.data.strict_json import SPACE, Fault, described, parse
from yeonma.errors import Problem, UserError, brief, system_reason
from yeonma.files import user_path
from yeonma.messages import counted, tr

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
MAX_BYTES = 16 << 20
MAX_RANK = 1 << 20
MAX_SHOWN = 8
"""Keys that one message names."""
SAVE_AGAIN = tr(
    "load it with PEFT on its base, and give the folder that "
    "`merge_and_unload().save_pretrained(...)` writes as a base model"
)
_NO_WEIGHTS_OF_THEIR_OWN = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
_NOT_MERGED = (*_NO_WEIGHTS_OF_THEIR_OWN, "ADAPTION_PROMPT", "XLORA", "POLY")
"""Kinds of PEFT that change no weight of the base, so that nothing can be merged."""


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, as far as it matters for an adapter that is trained already."""

    folder: Path
    keys: Mapping[str, Any]
    """The fields of PEFT's LoraConfig that have a value here."""
    base: str | None
    """`base_model_name_or_path`: nothing follows it but the functions that say so."""
    revision: str | None
    trains_biases: bool
    """Whether `bias` says that the base's own biases were trained, too."""

    @property
    def place(self) -> str:
        return str(self.folder / CONFIG_FILE)


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Reads adapter_config.json of a folder. Raises UserError that lists all keys which are wrong or not supported."""
    path = user_path(folder) / CONFIG_FILE
    content = _read(path)
    _check_kind(content, path)
    problems = []
    keys: dict[str, Any] = {}
    for name, value in content.items():
        if name in _KEYS:
            wanted = _KEYS[name](value)
            if wanted is not None:
                what = tr(
                    '"{name}" is {value}, but must be {wanted}',
                    name=name,
                    value=brief(_shown(value)),
                    wanted=wanted,
                )
                problems.append(Problem(what, str(path), tr("download it again, or save it again with PEFT")))
            elif value is not None:
                keys[name] = value
        elif name not in _WITHOUT_EFFECT and not _is_nothing(value):
            problems.append(_not_supported(name, value, path))
    if not problems:
        problems = _together(keys, path)
    if problems:
        more = len(problems) - MAX_SHOWN
        rest = (
            [
                Problem(
                    counted(
                        more,
                        "more key is wrong or not supported",
                        "more keys are wrong or not supported",
                    ),
                    str(path),
                )
            ]
            if more > 0
            else []
        )
        raise UserError([*problems[:MAX_SHOWN], *rest])
    base, revision = keys.pop("base_model_name_or_path", None), keys.pop("revision", None)
    biases = keys.pop("bias", "none") != "none"
    for name in ("peft_type", "task_type", "inference_mode", "init_lora_weights"):
        keys.pop(name, None)
    return AdapterConfig(path.parent, keys, base or None, revision or None, biases)


def _read(path: Path) -> dict[str, Any]:
    cure = tr("download it again, or save it again with PEFT")
    try:
        if not path.is_file():
            raise UserError(
                tr("{config_file} is missing", config_file=CONFIG_FILE),
                place=str(path.parent),
                cure=tr("give an adapter's folder"),
            )
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(
                tr("more than {max_bytes} MB", max_bytes=MAX_BYTES >> 20), place=str(path), cure=cure
            )
        text = content.decode("utf-8-sig")
        value, end = parse(text, len(text) - len(text.lstrip(SPACE)))
        if text[end:].strip(SPACE):
            raise Fault(tr("more text after the object"), end)
    except OSError as error:
        raise UserError(
            tr("cannot be read ({strerror})", strerror=system_reason(error)), place=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            tr("not valid JSON (not UTF-8, at byte {start})", start=error.start + 1),
            place=str(path),
            cure=cure,
        ) from None
    except Fault as fault:
        what = tr("not valid JSON ({problem}, at character {at})", problem=fault.problem, at=fault.at + 1)
        raise UserError(what, place=str(path), cure=cure) from None
    if not isinstance(value, dict):
        raise UserError(tr("not a JSON object"), place=str(path), cure=cure)
    return value


def _check_kind(content: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless it is LoRA of a causal language model, as PEFT writes it."""
    kind, task = content.get("peft_type"), content.get("task_type")
    if kind is None:
        what = tr("it has no peft_type, so PEFT did not write it")
        if "lora_parameters" in content or "fine_tune_type" in content:
            what = tr(
                "it has no peft_type, so PEFT did not write it, but MLX, whose adapters Yeonma does not read"
            )
        raise UserError(what, place=str(path), cure=tr("give an adapter in PEFT's format"))
    if kind != "LORA":
        cure = (
            SAVE_AGAIN
            if kind not in _NOT_MERGED
            else tr("answer with PEFT itself: this kind cannot be merged")
        )
        what = tr(
            "it is an adapter of PEFT's kind {kind}, and Yeonma uses LORA alone", kind=brief(_shown(kind))
        )
        raise UserError(what, place=str(path), cure=cure)
    if task not in (None, "CAUSAL_LM"):
        what = tr(
            "it was trained for the task {task}, and Yeonma uses CAUSAL_LM alone", task=brief(_shown(task))
        )
        raise UserError(what, place=str(path), cure=tr("give an adapter of a model that writes text"))


def _not_supported(name: str, value: object, path: Path) -> Problem:
    shown = f'"{brief(name, 60)}": {brief(_shown(value), 60)}'
    if name in _REFUSED:
        return Problem(
            tr("it has {shown}, which {refused}", shown=shown, refused=_REFUSED[name]), str(path), SAVE_AGAIN
        )
    return Problem(tr("it has {shown}, a key that Yeonma does not know", shown=shown), str(path), SAVE_AGAIN)


def _together(keys: Mapping[str, Any], path: Path) -> list[Problem]:
    """What is wrong with keys that are right by themselves."""
    what = None
    if keys.get("r") is None:
        what = tr('it has no "r", the rank')
    elif isinstance(keys.get("target_modules"), str) and keys.get("layers_to_transform") is not None:
        what = tr("layers_to_transform does not go with target_modules as an expression")
    elif keys.get("layers_pattern") and keys.get("layers_to_transform") is None:
        what = tr("layers_pattern needs layers_to_transform")
    elif keys.get("target_modules") is None and not keys.get("target_parameters"):
        what = tr("it names no target_modules")
    return (
        []
        if what is None
        else [Problem(what, str(path), tr("download it again, or save it again with PEFT"))]
    )


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list | dict) else described(value)


def _is_nothing(value: object) -> bool:
    """Whether a key may be left out: newer versions write keys that are switched off."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


# What each key may hold: functions that return None, or say what is wanted.


def _text(value: object) -> str | None:
    return None if value is None or isinstance(value, str) else tr("text or null")


def _flag(value: object) -> str | None:
    return None if value is None or isinstance(value, bool) else tr("true or false")


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _rank(value: object) -> str | None:
    return (
        None
        if _is_whole(value, 1, MAX_RANK)
        else tr("a whole number from 1 to {max_rank}", max_rank=MAX_RANK)
    )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 and math.isfinite(value)


def _alpha(value: object) -> str | None:
    return None if _is_number(value) else tr("a number below 2**63")


def _dropout(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value < 1 else tr("a number from 0 to below 1")


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _targets(value: object) -> str | None:
    fits = value is None or (isinstance(value, str) and value) or _are_names(value)
    return None if fits else tr("a list of names, or an expression")


def _names(value: object) -> str | None:
    return None if value is None or _are_names(value) else tr("a list of names")


def _plain_names(value: object) -> str | None:
    fits = value is None or (_are_names(value) and all(_is_path(name) for name in value))  # type: ignore[attr-defined]
    return None if fits else tr("a list of modules' names")


def _is_path(name: str) -> bool:
    return all(part.isidentifier() or part.isdigit() for part in name.split("."))


def _layers(value: object) -> str | None:
    listed = value if isinstance(value, list) else [value]
    fits = value is None or all(_is_whole(one, 0, 2**31) for one in listed)
    return None if fits else tr("a layer's number, or a list of them")


def _ranks(value: object) -> str | None:
    fits = value is None or (isinstance(value, dict) and all(_rank(one) is None for one in value.values()))
    return None if fits else tr("an object of names and ranks")


def _alphas(value: object) -> str | None:
    fits = value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))
    return None if fits else tr("an object of names and numbers")


def _tokens(value: object) -> str | None:
    lists = value.values() if isinstance(value, dict) else [value]
    names = _are_names(list(value)) and all(map(_is_path, value)) if isinstance(value, dict) else True
    fits = names and all(
        isinstance(ids, list) and ids and all(_is_whole(number, 0, 2**31) for number in ids) for ids in lists
    )
    return (
        None if value is None or fits else tr("a list of token ids, or an object of modules and such lists")
    )


def _one_of(*words: str) -> Callable[[object], str | None]:
    return lambda value: (
        None if value is None or value in words else tr("one of {words}", words=", ".join(words))
    )


def _start(value: object) -> str | None:
    """`init_lora_weights`. Some starts also change the base, by an amount that the adapter's file does not hold."""
    if value is None or isinstance(value, bool) or value in ("gaussian", "eva", "orthogonal"):
        return None
    return tr(
        "true, false, gaussian, eva or orthogonal, because other starts change the base's own "
        "weights (PEFT's path_initial_model_for_weight_conversion saves an adapter without that "
        "change)"
    )


_KEYS: Mapping[str, Callable[[Any], str | None]] = {
    "peft_type": lambda _: None,  # checked before
    "task_type": lambda _: None,
    "base_model_name_or_path": _text,
    "revision": _text,
    "inference_mode": _flag,
    "r": _rank,
    "lora_alpha": _alpha,
    "lora_dropout": _dropout,
    "target_modules": _targets,
    "target_parameters": _names,
    "exclude_modules": _targets,
    "layers_to_transform": _layers,
    "layers_pattern": lambda value: _plain_names([value] if isinstance(value, str) else value),
    "rank_pattern": _ranks,
    "alpha_pattern": _alphas,
    "modules_to_save": _plain_names,
    "trainable_token_indices": _tokens,
    "ensure_weight_tying": _flag,
    "fan_in_fan_out": _flag,
    "use_rslora": _flag,
    "use_dora": _flag,
    "bias": _one_of("none", "all", "lora_only"),
    "init_lora_weights": _start,
}
"""Every key that is read -> what it may hold."""

_WITHOUT_EFFECT = frozenset(
    {
        "peft_version",
        "auto_mapping",  # the class of the base, for PEFT's own loader
        "megatron_core",
        "runtime_config",
        "qalora_group_size",  # of use_qalora
        "loftq_config",  # of init_lora_weights
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)
"""Keys that change nothing once an adapter is trained."""

_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": tr("switches the adapter on at certain tokens only"),
    "arrow_config": tr("chooses among several adapters token by token"),
    "kasa_config": tr("changes the base's own weights"),
    "layer_replication": tr("repeats layers of the base"),
    "lora_bias": tr("adds biases to the layers"),
    "megatron_config": tr("is for Megatron's layers"),
    "monteclora_config": tr("draws the adapter at random"),
    "use_bdlora": tr("is block-diagonal LoRA"),
    "use_qalora": tr("pools the layers' inputs"),
    "velora_config": tr("changes the layers' gradients"),
}
"""Keys of PEFT that Yeonma does not support -> what they do."""
