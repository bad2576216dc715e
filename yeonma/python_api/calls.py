"""The verbs as functions. Each takes the settings of its verb as keywords, and returns what the verb computed.

A call ends no process and asks nothing: mistakes raise UserError, with keywords in its cures. Lines of progress are
printed as on the command line.
"""

from __future__ import annotations

import functools
import inspect as inspect_module
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_type_hints

from yeonma.cli import VERBS
from yeonma.config.parse import ParsedConfig, config_from_keywords
from yeonma.config.settings import (
    CompareConfig,
    ExportSettings,
    GenerateConfig,
    InspectConfig,
    MergeSettings,
    PushSettings,
    RunConfig,
    VerifySettings,
)
from yeonma.data.python_rows import given
from yeonma.errors import Problem, RunFailed, UserError
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.platforms import check_platform
from yeonma.python_api.keyword_form import in_keyword_form
from yeonma.python_api.results import (
    CompareResult,
    ExportResult,
    GenerateResult,
    InspectResult,
    MergeResult,
    PushResult,
    RunResult,
    VerifyResult,
    run_result,
)
from yeonma.python_api.signatures import CallForm, docstring_of, signature_of
from yeonma.shown import one_line
from yeonma.streams import log_line
from yeonma.train.interrupt import Stopped

Result = TypeVar("Result")

INTERRUPTED = 130
"""The status of a `Stopped` by SIGINT, as everywhere."""
# tqdm's hint at ipywidgets in a notebook without them: no call shows its bars.
warnings.filterwarnings("ignore", message="IProgress not found")


@dataclass(frozen=True)
class PythonCall:
    """A call: its form, the text that begins its docstring, and the name of what it returns."""

    form: CallForm
    about: str
    returns: str


CALLS: dict[str, PythonCall] = {}
"""Name -> call, in the order of the definitions below."""


def _call_of(
    *positional: str, omitted: tuple[str, ...] = ()
) -> Callable[[Callable[[Any], Result]], Callable[..., Result]]:
    """Makes a function of a config a function of keywords, with the signature and docstring of all settings."""

    def decorate(function: Callable[[Any], Result]) -> Callable[..., Result]:
        verb = VERBS[function.__name__]
        form = CallForm(verb, positional, omitted)
        about = inspect_module.cleandoc(function.__doc__ or "")

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Result:
            check_platform()
            keywords = _keywords(form, function.__name__, arguments, keywords)
            with in_keyword_form(form.settings), given(keywords) as settings:
                parsed: ParsedConfig[Any] = config_from_keywords(
                    verb.config,
                    settings,
                    groups=verb.groups,
                    not_required=verb.not_required,
                    defaults=verb.defaults,
                )
                for warning in parsed.warnings:
                    warnings.warn(one_line(warning), stacklevel=2)
                try:
                    return function(parsed.config)
                except Stopped:
                    raise
                except KeyboardInterrupt:
                    raise Stopped(tr("interrupted"), INTERRUPTED) from None

        returns = get_type_hints(function)["return"]
        call.__doc__ = docstring_of(form, about)
        call.__signature__ = signature_of(form, returns)  # type: ignore[attr-defined]
        call.__annotations__ = {"return": returns}
        call.__module__ = "yeonma"
        CALLS[function.__name__] = PythonCall(form, about, returns.__name__)
        return call

    return decorate


def _keywords(
    form: CallForm, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> dict[str, Any]:
    """All arguments by name. Raises UserError for too many without a name, and for those that only print."""
    problems = [
        Problem(
            tr("a setting of the command line, which changes only what is printed"),
            setting,
            tr("leave it out"),
        )
        for setting in form.omitted
        if setting in keywords
    ]
    named = dict(zip(form.positional, arguments, strict=False))
    if len(arguments) > len(form.positional):
        cure = tr('write yeonma.{name}(setting="value", ...)', name=name)
        problems.append(Problem(tr("settings are given by name"), f"yeonma.{name}", cure))
    problems += [
        Problem(tr("given twice"), setting, tr("give it once")) for setting in named if setting in keywords
    ]
    if problems:
        raise UserError(problems)
    return {**named, **keywords}


# ---------------------------------------------------------------------------- training


@_call_of()
def sft(config: RunConfig) -> RunResult:
    """Fine-tune a model on the answers in a table of examples.

    `data_path` and `val_data_path` may also be the rows themselves: a list of dicts, a pandas or polars DataFrame, or a
    `datasets.Dataset`.

    Returns the run: its folder, its losses, its card. Raises UserError for every mistake that `yeonma sft` reports, and
    RunFailed, a RuntimeError, if one of several processes (`nproc`) failed. An interrupt (Ctrl-C, or a notebook's stop
    button) and `time_limit` save a checkpoint and raise Stopped, a KeyboardInterrupt; the same call goes on from there.
    A second interrupt ends the call at once.
    """
    return _train("sft", config)


@_call_of()
def dpo(config: RunConfig) -> RunResult:
    """Fine-tune a model on preference pairs or labelled answers. Takes data, returns and raises as `sft`."""
    return _train("dpo", config)


def _train(verb: str, config: RunConfig) -> RunResult:
    from yeonma.commands.sft import train

    if status := train(verb, config, as_command=False):
        raise RunFailed(tr("training ended with status {status}; the reason is printed above", status=status))
    return run_result(user_path(config.run.output_dir))


# ---------------------------------------------------------------------------- data and models


@_call_of(omitted=("json",))
def inspect(config: InspectConfig) -> InspectResult:
    """Show what a run would train on, audit it, and forecast memory and time. Takes data as `sft`.

    Returns the rows, the audit and the forecast. Raises UserError for all that `sft` refuses before it loads weights.
    """
    from yeonma.commands.inspect import inspect as inspect_config

    inspection = inspect_config(config)
    return InspectResult(replace(inspection, views=tuple(inspection.views)), config.inspect)


@_call_of("adapter_dir", "data_path")
def generate(config: GenerateConfig) -> GenerateResult:
    """Generate answers to rows, one row, or a prompt. Takes rows as `sft`: `yeonma.generate(run, rows)`.

    `row` may also be a dict. Returns the answers; with `output` they are written to a file, too, as they come. Each
    call loads the model; to ask it several times, see `yeonma.load`. Raises UserError before the model is loaded.
    """
    from yeonma.commands.generate import generate as generate_answers

    return GenerateResult(tuple(answered.entries for answered in generate_answers(config, log_line)))


@_call_of()
def compare(config: CompareConfig) -> CompareResult:
    """Compare models on the same rows and write a report. Takes data as `sft`.

    Returns the report: scores, answers, and the page to open. Raises UserError, where possible before weights are
    loaded. After an interrupt the same call goes on from the answers so far.
    """
    from yeonma.commands.compare import compare_models

    try:
        folder, report = compare_models(config, log_line)
    except KeyboardInterrupt:
        what = tr(
            "interrupted; the answers so far are in {folder}, and the same call goes on from there",
            folder=config.compare.output_dir,
        )
        raise Stopped(what, INTERRUPTED) from None
    return CompareResult(folder, report)


# ---------------------------------------------------------------------------- folders


@_call_of("adapter_dir", omitted=("json",))
def verify(config: VerifySettings) -> VerifyResult:
    """Check the folder of a run for damage and mismatches. Takes data as `sft`.

    Returns all findings; `is_well` says whether there are no differences. Raises UserError if there is nothing to
    check.
    """
    from yeonma.commands.verify import report_of

    return VerifyResult(report_of(config))


@_call_of("adapter_dir")
def merge(config: MergeSettings) -> MergeResult:
    """Merge an adapter into its base model and check the result.

    Returns the folder of the merged model, and how far its answers agree. Raises UserError if the merged model does not
    answer as the adapter on its base does; nothing is written then.
    """
    from yeonma.export.merged_model import merge as merge_adapter
    from yeonma.export.merged_model import prepare_merge
    from yeonma.files import new_output_folder
    from yeonma.streams import say

    output = new_output_folder(config.output_dir)
    agreement = merge_adapter(prepare_merge(config, say), output, say)
    if not agreement.is_close:
        raise _disagreement(config.adapter_dir)
    return MergeResult(output, agreement)


@_call_of("model_dir")
def export(config: ExportSettings) -> ExportResult:
    """Export a fine-tuned model to llama.cpp or Ollama.

    Returns the files. Raises UserError as `merge`, and if the converter cannot be installed or does not support the
    model.
    """
    from yeonma.commands.export import export as export_model

    exported = export_model(config)
    if exported is None:
        raise _disagreement(config.model_dir)
    files = tuple(sorted(exported.folder.iterdir()))
    return ExportResult(exported.folder, files, "\n".join(exported.lines))


@_call_of("folder")
def push(config: PushSettings) -> PushResult:
    """Upload an adapter or a merged model to the Hugging Face hub. In a notebook, give `yes=True` or `dry_run=True`.

    Returns what was sent and the address of the commit. Raises UserError before anything is sent if the files contain
    secrets or names of this machine, and if the hub refuses.
    """
    from yeonma.commands.push import push as push_files

    pushed = push_files(config)
    return PushResult(pushed.repo, pushed.files, pushed.url)


def _disagreement(folder: str) -> UserError:
    what = tr("the merged model does not answer as the adapter on its base does: nothing was written")
    return UserError(what, place=folder, cure=tr('the lines above say by how much; try dtype="float32"'))
