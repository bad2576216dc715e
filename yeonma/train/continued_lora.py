"""The LoRA settings of a run that continues an adapter: they are the adapter's own. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from yeonma.adapter.lora_ranks import lora_config
from yeonma.config.settings import LoraSettings, RunConfig
from yeonma.errors import Problem, UserError
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.tokenization.new_tokens import read_new_tokens

MANIFEST = "yeonma.json"
PEFT_ALPHA = 8
"""What PEFT takes where a config does not say."""
CURE = tr(
    "leave it out; for another shape, merge that adapter with `yeonma merge` and train a new "
    "one on the result"
)


@dataclass(frozen=True)
class AdapterLora:
    """What an adapter's folder says of its shape, as settings."""

    folder: str
    settings: LoraSettings
    targets: tuple[str, ...] | None
    """Names of its target modules and parameters; None if they are a regular expression of PEFT's."""


COMPARED = (
    *("lora_r", "lora_alpha", "lora_target_modules", "new_tokens", "modules_to_save"),
    *("use_rslora", "use_dora"),
)
"""Settings that must be the adapter's own, if they are given."""
CHOICE = ("lora_target_modules", "lora_experts", "lora_layers", "exclude_modules")
"""Settings that choose layers: in other words they may still reach the same."""


def adapter_lora(folder: str) -> AdapterLora:
    """Reads adapter_config.json, and yeonma.json if there is one. Raises UserError if PEFT could not read it."""
    path = user_path(folder)
    try:
        config = lora_config(path)
        own = (
            _recorded(json.loads((path / MANIFEST).read_text("utf-8"))) if (path / MANIFEST).is_file() else {}
        )
        modules = config.get("target_modules") or []
        excluded = config.get("exclude_modules")
        targets = None if isinstance(modules, str) else (*modules, *(config.get("target_parameters") or []))
        settings = LoraSettings(
            lora_r=int(config["r"]),
            lora_alpha=config.get("lora_alpha", PEFT_ALPHA),
            lora_dropout=own.get("dropout", config.get("lora_dropout", 0.0)),
            lora_target_modules=own.get("target_modules", modules if targets is None else sorted(targets)),
            lora_experts=own.get("experts", LoraSettings.lora_experts),
            lora_layers=own.get("layers", config.get("layers_to_transform")),
            new_tokens=own.get("new_tokens"),
            modules_to_save=own.get("modules_to_save", config.get("modules_to_save")),
            exclude_modules=own.get("exclude", None if isinstance(excluded, str) else excluded),
            use_rslora=bool(config.get("use_rslora", False)),
            use_dora=bool(config.get("use_dora", False)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        place = str(path / "adapter_config.json")
        raise UserError(
            tr("damaged ({error})", error=error), place=place, cure=tr("give another adapter")
        ) from error
    return AdapterLora(folder, settings, targets)


def _recorded(details: Mapping[str, Any]) -> Mapping[str, Any]:
    """The LoRA settings in yeonma.json, which earlier versions did not write."""
    recorded = details.get("lora")
    return recorded if isinstance(recorded, dict) else {}


def check_lora(config: RunConfig, adapter: AdapterLora) -> None:
    """Raises UserError that names all LoRA settings which were given and differ from the adapter's.

    Target modules count as different here if they leave out some of the adapter's. `check_adapter` compares what both
    reach in the model.
    """
    own, settings = adapter.settings, config.lora
    problems = []
    for name in COMPARED:
        value, has = getattr(settings, name), getattr(own, name)
        same = value == has
        if name == "new_tokens":
            same = read_new_tokens(value) == has
        if name == "modules_to_save" and value and has:
            same = [value] == has if isinstance(value, str) else sorted(value) == sorted(has)
        if name == "lora_target_modules" and not same:
            names = [value] if isinstance(value, str) else list(value)
            same = adapter.targets is None or _may_be_all(names, adapter.targets)
        if name in config.given and not same:
            problems.append(
                Problem(
                    tr(
                        "it is {value}, but {folder} has {has}",
                        value=_text(value),
                        folder=adapter.folder,
                        has=_text(has),
                    ),
                    name,
                    CURE,
                )
            )
    if problems:
        raise UserError(problems)


def _may_be_all(names: list[str], targets: tuple[str, ...]) -> bool:
    """Whether names might reach all of these targets, as far as the names alone tell."""
    patterns = [name for name in names if name.lower() == "all-linear" or any(char in name for char in "*?[")]
    if patterns:
        return True
    covered = [any(f".{name}." in f".{target}." for name in names) for target in targets if "." in target]
    plain = {target for target in targets if "." not in target and not target.endswith("gate_up_proj")}
    return all(covered) and plain <= {name.rpartition(".")[2] for name in names}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        shown, more = ", ".join(map(str, value[:8])), len(value) - 8
        return tr("[{shown} and {more} more]", shown=shown, more=more) if more > 0 else f"[{shown}]"
    return str(value)


def follow_adapter(config: RunConfig, continued: str | None) -> RunConfig:
    """The config with the LoRA settings of the adapter to continue, if there is one, so that every record of the run
    says what is trained. A `lora_dropout` that was given stays, and so do the words that named target modules."""
    if continued is None:
        return config
    own = asdict(adapter_lora(continued).settings)
    kept = {"lora_dropout", *CHOICE} & config.given
    return replace(
        config, lora=LoraSettings(**{**own, **{name: getattr(config.lora, name) for name in kept}})
    )
