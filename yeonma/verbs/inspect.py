"""`yeonma inspect`: the settings of a training run in, what it would train on out."""

from __future__ import annotations

from collections.abc import Mapping

from yeonma.configure import group_of
from yeonma.settings import InspectSettings, PreferenceSettings
from yeonma.train.preflight import preflight


def run(settings: Mapping[type, object]) -> int:
    """Raises UserError for whatever the verb that would train refuses before it loads weights, and as early."""
    if group_of(settings, InspectSettings).objective == "sft":
        settings = {group: values for group, values in settings.items() if group is not PreferenceSettings}
    preflight(settings)
    from yeonma.before.run import run_inspect

    run_inspect(settings)
    return 0
