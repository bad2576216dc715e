"""The results of `yeonma eval`: where they lie, their table on a terminal, and their part of a comparison's report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from yeonma.config.settings import EvalSettings
from yeonma.evaluate.verdict import SIGNIFICANT_P, format_number, format_p
from yeonma.files import file_hash, output_file, user_path
from yeonma.messages import counted, later, tr
from yeonma.model.adapter_config import WEIGHTS_FILE
from yeonma.run_folder.entries import is_checkpoint
from yeonma.shown import html, one_line

FORMAT = 1
NAMES = (later("base"), later("tuned"))
RESULTS = "eval.json"
ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
WIDE = 110
"""Columns of a terminal that has room for numbers and intervals in one line."""
NO_FILTER = "none"
"""The harness's name of it."""

EvalReport = dict[str, Any]


def eval_file(settings: EvalSettings) -> Path:
    """The file of results. Raises UserError if `output` cannot be written."""
    if settings.output is not None:
        return output_file(settings.output, "--output", None)
    return results_of(user_path(settings.adapter_dir))


def results_of(folder: Path) -> Path:
    """Where the results of an adapter lie: in its folder; those of a checkpoint beside it, because a checkpoint's files
    do not change."""
    if is_checkpoint(folder.absolute().name):
        return folder.absolute().parent / f"eval-{folder.absolute().name}.json"
    return folder / RESULTS


def print_eval(console: Console, report: EvalReport) -> None:
    """Print a table of the tasks and groups that were asked for, and what to know of it."""
    console.print(eval_table(report, console.width))
    for sentence in _sentences(report):
        console.print(Text(one_line(sentence)), soft_wrap=True)


def eval_table(report: EvalReport, width: int = 80) -> Table:
    """Each task or group with its metrics below it; for two models also the difference, its 95% interval and p-value.
    In less than WIDE columns an interval stands below its number."""
    names = [model["name"] for model in report["models"]]
    gap = " " if width >= WIDE else "\n"
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("")
    for head in (*(tr(name) for name in names), *([tr("change"), "p"] if len(names) == 2 else [])):
        table.add_column(Text(head), justify="right", no_wrap=True)
    before = ""
    for entry in _shown(report):
        if entry["name"] != before:
            table.add_row(Text(one_line(entry["name"]), "bold"))
            before = entry["name"]
        table.add_row(Text(f"  {one_line(metric_name(entry))}"), *map(Text, _cells(entry, gap)))
    return table


def _cells(entry: Mapping[str, Any], gap: str) -> list[str]:
    """The numbers of a row."""
    values, p = entry["values"], entry.get("p_corrected")
    if len(values) == 1:
        return [format_number(values[0]) + _range(entry["intervals"][0], gap)]
    change = signed(entry["difference"]) + _range(entry["interval"], gap, sign=True)
    return [*map(format_number, values), change, format_p(p).removeprefix("p").removeprefix("=")]


def _range(ends: Sequence[float] | None, gap: str, *, sign: bool = False) -> str:
    if ends is None:
        return ""
    low, high = (signed(end) if sign else format_number(end) for end in ends)
    return f"{gap}[{low}, {high}]"


def signed(number: float | None) -> str:
    """With its sign; `-` for None."""
    return ("+" if number is not None and number >= 0 else "") + format_number(number)


def metric_name(entry: Mapping[str, Any]) -> str:
    """The metric with its filter, if that is one, and the better direction."""
    of_filter = "" if entry["filter"] == NO_FILTER else f" ({entry['filter']})"
    return f"{entry['metric']}{of_filter}{ARROWS[entry['better']]}"


def _shown(report: EvalReport) -> Iterator[dict[str, Any]]:
    return (entry for entry in report["scores"] if entry["asked_for"])


def _sentences(report: EvalReport) -> Iterator[str]:
    """What the numbers say, and what a reader of them should know."""
    shown = list(_shown(report))
    if len(report["models"]) == 2:
        yield from _verdict(shown)
    tasks = report["tasks"]
    hidden = sorted(tasks.keys() - {entry["name"] for entry in shown})
    if hidden:
        yield tr("The scores of {tasks} within groups are in the file.", tasks=counted(len(hidden), "task"))
    yield from report["notes"]
    if report["settings"]["limit"] is not None:
        yield tr("With --limit these are no scores to compare with those of others.")


def _verdict(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How many of the tested scores changed, by their corrected p-values and the direction of each metric."""
    tested = [entry for entry in entries if entry.get("p_corrected") is not None and entry["better"]]
    if not tested:
        return
    counts = {"better": 0, "worse": 0, "same": 0}
    for entry in tested:
        if entry["p_corrected"] >= SIGNIFICANT_P or not entry["difference"]:
            counts["same"] += 1
        else:
            is_better = (entry["difference"] > 0) == (entry["better"] == "higher")
            counts["better" if is_better else "worse"] += 1
    yield tr(
        "Tuned against base: {better} better, {worse} worse, {same} without a shown difference (p corrected for "
        "{tests}).",
        tests=counted(len(tested), "test"),
        **counts,
    )


# ---------------------------------------------------------------------------- in a comparison's report


def eval_reports(adapters: Iterable[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """For the report of `yeonma compare`: the results that lie in the folders of its adapters, without the items.

    `adapters`: (name in the report, adapter folder or None). Results of other weights than the folder's are left out.
    """
    found = []
    for name, folder in adapters:
        if folder is None:
            continue
        try:
            report = json.loads(results_of(Path(folder)).read_text("utf-8"))
            kept = {key: value for key, value in report.items() if key != "tasks"}
            kept |= {"model": name, "tasks": dict.fromkeys(report["tasks"])}
            is_current = report["format"] == FORMAT and report["weights"] == weights_hash(Path(folder))
            is_shown = is_current and any(_shown(kept)) and bool(list(eval_html([kept])))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # there is none, or it is damaged
        if is_shown:
            found.append(kept)
    return found


def weights_hash(folder: Path) -> str | None:
    """The SHA-256 of an adapter's weights; None for a folder without, such as that of a merged model."""
    path = folder / WEIGHTS_FILE
    return file_hash(path) if path.is_file() else None


def print_eval_reports(console: Console, reports: Sequence[EvalReport]) -> None:
    """Print the tables of these results, each under the name of its model."""
    for report in reports:
        console.print(Text("\n" + one_line(_heading(report))), soft_wrap=True)
        print_eval(console, report)


def _heading(report: EvalReport) -> str:
    return tr("Benchmarks of {model} (`yeonma eval`, {made})", model=report["model"], made=report["made"])


def eval_html(reports: Sequence[EvalReport]) -> Iterator[str]:
    """The tables of these results as sections of the page; none without results."""
    for number, report in enumerate(reports):
        names = [tr(model["name"]) for model in report["models"]]
        heads = [tr("task"), tr("metric"), *names, *([tr("change"), "p"] if len(names) == 2 else [])]
        yield f'<h2 id="benchmarks{number}">{html(_heading(report))}</h2>'
        yield f'<div class="wide" tabindex="0" role="region" aria-labelledby="benchmarks{number}"><table>'
        cells = "".join(f'<th scope="col">{html(head)}</th>' for head in heads)
        yield f"<thead><tr>{cells}</tr></thead><tbody>"
        for entry in _shown(report):
            head = f'<th scope="row">{html(entry["name"])}</th>'
            cells = "".join(f"<td>{html(cell)}</td>" for cell in (metric_name(entry), *_cells(entry, " ")))
            yield f"<tr>{head}{cells}</tr>"
        yield "</tbody></table></div><ul>"
        yield from (f"<li>{html(sentence)}</li>" for sentence in _sentences(report))
        yield "</ul>"
