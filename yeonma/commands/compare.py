"""`yeonma compare`: models and rows in, a report out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from yeonma.config.settings import AnswerSettings, CompareConfig, CompareSettings
from yeonma.data.rows import open_rows
from yeonma.errors import Log, UserError
from yeonma.evaluate.answer_cache import open_answer_cache
from yeonma.evaluate.answers import answer_all, comparison_rows, read_rows, wanted_answers
from yeonma.evaluate.candidates import open_candidates
from yeonma.evaluate.metrics import INSTALL, has_sacrebleu
from yeonma.evaluate.report import Compared, make_report, print_table, to_json
from yeonma.evaluate.report_page import page
from yeonma.files import disk_errors_as_user_errors, replace_file, user_path

ANSWERS = "answers.jsonl"


def run(config: CompareConfig) -> int:
    """Compare what the settings name. All that may be wrong is told before any weights are loaded. Raises UserError."""
    asked, how = config.compare, config.answer
    try:
        folder = compare(asked, how, _say)
    except KeyboardInterrupt:
        _say(
            f"interrupted; what was answered so far is kept in {asked.output_dir}, and the same command goes on"
        )
        return 130
    print(f"Open {folder / 'report.html'} in a browser; it needs no network.")
    return 0


def compare(asked: CompareSettings, how: AnswerSettings, say: Log) -> Path:
    """The folder with the report. Prints the table; `say` gets what goes on before. Raises UserError."""
    output = _output(asked)
    source = open_rows(
        asked.data_path, split=asked.data_split, revision=asked.data_revision, encoding=asked.encoding
    )
    rows = read_rows(source, asked.rows)
    candidates = open_candidates(asked, source)
    tasks = comparison_rows(candidates, rows, asked, how)
    wanted = wanted_answers(candidates, rows, asked)
    if any(text is not None for text in wanted) and not has_sacrebleu():
        say(f"BLEU and chrF are left out without sacrebleu: {INSTALL}")
    _made(output, asked.output_dir)
    with open_answer_cache(output / ANSWERS) as kept:
        wrote, tasks = answer_all(tasks, asked, how, kept, say)
    report = make_report(asked, how, Compared(source, rows, wanted, tasks, wrote))
    with disk_errors_as_user_errors(output, "the report"):
        replace_file(output / "report.json", to_json(report).encode())
        replace_file(output / "report.html", page(report).encode())
    from rich.console import Console

    print_table(Console(highlight=False, markup=False, emoji=False), report)
    return output


def _output(asked: CompareSettings) -> Path:
    """Where the report goes. Raises UserError where nothing can be written there, having left nothing behind."""
    output, place = user_path(asked.output_dir, "--output_dir"), f"--output_dir {asked.output_dir}"
    if output.exists() and not output.is_dir():
        raise UserError("it is a file", place=place, cure="name a folder")
    if output.is_dir():
        for spec in asked.models:
            model = user_path(spec, "--models")
            if model.is_dir() and output.samefile(model) and not (model / ANSWERS).exists():
                raise UserError("it is a model's folder", place=place, cure="name another one")
        _check_writable(output, place)
        return output
    beside = next(parent for parent in output.absolute().parents if parent.exists())
    if not beside.is_dir():
        raise UserError(f"{beside} is a file", place=place, cure="name a folder")
    _check_writable(beside, place)
    return output


def _check_writable(folder: Path, place: str) -> None:

    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError("cannot be written", place=place, cure="name a folder that you may write to")


def _made(output: Path, written: str) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", place=f"--output_dir {written}") from error


def _say(text: str) -> None:
    print(f"yeonma: {text}", file=sys.stderr, flush=True)
