"""What was answered -> the numbers of a report: report.json, and the table on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from yeonma import __version__
from yeonma.config.settings import AnswerSettings, CompareSettings
from yeonma.data.rows import Row, Rows
from yeonma.errors import UserError
from yeonma.evaluate.answers import ComparisonRow
from yeonma.evaluate.candidates import Candidate
from yeonma.evaluate.metrics import INSTALL, Metric, Units, Wrote, has_sacrebleu, measured, units_for
from yeonma.evaluate.significance import RESAMPLES, holm, interval, resampled_sums, swap_test
from yeonma.run_folder.trackers import read_metrics

FORMAT = 1
CURVE_POINTS = 400
SURE = 0.05

ComparisonReport = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Compared:
    """Everything that a report is made of; `wrote[m][r]` is what model m wrote for row r."""

    source: Rows
    rows: Sequence[Row]
    wanted: Sequence[str | None]
    tasks: Sequence[ComparisonRow]
    wrote: Sequence[Sequence[Wrote]]


def make_report(asked: CompareSettings, how: AnswerSettings, compared: Compared) -> ComparisonReport:
    """All numbers and texts, as report.json has them. What is not finite or not known is null."""
    units = units_for(text for text in compared.wanted if text is not None)
    found = measured(compared.wrote, compared.wanted, units)
    return {
        "format": FORMAT,
        "yeonma": __version__,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "data": {
            "name": _unplaced(asked.data_path),
            "sha256": compared.source.identity,
            "rows": len(compared.rows),
        },
        "answers": asdict(how),
        "models": [_about(task) for task in compared.tasks],
        "units": {"rouge": units.name, "bleu": units.bleu},
        "notes": list(notes(compared, units)),
        "resamples": RESAMPLES,
        "metrics": _metrics(found, how.seed),
        "rows": _rows(compared, found),
    }


def _about(task: ComparisonRow) -> dict[str, Any]:
    candidate = task.candidate
    template = candidate.prompt_builder.adapter.template
    return {
        "name": candidate.name,
        "base": _unplaced(candidate.prompt_builder.source.name),
        "revision": candidate.prompt_builder.source.revision,
        "adapter": None if candidate.adapter is None else candidate.name,
        "identity": task.identity,
        "template": template.text,
        "template_of": candidate.template_of,
        "shortened": sum(question.shortened for question in task.questions),
        "left_out": task.left_out,
        "curve": _curve(candidate),
    }


def _unplaced(name: str) -> str:
    """A local file or folder without the way to it: a report is made to be passed on."""
    return Path(name).name if Path(name).exists() else name


def _curve(candidate: Candidate) -> dict[str, list[list[float]]] | None:
    """(step, loss) of training and of the looks at the validation rows, where the folder has them."""
    if candidate.adapter is None:
        return None
    try:
        lines = read_metrics(Path(candidate.adapter) / "metrics.jsonl")
    except UserError:
        return None
    known = [line for line in lines if line.get("loss") is not None and "step" in line]
    looks = [[line["step"], line["loss"]] for line in known if line.get("evaluation")]
    steps = [[line["step"], line["loss"]] for line in known if not line.get("evaluation")]
    every = -(-len(steps) // CURVE_POINTS) or 1
    return {"training": steps[::every], "validation": looks} if steps or looks else None


def notes(compared: Compared, units: Units) -> list[str]:
    """What a reader of the numbers should know, a sentence each."""
    total = len(compared.rows)
    without = sum(text is None for text in compared.wanted)
    said = []
    if without == total:
        said.append("No row has a wanted answer: there are texts to read, and nothing to measure them by.")
    elif without:
        said.append(
            f"{without} of {total} rows have no wanted answer and count for lengths and repetition alone."
        )
    for task in compared.tasks:
        name = task.candidate.name
        if task.left_out:
            cutoff_len = task.candidate.prompt_builder.adapter.rules.cutoff_len
            said.append(f"{name}: {task.left_out} rows are over cutoff_len {cutoff_len}: no loss of them.")
        if shortened := sum(question.shortened for question in task.questions):
            said.append(f"{name}: {shortened} prompts were shortened to leave room for the answer.")
    vocabularies = {task.candidate.prompt_builder.source.name for task in compared.tasks}
    if len(vocabularies) > 1:
        said.append(
            "Models of different bases may cut texts into different tokens: compare their losses with care."
        )
    if total < 30:
        said.append(f"{total} rows are few: intervals from so few rows tend to be too narrow.")
    if without < total and not has_sacrebleu():
        said.append(f"BLEU and chrF are left out: {INSTALL}")
    if units.note and without < total:
        said.append(f"ROUGE is by {units.name}; {units.note}")
    return said


def _metrics(found: Sequence[tuple[Metric, list[np.ndarray]]], seed: int) -> list[dict[str, Any]]:
    """Values with their intervals, and the differences between every two models."""
    flat = [table for _, tables in found for table in tables]
    resampled = iter(resampled_sums(flat, seed)) if len(flat[0]) > 1 else None
    written: list[dict[str, Any]] = []
    for metric, tables in found:
        values = [_number(metric.value(table.sum(axis=0))) for table in tables]
        draws = [metric.value(next(resampled)) for _ in tables] if resampled is not None else None
        entry: dict[str, Any] = {
            "key": metric.key,
            "name": metric.name,
            "better": metric.better,
            "about": metric.about,
            "values": values,
            "intervals": [_interval(each) for each in draws] if draws is not None else [None] * len(tables),
            "differences": [],
        }
        for a, b in combinations(range(len(tables)), 2):
            first, second = values[a], values[b]
            known = first is not None and second is not None
            tested = metric.tested and known and draws is not None
            entry["differences"].append(
                {
                    "models": [a, b],
                    "difference": second - first if first is not None and second is not None else None,
                    "interval": _interval(draws[b] - draws[a]) if draws is not None and known else None,
                    "p": swap_test(tables[a], tables[b], metric.value, seed) if tested else None,
                }
            )
        written.append(entry)
    every = [each for entry in written for each in entry["differences"] if each["p"] is not None]
    for each, corrected in zip(every, holm([each["p"] for each in every]), strict=True):
        each["p_corrected"] = corrected
    return written


def _interval(draws: np.ndarray) -> list[float] | None:
    found = interval(draws)
    return None if found is None else list(found)


def _rows(compared: Compared, found: Sequence[tuple[Metric, list[np.ndarray]]]) -> list[dict[str, Any]]:
    shown = [(metric, tables) for metric, tables in found if metric.key != "perplexity"]
    needs_wanted = {"chrf", "bleu"}
    per_row = {metric.key: [metric.value(table) for table in tables] for metric, tables in shown}
    written = []
    for at, (row, wanted) in enumerate(zip(compared.rows, compared.wanted, strict=True)):
        prompts = [_prompt(task, at) for task in compared.tasks]
        answers = []
        for model, wrote in enumerate(compared.wrote):
            each = wrote[at]
            scores = {
                key: None if wanted is None and key in needs_wanted else _number(values[model][at], digits=4)
                for key, values in per_row.items()
            }
            answers.append({"text": each.text, "ended": each.ended, "scores": scores})
            if prompts[model] != prompts[0]:
                answers[-1]["prompt"] = prompts[model]
        written.append({"row": row.number, "prompt": prompts[0], "wanted": wanted, "answers": answers})
    return written


def _prompt(task: ComparisonRow, row: int) -> str:
    ids = task.questions[row].token_ids.tolist()
    decoded = task.candidate.prompt_builder.tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(decoded)


def _number(value: Any, digits: int | None = None) -> float | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return number if digits is None else round(number, digits)


def to_json(report: ComparisonReport) -> str:
    return json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def shown(value: float | None) -> str:
    """A number as tables show it: three significant digits or more."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 10_000 else f"{value:.3g}"


def shown_p(p: float | None) -> str:
    if p is None:
        return ""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


ARROWS = {"higher": "↑", "lower": "↓", "": ""}


def print_table(console: Console, report: ComparisonReport) -> None:
    """Values with their 95% intervals; of two models and more the difference to the first, and how sure it is."""
    names = [model["name"] for model in report["models"]]
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    others = range(1, len(names))
    for other in others:
        table.add_column(
            "change" if len(names) == 2 else f"{names[other]} - {names[0]}",
            justify="right",
            overflow="fold",
        )
    gap = " " if console.width >= 30 + 30 * (2 * len(names) - 1) else "\n"
    for metric in report["metrics"]:
        cells = [f"{metric['name']} {ARROWS[metric['better']]}".rstrip()]
        for value, between in zip(metric["values"], metric["intervals"], strict=True):
            cells.append(
                shown(value) + (f"{gap}[{shown(between[0])}, {shown(between[1])}]" if between else "")
            )
        to_first = {each["models"][1]: each for each in metric["differences"] if each["models"][0] == 0}
        for other in others:
            each = to_first[other]
            difference = each["difference"]
            sign = "+" if difference is not None and difference >= 0 else ""
            cells.append(f"{sign}{shown(difference)}{gap}{shown_p(each.get('p_corrected'))}".strip())
        table.add_row(*cells)
    console.print(table)
    for note in report["notes"]:
        console.print(f"- {note}", soft_wrap=True)


def about_numbers(report: ComparisonReport) -> list[str]:
    """How the numbers were made and what they do not say, for the page."""
    said = [
        f"Intervals hold the middle 95% of {report['resamples']:,} resamplings of the {report['data']['rows']:,} rows "
        "(bootstrap, Efron 1979); all models are resampled with the same rows.",
    ]
    tests = [each for metric in report["metrics"] for each in metric["differences"] if each["p"] is not None]
    if tests:
        said.append(
            "p is of a paired randomisation test (Noreen 1989; Riezler & Maxwell 2005): how often swapping the two "
            "models' answers of random rows gives as large a difference. It is corrected for the "
            f"{len(tests)} tests on this page (Holm 1979). Metrics go together, so this is more careful than exact."
        )
    said.append(
        "Both take the rows for independent draws of what the models will be asked. They say nothing of another "
        "training run with another seed, and metrics of overlap are no judgement of quality: read the rows."
    )
    return said
