"""The help page of a command, made from the settings groups that it reads."""

from __future__ import annotations

import ast
import inspect
import textwrap
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from types import NoneType
from typing import Literal, get_origin

from yeonma.config.parse import NO_DEFAULTS, Setting, describe, settings_of

METAVARS = {int: "N", float: "X", bool: "BOOL", str: "TEXT", list: "LIST", dict: "MAP", Literal: "NAME"}


def help_text(
    groups: Sequence[type],
    *,
    verb: str,
    about: str,
    positional: str | None = None,
    not_required: Sequence[str] = (),
    defaults: Mapping[str, object] = NO_DEFAULTS,
) -> str:
    """The help page, as wide as the terminal: one section per group, with the text, values and default of its settings.

    `positional`, `not_required` and `defaults` as in `read_config`.
    """
    settings = settings_of(groups, not_required, defaults)
    required = [name for name, setting in settings.items() if setting.required and name != positional]
    usage = [f"yeonma {verb}", *([positional.upper()] if positional else []), "[--config FILE]"]
    usage += [*(f"--{name} ..." for name in required), "[--setting value ...]"]
    parser = ArgumentParser(usage=" ".join(usage), description=about, add_help=False)
    general = parser.add_argument_group("options")
    general.add_argument("-h", "--help", action="store_true", help="Show this help.")
    general.add_argument(
        "--config", metavar="FILE", help="YAML file of settings. The command line wins over it."
    )
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or "").rstrip("."))
        texts = setting_texts(group)
        for field in fields(group):
            setting = settings[field.name]
            text = f"{texts[field.name]} {_values_and_default(setting)}".rstrip().replace("%", "%%")
            section.add_argument(f"--{field.name}", metavar=_metavar(setting), help=text)
    return parser.format_help()


def setting_texts(group: type) -> dict[str, str]:
    """Field name -> the docstring below it, for a settings group."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _values_and_default(setting: Setting) -> str:
    parts = [describe(setting)] if set(setting.members) - {str, NoneType} else []
    if setting.required:
        parts.append("required")
    elif setting.default not in (None, ""):
        parts.append(f"default {setting.default}")
    return f"({'; '.join(parts)})" if parts else ""


def _metavar(setting: Setting) -> str:
    kinds = [get_origin(member) or member for member in setting.members if member is not NoneType]
    return "|".join(dict.fromkeys(METAVARS[kind] for kind in kinds))
