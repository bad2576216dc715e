"""Training mode for an adapter on a frozen base, whose own dropout and noise are off.

Dropout of the base would make an example's loss depend on what is drawn beside it, and add noise that nobody asked for:
some bases name 0.1 (GPT-2, OPT, Phi-2), because they were pretrained with it. `lora_dropout` is the only one here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

NOISE = ("drop", "jitter")
"""Parts of the names of probabilities and amounts of noise, in configs and in modules."""
OTHER_HEADS = ("classif", "summary")
"""Parts of the names of settings for other tasks than language modelling."""


def train_adapter(model: nn.Module) -> None:
    """Training mode for the layers of adapters, and for modules that checkpoint activations, which transformers does
    only in training mode; eval mode for all other modules. `model` may be without an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes a second

    model.eval()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.training = True
            for name in (*module.adapter_layer_names, *module.other_param_names):
                if isinstance(part := getattr(module, name, None), nn.Module):
                    part.train()
        elif getattr(module, "gradient_checkpointing", False) is True:
            module.training = True
            for name in _noise(vars(module)):
                setattr(module, name, 0.0)


def base_noise(config: Any) -> dict[str, float]:
    """The dropout probabilities and amounts of noise above 0 that a model's config names."""
    return _noise(config.get_text_config().to_dict())


def _noise(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, float | int)
        and not isinstance(value, bool)
        and value > 0
        and any(part in name for part in NOISE)
        and not any(part in name for part in OTHER_HEADS)
    }
