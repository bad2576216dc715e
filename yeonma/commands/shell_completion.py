"""`yeonma completion`: a script with which a shell completes commands, settings, their values and paths, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin

from yeonma.config.help import ABOUT_CONFIG, ABOUT_HELP, ABOUT_VERB_HELP, ABOUT_VERSION
from yeonma.config.parse import Setting
from yeonma.config.settings import CompletionSettings
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.packages import install
from yeonma.streams import give

FILES = (
    "config",
    "data_path",
    "file",
    "html",
    "output",
    "template",
    "val_data_path",
)
FOLDERS = (
    "adapter",
    "adapter_dir",
    "adapter_dirs",
    "base_model",
    "cache_dir",
    "dataset_dir",
    "folder",
    "include_path",
    "model_dir",
    "models",
    "output_dir",
    "resume_from_checkpoint",
)
"""Settings whose values are completed as paths. Those of FILES may also be folders or other texts."""


@dataclass(frozen=True)
class CompletedCommand:
    """A command of `yeonma`. about: one line. positional: the setting that is given without its name."""

    about: str
    settings: Mapping[str, Setting]
    positional: str | None


def write_script(settings: CompletionSettings, commands: Mapping[str, CompletedCommand]) -> int:
    """Writes the script on standard output. Raises UserError if shtab is not installed."""
    if find_spec("shtab") is None:
        cure = tr("install it with: {install}", install=install("shtab"))
        raise UserError(tr("missing package: shtab"), place="yeonma completion", cure=cure)
    import shtab

    give(shtab.complete(_parser(commands), shell=settings.shell))
    return 0


def _parser(commands: Mapping[str, CompletedCommand]) -> argparse.ArgumentParser:
    """What shtab reads the words from. Command lines are parsed by `yeonma.config.parse`, and not by this."""
    parser = argparse.ArgumentParser(prog="yeonma", add_help=False)
    parser.add_argument("--help", "-h", action="store_true", help=tr(ABOUT_VERB_HELP))
    parser.add_argument("--version", "-V", action="store_true", help=tr(ABOUT_VERSION))
    verbs = parser.add_subparsers()
    for name, command in commands.items():
        verb = verbs.add_parser(name, help=command.about, add_help=False)
        verb.add_argument("--help", "-h", nargs="?", choices=["all"], help=tr(ABOUT_HELP))
        _complete(verb.add_argument("--config", help=tr(ABOUT_CONFIG)), "config")
        for setting in command.settings.values():
            is_positional = setting.name == command.positional
            option = setting.name if is_positional else f"--{setting.name}"
            _complete(verb.add_argument(option, **_values(setting, is_positional)), setting.name)
    return parser


def _values(setting: Setting, is_positional: bool) -> dict[str, Any]:
    """The choices of a setting, and how many values it takes."""
    choices = _choices(setting)
    values: dict[str, Any] = {"choices": choices} if choices else {}
    if get_origin(setting.hint) is list:
        values["nargs"] = "*"
    elif bool in setting.members and not is_positional:
        values["nargs"] = "?"
    return values


def _choices(setting: Setting) -> Sequence[str]:
    found: list[str] = []
    for member in setting.members:
        if get_origin(member) is Literal:
            found += map(str, get_args(member))
        elif member is bool:
            found += ["true", "false"]
    return found


def _complete(action: argparse.Action, name: str) -> None:
    """Marks an option whose value is a path."""
    import shtab

    if name in FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif name in FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
