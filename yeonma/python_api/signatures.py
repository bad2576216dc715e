"""The settings of a verb -> the signature and the docstring of its Python call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from yeonma.cli import Verb
from yeonma.config.help import setting_entries
from yeonma.config.parse import Setting, settings_of
from yeonma.messages import later, tr

CONFIG = later("YAML file of settings. Keywords win over it.")


@dataclass(frozen=True)
class CallForm:
    """How a verb is called from Python. `positional`: the settings that may be given without their names. `omitted`:
    settings that only change what the command prints."""

    verb: Verb
    positional: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Setting]:
        """The settings by name, the positional ones first."""
        verb = self.verb
        settings = settings_of(verb.groups, verb.not_required, verb.defaults)
        first = self.positional
        names = [*first, *(name for name in settings if name not in (*first, *self.omitted))]
        return {name: settings[name] for name in names}


def signature_of(form: CallForm, returns: object) -> inspect.Signature:
    """All settings as parameters with their types and defaults; all but the positional ones by keyword."""
    parameters = []
    for name, setting in form.settings.items():
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if name in form.positional
                else inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if setting.required else setting.default,
                annotation=setting.hint,
            )
        )
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)
    return inspect.Signature([*parameters, config], return_annotation=returns)


def docstring_of(form: CallForm, about: str) -> str:
    """The call's own text, then each setting with its help text, values and default."""
    entries = setting_entries(form.verb.groups, form.settings)
    lines = [f"{name}: {text}" for name, text in entries]
    return "\n".join(
        [about, "", tr("Settings:"), *(f"    {line}" for line in [*lines, f"config: {tr(CONFIG)}"])]
    )
