"""`yeonma generate`: rows, one row or a text in, answers out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TextIO

from yeonma.adapter.prompt_builder import Prompt, PromptBuilder, open_folder
from yeonma.config.settings import AnswerSettings, GenerateConfig, GenerateSettings
from yeonma.data.rows import Row, Rows, open_rows
from yeonma.data.strict_json import SPACE, Fault, kind_of, parse
from yeonma.errors import Log, Problem, UserError
from yeonma.files import output_file, user_path
from yeonma.policy import Policy, load_policy

BATCHES_A_CHUNK = 8  # answers are written after so many batches, sorted by length within them
MOST_PROBLEMS = 20
MOST_NUMBERS = 10

Write = Callable[[str], None]


def run(config: GenerateConfig) -> int:
    """Answer what the settings name. Rows are all checked before the model is loaded. Raises UserError."""
    folder = config.adapter
    asked, how = config.generate, config.answer
    _check(asked)
    asker = open_folder(
        folder.adapter_dir, base_model=folder.base_model, trust_remote_code=folder.trust_remote_code
    )

    def loaded() -> Policy:
        return load_policy(
            asker,
            device=folder.device,
            dtype=folder.dtype,
            quantization=folder.quantization,
            adapter_weights=folder.adapter_weights,
        )

    if asked.data_path is not None:
        rows = open_rows(
            asked.data_path, split=asked.data_split, revision=asked.data_revision, encoding=asked.encoding
        )
        count = _check_rows(asker, rows, asked, how, _say)
        model = loaded()
        with _writer(asked.output) as write, _progress(count, asked.output) as answered:
            _answer_rows(model, rows, asked, how, write, answered)
    elif asked.row is not None:
        row = Row(1, row_of(asked.row), "--row")
        (question,) = asker.questions([row], asked.columns, max_new_tokens=how.max_new_tokens)
        if question.shortened:
            _say(f"the row was shortened to fit cutoff_len {asker.adapter.rules.cutoff_len}")
        _answer_one(loaded(), question, how, asked.output, asker.reference(row, asked.columns))
    else:
        text = asked.prompt or ""
        asker.text_question(text, "--prompt")
        model = loaded()
        _answer_one(model, model.text_question(text, how.max_new_tokens, "--prompt"), how, asked.output, None)
    return 0


def row_of(text: str) -> Mapping[str, object]:
    """The row that `--row` spells as JSON. Raises UserError."""
    cure = """write '{"document": "..."}'"""
    try:
        value, end = parse(text, len(text) - len(text.lstrip(SPACE)))
        if rest := text[end:].lstrip(SPACE):
            raise Fault("more text after the row", len(text) - len(rest))
    except Fault as fault:
        raise UserError(
            f"{fault.what}, at character {fault.at + 1}", place="--row", cure=fault.cure or cure
        ) from None
    if not isinstance(value, Mapping):
        raise UserError(f"a row must be an object, not {kind_of(value)}", place="--row", cure=cure)
    return value


def _check(asked: GenerateSettings) -> None:
    """Raises UserError unless one thing is asked and the answers have a place to go to."""
    sources = {"data_path": asked.data_path, "row": asked.row, "prompt": asked.prompt}
    given = [f"--{name}" for name, value in sources.items() if value is not None]
    if len(given) != 1:
        what = "nothing is asked" if not given else f"{' and '.join(given)} are both given"
        raise UserError(what, cure="give one of --data_path, --row and --prompt")
    if asked.output is not None:
        output_file(asked.output, "--output", asked.data_path)


def _check_rows(
    asker: PromptBuilder, rows: Rows, asked: GenerateSettings, how: AnswerSettings, say: Log
) -> int:
    """The number of rows. Raises UserError with the problems of all, the first twenty; says which are shortened."""
    count = shortened = 0
    problems: list[Problem] = []
    numbers: list[str] = []
    for chunk in _chunks(rows, asked.limit, asked.batch_size):
        count += len(chunk)
        try:
            questions = asker.questions(chunk, asked.columns, max_new_tokens=how.max_new_tokens)
        except UserError as error:
            problems += error.problems
            if len(problems) > MOST_PROBLEMS:
                break
            continue
        found = [str(row.number) for row, each in zip(chunk, questions, strict=True) if each.shortened]
        shortened += len(found)
        numbers += found[: MOST_NUMBERS - len(numbers)]
    if problems:
        more = [Problem("there are more such problems", rows.name)] if len(problems) > MOST_PROBLEMS else []
        raise UserError([*problems[:MOST_PROBLEMS], *more])
    if shortened:
        listed = ", ".join(numbers) + (", ..." if shortened > len(numbers) else "")
        say(
            f"{shortened} of {count} rows are shortened to fit cutoff_len {asker.adapter.rules.cutoff_len}: {listed}"
        )
    return count


def _answer_rows(
    loaded: Policy,
    rows: Rows,
    asked: GenerateSettings,
    how: AnswerSettings,
    write: Write,
    answered: Callable[[], None],
) -> None:
    for chunk in _chunks(rows, asked.limit, asked.batch_size):
        questions = loaded.asker.questions(chunk, asked.columns, max_new_tokens=how.max_new_tokens)
        answers = loaded.answers(questions, how, batch_size=asked.batch_size, on_answer=lambda *_: answered())
        for row, answer in zip(chunk, answers, strict=True):
            write(_line(row.number, answer, loaded.asker.reference(row, asked.columns)))


def _answer_one(
    loaded: Policy, question: Prompt, how: AnswerSettings, output: str | None, reference: str | None
) -> None:
    (answer,) = loaded.answers([question], how)
    with _writer(output) as write:
        write(answer + "\n" if output is None else _line(1, answer, reference))


def _line(row: int, answer: str, reference: str | None) -> str:
    line = {"row": row, "answer": answer, **({} if reference is None else {"reference": reference})}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _chunks(rows: Rows, limit: int | None, batch_size: int) -> Iterator[list[Row]]:
    source = islice(rows, limit)
    while chunk := list(islice(source, batch_size * BATCHES_A_CHUNK)):
        yield chunk


@contextmanager
def _writer(output: str | None) -> Iterator[Write]:
    """Writes to the file or to standard output; what is written is there at once, whatever happens next."""

    def to(file: TextIO) -> Write:
        def write(text: str) -> None:
            file.write(text)
            file.flush()

        return write

    if output is None:
        yield to(sys.stdout)
        return
    with user_path(output).open("w", encoding="utf-8", newline="\n") as file:
        yield to(file)


def _say(text: str) -> None:
    print(f"yeonma: {text}", file=sys.stderr, flush=True)


@contextmanager
def _progress(count: int, output: str | None) -> Iterator[Callable[[], None]]:
    """On standard error: a bar on a terminal that does not show the answers, else a line every tenth of the rows."""
    if sys.stderr.isatty() and (output is not None or not sys.stdout.isatty()):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
            task = bar.add_task("answered", total=count)
            yield lambda: bar.advance(task)
        return
    done = _Count()

    def answered() -> None:
        done.rows += 1
        if not sys.stderr.isatty() and done.rows * 10 // count > (done.rows - 1) * 10 // count:
            _say(f"answered {done.rows} of {count} rows")

    yield answered


@dataclass
class _Count:
    rows: int = 0
