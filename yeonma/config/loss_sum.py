"""The names of the preference losses, and sums of them: `sigmoid:1,sft:0.5`. No torch here."""

from __future__ import annotations

import math
from typing import Literal, get_args

from yeonma.errors import did_you_mean
from yeonma.messages import later, tr

PairLossName = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "discopop",
    "apo_zero",
    "apo_down",
    "simpo",
    "cpo",
    "orpo",
    "sft",
]
LabelLossName = Literal["kto", "apo_zero_unpaired", "bco"]  # learn from labelled answers instead of pairs
LossName = Literal[PairLossName, LabelLossName]

PAIR_LOSSES, LABEL_LOSSES = get_args(PairLossName), get_args(LabelLossName)
SUM_EXAMPLE = later("a weighted sum such as sigmoid:1,sft:0.5")


class InvalidLoss(ValueError):
    """A text that names no loss and no sum of losses. `cure` may be empty."""

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(what)
        self.cure = cure


def weighted_losses(text: str) -> tuple[tuple[str, float], ...]:
    """The losses that a value of `--loss` names, each with its weight: one name, or `name:weight` separated by commas.
    A weight that is left out is 1.

    Raises InvalidLoss, with what is wrong and a cure.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in PAIR_LOSSES + LABEL_LOSSES:
            cure = (
                did_you_mean(name, PAIR_LOSSES + LABEL_LOSSES)
                if name
                else tr("write name:weight, name:weight")
            )
            raise InvalidLoss(
                tr('"{name}" is not a loss', name=name) if name else tr("a loss is missing"), cure
            )
        if name in found:
            raise InvalidLoss(
                tr("{name} stands there twice", name=name),
                tr("write {name} once, with one weight", name=name),
            )
        found[name] = _weight(name, number) if colon else 1.0
    kinds = {name in LABEL_LOSSES for name in found}
    if len(kinds) > 1:
        labelled, paired = (
            next(name for name in found if (name in LABEL_LOSSES) is kind) for kind in (True, False)
        )
        what = tr(
            "{labelled} learns from labelled answers and {paired} from pairs",
            labelled=labelled,
            paired=paired,
        )
        raise InvalidLoss(what, tr("add up losses of one kind of data"))
    return tuple(found.items())


def _weight(name: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InvalidLoss(
            tr('the weight of {name}, "{number}", is not a number above 0', name=name, number=number),
            tr("write {words}", words=f"{name}:0.5"),
        )
    return weight
