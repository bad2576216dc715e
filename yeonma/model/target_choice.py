"""Which layers a new adapter gets, by all the settings that choose: names, layers by number, exceptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yeonma.config.layer_ranges import as_ranges, layer_ranges, layers_in, layers_lacking
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.layer_names import LAYERS, listed, missing_layers
from yeonma.model.targets import (
    AUDIO,
    HEAD,
    PROJECTOR,
    VISION,
    TargetLayer,
    excluded_layers,
    resolve,
    target_layers,
)

OUTSIDE = {VISION, AUDIO, PROJECTOR, HEAD}
"""Parts without layers of the language model: their own names reach them, whatever layers are chosen."""


@dataclass(frozen=True)
class TargetChoice:
    """The settings of the same names."""

    lora_target_modules: Sequence[str] | str
    lora_experts: bool = True
    lora_layers: Sequence[int] | int | str | None = None
    exclude_modules: Sequence[str] | str | None = None

    @property
    def names(self) -> list[str]:
        return listed(self.lora_target_modules)


def chosen_layers(model: Any, choice: TargetChoice) -> list[TargetLayer]:
    """The layers that the choice reaches, in the order of the model.

    Raises UserError for names and layers that the model does not have, and if nothing is left.
    """
    reached = resolve(model, choice.names, experts=choice.lora_experts)
    if choice.lora_layers is not None:
        reached = _within(reached, model, choice.lora_layers)
    excluded = listed(choice.exclude_modules)
    if excluded:
        without = excluded_layers(model, excluded)
        left = [layer for layer in reached if layer not in without]
        if not left:
            names = ", ".join(dict.fromkeys(layer.leaf for layer in reached))
            what = tr("it leaves no layer to adapt: the other settings reach {names}", names=names)
            raise UserError(what, place="exclude_modules", cure=tr("exclude less, or reach more"))
        reached = left
    return reached


def layer_number(layer: TargetLayer) -> int | None:
    """The number of the language model's layer that it belongs to; None outside of them."""
    number = layer.block.rpartition(".")[2]
    return int(number) if layer.part not in OUTSIDE and number.isdigit() else None


def _within(
    reached: Sequence[TargetLayer], model: Any, numbers: Sequence[int] | int | str
) -> list[TargetLayer]:
    """Those in the layers with these numbers, and those of the head and of towers, which have names of their own."""
    place, ranges = LAYERS, layer_ranges(str(numbers))
    there = sorted({number for one in target_layers(model) if (number := layer_number(one)) is not None})
    if lacking := layers_lacking(ranges, there):
        raise UserError([missing_layers(lacking, there)])
    wanted = layers_in(ranges, there)
    left = [layer for layer in reached if layer.part in OUTSIDE or layer_number(layer) in wanted]
    if not left:
        names = ", ".join(dict.fromkeys(layer.leaf for layer in reached))
        own = as_ranges([number for layer in reached if (number := layer_number(layer)) is not None])
        places = {"wanted": as_ranges(sorted(wanted)), "names": names}
        what = (
            tr(
                "the layers {wanted} have none of the layers to adapt: only the layers {own} have {names}",
                own=own,
                **places,
            )
            if own
            else tr("the layers {wanted} have none of the layers to adapt: no layer has {names}", **places)
        )
        raise UserError(what, place=place, cure=tr("name other layers, or other lora_target_modules"))
    return left
