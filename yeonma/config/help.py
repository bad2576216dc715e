"""The help of a command, made from the settings groups that it reads: one screen, all settings, or one of them."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Literal, get_origin

from yeonma.config.parse import Setting, describe, settings_of, unknown_cure
from yeonma.errors import UserError
from yeonma.language import language
from yeonma.messages import later, tr

METAVARS = {int: "N", float: "X", bool: "BOOL", str: "TEXT", list: "LIST", dict: "MAP", Literal: "NAME"}
KOREAN_TEXTS = Path(__file__).parent / "settings.ko.yaml"
NAMES_WIDTH, MAX_WIDTH = 26, 100
ABOUT_HELP = later("Show this help; `all` for every setting, or the name of one.")
ABOUT_CONFIG = later("YAML file of settings. The command line wins over it.")
ABOUT_VERB_HELP, ABOUT_VERSION = later("settings of a command"), later("version of Yeonma")
"""What the pages say of options that are no settings; shown by `tr`."""


@dataclass(frozen=True)
class HelpSource:
    """What the help of a command is made from. `groups`, `positional`, `not_required` and `defaults` as in
    `read_config`. about: one line. important: the settings of the short page. example: a command line."""

    groups: Sequence[type]
    verb: str
    about: str
    positional: str | None
    not_required: Sequence[str]
    defaults: Mapping[str, object]
    important: Sequence[str]
    example: str

    @property
    def settings(self) -> dict[str, Setting]:
        return settings_of(self.groups, self.not_required, self.defaults)


def overview(verbs: Mapping[str, str]) -> str:
    """The page of `yeonma --help`: all commands, and what each does. `verbs`: name -> the same in English."""
    width = max(map(len, verbs)) + 4
    lines = [tr("usage: {command}", command=f"yeonma COMMAND {tr('[--setting value ...]')}"), ""]
    for name, about in verbs.items():
        lines += _wrapped(about_command(name, about), " " * width, f"  {name}".ljust(width - 1))
    lines += ["", f"yeonma COMMAND --help   {tr(ABOUT_VERB_HELP)}"]
    return "\n".join([*lines, f"yeonma --version        {tr(ABOUT_VERSION)}"])


def help_text(source: HelpSource, topic: str | None) -> str:
    """The page for `--help TOPIC`: one screen without a topic, all settings for `all`, or the setting of that name.

    Raises UserError for a topic that is no setting of the command.
    """
    if topic is None:
        return _short_page(source) if source.important else _whole_page(source)
    if topic == "all":
        return _whole_page(source)
    return _setting_page(source, topic.lstrip("-").replace("-", "_"))


def _short_page(source: HelpSource) -> str:
    settings, texts = source.settings, _texts(source.groups)
    required = [name for name, setting in settings.items() if setting.required]
    lines = _head(source)
    important = tr("the settings that matter most:")
    for title, names in ((tr("required:"), required), (important, source.important)):
        lines += [title]
        for name in names:
            lines += _entry(settings[name], _first_sentence(texts[name]), source, is_short=True)
        lines += [""]
    command = f"yeonma {source.verb} --help"
    width = len(f"{command} learning_rate") + 3
    lines += [tr("example:"), *(f"  {line}" for line in source.example.split("\n")), ""]
    lines += [f"{f'{command} all':{width}}{tr('all {count} settings', count=len(settings))}"]
    lines += [f"{f'{command} {source.important[-1]}':{width}}{tr('one setting')}"]
    return "\n".join(lines)


def _whole_page(source: HelpSource) -> str:
    """One section per group, with the text, values and default of its settings."""
    settings, texts = source.settings, _texts(source.groups)
    lines = [*_head(source), tr("options:")]
    lines += _columns("-h, --help [NAME]", tr(ABOUT_HELP)) + _columns("--config FILE", tr(ABOUT_CONFIG))
    for group in source.groups:
        lines += ["", *_wrapped(f"{_about(group).rstrip('.')}:", "")]
        for field in fields(group):
            setting = settings[field.name]
            lines += _entry(setting, texts[field.name], source)
    return "\n".join(lines)


def _setting_page(source: HelpSource, name: str) -> str:
    settings = source.settings
    if name not in settings:
        cure = unknown_cure(name, settings, "--{}") or tr(
            "yeonma {verb} --help all lists them", verb=source.verb
        )
        raise UserError(tr("no setting of this command"), place=name, cure=cure)
    lines = _entry(settings[name], _texts(source.groups)[name], source)
    return "\n".join(line.removeprefix("  ") for line in lines)


def _head(source: HelpSource) -> list[str]:
    required = [name for name, setting in source.settings.items() if setting.required]
    usage = [f"yeonma {source.verb}", *([source.positional.upper()] if source.positional else [])]
    usage += ["[--config FILE]", *(f"--{name} ..." for name in required if name != source.positional)]
    usage += [tr("[--setting value ...]")]
    text = tr("usage: {command}", command=" ".join(usage))
    return [*_wrapped(text, "       "), "", *_wrapped(about_command(source.verb, source.about), ""), ""]


def about_command(verb: str, about: str) -> str:
    """What a command does, in one line. `about`: the same in English."""
    return _korean_texts()["commands"].get(verb, about) if language() == "ko" else about


def _entry(setting: Setting, text: str, source: HelpSource, *, is_short: bool = False) -> list[str]:
    """A setting's name and kind of value, and beside them its text, its values unless `is_short`, and its default."""
    is_positional = setting.name == source.positional
    name = setting.name.upper() if is_positional else f"--{setting.name} {_metavar(setting)}"
    return _columns(name, f"{text} {_values_and_default(setting, is_short)}".rstrip())


def _columns(name: str, text: str) -> list[str]:
    indent = " " * NAMES_WIDTH
    lines = _wrapped(text, indent, indent)
    if len(name) + 4 <= NAMES_WIDTH:
        return [f"  {name:{NAMES_WIDTH - 2}}{lines[0][NAMES_WIDTH:]}", *lines[1:]]
    return [f"  {name}", *lines]


def _wrapped(text: str, later: str, first: str = "") -> list[str]:
    """Lines as wide as the terminal. Hangul and other wide characters take two columns."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH) - 1
    lines, line = list[str](), first
    for word in text.split():
        joined = f"{line} {word}" if line.strip() else line + word
        if line.strip() and _columns_of(joined) > width:
            lines.append(line)
            joined = later + word
        line = joined
    return [*lines, line]


def _columns_of(text: str) -> int:
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(char) in "WF" else 1 for char in text)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def _texts(groups: Sequence[type]) -> dict[str, str]:
    """Setting name -> its text."""
    if language() == "ko":
        korean = _korean_texts()
        return {name: text for group in groups for name, text in korean[group.__name__].items()}
    return {name: text for group in groups for name, text in setting_texts(group).items()}


def _about(group: type) -> str:
    return _korean_texts()[group.__name__]["about"] if language() == "ko" else (group.__doc__ or "")


@cache
def _korean_texts() -> Mapping[str, Mapping[str, str]]:
    """Group of settings, or `commands` -> name -> text."""
    import yaml

    texts = yaml.safe_load(KOREAN_TEXTS.read_text("utf-8"))
    return {**texts["groups"], "commands": texts["commands"]}


@cache
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


def _values_and_default(setting: Setting, is_short: bool) -> str:
    parts = []
    if not is_short and set(setting.members) - {str, NoneType}:
        parts.append(describe(setting))
    if setting.required:
        parts += [] if is_short else [tr("required")]
    elif setting.default not in (None, ""):
        parts.append(tr("default {value}", value=setting.default))
    return f"({'; '.join(parts)})" if parts else ""


def _metavar(setting: Setting) -> str:
    kinds = [get_origin(member) or member for member in setting.members if member is not NoneType]
    return "|".join(dict.fromkeys(METAVARS[kind] for kind in kinds))


def setting_entries(groups: Sequence[type], settings: Mapping[str, Setting]) -> list[tuple[str, str]]:
    """Name and text of each of `settings`, with the values that it accepts and its default."""
    texts = _texts(groups)
    return [
        (name, f"{texts[name]} {_values_and_default(setting, is_short=False)}".rstrip())
        for name, setting in settings.items()
    ]
