"""`yeonma inspect`: show what a run would train on, audit it, and forecast memory and time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from yeonma.config.data_sets import data_sets
from yeonma.config.settings import InspectConfig
from yeonma.files import output_file
from yeonma.inspect.row_views import check_rows_there, row_ranges
from yeonma.train.preflight import preflight

if TYPE_CHECKING:
    from yeonma.inspect.inspect_run import Inspection


def run(config: InspectConfig) -> int:
    """Run the command. Raises UserError for everything that training refuses before it loads weights, and as early."""
    inspection = inspect(config)
    from yeonma.inspect.inspect_run import print_inspection

    print_inspection(inspection, config.inspect)
    return 0


def inspect(config: InspectConfig) -> Inspection:
    """What the command prints. Raises as `run`."""
    options, training = config.inspect, config.training
    if options.html is not None:
        for one in data_sets(training.data):
            output_file(options.html, "--html", one.path)
    row_ranges(options.rows)
    if options.objective == "sft":
        training = replace(training, preference=None)
    preflight(training)
    check_rows_there(options.rows, training.data)
    with _rare_garbage_collection():
        from yeonma.inspect.inspect_run import inspect_training

        return inspect_training(options, training)


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Importing torch and transformers creates a million lasting objects. Garbage collection would scan them again and
    again meanwhile, for a second in total."""
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
