"""Settings of a training run -> rows, audit and forecast. Trains nothing; writes a file only with `--html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from yeonma.config.settings import (
    InspectSettings,
    RunConfig,
)
from yeonma.errors import UserError
from yeonma.files import user_path
from yeonma.inspect.answer_time import with_run_answers
from yeonma.inspect.audit import Audit, audit_of
from yeonma.inspect.fit_verdict import Verdict, memory_for_run, outcome_of, savings, verdict_lines, verdict_of
from yeonma.inspect.forecast import (
    Forecast,
    forecast_dict,
    forecast_lines,
    timed_by_data_sheet,
    timed_by_probe,
    timed_by_rate,
)
from yeonma.inspect.forecast_cache import forecast_key, read_forecast, write_forecast
from yeonma.inspect.inspect_page import page
from yeonma.inspect.probe import device_rate
from yeonma.inspect.row_views import RowSelection, audit_json, select_rows, view_json, views_of
from yeonma.inspect.terminal import (
    VERDICT_STYLES,
    print_audit,
    print_forecast,
    print_remark,
    print_views,
)
from yeonma.language import speaking
from yeonma.messages import tr
from yeonma.model import load
from yeonma.model.targets import Coverage
from yeonma.run_folder.checkpoint import write_text_atomically
from yeonma.streams import give, log_line
from yeonma.tokenization.dataset import cache_folder
from yeonma.tokenization.explain import View
from yeonma.train.continued_lora import adapter_lora, check_lora
from yeonma.train.distributed import Processes
from yeonma.train.full_settings import check_full
from yeonma.train.memory_budget import micro_batching, resolve_auto
from yeonma.train.model_remarks import model_remarks
from yeonma.train.preflight import check_folders, with_adapters_lora
from yeonma.train.prepare import Prepared, check_adapter, prepare
from yeonma.train.run_warnings import run_warnings
from yeonma.train.target_device import TargetDevice, target_device


@dataclass(frozen=True)
class Inspection:
    """What is shown of a run. `views` may be read only once."""

    title: str
    views: Iterable[View]
    audit: Audit
    forecast: Forecast | None
    verdict: Verdict | None
    """Whether the run fits into memory."""
    forecast_lines: Sequence[tuple[str, str]]
    adapter: Coverage | None
    remarks: Sequence[str]
    """Sentences about the base model."""

    @property
    def web_page(self) -> str:
        return page(self.title, list(self.views), self.audit, self.forecast_lines, self.remarks)


def inspect_training(options: InspectSettings, config: RunConfig) -> Inspection:
    """Compute rows, audit and forecast, and print progress on standard error. Writes the page that `html` names.

    Raises UserError for everything that a training run would refuse before it loads weights.
    """
    target = target_device(config.model.device, options.gpu)
    if options.gpu is not None and options.probe:
        raise UserError(
            tr("real steps run on this machine"), place="probe", cure=tr("leave out --gpu or --probe")
        )
    memory_bytes = memory_for_run(target, config.run.nproc)
    source, continued = check_folders(config.model, config.run)
    check_full(config, continued)
    if continued is not None:
        check_lora(config, adapter_lora(continued))
    config = with_adapters_lora(config)
    prepared = prepare(config, source, continued, log_line, target=target, try_adapter=False)
    group = Processes(0, 1)
    processes = config.run.nproc
    config = resolve_auto(config, source, prepared, group, log_line, target=target, processes=processes)
    dataset = prepared.dataset
    selection = select_rows(options.rows, max(one.train.store.counts.rows for one in dataset.sets))
    with speaking("en") if options.json else nullcontext():  # JSON is for programs
        inspection = _inspection(options, config, source, prepared, target, memory_bytes, selection)
        if options.html is not None:
            write_text_atomically(user_path(options.html), inspection.web_page)
    return inspection


def _inspection(
    options: InspectSettings,
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    target: TargetDevice,
    memory_bytes: int | None,
    selection: RowSelection,
) -> Inspection:
    """What is shown. The views are made after the forecast, which measures the memory of this process."""
    dataset = prepared.dataset
    audit = _audit(config, prepared)
    forecast, adapter = _forecast(options, config, source, prepared, target, memory_bytes)
    if forecast is not None:
        forecast = with_run_answers(forecast, config, prepared, target)
    lines = [(tr("adapter on"), str(adapter))] if adapter is not None else []
    verdict = None
    if forecast is not None:
        verdict = verdict_of(forecast, target, memory_bytes)
        lines = verdict_lines(verdict, forecast)
        lines += forecast_lines(forecast, dataset.task.units, savings(forecast))
    remarks = model_remarks(prepared.config, dataset)
    views: Iterable[View] = views_of(
        dataset, prepared.tokenizer, selection, in_full=not options.json or options.html is not None
    )
    title = tr("{data} for {model}", data=dataset.train.rows.name, model=Path(source.name).name)
    if options.html is not None:
        views = list(views)
    return Inspection(title, views, audit, forecast, verdict, lines, adapter, remarks)


def print_inspection(
    inspection: Inspection, options: InspectSettings, console: Console | None = None
) -> None:
    """Print rows, audit and forecast on `console`, by default on standard output; with `options.json`, as JSON."""
    verdict = inspection.verdict
    if options.json:
        with speaking("en"):
            for view in inspection.views:
                give(view_json(view))
            about: dict[str, Any] = {
                "forecast": inspection.forecast and forecast_dict(inspection.forecast),
                **({} if verdict is None else {"verdict": asdict(verdict)}),
                "adapter": inspection.adapter and asdict(inspection.adapter),
                **({"model_remarks": inspection.remarks} if inspection.remarks else {}),
            }
            give(audit_json(inspection.audit, about))
        return
    console = console or Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    print_views(console, inspection.views, tokens=options.tokens)
    print_audit(console, inspection.audit)
    for remark in inspection.remarks:
        print_remark(console, tr("model"), remark)
    style = VERDICT_STYLES[verdict.outcome] if verdict is not None else ""
    print_forecast(console, inspection.forecast_lines, style)


def _audit(config: RunConfig, prepared: Prepared) -> Audit:
    micro, tokenizer = micro_batching(config.step), prepared.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        unknown = None  # it has other uses as well, as in GPT-2
    return audit_of(
        prepared.dataset,
        prepared.plan,
        micro_batch_size=micro.most_examples,
        micro_batch_tokens=micro.most_tokens,
        share_prefix=micro.share_prefix,
        unknown_id=unknown,
        tokenizer=tokenizer,
        preference=config.preference,
        warnings=run_warnings(config.step, prepared.dataset, prepared.plan),
    )


def _forecast(
    options: InspectSettings,
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    target: TargetDevice,
    memory_bytes: int | None,
) -> tuple[Forecast | None, Coverage | None]:
    """The forecast; None, after a message, if the model cannot be traced without its weights. And what of the model has
    an adapter; None if the model cannot be built without its weights."""
    processes = config.run.nproc
    folder = cache_folder(config.tokens)
    key = forecast_key(config, prepared, target, processes)
    forecast = cached = read_forecast(folder, key)
    if forecast is None:
        from yeonma.inspect.estimate import estimate  # imports PEFT and the model's code, which takes seconds

        _, adapter = check_adapter(config, prepared.config, source, prepared.adapter, prepared.new_token_ids)
        try:
            forecast = estimate(config, source, prepared, target=target, processes=processes)
        except UserError as error:
            log_line(tr("no forecast: {error}", error=error))
            return None, adapter
    peak = forecast.memory.peak
    if outcome_of(peak, memory_bytes, target.device.type) in ("may not fit", "does not fit"):
        if not forecast.combinations:
            from yeonma.inspect.estimate import combinations

            process_bytes = forecast.memory.process
            found = combinations(config, source, prepared, target, processes, process_bytes)
            forecast = replace(forecast, combinations=found)
    if forecast != cached:
        write_forecast(folder, key, forecast)
    if options.probe:
        from yeonma.inspect.probe import probe_run

        probe = probe_run(config, source, prepared, log_line)
        log_line(
            tr(
                "{steps} real steps: at most {peak_memory_bytes:.2f} GB in this process",
                steps=probe.steps,
                peak_memory_bytes=probe.peak_memory_bytes / 1e9,
            )
        )
        return timed_by_probe(forecast, probe.tokens_per_second, options.price), forecast.adapter
    if target.gpu is not None:
        return timed_by_data_sheet(forecast, target.gpu, options.price), forecast.adapter
    rate = device_rate(folder, target.device, target.dtype(config.model))
    return timed_by_rate(forecast, rate.flops_per_second, options.price), forecast.adapter
