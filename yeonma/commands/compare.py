"""`yeonma compare`: answer the same rows with several models and write a report."""

from __future__ import annotations

import os
from pathlib import Path

from yeonma.config.settings import AnswerSettings, CompareConfig, CompareSettings
from yeonma.data.column_paths import with_paths
from yeonma.data.rows import open_rows
from yeonma.errors import Log, UserError
from yeonma.evaluate.answer_cache import open_answer_cache
from yeonma.evaluate.answers import answer_all, candidate_inputs, read_rows, reference_answers
from yeonma.evaluate.candidates import open_candidates
from yeonma.evaluate.metrics import INSTALL_SACREBLEU, has_sacrebleu
from yeonma.evaluate.report import Comparison, make_report, print_report, to_json
from yeonma.evaluate.report_page import page
from yeonma.files import disk_errors_as_user_errors, replace_file, user_path
from yeonma.streams import log_line, say

ANSWERS = "answers.jsonl"


def run(config: CompareConfig) -> int:
    """Run the command and return its exit status. Raises UserError, where possible before weights are loaded."""
    try:
        folder = compare(config.compare, config.answer, log_line)
    except KeyboardInterrupt:
        log_line(
            f"interrupted; the answers so far are in {config.compare.output_dir}. "
            "Run the same command again to continue"
        )
        return 130
    say(f"Open {folder / 'report.html'} in a browser; it needs no network.")
    return 0


def compare(settings: CompareSettings, options: AnswerSettings, log: Log) -> Path:
    """Write the report, print its table and return its folder. `log` gets progress messages. Raises UserError."""
    output = _output(settings)
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
        log(f"BLEU and chrF need sacrebleu: {INSTALL_SACREBLEU}")
    _create(output, settings.output_dir)
    with open_answer_cache(output / ANSWERS) as cache:
        answers, inputs = answer_all(inputs, settings, options, cache, log)
    report = make_report(settings, options, Comparison(source, rows, references, inputs, answers))
    with disk_errors_as_user_errors(output, "the report"):
        replace_file(output / "report.json", to_json(report).encode())
        replace_file(output / "report.html", page(report).encode())
    from rich.console import Console

    print_report(Console(highlight=False, markup=False, emoji=False), report)
    return output


def _output(settings: CompareSettings) -> Path:
    """The folder of the report, not created yet. Raises UserError if it cannot be written."""
    output, place = user_path(settings.output_dir, "--output_dir"), f"--output_dir {settings.output_dir}"
    if output.exists() and not output.is_dir():
        raise UserError("it is a file", place=place, cure="name a folder")
    if output.is_dir():
        for spec in settings.models:
            model = user_path(spec, "--models")
            if model.is_dir() and output.samefile(model) and not (model / ANSWERS).exists():
                raise UserError("it is a model's folder", place=place, cure="name another one")
        _check_writable(output, place)
        return output
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{parent} is a file", place=place, cure="name a folder")
    _check_writable(parent, place)
    return output


def _check_writable(folder: Path, place: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError("cannot be written", place=place, cure="name a folder that you can write to")


def _create(output: Path, given: str) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be created: {error.strerror}", place=f"--output_dir {given}") from error
