"""Write the tables of settings into docs/settings.md and docs/settings.ko.md, between the two `settings` comments.

The English texts are the docstrings in yeonma/config/settings.py, the Korean ones are in
yeonma/config/settings.ko.yaml.
With --check nothing is written; the exit status is 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from page_tables import ROOT, write_pages

BEGIN, END = "<!-- settings -->", "<!-- /settings -->"
ENGLISH_PAGE, KOREAN_PAGE = "docs/settings.md", "docs/settings.ko.md"
KOREAN_TEXTS = ROOT / "yeonma" / "config" / "settings.ko.yaml"
TRAINING_VERBS = ("sft", "dpo")


@dataclass(frozen=True)
class Setting:
    name: str
    default: str | None  # as YAML would write it; None: the setting must be given
    choices: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class Group:
    name: str
    meaning: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Wording:
    """What differs between the languages.

    `groups`: group name -> `about` or setting name -> text; None for the docstrings' own. `commands`: the lines of
    `yeonma --help`, which stand in no table.
    """

    heading: str
    required: str
    unset: str
    groups: Mapping[str, Mapping[str, str]] | None = None
    commands: Mapping[str, str] | None = None


# The verbs that read a group. TRAINING_VERBS read all others.
VERBS = {
    "PreferenceSettings": ("dpo",),
    "InspectSettings": ("inspect",),
    "AdapterSettings": ("generate", "chat"),
    "GenerateSettings": ("generate",),
    "CompareSettings": ("compare",),
    "JudgeSettings": ("compare",),
    "AnswerSettings": ("generate", "chat", "compare"),
    "MergeSettings": ("merge",),
    "ExportSettings": ("export",),
    "VerifySettings": ("verify",),
    "PushSettings": ("push",),
    "ServeSettings": ("serve",),
    "DemoSettings": ("demo",),
    "ConvertSettings": ("convert",),
    "DoctorSettings": ("doctor",),
    "CacheSettings": ("cache",),
    "CompletionSettings": ("completion",),
}
ENGLISH = Wording("| setting | default | meaning |", "**required**", "not set")


def fields_in_source(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and the string below it of every field that the class itself declares."""
    source = inspect.cleandoc(inspect.getsource(cls))
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
            raise SystemExit(f"{cls.__name__}.{field.target.id} has no text below it")
        value = field.value
        if isinstance(value, ast.Call):  # field(default=..., metadata=...)
            value = next((part.value for part in value.keywords if part.arg == "default"), None)
        default = ast.get_source_segment(source, value) if value else None
        yield field.target.id, default or "", " ".join(str(below.value.value).split())


def choices_of(annotation: object) -> tuple[str, ...]:
    """The texts of every `Literal` in an annotation, each once."""
    if get_origin(annotation) is Literal:
        return tuple(choice for choice in get_args(annotation) if isinstance(choice, str))
    found = (choice for part in get_args(annotation) for choice in choices_of(part))
    return tuple(dict.fromkeys(found))


def default_of(field: Field[Any], in_source: str) -> str | None:
    """A number as the source writes it (2e-4), anything else as YAML does; "" for none, None for required."""
    if field.default is MISSING and field.default_factory is MISSING:
        return None
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return in_source if isinstance(value, int | float) else str(value)


def settings_of(cls: type) -> Iterator[Setting]:
    hints = get_type_hints(cls)
    by_name = {field.name: field for field in fields(cls)}
    for name, default, meaning in fields_in_source(cls):
        yield Setting(name, default_of(by_name[name], default), choices_of(hints[name]), meaning)


def groups_of(*modules: ModuleType) -> tuple[Group, ...]:
    """The modules' own public dataclasses of settings, in the order of the files."""
    found = []
    for module in modules:
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and is_dataclass(cls) and cls.__module__ == module.__name__
            if own and name.endswith("Settings"):
                meaning = (inspect.getdoc(cls) or "").split("\n\n")[0]
                found.append(Group(name, " ".join(meaning.split()), tuple(settings_of(cls))))
    return tuple(found)


def translated(groups: Sequence[Group], file: Path) -> Wording:
    """The wording in a YAML file of Wording's fields; each group and setting must be there, and no other."""
    texts = yaml.safe_load(file.read_text(encoding="utf-8"))
    wanted = {
        (group.name, name) for group in groups for name in ("about", *(item.name for item in group.settings))
    }
    given = {(group, name) for group, names in texts["groups"].items() for name in names}
    problems = [f"{file}: {group}: {name} is missing" for group, name in sorted(wanted - given)]
    problems += [f"{file}: {group}: there is no {name}" for group, name in sorted(given - wanted)]
    if problems:
        raise SystemExit("\n".join(problems))
    return Wording(**texts)


def by_verbs(groups: Sequence[Group]) -> list[tuple[tuple[str, ...], list[Group]]]:
    """The groups that the same verbs read, together, in the order in which the verbs come first."""
    chapters: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        chapters.setdefault(VERBS.get(group.name, TRAINING_VERBS), []).append(group)
    return list(chapters.items())


def in_chapters(groups: Sequence[Group], wording: Wording) -> str:
    """The tables under a heading for each set of verbs, such as "## `yeonma generate`, `yeonma chat`"."""
    return "\n\n".join(
        f"## {', '.join(f'`yeonma {verb}`' for verb in verbs)}\n\n{markdown(members, wording)}"
        for verbs, members in by_verbs(groups)
    )


def markdown(groups: Sequence[Group], wording: Wording) -> str:
    """The tables, one per group, each below the group's own text."""
    blocks = []
    for group in groups:
        texts = wording.groups[group.name] if wording.groups is not None else None
        rows = [wording.heading, "| --- | --- | --- |"]
        for setting in group.settings:
            meaning = texts[setting.name] if texts is not None else setting.meaning
            untold = [choice for choice in setting.choices if not re.search(rf"\b{choice}\b", meaning)]
            if untold:
                meaning += " (" + ", ".join(f"`{choice}`" for choice in setting.choices) + ")"
            default = {None: wording.required, "": wording.unset}.get(setting.default, f"`{setting.default}`")
            cells = (f"`{setting.name}`", default, meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        about = texts["about"] if texts is not None else group.meaning
        blocks.append(about + "\n\n" + "\n".join(rows))
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a table is out of date"
    )
    check = parser.parse_args(arguments).check

    sys.path.insert(0, str(ROOT))
    from yeonma.config import settings

    groups = groups_of(settings)
    pages = {
        ENGLISH_PAGE: in_chapters(groups, ENGLISH),
        KOREAN_PAGE: in_chapters(groups, translated(groups, KOREAN_TEXTS)),
    }
    stale = write_pages(BEGIN, END, pages, "yeonma/config/settings.py", check=check)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
