"""`yeonma inspect`: the settings of a training run in, what it would train on out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from yeonma.config.settings import InspectConfig
from yeonma.files import output_file
from yeonma.train.preflight import preflight


def run(config: InspectConfig) -> int:
    """Raises UserError for whatever the verb that would train refuses before it loads weights, and as early."""
    shown, training = config.inspect, config.training
    if shown.html is not None:
        output_file(shown.html, "--html", training.data.data_path)
    if shown.objective == "sft":
        training = replace(training, preference=None)
    preflight(training)
    with _patient_collector():
        from yeonma.inspect.inspect_run import run_inspect

        run_inspect(shown, training)
    return 0


@contextmanager
def _patient_collector() -> Iterator[None]:
    """Torch and transformers make a million objects as they are imported, which all stay: Python's garbage collector
    would look through them again and again, for a second in all."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
