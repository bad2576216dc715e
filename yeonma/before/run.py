"""The settings of a training run in, what it would train on out. Nothing is trained, and nothing written but a page."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from rich.console import Console

from yeonma.before.audit import Audit, audit_of
from yeonma.before.forecast import Forecast, forecast_dict, forecast_lines, forecast_run
from yeonma.before.inspect import audit_json, held_out_rows, view_json, views_of, wanted_rows
from yeonma.before.page import page
from yeonma.before.probe import probe_run
from yeonma.before.rate import measure_rate
from yeonma.before.terminal import print_audit, print_forecast, print_views
from yeonma.configure import group_of
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.paths import user_path
from yeonma.settings import InspectSettings, ModelSettings, RunSettings, StepSettings
from yeonma.tokens.explain import View
from yeonma.train.checkpoint import write_text_atomically
from yeonma.train.preflight import check_folders
from yeonma.train.prepare import Prepared, prepare


def run_inspect(settings: Mapping[type, object]) -> None:
    """Show what the settings name, on standard output; what is said meanwhile goes to standard error.

    Raises UserError for whatever `yeonma sft` would refuse before it loads weights.
    """
    shown, model = group_of(settings, InspectSettings), group_of(settings, ModelSettings)
    source, continued = check_folders(model, group_of(settings, RunSettings))
    prepared = prepare(settings, source, continued, _say)
    dataset = prepared.dataset
    wanted = wanted_rows(shown.rows, dataset.train.store.counts.rows)
    audit = _audit(settings, prepared)
    forecast = _forecast(settings, source, prepared)
    if shown.json:
        for view in views_of(dataset, prepared.tokenizer, wanted, in_full=False):
            sys.stdout.write(view_json(view))
        sys.stdout.write(audit_json(audit, {"forecast": forecast and forecast_dict(forecast)}))
        return
    lines = forecast_lines(forecast, dataset.kind.units) if forecast is not None else []
    views: Iterable[View] = views_of(dataset, prepared.tokenizer, wanted)
    if shown.html is not None:
        views = list(views)
        title = f"{dataset.train.rows.name} for {Path(source.name).name}"
        text = page(title, views, held_out_rows(dataset), audit, lines)
        write_text_atomically(user_path(shown.html), text)
    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    print_views(console, views, held_out_rows(dataset), tokens=shown.tokens)
    print_audit(console, audit)
    print_forecast(console, lines)


def _audit(settings: Mapping[type, object], prepared: Prepared) -> Audit:
    step, tokenizer = group_of(settings, StepSettings), prepared.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        unknown = None  # such as GPT-2's, which stands for other things as well
    return audit_of(
        prepared.dataset,
        prepared.plan,
        micro_batch_size=step.micro_batch_size,
        micro_batch_tokens=step.micro_batch_tokens,
        share_prefix=step.share_prefix,
        unknown_id=unknown,
    )


def _forecast(
    settings: Mapping[type, object], source: load.BaseSource, prepared: Prepared
) -> Forecast | None:
    """What the run will need; None, having said why, where the model's memory cannot be followed without weights."""
    shown, model, run = (
        group_of(settings, InspectSettings),
        group_of(settings, ModelSettings),
        group_of(settings, RunSettings),
    )
    device = load.pick_device(model.device)
    dtype = load.pick_dtype(model.dtype, device)
    make = partial(forecast_run, settings, source, prepared, processes=run.nproc, price=shown.price)
    try:
        found = make(rate=None if shown.probe else measure_rate(device, dtype))
        return make(probe=probe_run(settings, source, prepared, _say)) if shown.probe else found
    except UserError as error:
        _say(f"no forecast: {error}")
        return None


def _say(text: str) -> None:
    print(f"yeonma: {text}", file=sys.stderr, flush=True)
