"""What is known of a setting, and what was written for it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import date
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from yeonma.config.settings import Range, StepSettings
from yeonma.config.yaml_text import read_items, read_value, write_item
from yeonma.errors import Problem, UserError, did_you_mean

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

    @property
    def optional(self) -> bool:
        return NoneType in self.members


@dataclass(frozen=True)
class Given:
    """A value as it was written. `place` is what a message about it begins with."""

    value: object
    place: str


def settings_of(
    groups: Iterable[type], not_required: Sequence[str] = (), defaults: Mapping[str, object] = NO_DEFAULTS
) -> dict[str, Setting]:
    """The settings of `groups` by name, in order. Those in `not_required` may be missing; `defaults` win over the
    groups' own."""
    known = {}
    for group in groups:
        hints = get_type_hints(group)
        for field in fields(group):
            hint = hints[field.name]
            required = field.default is MISSING and field.name not in not_required
            default = field.default
            if default is MISSING:
                default = None if required else ""
            members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            known[field.name] = Setting(
                name=field.name,
                hint=hint,
                members=members,
                required=required,
                default=defaults.get(field.name, default),
                range=field.metadata.get("range"),
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


NONE_WORDS = ("None", "null")
MOST_PARTS = 1000  # of a list or mapping that jsonargparse fits, in a time that grows with their square


class Misfit(Exception):
    """Why a value is not one of its setting's: `is out of range`."""


def fitter(known: Mapping[str, Setting]) -> Callable[[Setting, object], object]:
    """A function from a setting and what was written for it to its value. It raises Misfit."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    for setting in known.values():
        parser.add_argument(f"--{setting.name}", type=setting.hint)

    def fit(setting: Setting, value: object) -> object:
        if setting.optional and (value is None or value in NONE_WORDS):
            return None
        if isinstance(value, str) and set(setting.members) <= {str, NoneType}:
            if not value and not setting.optional:
                raise Misfit("is empty")
            _check_texts(value)
            return value  # As it stands: a template may look like YAML, and is none.
        if isinstance(value, str) and {get_origin(member) for member in setting.members} & {list, dict}:
            value = _list_or_mapping(value, setting)
        if isinstance(value, list) and list[str] in setting.members:
            if all(isinstance(part, str) for part in value):
                _check_texts(value)
                return value
        if isinstance(value, (list, dict)) and len(value) > MOST_PARTS:
            raise Misfit(f"has more than {MOST_PARTS:,} parts")
        try:
            if value is None:  # jsonargparse takes None for "not given", whatever the type.
                raise Misfit("does not fit")
            fitted: object = parser.parse_object({setting.name: value}, defaults=False)[setting.name]
        except (
            ArgumentError,
            ValueError,
            OverflowError,
            RecursionError,
        ):  # The last three: monstrous values.
            raise Misfit("does not fit") from None
        _check_texts(fitted)
        for number in _numbers(fitted):
            if number not in (setting.range or Range()):
                raise Misfit("is out of range")
        return fitted

    return fit


def _list_or_mapping(text: str, setting: Setting) -> object:
    """The list or mapping that a text spells, or the text itself where the setting takes text too."""
    try:
        value = read_value(text, setting.name)
    except UserError as error:
        if text.startswith(("[", "{")):
            raise Misfit(f"does not fit ({error.problems[0].what})") from None
        value = text
    return value if isinstance(value, (list, dict)) else text


def _check_texts(value: object) -> None:
    """Raises Misfit for half a character: a byte of the command line that is no text, or an escape in YAML. What a
    run leaves behind could not be written with it."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str) and re.search("[\ud800-\udfff]", part):
            raise Misfit("is not UTF-8 text")


def _numbers(value: object) -> Iterator[float]:
    """The numbers in a value. Raises Misfit for a mapping with a key that is not text."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise Misfit("does not fit")
        value = list(value.values())
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, (int, float)) and not isinstance(part, bool):
            yield part


def misfit_problem(setting: Setting, written: Given, why: str) -> Problem:
    value = written.value
    if str in setting.members and isinstance(value, (bool, int, float, date)):
        return Problem(f"{shown(value)} is not text", written.place, "put it in quotes")
    cure = f"give {describe(setting)}"
    choices = [
        choice for member in setting.members if get_origin(member) is Literal for choice in get_args(member)
    ]
    meant = did_you_mean(value, choices) if isinstance(value, str) else ""
    return Problem(f"{shown(value)} {why}", written.place, f"{cure}; {meant}" if meant else cure)


def shown(value: object) -> str:
    """A value as messages show it, cut to 60 characters."""
    plain = not isinstance(value, str) or re.fullmatch(r"[-+.\w]+", value)
    text = str(value) if plain else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


Config = TypeVar("Config")
OPTION = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Reading(Generic[Config]):
    """A config that passed every check, and warnings for the caller to print."""

    config: Config
    warnings: tuple[str, ...]


def read_config(
    kind: type[Config],
    argv: Sequence[str],
    *,
    verb: str,
    groups: Sequence[type] | None = None,
    positional: str | None = None,
    not_required: Sequence[str] = (),
    defaults: Mapping[str, object] = NO_DEFAULTS,
) -> Reading[Config]:
    """Read a verb's settings from command line arguments and the YAML file that `--config` names.

    `kind` is a settings group, or a config of groups such as RunConfig; `groups` are those of its groups that the verb
    reads, all of them by default; an optional group that is not read is None. The command line wins over the file.
    `positional` is the setting that an argument without a name fills. Settings in `not_required` are empty texts if not
    given, although their group requires them. `defaults` override the groups' own.
    Raises UserError with every problem found.
    """
    problems: list[Problem] = []
    known = settings_of(groups or groups_in(kind), not_required, defaults)
    given = _from_command_line(argv, known, positional, verb, problems)
    config = given.pop("config", None)
    if config is not None:
        given = {**_from_yaml(str(config.value), known, problems), **given}
    return _checked(kind, known, given, problems, "--{} ...")


def config_from_keywords(
    kind: type[Config],
    keywords: Mapping[str, object],
    *,
    groups: Sequence[type] | None = None,
    defaults: Mapping[str, object] = NO_DEFAULTS,
) -> Reading[Config]:
    """Read the settings from Python keywords; `config` names a YAML file; the keywords win. `kind`, `groups` and
    `defaults` as in `read_config`.

    Raises UserError with every problem found.
    """
    problems: list[Problem] = []
    known = settings_of(groups or groups_in(kind), (), defaults)
    given: dict[str, Given] = {}
    for name, value in keywords.items():
        if name in known:
            given[name] = Given(os.fspath(value) if isinstance(value, os.PathLike) else value, name)
        elif name != "config":
            problems.append(Problem("unknown setting", name, did_you_mean(name, known)))
    if keywords.get("config") is not None:
        given = {**_from_yaml(str(keywords["config"]), known, problems), **given}
    return _checked(kind, known, given, problems, "{}=...")


def _members(kind: type) -> dict[str, tuple[type, bool]]:
    """Field -> the config or group it holds, and whether it may be None; empty for a settings group."""
    members: dict[str, tuple[type, bool]] = {}
    for name, hint in get_type_hints(kind).items():
        options = [option for option in get_args(hint) or (hint,) if option is not NoneType]
        if len(options) == 1 and isinstance(options[0], type) and is_dataclass(options[0]):
            members[name] = options[0], options[0] is not hint
    return members


def groups_in(kind: type) -> tuple[type, ...]:
    """The settings groups of a config, in order; of a group, itself."""
    members = _members(kind)
    return tuple(group for inner, _ in members.values() for group in groups_in(inner)) if members else (kind,)


def settings_dict(config: object) -> dict[str, Any]:
    """The settings of all groups by name, in order; no two groups share a name."""
    if not _members(type(config)):
        return dict(vars(config))
    inner = [getattr(config, name) for name in _members(type(config))]
    return {name: value for part in inner if part is not None for name, value in settings_dict(part).items()}


def to_yaml(config: object) -> str:
    """The settings as flat YAML that `--config` reads back to an equal config."""
    values = settings_dict(config)
    # Never chosen and overruled by max_steps: in the file it would read as a choice, and warn.
    if values.get("max_steps") is not None and values.get("num_epochs") == StepSettings.num_epochs:
        del values["num_epochs"]
    return "".join(write_item(name, value) for name, value in values.items())


# -------------------------------------------------------------------------------- the command line


def _from_command_line(
    argv: Sequence[str],
    known: Mapping[str, Setting],
    positional: str | None,
    verb: str,
    problems: list[Problem],
) -> dict[str, Given]:
    """What each option says, as text; the last one wins. `config` stands among them as one of its own."""
    given: dict[str, Given] = {}
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        option = OPTION.fullmatch(argument)
        if option is None:
            if positional and positional not in given and not _looks_like_option(argument):
                given[positional] = Given(_with_more(known.get(positional), argument, waiting), positional)
            else:
                problems.append(_unexpected(argument, known))
            continue
        name, value = option[1].replace("-", "_"), option[2]
        if value is None and waiting and not OPTION.fullmatch(waiting[0]):
            value = waiting.pop(0)
        if name not in known and name != "config":
            cure = did_you_mean(name, known) or f"see yeonma {verb} --help"
            problems.append(Problem("unknown setting", f"--{option[1]}", cure))
            continue
        if value is None and name in known and bool in known[name].members:
            value = "true"
        if value is None:
            problems.append(Problem("a value is missing after it", f"--{option[1]}"))
        elif name == "config" and name in given:
            problems.append(Problem("given twice", "--config", "put the settings into one file"))
        else:
            given[name] = Given(_with_more(known.get(name), value, waiting), name)
    return given


def _with_more(setting: Setting | None, value: str, waiting: list[str]) -> object:
    """The value; for a list of texts, `--models a b c`, with the words that follow, which are taken from `waiting`.

    A list that has no name on the command line, `yeonma serve a b`, is read alike.
    """
    if setting is None or setting.hint != list[str] or value.startswith("["):
        return value
    words = [value]
    while waiting and not _looks_like_option(waiting[0]):
        words.append(waiting.pop(0))
    return words


def _looks_like_option(argument: str) -> bool:
    return re.fullmatch(r"-{1,2}[A-Za-z].*", argument) is not None


def _unexpected(argument: str, known: Mapping[str, Setting]) -> Problem:
    if _looks_like_option(argument):
        name = argument.lstrip("-").replace("-", "_")
        cure = f"write --{name}" if name in known else "names of settings begin with --"
    elif "=" in argument and argument.partition("=")[0].replace("-", "_") in known:
        cure = f"write --{argument}"
    else:
        cure = "write a list as '[a, b]', and text with spaces in quotes"
    return Problem(f"{shown(argument)} belongs to no setting", cure=cure)


# -------------------------------------------------------------------------------- YAML


def _from_yaml(path: str, known: Mapping[str, Setting], problems: list[Problem]) -> dict[str, Given]:
    """What a YAML file says. Problems with its keys are collected; a file that is no settings raises UserError."""
    given: dict[str, Given] = {}
    try:
        items = list(read_items(_config_text(path), path))
    except UserError as error:  # What the file would have set is unknown: no word of what is missing.
        raise UserError([*problems, *error.problems]) from None
    for key, value, line in items:
        place = f"{path}:{line}"
        name = str(key).replace("-", "_")
        if name not in known:
            problems.append(Problem(f"unknown setting {shown(key)}", place, did_you_mean(name, known)))
        elif name in given:
            problems.append(Problem(f'"{name}" is given twice', place, "remove one of them"))
        else:
            given[name] = Given(value, f"{place}: {name}")
    return given


def _config_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError:
        raise UserError("not UTF-8", place=path, cure="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot be read: {reason}", place=path, cure="--config takes a YAML file") from None


# -------------------------------------------------------------------------------- checks


def _checked(
    kind: type[Config],
    known: Mapping[str, Setting],
    given: Mapping[str, Given],
    problems: list[Problem],
    form: str,
) -> Reading[Config]:
    """Fit every value to its type and range and build the config, or raise UserError with every problem.

    `form` is how a setting is written where the settings come from: `--{} ...`.
    """
    fit = fitter(known)
    values: dict[str, Any] = {}
    for name, written in given.items():
        try:
            values[name] = fit(known[name], written.value)
        except Misfit as misfit:
            problems.append(misfit_problem(known[name], written, str(misfit)))
    problems += _contradictions(values, given)
    missing = [name for name, setting in known.items() if setting.required and name not in given]
    if missing:
        cure = f"write {' '.join(form.format(name) for name in missing)}, or set {{}} in a --config file"
        what = "required, but not given"
        problems.append(Problem(what, ", ".join(missing), cure.format("them" if missing[1:] else "it")))
    if problems:
        raise UserError(problems)
    chosen = {name: setting.default for name, setting in known.items()} | values
    return Reading(_build(kind, chosen), tuple(_warnings(values)))


def _build(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from the values of all settings read; an optional group of which none is there is None."""
    members = _members(kind)
    if not members:
        return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]
    parts: dict[str, Any] = {}
    for name, (inner, optional) in members.items():
        missing = optional and all(field.name not in values for field in fields(inner))
        parts[name] = None if missing else _build(inner, values)
    return kind(**parts)


def _contradictions(values: Mapping[str, Any], given: Mapping[str, Given]) -> Iterator[Problem]:
    held_out = values.get("val_set_size", 0)
    if held_out > 1 and not float(held_out).is_integer():
        cure = "give a count, such as 100, or a fraction below 1"
        yield Problem(f"{held_out} is no number of rows", given["val_set_size"].place, cure)


def _warnings(values: Mapping[str, Any]) -> Iterator[str]:
    """What was chosen, and is overruled by another choice."""
    if values.get("max_steps") is not None and "num_epochs" in values:
        yield f"num_epochs and max_steps are both given: max_steps ({values['max_steps']}) wins"
    if values.get("warmup_steps") and values.get("warmup_ratio"):
        yield f"warmup_steps and warmup_ratio are both given: warmup_steps ({values['warmup_steps']}) wins"
