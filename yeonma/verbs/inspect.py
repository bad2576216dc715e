"""`yeonma inspect`: the settings of a training run in, what it would train on out."""

from __future__ import annotations

from collections.abc import Mapping

from yeonma.train.preflight import preflight


def run(settings: Mapping[type, object]) -> int:
    """Raises UserError for whatever `yeonma sft` would refuse before it loads weights, and as early."""
    preflight(settings)
    from yeonma.before.run import run_inspect

    run_inspect(settings)
    return 0
