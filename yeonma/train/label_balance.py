"""How many labelled answers are desirable, and whether their weights make up for a difference.

Ethayarajh et al. 2024 (arXiv:2402.01306) recommend weights with which all desirable answers together count as much as
all undesirable ones, or up to a third more (equation 8 of the first version; the last one allows up to a half more).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10

from yeonma.config.settings import PreferenceSettings
from yeonma.messages import tr
from yeonma.tokenization.dataset import DatasetPart
from yeonma.tokenization.example import AnswerRole

MOST_UNEQUAL = 4
"""One label may count so many times as much as the other without a warning."""
LARGEST_SHARE = 4 / 3
"""The recommended weight of all desirable answers, as a multiple of that of all undesirable ones, is 1 to this."""


@dataclass(frozen=True)
class LabelBalance:
    """The numbers of answers with each label."""

    desirable: int
    undesirable: int
    warning: str | None
    """What is wrong with them, and the setting that cures it; None if nothing is."""

    def __str__(self) -> str:
        counts = tr(
            "labels: {desirable:,} desirable, {undesirable:,} undesirable",
            desirable=self.desirable,
            undesirable=self.undesirable,
        )
        return f"{counts}; {self.warning}" if self.warning else counts


def label_balance(part: DatasetPart, preference: PreferenceSettings | None) -> LabelBalance | None:
    """The balance of some examples, given the weights of the loss; None if they have no labels."""
    roles = part.store.roles[part.store.examples_of(part.units)]
    desirable, undesirable = (
        int((roles == role).sum()) for role in (AnswerRole.DESIRABLE, AnswerRole.UNDESIRABLE)
    )
    if preference is None or not desirable + undesirable:
        return None
    weights = preference.kto_desirable_weight, preference.kto_undesirable_weight
    return LabelBalance(desirable, undesirable, balance_warning(desirable, undesirable, *weights))


def balance_warning(
    desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float
) -> str | None:
    """A warning about such numbers of answers, at least one, of which each has that weight; None if they are fine."""
    if not (desirable and undesirable):
        if desirable:
            return tr("the loss needs undesirable answers as well; no weight makes up for having none")
        return tr("the loss needs desirable answers as well; no weight makes up for having none")
    good, bad = desirable * desirable_weight, undesirable * undesirable_weight
    if max(good, bad) <= MOST_UNEQUAL * min(good, bad):
        return None
    if good > bad:
        name, least, most = "undesirable", good / undesirable / LARGEST_SHARE, good / undesirable
    else:
        name, least, most = "desirable", bad / desirable, bad / desirable * LARGEST_SHARE
    ratio = tr("1 to {ratio:.3g}", ratio=bad / good)
    if good > bad:
        ratio = tr("{ratio:.3g} to 1", ratio=good / bad)
    return tr(
        "weighed, they count {ratio}; --kto_{name}_weight {least} to {most} brings that to between 1 to 1 and 4 to 3",
        ratio=ratio,
        name=name,
        least=_rounded(least, up=True),
        most=_rounded(most, up=False),
    )


def _rounded(number: float, *, up: bool) -> str:
    """A positive number with three digits."""
    scale = 10 ** (2 - floor(log10(number)))
    return f"{(ceil if up else floor)(number * scale) / scale:g}"
