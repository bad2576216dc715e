"""Modules that are trained whole beside an adapter, as PEFT's `modules_to_save`: which they are, and what cannot be.

PEFT trains a copy of the module and stores it in the adapter's file. Here the copy has float32 weights, whatever the
base has: AdamW's steps are smaller than what bfloat16 can tell apart. It computes in float32, and its output has the
base's number format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from yeonma.errors import Problem, UserError, did_you_mean, first_line
from yeonma.messages import tr
from yeonma.model.targets import TargetLayer

PLACE = "modules_to_save"
FORMAT = "yeonma_format_of_base"
"""Attribute of a module with float32 weights: the base's number format, and the hooks that keep it outside."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def whole_modules(model: Any, names: Sequence[str] | str | None, reached: Sequence[TargetLayer]) -> list[str]:
    """The paths of the modules that names reach, in the order of the model: ends of paths, or patterns with `*`. Of
    modules within each other, the outer one. Embedding and head that share a weight come together.

    `reached`: what gets an adapter. Raises UserError for names that reach nothing, and for modules that cannot be
    trained whole.
    """
    names = [] if names is None else [names] if isinstance(names, str) else list(names)
    modules = {path: module for path, module in model.named_modules() if path}
    found = {name: [path for path in modules if _is_named(path, name)] for name in names}
    problems = [_unknown(name, modules) for name, paths in found.items() if not paths]
    chosen = {path for paths in found.values() for path in paths}
    if shared := _shared(model, modules):
        chosen |= shared if chosen & shared else set()
    paths = [
        path
        for path in modules
        if path in chosen and not any(_is_within(path, one) for one in chosen - {path})
    ]
    for path in paths:
        problems += _problems(path, modules[path], reached)
    if problems:
        raise UserError(problems)
    return paths


def _is_named(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}") or fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}")


def _is_within(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _shared(model: Any, modules: dict[str, nn.Module]) -> set[str]:
    """The paths of embedding and head, if they share a weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return set()
    return {path for path, module in modules.items() if module is embedding or module is head}


def _unknown(name: str, modules: dict[str, nn.Module]) -> Problem:
    leaves = sorted({path.rpartition(".")[2] for path, module in modules.items() if not module._modules})
    cure = did_you_mean(name, leaves) or tr(
        "it has {leaves}", leaves=", ".join(leaf for leaf in leaves if not leaf.isdigit())
    )
    return Problem(tr('no module of the model is called "{name}"', name=name), PLACE, cure)


def _problems(path: str, module: nn.Module, reached: Sequence[TargetLayer]) -> list[Problem]:
    from transformers.modeling_layers import GradientCheckpointingLayer  # imports torch's compiler

    inside = list(module.modules())
    what, cure = "", tr("name the modules in it that are to be trained whole")
    if any(isinstance(one, GradientCheckpointingLayer) for one in inside):
        what = tr("{path} holds whole layers of the model", path=path)
    elif isinstance(module, _CONTAINERS):
        what = tr("{path} is a list of modules", path=path)
    elif next(module.parameters(), None) is None:
        what, cure = tr("{path} has no weights", path=path), tr("leave it out")
    elif any(_is_packed(weight) for weight in module.parameters()):
        what, cure = tr("{path} is quantised", path=path), tr("leave it out, or leave out --quantization")
    elif adapted := [layer for layer in reached if layer.path == path or _is_within(layer.path, path)]:
        names = ", ".join(dict.fromkeys(layer.leaf for layer in adapted))
        what = tr("{path} would be trained whole and have an adapter too ({names})", path=path, names=names)
        cure = tr("keep the adapter out of it with --exclude_modules '[{path}]'", path=path)
    return [Problem(what, PLACE, cure)] if what else []


def _is_packed(weight: torch.Tensor) -> bool:
    return hasattr(weight, "quant_state") or not weight.is_floating_point() or weight.element_size() == 1


def check_not_quantised(model: Any, paths: Sequence[str], quantised: Iterable[nn.Module]) -> None:
    """Raises UserError for modules with layers that will be `quantised` once the weights are loaded."""
    layers = set(quantised)
    problems = [
        Problem(
            tr("{path} will be quantised", path=path), PLACE, tr("leave it out, or leave out --quantization")
        )
        for path in paths
        if not layers.isdisjoint(model.get_submodule(path).modules())
    ]
    if problems:
        raise UserError(problems)


def whole_fields(model: Any, paths: Sequence[str]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that train these modules. `model`: without the adapter."""
    if not paths:
        return {}
    shared = _shared(model, {path: module for path, module in model.named_modules() if path})
    return {"modules_to_save": list(paths), "ensure_weight_tying": bool(shared & set(paths))}


def begin_whole_modules(model: Any, paths: Sequence[str], shared: bool) -> None:
    """Prepares the copies that PEFT has made. `shared`: whether embedding and head must still share their weight.

    Raises UserError if they do not, or if the model cannot compute with copies in float32.
    """
    wrapped = {path for path, module in model.named_modules() if hasattr(module, "modules_to_save")}
    if wrapped != set(paths):
        raise RuntimeError(f"PEFT trains other modules whole: {sorted(wrapped ^ set(paths))[:5]}")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if shared and embedding.weight is not head.weight:
        what = tr("embedding and head of this model share a weight, and PEFT would train them apart")
        raise UserError(what, place=PLACE, cure=tr("leave them out"))
    if not keep_float32(model) or next(model.parameters()).device.type == "meta":
        return
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=model.device))
    except (RuntimeError, TypeError, ValueError) as error:
        what = tr(
            "the model does not compute with float32 weights in {paths} ({error})",
            paths=", ".join(paths),
            error=first_line(error),
        )
        raise UserError(what, place=PLACE, cure=tr("use --dtype float32, or leave it out")) from error


def keep_float32(model: Any) -> bool:
    """Gives modules that are trained whole float32 weights, and the base's number format outside. Returns whether there
    were any in another format."""
    changed = False
    for module in _copies(model):
        formats = {weight.dtype for weight in module.parameters()} & {torch.bfloat16, torch.float16}
        if formats:
            dtype = min(formats, key=str)
            module.float()
            hooks = (
                module.register_forward_pre_hook(_to_float32, with_kwargs=True),
                module.register_forward_hook(partial(_to_format, dtype)),
            )
            setattr(module, FORMAT, (dtype, hooks))
            changed = True
    return changed


def as_the_base(model: Any) -> None:
    """Undoes `keep_float32`, and rounds the trained weights to the base's number format: for a merged model."""
    for module in _copies(model):
        if hasattr(module, FORMAT):
            dtype, hooks = getattr(module, FORMAT)
            delattr(module, FORMAT)
            for hook in hooks:
                hook.remove()
            module.to(dtype)


def _copies(model: Any) -> list[nn.Module]:
    """The modules that are trained whole."""
    by_adapter = [getattr(module, "modules_to_save", None) for module in model.modules()]
    return [copy for copies in by_adapter if isinstance(copies, nn.ModuleDict) for copy in copies.values()]


def _to_format(dtype: torch.dtype, module: nn.Module, args: Any, result: Any) -> Any:
    return _cast(result, dtype)


def _to_float32(module: nn.Module, args: Any, keywords: Any) -> tuple[Any, Any]:
    keywords = {name: _cast(value, torch.float32) for name, value in keywords.items()}
    return tuple(_cast(value, torch.float32) for value in args), keywords


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(one, dtype) for one in value)
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_number else value
