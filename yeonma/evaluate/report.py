"""Scored answers -> report.json, and the table on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from yeonma import __version__
from yeonma.config.settings import AnswerSettings, CompareSettings
from yeonma.data.classification import (
    NO_LABEL,
    Confusion,
    as_confusion,
    confusion_matrix,
    confusion_table,
    f1_of,
    label_counts,
    label_name,
)
from yeonma.data.rows import Row, Rows
from yeonma.errors import UserError
from yeonma.evaluate.answers import CandidateInputs
from yeonma.evaluate.candidates import Candidate
from yeonma.evaluate.judge import Judged
from yeonma.evaluate.judge_report import (
    explain_judge,
    judge_caption,
    judge_entry,
    judge_notes,
    judge_sentences,
    judge_table,
    row_entries,
)
from yeonma.evaluate.metrics import (
    INSTALL_SACREBLEU,
    NOT_BY_ROW,
    RESAMPLES,
    Metric,
    MetricTokenizer,
    ScoredAnswer,
    compute_metrics,
    has_sacrebleu,
    holm,
    interval,
    metric_tokenizer,
    predicted_labels,
    resampled_sums,
    swap_test,
)
from yeonma.evaluate.verdict import format_number, format_p, reference_heading, verdict
from yeonma.evaluate.vote_pairs import PairColumns
from yeonma.messages import counted, tr
from yeonma.run_folder.run_log import read_metrics
from yeonma.shown import json_text, one_line

FORMAT = 1
CURVE_POINTS = 400

ComparisonReport = dict[str, Any]
MetricTables = Sequence[tuple[Metric, list[np.ndarray]]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The contents of a report. `answers[m][r]` is model m's answer to row r."""

    source: Rows
    rows: Sequence[Row]
    references: Sequence[str | None]
    inputs: Sequence[CandidateInputs]
    answers: Sequence[Sequence[ScoredAnswer]]
    pair_columns: Sequence[PairColumns | None]
    """The rows' prompts, for the pairs of people's votes."""
    judged: Judged | None = None


def make_report(
    settings: CompareSettings, options: AnswerSettings, comparison: Comparison
) -> ComparisonReport:
    """The content of report.json. Numbers that are unknown or not finite are null."""
    references = comparison.references
    tokenizer = metric_tokenizer(text for text in references if text is not None)
    metrics = compute_metrics(comparison.answers, references, tokenizer)
    entries = _metric_entries(metrics, options.seed)
    names = [inputs.candidate.name for inputs in comparison.inputs]
    judged = None if comparison.judged is None else judge_entry(comparison.judged, options.seed)
    said, notes = ([], []) if judged is None else (judge_sentences(judged, names), judge_notes(judged, names))
    return {
        "format": FORMAT,
        "yeonma": __version__,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "data": {
            "name": _without_path(settings.data_path),
            "sha256": comparison.source.identity,
            "rows": len(comparison.rows),
        },
        "verdict": [*verdict(names, entries, len(comparison.rows)), *said],
        "answers": asdict(options),
        "models": [_model_entry(inputs) for inputs in comparison.inputs],
        "units": {"rouge": tokenizer.name, "bleu": tokenizer.bleu},
        "notes": [*_notes(comparison, tokenizer), *notes],
        "resamples": RESAMPLES,
        "metrics": entries,
        "labels": _labels(comparison),
        "judge": judged,
        "rows": _row_entries(comparison, metrics),
    }


def _labels(comparison: Comparison) -> dict[str, Any] | None:
    """The labels with their numbers of rows, and each model's confusion; None if the references are no labels."""
    own = [text for text in comparison.references if text is not None]
    counts = label_counts(own)
    if counts is None:
        return None
    labels = list(counts)
    number = {label: index for index, label in enumerate(labels)}
    confusions = []
    for answers in comparison.answers:
        scored = [
            answer for answer, text in zip(answers, comparison.references, strict=True) if text is not None
        ]
        predicted = [
            len(labels) if text is None else number[text] for text in predicted_labels(scored, labels)
        ]
        matrix = confusion_matrix([number[text.strip()] for text in own], predicted, len(labels))
        confusions.append(as_confusion(matrix, labels))
    return {"counts": counts, "confusions": confusions}


def _model_entry(inputs: CandidateInputs) -> dict[str, Any]:
    candidate = inputs.candidate
    source, template = candidate.prompt_builder.source, candidate.prompt_builder.adapter.template
    return {
        "name": candidate.name,
        "base": _without_path(source.name),
        "revision": source.revision,
        "adapter": None if candidate.adapter is None else candidate.name,
        "identity": inputs.identity,
        "template": template.text,
        "template_of": candidate.template_of,
        "shortened": sum(prompt.shortened for prompt in inputs.prompts),
        "left_out": inputs.left_out,
        "curve": _loss_curve(candidate),
    }


def _without_path(name: str) -> str:
    """The last part of a local path, because reports are passed on to others."""
    return Path(name).name if Path(name).exists() else name


def _loss_curve(candidate: Candidate) -> dict[str, list[list[float]]] | None:
    """(step, loss) of training and of evaluations; None if the adapter's folder has no metrics.jsonl."""
    if candidate.adapter is None:
        return None
    try:
        records = read_metrics(Path(candidate.adapter) / "metrics.jsonl")
    except UserError:
        return None
    records = [record for record in records if record.get("loss") is not None and "step" in record]
    evaluations = [[record["step"], record["loss"]] for record in records if record.get("evaluation")]
    steps = [[record["step"], record["loss"]] for record in records if not record.get("evaluation")]
    stride = -(-len(steps) // CURVE_POINTS) or 1
    return {"training": steps[::stride], "validation": evaluations} if steps or evaluations else None


def _notes(comparison: Comparison, tokenizer: MetricTokenizer) -> list[str]:
    """What a reader of the numbers should know, one sentence per note."""
    total = len(comparison.rows)
    without_reference = sum(text is None for text in comparison.references)
    notes = []
    if without_reference == total:
        notes.append(tr("No row has a reference answer: the answers can be read, but not scored."))
    elif without_reference:
        notes.append(
            tr(
                "{without_reference} of {total} rows have no reference answer. They count only for "
                "lengths and repetition.",
                without_reference=without_reference,
                total=total,
            )
        )
    for inputs in comparison.inputs:
        name = inputs.candidate.name
        if inputs.left_out:
            limit = inputs.candidate.prompt_builder.limit
            left_out = counted(
                inputs.left_out,
                "row is over {limit} and has no loss",
                "rows are over {limit} and have no loss",
                limit=limit,
            )
            notes.append(f"{name}: {left_out}.")
        if shortened := sum(prompt.shortened for prompt in inputs.prompts):
            prompts = counted(shortened, "prompt was", "prompts were")
            notes.append(
                tr("{name}: {prompts} shortened to leave room for the answer.", name=name, prompts=prompts)
            )
    bases = {inputs.candidate.prompt_builder.source.name for inputs in comparison.inputs}
    if len(bases) > 1:
        notes.append(
            tr("Models of different bases may split texts into different tokens: compare losses with care.")
        )
    if total < 30:
        notes.append(
            tr("With only {rows}, confidence intervals tend to be too narrow.", rows=counted(total, "row"))
        )
    if without_reference < total and not has_sacrebleu():
        notes.append(
            tr(
                "BLEU and chrF are missing. To get them: {install_sacrebleu}",
                install_sacrebleu=INSTALL_SACREBLEU,
            )
        )
    if tokenizer.note and without_reference < total:
        notes.append(tr("ROUGE counts {unit}; {note}", unit=tr(tokenizer.name), note=tokenizer.note))
    return notes


def _metric_entries(metrics: MetricTables, seed: int) -> list[dict[str, Any]]:
    """The metrics' values and confidence intervals, and the differences between all pairs of models."""
    all_tables = [table for _, tables in metrics for table in tables]
    resampled = iter(resampled_sums(all_tables, seed)) if len(all_tables[0]) > 1 else None
    entries: list[dict[str, Any]] = []
    for metric, tables in metrics:
        values = [_number(metric.value(table.sum(axis=0))) for table in tables]
        samples = [metric.value(next(resampled)) for _ in tables] if resampled is not None else None
        differences = []
        for a, b in combinations(range(len(tables)), 2):
            first, second = values[a], values[b]
            has_both = first is not None and second is not None
            tested = metric.tested and has_both and samples is not None
            differences.append(
                {
                    "models": [a, b],
                    "difference": second - first if first is not None and second is not None else None,
                    "interval": _interval(samples[b] - samples[a])
                    if samples is not None and has_both
                    else None,
                    "p": swap_test(tables[a], tables[b], metric.value, seed) if tested else None,
                }
            )
        entries.append(
            {
                "key": metric.key,
                "name": metric.name,
                "better": metric.better,
                "about": metric.about,
                "values": values,
                "intervals": [None] * len(tables) if samples is None else [_interval(s) for s in samples],
                "differences": differences,
            }
        )
    tests = [test for entry in entries for test in entry["differences"] if test["p"] is not None]
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_corrected"] = corrected
    return entries


def _interval(samples: np.ndarray) -> list[float] | None:
    ends = interval(samples)
    return None if ends is None else list(ends)


def _row_entries(comparison: Comparison, metrics: MetricTables) -> list[dict[str, Any]]:
    need_reference = {"chrf", "bleu"}
    values = {
        metric.key: [metric.value(table) for table in tables]
        for metric, tables in metrics
        if metric.key not in NOT_BY_ROW
    }
    entries = []
    for index, (row, reference) in enumerate(zip(comparison.rows, comparison.references, strict=True)):
        prompts = [_prompt_text(inputs, index) for inputs in comparison.inputs]
        answers: list[dict[str, Any]] = []
        for model, model_answers in enumerate(comparison.answers):
            scores = {
                key: None
                if reference is None and key in need_reference
                else _number(by_model[model][index], digits=4)
                for key, by_model in values.items()
            }
            answer = model_answers[index]
            answers.append({"text": answer.text, "ended": answer.ended, "scores": scores})
            if prompts[model] != prompts[0]:
                answers[-1]["prompt"] = prompts[model]
        entry = {"row": row.number, "prompt": prompts[0], "wanted": reference, "answers": answers}
        entry["columns"] = comparison.pair_columns[index]
        if comparison.judged is not None:
            entry["judge"] = row_entries(comparison.judged, index)
        entries.append(entry)
    return entries


def _prompt_text(inputs: CandidateInputs, row: int) -> str:
    token_ids = inputs.prompts[row].token_ids.tolist()
    tokenizer = inputs.candidate.prompt_builder.tokenizer
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _number(value: Any, digits: int | None = None) -> float | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return number if digits is None else round(number, digits)


def to_json(report: ComparisonReport) -> str:
    return json_text(report, indent=1, allow_nan=False) + "\n"


ARROWS = {"higher": "↑", "lower": "↓", "": ""}


SHOWN_ROWS = 2
"""Rows whose answers the terminal shows."""
SHOWN_CHARACTERS = 200
"""Of each of these texts."""
SHOWN_LABELS = 12
"""The most labels of which the terminal shows confusion tables."""
LABEL_CELLS = 24
LEAST_LABEL_CELLS = 8
"""The widths of a label on the terminal, in cells; a Hangul syllable takes two."""


def print_report(console: Console, report: ComparisonReport) -> None:
    """Print what the comparison shows, a few answers, and the numbers."""
    for sentence in report["verdict"]:
        console.print(Text(one_line(sentence), "bold"), soft_wrap=True)
    _print_rows(console, report)
    _print_table(console, report)
    _print_confusions(console, report)
    if report["judge"] is not None:
        console.print(Text(one_line(judge_caption(report["judge"]))), soft_wrap=True)
        console.print(judge_table(report["judge"], [model["name"] for model in report["models"]]))
    for note in report["notes"]:
        console.print(Text(one_line(f"- {note}")), soft_wrap=True)


def _print_rows(console: Console, report: ComparisonReport) -> None:
    """The first rows that the models answer differently, or the first ones if there are none."""
    rows = report["rows"]
    differ = [row for row in rows if len({answer["text"] for answer in row["answers"]}) > 1]
    names = [model["name"] for model in report["models"]]
    for row in (differ or rows)[:SHOWN_ROWS]:
        console.print(Text("\n" + tr("row {number}", number=row["row"])))
        texts = [] if row["wanted"] is None else [(reference_heading(), row["wanted"])]
        texts += [(name, answer["text"]) for name, answer in zip(names, row["answers"], strict=True)]
        for name, text in texts:
            console.print(Text(f"  {one_line(name)}: {one_line(text, SHOWN_CHARACTERS)}"), soft_wrap=True)


def _print_table(console: Console, report: ComparisonReport) -> None:
    """Print the metrics with 95% confidence intervals, and the models' differences from the first, with p-values."""
    names = [model["name"] for model in report["models"]]
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(one_line(name)), justify="right", overflow="fold")
    for model in range(1, len(names)):
        table.add_column(
            Text(tr("change") if len(names) == 2 else one_line(f"{names[model]} - {names[0]}")),
            justify="right",
            overflow="fold",
        )
    gap = " " if console.width >= 30 + 30 * (2 * len(names) - 1) else "\n"
    for metric in report["metrics"]:
        cells = [f"{tr(metric['name'])} {ARROWS[metric['better']]}".rstrip()]
        for value, ends in zip(metric["values"], metric["intervals"], strict=True):
            interval_text = f"{gap}[{format_number(ends[0])}, {format_number(ends[1])}]" if ends else ""
            cells.append(format_number(value) + interval_text)
        from_first = {test["models"][1]: test for test in metric["differences"] if test["models"][0] == 0}
        for model in range(1, len(names)):
            difference, p = from_first[model]["difference"], from_first[model].get("p_corrected")
            sign = "+" if difference is not None and difference >= 0 else ""
            cells.append(f"{sign}{format_number(difference)}{gap}{format_p(p)}".strip())
        table.add_row(*map(Text, cells))
    console.print(table)


def _print_confusions(console: Console, report: ComparisonReport) -> None:
    """Print a confusion table for each model, if the reference answers are labels. Tables for which the terminal has no
    room are left to the page."""
    if report["labels"] is None:
        return
    labels = list(report["labels"]["counts"])
    tables = [
        _confusion_on_terminal(confusion, labels, console) for confusion in report["labels"]["confusions"]
    ]
    if len(labels) > SHOWN_LABELS or None in tables:
        sentence = tr("The confusion tables of the {labels} labels are in report.html.", labels=len(labels))
        console.print(Text(f"{sentence}\n"), soft_wrap=True)
        return
    for model, table in zip(report["models"], tables, strict=True):
        caption = tr("{model}: rows of a label, by the label that was answered", model=model["name"])
        console.print(Text(one_line(caption)), soft_wrap=True)
        console.print(table)


def _confusion_on_terminal(confusion: Confusion, labels: Sequence[str], console: Console) -> Table | None:
    """The table with names above its columns, or with numbers where names are too wide, and then with names cut short;
    None if there is no room for that."""
    for by_number in (False, True):
        table = _confusion_of(confusion, labels, by_number, LABEL_CELLS)
        excess = (
            Measurement.get(console, console.options.update(max_width=10_000), table).maximum - console.width
        )
        if excess <= 0:
            return table
    longest = max(cell_len(one_line(label_name(own))) for own, _ in confusion_table(confusion, labels)[1])
    cells = min(longest, LABEL_CELLS) - excess
    return _confusion_of(confusion, labels, by_number, cells) if cells >= LEAST_LABEL_CELLS else None


def _confusion_of(confusion: Confusion, labels: Sequence[str], by_number: bool, cells: int) -> Table:
    """A row for each label, with names of at most so many cells. The columns have names, or numbers that stand before
    the names of the rows."""
    columns, rows = confusion_table(confusion, labels)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0) if by_number else (0, 1))
    if by_number:
        table.add_column("", justify="right", no_wrap=True)
    table.add_column(Text(tr("label")), no_wrap=True)
    for number, column in enumerate(columns, 1):
        head = one_line(label_name(column))
        if by_number:
            head = tr("none") if column == NO_LABEL else str(number)
        table.add_column(Text(head), justify="right", no_wrap=True)
    table.add_column("F1", justify="right", no_wrap=True)
    for number, (own, counts) in enumerate(rows, 1):
        name = Text(one_line(label_name(own)))
        name.truncate(cells, overflow="ellipsis")
        number_cells = ["" if own == NO_LABEL else str(number)] if by_number else []
        numbers = [*(f"{count:,}" for count in counts), format_number(f1_of(confusion, own))]
        table.add_row(*map(Text, number_cells), name, *map(Text, numbers))
    return table


def explain_numbers(report: ComparisonReport) -> list[str]:
    """How the numbers are computed and what they do not show, as sentences for the page."""
    sentences = [
        tr(
            "Confidence intervals are the middle 95% of {resamples:,} bootstrap resamples of the "
            "{rows:,} rows (Efron 1979). All models are resampled with the same rows.",
            resamples=report["resamples"],
            rows=report["data"]["rows"],
        ),
    ]
    tests = [test for metric in report["metrics"] for test in metric["differences"] if test["p"] is not None]
    if tests:
        sentences.append(
            tr(
                "p is from a paired randomisation test (Noreen 1989; Riezler & Maxwell 2005): how often "
                "a difference at least this large appears when the two models' answers are swapped on "
                "random rows. It is corrected for the {tests} tests on this page (Holm 1979); as metrics "
                "are correlated, the correction is conservative.",
                tests=len(tests),
            )
        )
    sentences.append(
        tr(
            "Both assume that the rows are independent samples of future prompts. They do not cover "
            "a repeated training run with another seed. Overlap metrics do not measure quality: read "
            "the rows."
        )
    )
    return sentences if report["judge"] is None else [*sentences, *explain_judge(report["judge"])]
