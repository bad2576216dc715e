"""Settings from the command line, a YAML file or Python keywords, parsed and checked.

Each source gives one `RawValue` per setting, with its place in the source. Every value is then converted to the
setting's type and checked against its range. All problems of all sources are raised together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from datetime import date
from functools import cache, reduce
from types import MappingProxyType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from yeonma.config.foreign_names import foreign_name_cure
from yeonma.config.gpus import UnknownGpu
from yeonma.config.layer_ranges import InvalidRanges
from yeonma.config.loss_sum import InvalidLoss
from yeonma.config.ranges import Range
from yeonma.config.settings import (
    ADAPTER_SETTINGS,
    DEFAULTS,
    FULL_LEARNING_RATES,
    GROUPS,
    InspectConfig,
    RunConfig,
    StepSettings,
)
from yeonma.config.yaml_text import read_items, read_value, write_item
from yeonma.errors import Problem, UserError, did_you_mean, system_reason
from yeonma.messages import tr

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

NO_DEFAULTS: Mapping[str, object] = MappingProxyType({})
NONE_WORDS = ("None", "null")
MAX_ITEMS = 1000  # in a list or mapping: jsonargparse's time grows with the square of their number
OPTION = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)

Config = TypeVar("Config")


@dataclass(frozen=True)
class Setting:
    """One setting: its type, the members of that type (`int | None` has two), its default and its range."""

    name: str
    hint: Any
    members: tuple[Any, ...]
    required: bool
    default: object
    range: Range | None
    check: Callable[[str], object] | None = None
    """Raises InvalidLoss or InvalidRanges for a text that the setting does not accept."""
    also: str = ""
    """What the setting accepts besides its choices; stands for `text` in its description."""

    @property
    def optional(self) -> bool:
        return NoneType in self.members


@dataclass(frozen=True)
class RawValue:
    """A value as the user gave it. Messages about it begin with `place`."""

    value: object
    place: str


@dataclass(frozen=True)
class ParsedConfig(Generic[Config]):
    """A config that passed every check, and warnings for the caller to print."""

    config: Config
    warnings: tuple[str, ...]


class InvalidValue(Exception):
    """The reason why a value is not valid for its setting, such as `is out of range`, and perhaps a cure."""

    def __init__(self, reason: str, cure: str = "") -> None:
        super().__init__(reason)
        self.cure = cure


# -------------------------------------------------------------------------------- the three sources


def read_config(
    kind: type[Config],
    argv: Sequence[str],
    *,
    verb: str,
    groups: Sequence[type] | None = None,
    positional: str | None = None,
    not_required: Sequence[str] = (),
    defaults: Mapping[str, object] = NO_DEFAULTS,
) -> ParsedConfig[Config]:
    """Parse command line arguments and the YAML file that `--config` names. The command line wins over the file.

    kind: a settings group, or a config of groups such as RunConfig.
    groups: the groups of `kind` that the command reads, by default all. An optional group that is not read is None.
    positional: the setting that an argument without a name sets.
    not_required: settings that their group requires but this command does not; they default to empty text.
    defaults: override the defaults of the groups.
    Raises UserError with every problem found.
    """
    problems: list[Problem] = []
    settings = settings_of(groups or groups_in(kind), not_required, defaults)
    raw_values = _from_command_line(argv, settings, positional, verb, problems)
    config_file = raw_values.pop("config", None)
    if config_file is not None:
        raw_values = {**_from_yaml(str(config_file.value), settings, problems), **raw_values}
    return _parse(kind, settings, raw_values, problems, "--{} ...")


def config_from_keywords(
    kind: type[Config],
    keywords: Mapping[str, object],
    *,
    groups: Sequence[type] | None = None,
    not_required: Sequence[str] = (),
    defaults: Mapping[str, object] = NO_DEFAULTS,
) -> ParsedConfig[Config]:
    """Parse Python keywords and the YAML file that the keyword `config` names. The keywords win over the file.

    `kind`, `groups`, `not_required` and `defaults` as in `read_config`. Raises UserError with every problem found.
    """
    problems: list[Problem] = []
    settings = settings_of(groups or groups_in(kind), not_required, defaults)
    raw_values: dict[str, RawValue] = {}
    for name, value in keywords.items():
        if name in settings:
            raw_values[name] = RawValue(_without_path_objects(value), name)
        elif name != "config":
            problems.append(Problem(tr("unknown setting"), name, unknown_cure(name, settings, "{}")))
    if keywords.get("config") is not None:
        raw_values = {**_from_yaml(str(keywords["config"]), settings, problems), **raw_values}
    return _parse(kind, settings, raw_values, problems, "{}=...")


def _without_path_objects(value: object) -> object:
    """Text in place of a path, or of the paths in a list."""
    if isinstance(value, (list, tuple)):
        return [_without_path_objects(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _from_command_line(
    argv: Sequence[str],
    settings: Mapping[str, Setting],
    positional: str | None,
    verb: str,
    problems: list[Problem],
) -> dict[str, RawValue]:
    """The values of all options as text, including `config`. If an option is repeated, the last one wins."""
    raw_values: dict[str, RawValue] = {}
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        option = OPTION.fullmatch(argument)
        if option is None:
            if positional and positional not in raw_values and not _looks_like_option(argument):
                value = _with_further_words(settings.get(positional), argument, remaining)
                raw_values[positional] = RawValue(value, positional)
            else:
                problems.append(_unexpected(argument, settings))
            continue
        name, text = option[1].replace("-", "_"), option[2]
        if text is None and remaining and not OPTION.fullmatch(remaining[0]):
            text = remaining.pop(0)
        if name not in settings and name != "config":
            cure = unknown_cure(name, settings, "--{}") or tr("see yeonma {verb} --help", verb=verb)
            problems.append(Problem(tr("unknown setting"), f"--{option[1]}", cure))
            continue
        if text is None and name in settings and bool in settings[name].members:
            text = "true"
        if text is None:
            problems.append(Problem(tr("needs a value"), f"--{option[1]}"))
        elif name == "config" and name in raw_values:
            problems.append(Problem(tr("given twice"), "--config", tr("put all settings into one file")))
        else:
            raw_values[name] = RawValue(_with_further_words(settings.get(name), text, remaining), name)
    return raw_values


def unknown_cure(name: str, settings: Mapping[str, Setting], form: str) -> str:
    """What to write instead of a name that no setting has; empty if nothing is like it. `form`: `--{}` or `{}`."""
    return foreign_name_cure(name, settings, form) or did_you_mean(name, settings)


def _with_further_words(setting: Setting | None, text: str, remaining: list[str]) -> object:
    """The value `text`; for a list of texts (`--models a b c`), a list of it and the words that follow.

    These words are removed from `remaining`.
    """
    of_paths = setting is not None and takes_paths(setting)
    of_texts = setting is not None and set(setting.members) <= {list[str], NoneType}
    if setting is None or not (of_texts or of_paths) or text.startswith("["):
        return text
    words = [text]
    while remaining and not _looks_like_option(remaining[0]):
        words.append(remaining.pop(0))
    return text if of_paths and len(words) == 1 else words


def takes_paths(setting: Setting) -> bool:
    """Whether the setting is a path, or a list of paths and entries."""
    return list[Any] in setting.members


def _looks_like_option(argument: str) -> bool:
    return re.fullmatch(r"-{1,2}[A-Za-z].*", argument) is not None


def _unexpected(argument: str, settings: Mapping[str, Setting]) -> Problem:
    if _looks_like_option(argument):
        name = argument.lstrip("-").replace("-", "_")
        cure = tr("write {words}", words=f"--{name}") if name in settings else tr("settings start with --")
    elif "=" in argument and argument.partition("=")[0].replace("-", "_") in settings:
        cure = tr("write {words}", words=f"--{argument}")
    else:
        cure = tr("write a list as '[a, b]', and put text with spaces in quotes")
    return Problem(
        tr("unexpected argument {argument}", argument=_shorten(json.dumps(argument, ensure_ascii=False))),
        cure=cure,
    )


def _from_yaml(path: str, settings: Mapping[str, Setting], problems: list[Problem]) -> dict[str, RawValue]:
    """The values in a YAML file. Problems with its keys are added to `problems`.

    Raises UserError, with `problems` included, if the file is not a YAML mapping, so that its settings are unknown.
    """
    raw_values: dict[str, RawValue] = {}
    try:
        items = list(read_items(config_text(path), path))
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    for key, value, line in items:
        place = f"{path}:{line}"
        name = str(key).replace("-", "_")
        if name not in settings:
            cure = unknown_cure(name, settings, "{}")
            problems.append(Problem(tr("unknown setting {key}", key=_format_value(key)), place, cure))
        elif name in raw_values:
            problems.append(
                Problem(tr('"{name}" is given twice', name=name), place, tr("remove one of them"))
            )
        else:
            raw_values[name] = RawValue(value, f"{place}: {name}")
    return raw_values


def config_text(path: str) -> str:
    """The text of a YAML file. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError:
        raise UserError(tr("not UTF-8"), place=path, cure=tr("save it as UTF-8")) from None
    except (OSError, ValueError) as error:
        raise UserError(
            tr("cannot be read: {reason}", reason=system_reason(error)),
            place=path,
            cure=tr("--config takes a YAML file"),
        ) from None


# -------------------------------------------------------------------------------- parsing and checks


def _parse(
    kind: type[Config],
    settings: Mapping[str, Setting],
    raw_values: Mapping[str, RawValue],
    problems: list[Problem],
    syntax: str,
) -> ParsedConfig[Config]:
    """Convert and check every value and build the config, or raise UserError with every problem.

    syntax: how the source writes a setting, `--{} ...` or `{}=...`.
    """
    parse_value = _value_parser([settings[name] for name in raw_values])
    values: dict[str, Any] = {}
    for name, raw in raw_values.items():
        try:
            values[name] = parse_value(settings[name], raw.value)
        except InvalidValue as error:
            problems.append(_value_problem(settings[name], raw, str(error), error.cure))
    held_out = values.get("val_set_size", 0)
    if held_out > 1 and not float(held_out).is_integer():
        cure = tr("give a count, such as 100, or a fraction below 1")
        problems.append(
            Problem(
                tr("{held_out} is not a number of rows", held_out=held_out),
                raw_values["val_set_size"].place,
                cure,
            )
        )
    missing = [name for name, setting in settings.items() if setting.required and name not in raw_values]
    if missing:
        words = " ".join(map(syntax.format, missing))
        if len(missing) == 1:
            cure = tr("write {words}, or set it in a --config file", words=words)
        else:
            cure = tr("write {words}, or set them in a --config file", words=words)
        problems.append(Problem(tr("required, but not given"), ", ".join(missing), cure))
    if problems:
        raise UserError(problems)
    defaults = {name: setting.default for name, setting in settings.items()}
    if values.get("train") == "full":
        defaults["learning_rate"] = FULL_LEARNING_RATES[defaults["learning_rate"]]
    config = _build(kind, defaults | values)
    if isinstance(config, RunConfig):
        config = replace(config, given=frozenset(values))
    elif isinstance(config, InspectConfig):
        config = replace(config, training=replace(config.training, given=frozenset(values)))
    return ParsedConfig(config, tuple(_warnings(values)))


def _value_parser(settings: Sequence[Setting]) -> Callable[[Setting, object], object]:
    """A function that converts a raw value to its setting's type, or raises InvalidValue."""

    @cache
    def parser() -> ArgumentParser:  # most values are text, and need none
        from jsonargparse import ArgumentParser

        made = ArgumentParser(exit_on_error=False, default_env=False)
        for setting in settings:
            made.add_argument(f"--{setting.name}", type=setting.hint)
        return made

    def parse_value(setting: Setting, value: object) -> object:
        if setting.optional and (value is None or value in NONE_WORDS):
            return None
        if isinstance(value, str) and set(setting.members) <= {str, NoneType}:
            if not value and not setting.optional:
                raise InvalidValue(tr("is empty"))
            _check_utf8(value)
            if setting.check is not None:
                _check_text(setting.check, value)
            return value  # Never parsed as YAML: a template may look like it.
        if (
            isinstance(value, str)
            and takes_paths(setting)
            and not (value.startswith("[") and _is_list(value))
        ):
            if not value:
                raise InvalidValue(tr("is empty"))
            _check_utf8(value)
            return value
        if isinstance(value, str) and {get_origin(member) for member in setting.members} & {list, dict}:
            value = _list_or_mapping(value, setting)
        if isinstance(value, list) and list[str] in setting.members:
            if all(isinstance(item, str) for item in value):
                _check_utf8(value)
                return value
        if isinstance(value, (list, dict)) and len(value) > MAX_ITEMS:
            raise InvalidValue(tr("has more than {max_items:,} items", max_items=MAX_ITEMS))
        if value is None:  # jsonargparse accepts None for every type
            raise InvalidValue(tr("is not valid"))
        from jsonargparse import ArgumentError

        try:
            parsed: object = parser().parse_object({setting.name: value}, defaults=False)[setting.name]
        except (ArgumentError, ValueError, OverflowError, RecursionError):  # the last two: huge values
            raise InvalidValue(tr("is not valid")) from None
        _check_utf8(parsed)
        if setting.check is not None:
            _check_text(setting.check, str(parsed))
        accepted = setting.range or Range()
        for number in _numbers(parsed):
            if number not in accepted:
                raise InvalidValue(tr("is out of range"))
            if accepted.limit is not None and number > accepted.limit:
                raise InvalidValue(
                    tr("is more than any run can mean (at most {limit:,})", limit=accepted.limit)
                )
        return parsed

    return parse_value


def _check_text(check: Callable[[str], object], text: str) -> None:
    try:
        check(text)
    except InvalidLoss as error:
        if "," in text or ":" in text:
            raise InvalidValue(tr("is no sum of losses: {error}", error=error), error.cure) from None
        raise InvalidValue(tr("is not valid")) from None
    except InvalidRanges as error:
        raise InvalidValue(tr("names no layers: {error}", error=error), error.cure) from None
    except UnknownGpu as error:
        raise InvalidValue(tr("names no GPU: {error}", error=error), error.cure) from None


def _is_list(text: str) -> bool:
    """Whether a text in brackets is a list, and not the name of a file or folder."""
    return not os.path.lexists(os.path.expanduser(text))


def _list_or_mapping(text: str, setting: Setting) -> object:
    """`text` parsed as a YAML list or mapping; the text itself if it is neither."""
    try:
        value = read_value(text, setting.name)
    except UserError as error:
        if text.startswith(("[", "{")):
            raise InvalidValue(tr("is not valid ({what})", what=error.problems[0].what)) from None
        return text
    return value if isinstance(value, (list, dict)) else text


def _check_utf8(value: object) -> None:
    """Raises InvalidValue for a lone surrogate, which cannot be written to a file. It comes from bytes on the command
    line that are not UTF-8, or from an escape in YAML."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and re.search("[\ud800-\udfff]", item):
            raise InvalidValue(tr("is not UTF-8 text"))


def _numbers(value: object) -> Iterator[float]:
    """The numbers in a value. Raises InvalidValue for a mapping with a key that is not text."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise InvalidValue(tr("is not valid"))
        value = list(value.values())
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            yield item


def _value_problem(setting: Setting, raw: RawValue, reason: str, cure: str = "") -> Problem:
    value = raw.value
    if cure:
        return Problem(tr("{value} {reason}", value=_format_value(value), reason=reason), raw.place, cure)
    if str in setting.members and isinstance(value, (bool, int, float, date)):
        return Problem(
            tr("{value} is not text", value=_format_value(value)), raw.place, tr("put it in quotes")
        )
    cure = tr("give {values}", values=describe(setting))
    choices = [
        choice for member in setting.members if get_origin(member) is Literal for choice in get_args(member)
    ]
    suggestion = did_you_mean(value, choices) if isinstance(value, str) else ""
    what = tr("{value} {reason}", value=_format_value(value), reason=reason)
    return Problem(what, raw.place, f"{cure}; {suggestion}" if suggestion else cure)


def _format_value(value: object) -> str:
    """A value for a message: text in quotes unless it is one word."""
    plain = not isinstance(value, str) or re.fullmatch(r"[-+.\w]+", value)
    return _shorten(str(value) if plain else json.dumps(value, ensure_ascii=False))


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _warnings(values: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about settings that have no effect because another setting overrides them."""
    if values.get("max_steps") is not None and "num_epochs" in values:
        yield tr(
            "num_epochs and max_steps are both given: max_steps ({steps}) wins", steps=values["max_steps"]
        )
    if values.get("warmup_steps") and values.get("warmup_ratio"):
        steps = values["warmup_steps"]
        yield tr("warmup_steps and warmup_ratio are both given: warmup_steps ({steps}) wins", steps=steps)


# -------------------------------------------------------------------------------- settings and configs


def settings_of(
    groups: Iterable[type], not_required: Sequence[str] = (), defaults: Mapping[str, object] = NO_DEFAULTS
) -> dict[str, Setting]:
    """The settings of `groups` by name, in order; `not_required` and `defaults` as in `read_config`."""
    settings = {}
    for group in groups:
        hints = get_type_hints(group)
        for field in fields(group):
            hint = hints[field.name]
            required = field.default is MISSING and field.name not in not_required
            default = field.default
            if default is MISSING:
                default = None if required else ""
            settings[field.name] = Setting(
                name=field.name,
                hint=hint,
                members=get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,),
                required=required,
                default=defaults.get(field.name, default),
                range=field.metadata.get("range"),
                check=field.metadata.get("check"),
                also=field.metadata.get("also", ""),
            )
    return settings


def describe(setting: Setting) -> str:
    """A description of the values that a setting accepts: `a whole number of at least 1`."""
    kinds: list[str] = []
    choices: list[str] = []
    for member in setting.members:
        if get_origin(member) is Literal:
            choices += [str(choice) for choice in get_args(member)]
        elif member is bool:
            kinds.append(tr("true or false"))
        elif member in (int, float):
            kinds.append(_number_in_words(member, setting.range))
        elif member is str:
            kinds += [] if setting.also else [tr("text")]
        elif get_origin(member) is list:
            item = get_args(member)[0]
            examples = get_args(item) if get_origin(item) is Literal else ("a", "b")
            kinds.append(tr("a list such as [{items}]", items=", ".join(map(str, examples[:2]))))
        elif get_origin(member) is dict:
            value = "b" if get_args(member)[1] is str else "1"
            kinds.append(tr("a mapping such as {{a: {value}}}, with a space after each colon", value=value))
    if choices:
        kinds.append(tr("one of {choices}", choices=", ".join(choices)))
    if setting.also:
        kinds.append(tr(setting.also))
    return reduce(lambda first, second: tr("{first} or {second}", first=first, second=second), kinds)


def _number_in_words(member: type, accepted: Range | None) -> str:
    number = tr("a whole number") if member is int else tr("a number")
    ends = accepted.in_words() if accepted is not None else []
    if len(ends) == 2:
        return tr("{number} {lower} and {upper}", number=number, lower=ends[0], upper=ends[1])
    return tr("{number} {end}", number=number, end=ends[0]) if ends else number


def _parts(kind: type) -> dict[str, tuple[type, bool]]:
    """Field name -> the config or group in that field, and whether it may be None. Empty for a settings group."""
    parts: dict[str, tuple[type, bool]] = {}
    for name, hint in get_type_hints(kind).items():
        options = [option for option in get_args(hint) or (hint,) if option is not NoneType]
        if len(options) == 1 and isinstance(options[0], type) and is_dataclass(options[0]):
            parts[name] = options[0], options[0] is not hint
    return parts


def groups_in(kind: type) -> tuple[type, ...]:
    """The settings groups of a config, in order. For a settings group: the group itself."""
    parts = _parts(kind)
    return tuple(group for part, _ in parts.values() for group in groups_in(part)) if parts else (kind,)


def _build(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from the values of all settings. An optional group without any values is None."""
    parts = _parts(kind)
    if not parts:
        return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for name, (part, optional) in parts.items():
        absent = optional and all(field.name not in values for field in fields(part))
        built[name] = None if absent else _build(part, values)
    return kind(**built)


def settings_dict(config: object) -> dict[str, Any]:
    """The settings of all groups by name, in order, without those of an adapter if there is none. No two groups of a
    config share a name."""
    names = _parts(type(config))
    if not names:
        return dict(vars(config))
    parts = [getattr(config, name) for name in names]
    values = {
        name: value for part in parts if part is not None for name, value in settings_dict(part).items()
    }
    unread = ADAPTER_SETTINGS if values.get("train") == "full" else ()
    return {name: value for name, value in values.items() if name not in unread}


def changed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that differ from the defaults of its command, by name."""
    settings = settings_of(GROUPS[config.objective], (), DEFAULTS[config.objective])
    defaults = {name: setting.default for name, setting in settings.items()}
    if config.model.train == "full":
        defaults["learning_rate"] = FULL_LEARNING_RATES[defaults["learning_rate"]]
    return {name: value for name, value in settings_dict(config).items() if value != defaults[name]}


def to_yaml(config: object) -> str:
    """The settings as flat YAML, which `--config` reads back into an equal config."""
    values = settings_dict(config)
    # max_steps overrides this default. Written out, it would count as given and cause a warning.
    if values.get("max_steps") is not None and values.get("num_epochs") == StepSettings.num_epochs:
        del values["num_epochs"]
    return "".join(write_item(name, value) for name, value in values.items())
