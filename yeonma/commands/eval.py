"""`yeonma eval`: benchmarks of lm-evaluation-harness, asked to the fine-tuned model and to its base."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from yeonma import __version__
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder, quantization_for
from yeonma.commands.first_checks import check_eval
from yeonma.config.settings import EvalSettings
from yeonma.errors import Log
from yeonma.evaluate.answer_cache import open_answer_cache
from yeonma.evaluate.candidates import Candidate, identity_of
from yeonma.evaluate.eval_part import FORMAT, NAMES, EvalReport, eval_file, print_eval, weights_hash
from yeonma.evaluate.harness import (
    Benchmarks,
    HarnessResults,
    item_entries,
    open_benchmarks,
    run_harness,
    scores_of,
    shortened_notes,
)
from yeonma.evaluate.harness_model import harness_model
from yeonma.evaluate.harness_requests import RequestRunner
from yeonma.evaluate.harness_scores import score_entries
from yeonma.files import disk_errors_as_user_errors, replace_file
from yeonma.messages import counted, tr
from yeonma.model.load import pick_device, pick_dtype
from yeonma.packages import version_of
from yeonma.policy import load_policy
from yeonma.resampling import RESAMPLES
from yeonma.shown import json_text
from yeonma.streams import give, log_line, say
from yeonma.tokenization.chat_template_export import base_chat_template

ANSWERS_ENDING = ".answers.jsonl"
"""Of the file with all responses, beside the results."""


def run(settings: EvalSettings) -> int:
    """Run the command and return its exit status. Raises UserError, where possible before weights are loaded."""
    output = eval_file(settings)
    try:
        report = evaluate(settings, log_line)
    except KeyboardInterrupt:
        log_line(
            tr(
                "interrupted; the answers so far are in {file}. Run the same command again to continue",
                file=answers_file(output),
            )
        )
        return 130
    if settings.json:
        give(json_text({key: report[key] for key in report if key != "tasks"}) + "\n")
        return 0
    from rich.console import Console

    print_eval(Console(highlight=False, markup=False, emoji=False), report)
    say(tr("{file} has every item.", file=output))
    return 0


def answers_file(output: Path) -> Path:
    """The responses beside a file of results."""
    return output.with_name(output.name.removesuffix(".json") + ANSWERS_ENDING)


def evaluate(settings: EvalSettings, log: Log) -> EvalReport:
    """Ask all tasks, write the results and return them. `log` gets progress messages.

    Responses are kept as they come, so that the same call continues after an interrupt, and another task costs only
    what is new. Raises UserError.
    """
    check_eval(settings)
    output = eval_file(settings)
    builder = open_prompt_builder(
        settings.adapter_dir, base_model=settings.base_model, trust_remote_code=settings.trust_remote_code
    )
    has_template = bool(base_chat_template(builder.tokenizer))
    benchmarks = open_benchmarks(settings, has_chat_template=has_template, log=log)
    count = counted(len(benchmarks.tasks), "task")
    log(tr("{tasks} found; loading {model}", tasks=count, model=builder.source.name))
    policy = load_policy(
        builder, device=settings.device, dtype=settings.dtype, quantization=settings.quantization, log=log
    )
    policies = {NAMES[0]: policy.without_adapter()} if settings.base else {}
    policies[NAMES[1]] = policy
    identities = _identities(builder, settings)
    shortened: Counter[str] = Counter()
    results: list[HarnessResults] = []
    limit = 0
    with open_answer_cache(answers_file(output)) as cache:
        for name, model in policies.items():
            runner = RequestRunner(
                model, builder.tokenizer, tr(name), identities[name], cache, log, settings.batch_size
            )
            shortened = Counter()
            asked = harness_model(runner, shortened)
            results.append(run_harness(asked, benchmarks, settings, log))
            limit = asked.max_length
    report = _report(settings, builder, benchmarks, results, list(policies), identities)
    report["notes"] = shortened_notes(shortened, limit)
    report["max_length"] = limit
    with disk_errors_as_user_errors(output.parent, tr("the results")):
        replace_file(output, (json_text(report, indent=1, allow_nan=False) + "\n").encode())
    return report


def _identities(builder: PromptBuilder, settings: EvalSettings) -> dict[str, str]:
    """Name of a model -> what determines its numbers, as for `yeonma compare`."""
    adapter = None if builder.adapter.is_whole else str(builder.adapter.path)
    quantization = quantization_for(settings.quantization, builder.adapter)
    tuned = Candidate(NAMES[1], builder, adapter, True, "", quantization)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    models = {NAMES[0]: replace(tuned, adapter=None), NAMES[1]: tuned}
    return {name: identity_of(model, dtype, device) for name, model in models.items()}


def _report(
    settings: EvalSettings,
    builder: PromptBuilder,
    benchmarks: Benchmarks,
    results: list[HarnessResults],
    names: list[str],
    identities: dict[str, str],
) -> EvalReport:
    asked: dict[str, Any] = {
        name: getattr(settings, name)
        for name in (
            *("num_fewshot", "limit", "apply_chat_template", "fewshot_as_multiturn"),
            *("system_instruction", "gen_kwargs"),
        )
    }
    return {
        "format": FORMAT,
        "yeonma": __version__,
        "lm_eval": version_of("lm_eval"),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "adapter": builder.adapter.path.name,
        "base": Path(builder.source.name).name if Path(builder.source.name).exists() else builder.source.name,
        "weights": weights_hash(builder.adapter.path),
        "models": [{"name": name, "identity": identities[name]} for name in names],
        "asked_for": list(benchmarks.asked_for),
        "settings": asked,
        "resamples": RESAMPLES,
        "scores": score_entries(scores_of(benchmarks, results), benchmarks.asked_for),
        "tasks": item_entries(benchmarks, results, names),
    }
