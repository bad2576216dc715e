"""`yeonma generate`: answer the rows of a file, one row, or a prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TextIO

from yeonma.adapter.prompt_builder import Prompt, PromptBuilder, open_prompt_builder
from yeonma.commands.first_checks import check_prompt_source, row_of
from yeonma.config.settings import AnswerSettings, GenerateConfig, GenerateSettings
from yeonma.data.rows import Row, Rows, open_rows
from yeonma.errors import Log, Problem, UserError
from yeonma.files import user_path
from yeonma.messages import counted, tr
from yeonma.policy import Policy, load_policy
from yeonma.shown import json_text
from yeonma.streams import give, log_line
from yeonma.tokenization.reasoning import AnswerParts

BATCHES_A_CHUNK = 4
"""Rows are read, answered (the longest first) and written in chunks of so many batches."""
MAX_PROBLEMS = 20
MAX_NUMBERS = 10

Write = Callable[[str], None]


def run(config: GenerateConfig) -> int:
    """Answer what the settings name. All rows are checked before the model is loaded. Raises UserError."""
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
        log_line(builder.remark)

    def load() -> Policy:
        return load_policy(
            builder,
            device=adapter.device,
            dtype=adapter.dtype,
            quantization=adapter.quantization,
            adapter_weights=adapter.adapter_weights,
            log=log_line,
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
            log_line(note)
        count = _check_rows(builder, rows, source, answer, log_line)
        policy = load()
        with _writer(source.output) as write, _progress(count, source.output) as answered:
            _answer_rows(policy, builder, rows, source, answer, write, answered)
    elif source.row is not None:
        row = Row(1, row_of(source.row), "--row")
        (prompt,) = builder.prompts([row], source.columns, max_new_tokens=answer.max_new_tokens)
        if prompt.shortened:
            log_line(tr("the row was shortened to fit {limit}", limit=builder.limit))
        _answer_one(load(), prompt, answer, source.output, builder.reference(row, source.columns))
    else:
        text = source.prompt or ""
        builder.text_prompt(text, "--prompt", answer.max_new_tokens)
        policy = load()
        prompt = policy.text_prompt(text, answer.max_new_tokens, "--prompt")
        _answer_one(policy, prompt, answer, source.output, None)
    return 0


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


def _answer_rows(
    policy: Policy,
    builder: PromptBuilder,
    rows: Rows,
    source: GenerateSettings,
    settings: AnswerSettings,
    write: Write,
    answered: Callable[[], None],
) -> None:
    for chunk in _chunks(rows, source.limit, source.batch_size):
        prompts = builder.prompts(chunk, source.columns, max_new_tokens=settings.max_new_tokens)
        answers = policy.answers(
            prompts, settings, batch_size=source.batch_size, on_answer=lambda _: answered()
        )
        for row, answer in zip(chunk, answers, strict=True):
            write(_line(row.number, answer, builder.reference(row, source.columns)))


def _answer_one(
    policy: Policy, prompt: Prompt, settings: AnswerSettings, output: str | None, reference: str | None
) -> None:
    (answer,) = policy.answers([prompt], settings)
    with _writer(output) as write:
        write(answer.content + "\n" if output is None else _line(1, answer, reference))


def _line(row: int, answer: AnswerParts, reference: str | None) -> str:
    line: dict[str, object] = {"row": row, "answer": answer.content}
    line |= {} if answer.reasoning is None else {"reasoning_content": answer.reasoning}
    line |= {} if reference is None else {"reference": reference}
    return json_text(line) + "\n"


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
def _progress(count: int, output: str | None) -> Iterator[Callable[[], None]]:
    """On standard error: a bar on a terminal that does not show the answers, else a line every tenth of the rows."""
    if sys.stderr.isatty() and (output is not None or not sys.stdout.isatty()):
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
        if not sys.stderr.isatty() and done.rows * 10 // count > (done.rows - 1) * 10 // count:
            log_line(tr("answered {rows} of {count}", rows=done.rows, count=counted(count, "row")))

    yield answered


@dataclass
class _Count:
    rows: int = 0
