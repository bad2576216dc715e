"""The language model within a checkpoint that also reads images, videos or sound.

Such a checkpoint is loaded in its own class, so that an adapter's names are those that PEFT, vLLM and transformers
expect for the whole checkpoint. Its towers (the vision model, the audio model) are neither built nor read: text never
passes through them. An `AbsentTower` stands in the place of each and knows its names.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.reading_class import class_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AbsentTower(nn.Module):
    """In the place of a tower that is not loaded."""

    def __init__(self, path: str, tower: PreTrainedModel) -> None:
        super().__init__()
        self.path = path
        self.config = tower.config
        self.inner = tuple(name for name, _ in tower.named_modules() if name)
        """The names of the tower's modules, below its own."""
        self.count = sum(parameter.numel() for parameter in tower.parameters())
        """Of its parameters."""

    def forward(self, *_: Any, **__: Any) -> None:
        """Raises UserError: the model calls its tower for text too."""
        what = tr(
            "it needs its {path} to read text, and Yeonma loads the language model alone", path=self.path
        )
        raise UserError(what, place="base_model", cure=tr("take another base model"))


def multimodal_class(config: Any) -> Any:
    """The class of a checkpoint that reads more than text; None for a config of a text model.

    A config of such a checkpoint whose weights are those of its language model alone, as `architectures` says, is one
    of a text model. So is one that comes with its own code.
    """
    if getattr(config, "auto_map", None) or getattr(config, "is_encoder_decoder", False):
        return None
    found: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    found = found[0] if isinstance(found, tuple) else found
    if found is None or not found.can_generate():
        return None
    text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if text_class is not None and text_class is not found:
        named = getattr(config, "architectures", None) or ()
        if text_class.__name__ in named and found.__name__ not in named:
            return None
    return found


def build_empty(config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model on the meta device, without its towers. `options` are those of transformers' `from_config`. The model
    gets a copy of the config, because building writes into it."""
    config = deepcopy(config)
    whole = multimodal_class(config)
    with torch.device("meta"):
        if whole is None:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
        model = without_towers(whole)._from_config(config, **options)
    model.__class__ = whole
    return model


def without_towers(model_class: Any) -> Any:
    """The class of a checkpoint whose towers are left out, for transformers to read the other weights into."""
    return class_with(model_class, leave_out_towers)


def leave_out_towers(model: Any) -> None:
    """Puts an AbsentTower in the place of every tower: a transformers model of its own beside the language model."""
    decoder = model.get_decoder()
    if decoder is None or decoder is model:
        return
    inside = {id(module) for module in decoder.modules()}
    for path in list(_towers(model, inside)):
        parent, _, name = path.rpartition(".")
        tower = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, AbsentTower(path, tower))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"(^|\.){name}\."}


def _towers(model: nn.Module, inside: set[int], path: str = "") -> Iterator[str]:
    """The outermost towers. `inside`: the modules of the language model."""
    from transformers import PreTrainedModel  # imports torch's compiler

    for name, module in model.named_children():
        here = f"{path}.{name}" if path else name
        if id(module) in inside:
            continue
        if isinstance(module, PreTrainedModel) and not any(id(one) in inside for one in module.modules()):
            yield here
        else:
            yield from _towers(module, inside, here)


def left_out(model: nn.Module) -> list[AbsentTower]:
    """What stands in the place of the model's towers."""
    return [module for module in model.modules() if isinstance(module, AbsentTower)]


def absent_parameters(model: nn.Module) -> int:
    """The number of parameters in the towers that are left out."""
    return sum(tower.count for tower in left_out(model))


def left_out_paths(model: nn.Module) -> list[str]:
    """The paths of all modules of the towers that are left out."""
    return [
        path
        for tower in left_out(model)
        for path in (tower.path, *(f"{tower.path}.{name}" for name in tower.inner))
    ]
