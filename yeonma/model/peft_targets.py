"""Targets in PEFT's config: as `targets.resolve` means them, and as plain PEFT reads them again.

Where transformers has fused a model's experts, PEFT moves target modules called `gate_proj` or `gate` to the experts
and the router, wherever they stand, so that older adapters still load. Our targets are paths in the model as it is, so
PEFT must leave them alone here (`exact_targets`). In the file, layers that PEFT would move stand among
`target_parameters`, as the weight that they are: plain PEFT then adds the adapter to the weight and
gives the same logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from yeonma.errors import UserError, brief
from yeonma.messages import tr
from yeonma.model.adapter_config import read_adapter_config
from yeonma.model.language_part import left_out_paths
from yeonma.model.name_patterns import is_name, names_of
from yeonma.model.targets import ALL_LINEAR, TargetLayer, module_paths, target_layers


def target_fields(
    model: nn.Module, reached: Sequence[TargetLayer], names: Sequence[str], r: int, alpha: float
) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig for these layers. `names`: the setting, which is kept where it says the same.

    A parameter that holds several matrices of the base's files gets as many times the rank, with the same scale.
    """
    modules = [layer.path for layer in reached if layer.kind == "linear"]
    paths = [*(path for path, _ in model.named_modules()), *left_out_paths(model)]
    by_name = [path for path in paths if _is_named(path, names)]
    fused = {layer.leaf: len(layer.in_files) for layer in reached if len(layer.in_files) > 1}
    linear = {path.rpartition(".")[2] for path in modules}
    ranks = {rf".*\.{'experts.' * (leaf in linear)}{re.escape(leaf)}": count for leaf, count in fused.items()}
    parameters = [layer.parameter for layer in reached if layer.kind != "linear"]
    return {
        "target_modules": list(names) if modules and sorted(by_name) == sorted(modules) else modules,
        "target_parameters": _shortest(parameters, [path for path, _ in model.named_parameters()]) or None,
        "rank_pattern": {key: r * count for key, count in ranks.items()},
        "alpha_pattern": {key: alpha * count for key, count in ranks.items()},
        # PEFT sets it for such layers by itself, with a warning for each
        "fan_in_fan_out": bool(modules)
        and all(isinstance(model.get_submodule(path), Conv1D) for path in modules),
    }


def _is_named(path: str, names: Iterable[str]) -> bool:
    """Whether PEFT takes a module for a target by one of these names."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def _shortest(paths: Sequence[str], every: Sequence[str]) -> list[str]:
    """The shortest ends of these paths that no other path has."""
    for length in range(1, max((path.count(".") for path in paths), default=0) + 1):
        ends = sorted({".".join(path.split(".")[-length:]) for path in paths})
        if sum(any(f".{path}".endswith(f".{end}") for end in ends) for path in every) == len(paths):
            return ends
    return sorted(paths)


@contextmanager
def exact_targets() -> Iterator[None]:
    """Within the block PEFT takes targets as they are."""
    from peft.utils import transformers_weight_conversion as conversion

    renaming = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = renaming


@contextmanager
def exact_names() -> Iterator[None]:
    """Within the block PEFT takes the names of an adapter's tensors as they are."""
    from peft.utils import transformers_weight_conversion as conversion

    renaming = conversion.convert_peft_adapter_state_dict_for_transformers
    conversion.convert_peft_adapter_state_dict_for_transformers = lambda *, adapter_state_dict, **_: (
        adapter_state_dict
    )
    try:
        yield
    finally:
        conversion.convert_peft_adapter_state_dict_for_transformers = renaming


@contextmanager
def as_peft_reads(model: Any, config: Any) -> Iterator[None]:
    """Within the block the config of an adapter on `model` has the targets that plain PEFT needs to load it."""
    own = config.target_modules, config.target_parameters, config.lora_dropout
    moved = _moved_by_peft(model, config)
    if moved:
        linear = [layer.path for layer in target_layers(model) if layer.kind == "linear"]
        paths = [path for path in linear if _is_named(path, moved)]
        config.target_modules = sorted(set(config.target_modules) - moved)
        config.target_parameters = [
            *(config.target_parameters or []),
            *sorted(f"{path}.weight" for path in paths),
        ]
        config.lora_dropout = 0.0  # PEFT has none for parameters; it matters in training only
    names = set(config.target_modules or ())
    if any(_is_named(path, names) for path in left_out_paths(model)):  # PEFT would adapt the towers too
        linear = [layer.path for layer in target_layers(model) if layer.kind == "linear"]
        config.target_modules = sorted(path for path in linear if _is_named(path, names))
    try:
        yield
    finally:
        config.target_modules, config.target_parameters, config.lora_dropout = own


def _moved_by_peft(model: Any, config: Any) -> set[str]:
    """The target modules that PEFT would take for experts or routers."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read = deepcopy(config)
    convert_peft_config_for_transformers(read, model, None)
    return set(config.target_modules or ()) - set(read.target_modules or ())


def read_config(model: Any, folder: str) -> tuple[Any, bool]:
    """The config of an adapter's folder for `model`, and whether its targets are exact. Layers that stand among its
    parameters because of `as_peft_reads` are modules again, and expressions are the names that they match."""
    from peft import LoraConfig

    own = read_adapter_config(folder)
    config: Any = LoraConfig(
        **_without_expressions(model, own.keys, own.place),
        base_model_name_or_path=own.base,
        revision=own.revision,
        task_type="CAUSAL_LM",
    )
    linear = {layer.parameter: layer.path for layer in target_layers(model) if layer.kind == "linear"}
    parameters = list(getattr(config, "target_parameters", None) or ())
    layers = [linear[name] for name in parameters if name in linear]
    if layers:
        config.target_modules = sorted({*(config.target_modules or ()), *layers})
        config.target_parameters = [name for name in parameters if name not in linear] or None
    return config, bool(layers)


def _without_expressions(model: Any, keys: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The keys with names in place of expressions, which PEFT would match without a bound of time."""
    changed = dict(keys)
    targets, excluded = (_expression(keys.get(name)) for name in ("target_modules", "exclude_modules"))
    patterns = {name: dict(keys.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    in_patterns = [key for pattern in patterns.values() for key in pattern]
    if targets is excluded is None and all(map(is_name, in_patterns)):
        return changed
    names = _names_to_match(model)
    ends = [rf"(?:.*\.)?(?:{key})" for key in in_patterns]
    asked = [one for one in (targets, excluded) if one is not None]
    found = names_of([*asked, *ends], names, place)
    matches = dict(zip([*asked, *in_patterns], found, strict=True))
    if targets is not None:
        without = matches[excluded] if excluded is not None else set[str]()
        changed["target_modules"] = sorted(matches[targets] - without)
        if not changed["target_modules"]:
            what = tr("the expression {targets} matches no layer of the base", targets=brief(targets))
            cure = tr("give the base model that the adapter was trained on")
            raise UserError(what, place=place, cure=cure)
    if excluded is not None:
        changed["exclude_modules"] = sorted(matches[excluded]) or None
    for name, pattern in patterns.items():
        if not all(map(is_name, pattern)):
            changed[name] = _by_names(pattern, matches)
    return changed


def _expression(value: object) -> str | None:
    """The expression that stands in place of a list of names; None if there is none, or none that takes time."""
    return value if isinstance(value, str) and value != ALL_LINEAR and not is_name(value) else None


def _names_to_match(model: Any) -> list[str]:
    """The names of modules and parameters, and those that the matrices of fused experts have in the base's files."""
    names = [*module_paths(model), *(path for path, _ in model.named_parameters())]
    for layer in target_layers(model):
        container = layer.path.rpartition(".")[0]
        names += [f"{container}.{name}" for name in layer.in_files]
    return [name for name in dict.fromkeys(names) if name]


def _by_names(pattern: Mapping[str, Any], matches: Mapping[str, set[str]]) -> dict[str, Any]:
    """A pattern of ranks whose keys are lists of names. As in PEFT, the first key that matches a name counts."""
    taken, changed = set[str](), dict[str, Any]()
    for key, value in pattern.items():
        names = sorted(matches[key] - taken)
        taken |= matches[key]
        if names:
            changed[f"^(?:{'|'.join(map(re.escape, names))})"] = value
    return changed
