"""What a model's config says about positions: how many there are, and where rotary frequencies change with the length.

LongRoPE (Ding et al. 2024, arXiv:2402.13753; Phi-3, 3.5 and 4 mini) has two sets of frequencies: one for sequences up
to the original length and one for longer ones. Dynamic NTK scaling has its own frequencies for every length above the
trained one. transformers picks them by the longest sequence of a forward pass; here every sequence has those that its
own length gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yeonma.errors import UserError
from yeonma.messages import counted, tr


@dataclass(frozen=True)
class LengthBorders:
    """The lengths at which a model's rotary frequencies change. None for most models."""

    switches: tuple[int, ...] = ()
    """LongRoPE's original lengths, ascending: longer sequences have other frequencies."""
    grows_from: int | None = None
    """Dynamic NTK scaling: every length above this one has frequencies of its own."""

    def __bool__(self) -> bool:
        return bool(self.switches) or self.grows_from is not None

    def rotary_length(self, length: int) -> int:
        """The shortest length with the frequencies of a sequence of `length` tokens."""
        shortest = max([1, *(border + 1 for border in self.switches if length > border)])
        return length if self.grows_from is not None and length > self.grows_from else shortest

    def switches_between(self, before: int, after: int) -> bool:
        """Whether a sequence that grows from `before` to `after` tokens gets LongRoPE's other frequencies, so that its
        keys must be computed again."""
        return any(before <= border < after for border in self.switches)


def length_borders(config: Any) -> LengthBorders:
    """The borders that a model's config names."""
    text = config.get_text_config()
    switches: set[int] = set()
    grows_from = None
    for parameters in _rope_parameters(text):
        kind = _kind(parameters)
        if kind in ("longrope", "su"):
            original = getattr(text, "original_max_position_embeddings", None)
            border = original or parameters.get("original_max_position_embeddings") or _positions(text)
            switches |= {int(border)} if border else set()
        elif "dynamic" in kind:
            grows_from = _positions(text)
    return LengthBorders(tuple(sorted(switches)), grows_from)


def model_positions(config: Any) -> int | None:
    """The most tokens that a sequence may have; None if the config names no limit.

    Dynamic NTK scaling extends the trained length by its factor.
    """
    text = config.get_text_config()
    positions = _positions(text)
    if positions is None:
        return None
    factors = [
        float(parameters.get("factor") or 1.0)
        for parameters in _rope_parameters(text)
        if "dynamic" in _kind(parameters)
    ]
    return int(positions * max([1.0, *factors]))


def check_fits(tokens: int, max_new_tokens: int, positions: int | None, place: str) -> None:
    """Raises UserError if a prompt of so many tokens and its answer exceed the model's positions."""
    if positions is not None and tokens + max_new_tokens > positions:
        what = tr(
            "{tokens} and {max_new_tokens} new ones exceed the model's {positions} positions",
            tokens=counted(tokens, "token"),
            max_new_tokens=max_new_tokens,
            positions=positions,
        )
        raise UserError(what, place=place, cure=tr("shorten it, or lower max_new_tokens"))


def _kind(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "")


def _positions(text_config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _rope_parameters(text_config: Any) -> list[Mapping[str, Any]]:
    """The parameters of rotary positions: one set, or one for each kind of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]
