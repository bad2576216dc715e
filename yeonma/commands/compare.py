"""`yeonma compare`: answer the same rows with several models and write a report."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from yeonma.commands.first_checks import ANSWERS, checked_judge, report_folder
from yeonma.config.settings import CompareConfig
from yeonma.data.column_paths import with_paths
from yeonma.data.rows import open_rows
from yeonma.errors import Log, UserError, system_reason
from yeonma.evaluate.answer_cache import open_answer_cache
from yeonma.evaluate.answers import answer_all, candidate_inputs, read_rows, reference_answers
from yeonma.evaluate.candidates import open_candidates
from yeonma.evaluate.judge import (
    JUDGE_RECORDS,
    JudgeSession,
    asked_as,
    is_judge_record,
    judge_all,
    judge_material,
    start_judge,
)
from yeonma.evaluate.judge_rubric import rubric_for
from yeonma.evaluate.metrics import INSTALL_SACREBLEU, has_sacrebleu
from yeonma.evaluate.report import Comparison, ComparisonReport, make_report, print_report, to_json
from yeonma.evaluate.report_page import page
from yeonma.evaluate.vote_pairs import pair_columns
from yeonma.files import disk_errors_as_user_errors, replace_file
from yeonma.messages import tr
from yeonma.streams import log_line, say


def run(config: CompareConfig) -> int:
    """Run the command and return its exit status. Raises UserError, where possible before weights are loaded."""
    try:
        folder = compare(config, log_line)
    except KeyboardInterrupt:
        log_line(
            tr(
                "interrupted; the answers so far are in {output_dir}. Run the same command again to continue",
                output_dir=config.compare.output_dir,
            )
        )
        return 130
    say(tr("Open {folder} in a browser; it needs no network.", folder=folder / "report.html"))
    return 0


def compare(config: CompareConfig, log: Log) -> Path:
    """Write the report, print its table and return its folder. `log` gets progress messages. Raises UserError."""
    output, report = compare_models(config, log)
    from rich.console import Console

    print_report(Console(highlight=False, markup=False, emoji=False), report)
    return output


def compare_models(config: CompareConfig, log: Log) -> tuple[Path, ComparisonReport]:
    """Write the report. Returns its folder and its content. `log` gets progress messages. Raises UserError."""
    settings, options = config.compare, config.answer
    output = report_folder(settings)
    judge = checked_judge(config)
    opened = open_rows(
        settings.data_path,
        split=settings.data_split,
        revision=settings.data_revision,
        encoding=settings.encoding,
        delimiter=settings.delimiter,
    )
    for note in opened.notes:
        log(note)
    source = with_paths(opened, settings.columns)
    rows = read_rows(source, settings.rows)
    candidates = open_candidates(settings, source, log)
    for candidate in candidates:
        rows = [candidate.prompt_builder.with_paths(row, settings.columns) for row in rows]
    inputs = candidate_inputs(candidates, rows, settings, options)
    references = reference_answers(candidates, rows, settings)
    if any(text is not None for text in references) and not has_sacrebleu():
        log(tr("BLEU and chrF need sacrebleu: {install_sacrebleu}", install_sacrebleu=INSTALL_SACREBLEU))
    columns = pair_columns(asked_as(candidates), rows, settings)
    _create(output, settings.output_dir)
    with ExitStack() as files:
        cache = files.enter_context(open_answer_cache(output / ANSWERS))
        session: JudgeSession | None = None
        if judge is not None:
            shown = references if config.judging.judge_reference else [None] * len(rows)
            material = judge_material(candidates, rows, settings, shown)
            verdicts = files.enter_context(open_answer_cache(output / JUDGE_RECORDS, is_judge_record))
            session = start_judge(judge, rubric_for(config.judging, material.texts), verdicts, log)
        answers, inputs = answer_all(inputs, settings, options, cache, log)
        judged = None
        if session is not None:
            texts = [[answer.text for answer in model] for model in answers]
            judged = judge_all(session, material, texts, log)
    report = make_report(
        settings, options, Comparison(source, rows, references, inputs, answers, columns, judged)
    )
    with disk_errors_as_user_errors(output, tr("the report")):
        replace_file(output / "report.json", to_json(report).encode())
        replace_file(output / "report.html", page(report).encode())
    return output, report


def _create(output: Path, given: str) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            tr("cannot be created: {strerror}", strerror=system_reason(error)),
            place=f"--output_dir {given}",
        ) from error
