"""`yeonma generate`: answer the rows of a file, one row, or a prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

from yeonma.adapter.prompt_builder import Prompt, PromptBuilder, open_prompt_builder
from yeonma.commands.first_checks import check_prompt_source, row_of
from yeonma.config.settings import AnswerSettings, GenerateConfig, GenerateSettings
from yeonma.data.rows import Row, Rows, open_rows
from yeonma.errors import Log, Problem, UserError
from yeonma.files import user_path
from yeonma.messages import counted, tr
from yeonma.policy import Policy, load_policy
from yeonma.run_folder.progress import passes_a_tenth
from yeonma.shown import json_text
from yeonma.streams import give, log_line
from yeonma.tokenization.reasoning import AnswerParts

BATCHES_A_CHUNK = 4
"""Rows are read, answered (the longest first) and written in chunks of so many batches."""
MAX_PROBLEMS = 20
MAX_NUMBERS = 10

Write = Callable[[str], None]


@dataclass(frozen=True)
class AnsweredRow:
    """A row's number and what the model answered. Of a prompt without a template, the number is 1."""

    number: int
    answer: AnswerParts
    reference: str | None
    """The row's own answer, if it has one."""

    @property
    def entries(self) -> dict[str, Any]:
        """As `--output` has them; without reasoning and reference where there are none."""
        entries: dict[str, Any] = {"row": self.number, "answer": self.answer.content}
        entries |= {} if self.answer.reasoning is None else {"reasoning_content": self.answer.reasoning}
        return entries | ({} if self.reference is None else {"reference": self.reference})


def run(config: GenerateConfig) -> int:
    """Answer what the settings name. Raises UserError."""
    is_text = config.generate.data_path is None and config.generate.output is None
    shows_answers = config.generate.output is None and sys.stdout.isatty()
    answers = open_answers(config, log_line, shows_answers=shows_answers)
    with _writer(config.generate.output) as write:
        for answered in answers:
            write(answered.answer.content + "\n" if is_text else json_text(answered.entries) + "\n")
    return 0


def generate(config: GenerateConfig, log: Log) -> list[AnsweredRow]:
    """The answers to what the settings name, which also go to `output` as they come. Raises UserError."""
    answers, output = open_answers(config, log), config.generate.output
    if output is None:
        return list(answers)
    rows = []
    with _writer(output) as write:
        for answered in answers:
            write(json_text(answered.entries) + "\n")
            rows.append(answered)
    return rows


def open_answers(config: GenerateConfig, log: Log, *, shows_answers: bool = False) -> Iterator[AnsweredRow]:
    """Checks all rows and loads the model; then the answers come chunk by chunk, in the order of the rows.

    `shows_answers`: they appear on the terminal, which then gets no bar. Raises UserError before the model is loaded.
    """
    adapter, source, answer = config.adapter, config.generate, config.answer
    check_prompt_source(source)
    builder = open_prompt_builder(
        adapter.adapter_dir,
        base_model=adapter.base_model,
        trust_remote_code=adapter.trust_remote_code,
        data_set=adapter.data_set,
        template=adapter.template,
    )
    if builder.remark:
        log(builder.remark)

    def load() -> Policy:
        return load_policy(
            builder,
            device=adapter.device,
            dtype=adapter.dtype,
            quantization=adapter.quantization,
            adapter_weights=adapter.adapter_weights,
            log=log,
        )

    if source.data_path is not None:
        rows = open_rows(
            source.data_path,
            split=source.data_split,
            revision=source.data_revision,
            encoding=source.encoding,
            delimiter=source.delimiter,
        )
        for note in rows.notes:
            log(note)
        count = _check_rows(builder, rows, source, answer, log)
        return _answers_to_rows(load(), builder, rows, source, answer, _progress(count, shows_answers, log))
    if source.row is not None:
        row = Row(1, row_of(source.row), "--row")
        (prompt,) = builder.prompts([row], source.columns, max_new_tokens=answer.max_new_tokens)
        if prompt.shortened:
            log(tr("the row was shortened to fit {limit}", limit=builder.limit))
        return _answer_to_prompt(load(), prompt, answer, builder.reference(row, source.columns))
    text = source.prompt or ""
    builder.text_prompt(text, "--prompt", answer.max_new_tokens)
    policy = load()
    return _answer_to_prompt(
        policy, policy.text_prompt(text, answer.max_new_tokens, "--prompt"), answer, None
    )


def _check_rows(
    builder: PromptBuilder, rows: Rows, source: GenerateSettings, answer: AnswerSettings, log: Log
) -> int:
    """The number of rows. Raises UserError with the first problems of all rows; logs which rows are shortened."""
    count = shortened = 0
    problems: list[Problem] = []
    numbers: list[str] = []
    for chunk in _chunks(rows, source.limit, source.batch_size):
        count += len(chunk)
        try:
            prompts = builder.prompts(chunk, source.columns, max_new_tokens=answer.max_new_tokens)
        except UserError as error:
            problems += error.problems
            if len(problems) > MAX_PROBLEMS:
                break
            continue
        short = [str(row.number) for row, prompt in zip(chunk, prompts, strict=True) if prompt.shortened]
        shortened += len(short)
        numbers += short[: MAX_NUMBERS - len(numbers)]
    if problems:
        more = (
            [Problem(tr("there are more such problems"), rows.name)] if len(problems) > MAX_PROBLEMS else []
        )
        raise UserError([*problems[:MAX_PROBLEMS], *more])
    if shortened:
        listed = ", ".join(numbers) + (", ..." if shortened > len(numbers) else "")
        values = {
            "shortened": shortened,
            "count": counted(count, "row"),
            "limit": builder.limit,
            "listed": listed,
        }
        log(
            tr("{shortened} of {count} is shortened to fit {limit}: {listed}", **values)
            if shortened == 1
            else tr("{shortened} of {count} are shortened to fit {limit}: {listed}", **values)
        )
    return count


def _answers_to_rows(
    policy: Policy,
    builder: PromptBuilder,
    rows: Rows,
    source: GenerateSettings,
    settings: AnswerSettings,
    progress: AbstractContextManager[Callable[[], None]],
) -> Iterator[AnsweredRow]:
    with progress as answered:
        for chunk in _chunks(rows, source.limit, source.batch_size):
            prompts = builder.prompts(chunk, source.columns, max_new_tokens=settings.max_new_tokens)
            answers = policy.answers(
                prompts, settings, batch_size=source.batch_size, on_answer=lambda _: answered()
            )
            for row, answer in zip(chunk, answers, strict=True):
                yield AnsweredRow(row.number, answer, builder.reference(row, source.columns))


def _answer_to_prompt(
    policy: Policy, prompt: Prompt, settings: AnswerSettings, reference: str | None
) -> Iterator[AnsweredRow]:
    (answer,) = policy.answers([prompt], settings)
    yield AnsweredRow(1, answer, reference)


def _chunks(rows: Rows, limit: int | None, batch_size: int) -> Iterator[list[Row]]:
    source = islice(rows, limit)
    while chunk := list(islice(source, batch_size * BATCHES_A_CHUNK)):
        yield chunk


@contextmanager
def _writer(output: str | None) -> Iterator[Write]:
    """Writes to the file or to standard output, and flushes after every write, so that an interrupt loses nothing."""

    def to(file: TextIO) -> Write:
        def write(text: str) -> None:
            file.write(text)
            file.flush()

        return write

    if output is None:
        yield give
        return
    with user_path(output).open("w", encoding="utf-8", newline="\n") as file:
        yield to(file)


@contextmanager
def _progress(count: int, shows_answers: bool, log: Log) -> Iterator[Callable[[], None]]:
    """A bar on a terminal that does not show the answers; without a terminal, a line every tenth of the rows."""
    if sys.stderr.isatty() and not shows_answers:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(tr("answered")), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
            task = bar.add_task("", total=count)
            yield lambda: bar.advance(task)
        return
    done = _Count()

    def answered() -> None:
        done.rows += 1
        if not sys.stderr.isatty() and passes_a_tenth(done.rows, done.rows - 1, count):
            log(tr("answered {rows} of {count}", rows=done.rows, count=counted(count, "row")))

    yield answered


@dataclass
class _Count:
    rows: int = 0
