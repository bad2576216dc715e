"""What is known of a setting, and what was written for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from yeonma.ranges import Range

NO_DEFAULTS: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True)
class Setting:
    """What is known of one setting: its type's members (`int | None` has two), default and range."""

    name: str
    hint: Any
    members: tuple[Any, ...]
    required: bool
    default: object
    range: Range | None
    needless: bool = False
    """Other verbs require it, this one does not: an empty text where it is not given."""

    @property
    def optional(self) -> bool:
        return NoneType in self.members


@dataclass(frozen=True)
class Given:
    """A value as it was written. `place` is what a message about it begins with."""

    value: object
    place: str


def settings_of(
    groups: Iterable[type], needless: Sequence[str] = (), defaults: Mapping[str, object] = NO_DEFAULTS
) -> dict[str, Setting]:
    """Every setting of `groups` by its name, in order; those named `needless` are not required; `defaults` are those
    of the verb."""
    known = {}
    for group in groups:
        hints = get_type_hints(group)
        for field in fields(group):
            hint = hints[field.name]
            members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            known[field.name] = Setting(
                name=field.name,
                hint=hint,
                members=members,
                required=field.default is MISSING and field.name not in needless,
                default=defaults.get(field.name, None if field.default is MISSING else field.default),
                range=field.metadata.get("range"),
                needless=field.name in needless,
            )
    return known


def describe(setting: Setting) -> str:
    """What a setting takes, in words: `a whole number of at least 1`."""
    kinds: list[str] = []
    choices: list[str] = []
    for member in setting.members:
        if get_origin(member) is Literal:
            choices += [str(choice) for choice in get_args(member)]
        elif member is bool:
            kinds.append("true or false")
        elif member in (int, float):
            words = "a whole number" if member is int else "a number"
            kinds.append(f"{words} {setting.range}" if setting.range else words)
        elif member is str:
            kinds.append("text")
        elif get_origin(member) is list:
            item = get_args(member)[0]
            of = get_args(item) if get_origin(item) is Literal else ("a", "b")
            kinds.append(f"a list such as [{', '.join(map(str, of[:2]))}]")
        elif get_origin(member) is dict:
            example = "b" if get_args(member)[1] is str else "1"
            kinds.append(f"a mapping such as {{a: {example}}}, with a space after each colon")
    if choices:
        kinds.append(f"one of {', '.join(choices)}")
    return " or ".join(kinds)
