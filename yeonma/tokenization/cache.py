"""The cache of token stores: a store is built once and reused by later runs.

A store's folder is named by its key, the SHA-256 of everything that determines the tokens. The folder is written under
a temporary name and renamed. A lock file lets one process of the machine build it while the others wait.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from filelock import FileLock

from yeonma.data.columns import PROMPT_COLUMNS, Columns, UnusedColumn, column_of, kinds_of_numbers
from yeonma.data.rows import Row, Rows, of_rows
from yeonma.data.task import ANSWERS, Task, columns_used
from yeonma.data.template import Template
from yeonma.data.text_checks import Notes
from yeonma.errors import Problem, UserError, system_reason
from yeonma.files import NO_LOCKS, kind_of, sync
from yeonma.messages import later, tr, translated
from yeonma.packages import version_of
from yeonma.tokenization.bad_rows import Outcomes, encode_good_rows
from yeonma.tokenization.chat_remarks import ChatWatch
from yeonma.tokenization.example import (
    NOT_TRAINED,
    WEIGHTLESS,
    Example,
    LeftOut,
    TokenRules,
    Unit,
    check_rules,
    check_tokenizer,
)
from yeonma.tokenization.example_encoder import OVER_LIMIT_CURE
from yeonma.tokenization.store import Counts, StoreWriter, TokenStore, open_store
from yeonma.tokenization.task_encoders import TASK_ENCODERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 6
"""Increased whenever the same rows would give different tokens or files."""

ROWS_A_CHUNK = 2000
MAX_PROBLEMS = 20
MOST_FAULTS = 5

Chunk = tuple[list[Notes], Outcomes]
"""The notes of some rows, and the outcomes of encoding them."""


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True) -> str:
    """SHA-256 of what determines a tokenizer's ids: vocabulary, rules, special tokens, chat template; not its name.

    Without `chat_template`: of what determines the ids of plain text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        content = backend.to_str()
        content = content[content.index('"added_tokens"') :]  # skip the settings of truncation and padding
    else:
        content = _canonical([type(tokenizer).__name__, tokenizer.get_vocab(), _vocabulary_hash(tokenizer)])
    special = [tokenizer.special_tokens_map, tokenizer.all_special_tokens]
    chat = tokenizer.chat_template if chat_template else None
    return sha256(f"{content}\0{_canonical([special, chat])}".encode()).hexdigest()


def store_key(
    rows: Rows,
    template: Template,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    task: Task = ANSWERS,
    *,
    skip_bad: bool = False,
) -> str:
    """SHA-256 of everything that determines the tokens, including the versions of the libraries."""
    versions = [FORMAT, task.name, tokenizers.__version__, version_of("transformers")]
    data = [rows.identity, template.text, dict(columns or {}), *(["skip"] if skip_bad else [])]
    return sha256(
        _canonical([versions, data, tokenizer_identity(tokenizer), asdict(rules)]).encode()
    ).hexdigest()


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """The garbage collector looks only at newer objects. Those of the libraries are many, and took a tenth of it."""
    if gc.get_freeze_count():  # the caller decides about them
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_old_objects_left_alone()
def build_store(
    rows: Rows,
    template: Template,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    cache_dir: Path,
    progress: Callable[[int], None] | None = None,
    task: Task = ANSWERS,
    *,
    skip_bad: bool = False,
) -> TokenStore:
    """The rows' examples, from the cache or newly tokenised. Memory does not grow with the number of rows.

    While rows are tokenised, `progress` is called with the number of rows read so far. A damaged store is built again.
    With `skip_bad`, bad rows are left out; else UserError is raised with up to 20 of their problems. It is also raised
    if all rows are left out; if `cache_dir` cannot be written; and as `check_rules` and `check_tokenizer`.
    """
    check_rules(template, rules)
    check_tokenizer(tokenizer, rules)
    key = store_key(rows, template, columns, tokenizer, rules, task, skip_bad=skip_bad)

    def write(writer: StoreWriter) -> dict[str, Any]:
        read = _noting_numbers(rows, _text_columns(template, columns, task), writer.number_columns)
        read = _noting_unused(read, columns_used(task, template, columns), writer.unused)
        chunks = _chunks_of_good_rows if skip_bad else _chunks
        faults, untrained = Counter[str](), Counter[str]()
        watch = ChatWatch(task, tokenizer, rules)
        for notes, outcomes in chunks(read, template, columns, tokenizer, rules, progress, watch):
            faults.update([row.fault for row in outcomes if isinstance(row, LeftOut) and row.fault])
            untrained.update([row.reason for row in outcomes if isinstance(row, LeftOut)])
            with _write_errors_as_user_errors(cache_dir):
                writer.add(with_flags(notes, outcomes, writer.counts.rows + 1), outcomes)
        _check_some_trained(writer.counts, rows, untrained)
        _check_some_left(writer.counts, rows, rules, task, faults)
        writer.remarks = watch.remarks()
        return {"data": rows.name, "template": template.name}

    return _cached(cache_dir, key, write)


def join_stores(stores: Sequence[TokenStore], cache_dir: Path) -> TokenStore:
    """One store with the examples of several, in this order, from the cache or newly written. Rows and units are
    numbered on from store to store.

    Raises UserError if `cache_dir` cannot be written.
    """
    key = sha256(_canonical([FORMAT, "joined", *[store.key for store in stores]]).encode()).hexdigest()

    def write(writer: StoreWriter) -> dict[str, Any]:
        for store in stores:
            with _write_errors_as_user_errors(cache_dir):
                writer.add_store(store)
        return {"stores": [store.key for store in stores]}

    return _cached(cache_dir, key, write)


def _cached(cache_dir: Path, key: str, write: Callable[[StoreWriter], dict[str, Any]]) -> TokenStore:
    """The store with this key, from the cache or written by `write`, which returns its description."""
    folder = cache_dir / key
    if (store := open_store(folder, key)) is not None:
        return store
    with _locked(cache_dir, key) as alone:
        if (store := open_store(folder, key)) is not None:  # built by another process in the meantime
            return store
        own = f"{key}.tmp" if alone else f"{key}.{secrets.token_hex(8)}.tmp"
        temporary = cache_dir / own
        try:
            with _write_errors_as_user_errors(cache_dir):
                _remove(temporary)
                writer = StoreWriter.open(temporary)
            description = write(writer)
            with _write_errors_as_user_errors(cache_dir):
                writer.finish({"key": key, **description})
                if not alone and (store := open_store(folder, key)) is not None:  # another process was faster
                    return store
                _remove(folder)
                os.rename(temporary, folder)
                sync(cache_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if (store := open_store(folder, key)) is None:
        problem = tr("the tokens just written cannot be read back")
        raise UserError(problem, place=str(folder), cure=tr("check the disk"))
    return store


def with_flags(notes: Sequence[Notes], outcomes: Outcomes, first_row: int) -> list[Notes]:
    """The notes of consecutive rows, with the flags of their examples."""
    flags: dict[int, int] = {}
    for outcome in outcomes:
        examples = [example for _, example in outcome.members] if isinstance(outcome, Unit) else [outcome]
        for example in examples:
            if isinstance(example, Example) and example.flags:
                flags[example.row] = flags.get(example.row, 0) | example.flags
    return [
        replace(one, flags=one.flags | flags[number]) if number in flags else one
        for number, one in enumerate(notes, first_row)
    ]


def _text_columns(template: Template, columns: Columns, task: Task) -> list[str]:
    """The columns whose text a template of texts shows."""
    names = sorted(task.text_fields(template))
    return [column_of(name, columns, template.answer_field) for name in names]


def _noting_numbers(rows: Rows, columns: Sequence[str], noted: set[tuple[str, str]]) -> Rows:
    """The same rows. While they are read, adds to `noted` which of the columns hold numbers or booleans."""

    def read() -> Iterator[Row]:
        for row in rows:
            noted.update(kinds_of_numbers(row, columns))
            yield row

    return replace(rows, read=read) if columns else rows


def _noting_unused(rows: Rows, used: Container[str], noted: dict[str, UnusedColumn]) -> Rows:
    """The same rows. While they are read, adds to `noted` the columns of prompts that are not used but filled."""
    names = frozenset(name for name in PROMPT_COLUMNS if name not in used)

    def read() -> Iterator[Row]:
        for row in rows:
            for name in row.values.keys() & names:
                noted.setdefault(name, UnusedColumn(name)).note(row)
            yield row

    return replace(rows, read=read)


def _chunks(
    rows: Rows,
    template: Template,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    progress: Callable[[int], None] | None,
    watch: ChatWatch,
) -> Iterator[Chunk]:
    """The encoded rows, in chunks. After the first problem, rows are only checked for more problems."""
    problems: list[Problem] = []
    source, done = iter(rows), 0
    while len(problems) <= MAX_PROBLEMS and (chunk := _next_rows(source, problems)):
        rendered = [_rendered(row, template, columns, watch.task, problems) for row in chunk]
        if not problems:
            try:
                outcomes = TASK_ENCODERS[watch.task.name].encode(rendered, chunk, tokenizer, rules)
                yield watch.notes(rendered, chunk), outcomes
            except UserError as error:
                problems += error.problems
        problems = _marked(problems, chunk)
        done += len(chunk)
        if progress is not None:
            progress(done)
    if problems:
        more = (
            [Problem(tr("there are more such problems"), rows.name)] if len(problems) > MAX_PROBLEMS else []
        )
        raise UserError([*problems[:MAX_PROBLEMS], *more])


def _chunks_of_good_rows(
    rows: Rows,
    template: Template,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    progress: Callable[[int], None] | None,
    watch: ChatWatch,
) -> Iterator[Chunk]:
    """Like `_chunks`, with bad rows left out."""
    source, done = iter(rows), 0
    while chunk := list(islice(source, ROWS_A_CHUNK)):
        yield encode_good_rows(chunk, template, columns, tokenizer, rules, watch)
        done += len(chunk)
        if progress is not None:
            progress(done)


def _marked(problems: Sequence[Problem], chunk: Sequence[Row]) -> list[Problem]:
    """The problems; those of the chunk's rows are marked as such, unless all rows are bad."""
    bad = {problem.place for problem in problems if problem.cure != OVER_LIMIT_CURE}
    bad &= {row.place for row in chunk}
    marked = of_rows(problems, bad if len(bad) < len(chunk) else ())
    return [replace(new, of_row=new.of_row or old.of_row) for new, old in zip(marked, problems, strict=True)]


def _next_rows(source: Iterator[Row], problems: list[Problem]) -> list[Row]:
    """The next rows. If one cannot be read, adds its problem to `problems` and returns the rows before it."""
    chunk: list[Row] = []
    try:
        for row in islice(source, ROWS_A_CHUNK):
            chunk.append(row)
    except UserError as error:
        problems += error.problems
    return chunk


def _rendered(row: Row, template: Template, columns: Columns, task: Task, problems: list[Problem]) -> Any:
    try:
        return task.render(template, row, columns)
    except UserError as error:
        problems += error.problems
        return None


def _check_some_trained(counts: Counts, rows: Rows, reasons: Mapping[str, int]) -> None:
    """Raises UserError if all rows were left out because nothing of them is trained. `reasons`: of how many rows."""
    found = [reason for reason in (NOT_TRAINED, WEIGHTLESS) if reasons.get(reason)]
    if counts.rows and sum(reasons.get(reason, 0) for reason in found) == counts.rows:
        problem = tr(
            "no row is left of {rows}: {found}", rows=counts.rows, found="; ".join(map(translated, found))
        )
        raise UserError(problem, place=rows.name, cure=tr("give weights above 0, or another --train_on"))


def _check_some_left(
    counts: Counts, rows: Rows, rules: TokenRules, task: Task, faults: Mapping[str, int]
) -> None:
    """`faults`: how many bad rows have which fault."""
    if counts.rows == 0:
        raise UserError(tr("there are no rows"), place=rows.name)
    if counts.examples:
        return
    encoder = TASK_ENCODERS[task.name]
    problem = tr(encoder.none_left, rows=counts.rows, cutoff_len=rules.cutoff_len)
    cure = tr("raise --cutoff_len, or shorten the template")
    if faults:
        commonest = sorted(faults.items(), key=lambda fault: -fault[1])[:MOST_FAULTS]
        shown = "; ".join(f"{translated(fault)} ({count:,})" for fault, count in commonest)
        all_bad = sum(faults.values()) == counts.rows
        message = (
            later("no row is left of {rows}: each is bad: {shown}") if all_bad else encoder.none_left_or_bad
        )
        problem = tr(message, rows=counts.rows, cutoff_len=rules.cutoff_len, shown=shown)
        cure = tr("give a --template and --columns that fit the rows, or mend them")
    raise UserError(problem, place=rows.name, cure=cure)


@contextmanager
def _locked(cache_dir: Path, key: str) -> Iterator[bool]:
    """Lets one process build the store while the others wait. A process that dies releases the lock.

    False on a disk that cannot lock files: several processes may then build the store at once, each in a folder of its
    own. What a reader finds is whole either way.
    """
    place = cache_dir / f"{key}.lock"
    lock, alone = FileLock(place, fallback_to_soft=False), True
    with _write_errors_as_user_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        if (kind := kind_of(place)) not in ("", "file"):
            raise UserError(
                tr("it is a {kind} where a file belongs", kind=tr(kind)),
                place=str(place),
                cure=tr("remove it"),
            )
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            alone = False
    try:
        yield alone
    finally:
        lock.release()


@contextmanager
def _write_errors_as_user_errors(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = tr("the token cache cannot be written: {value}", value=system_reason(error))
        raise UserError(
            problem, place=str(cache_dir), cure=tr("choose another folder with --cache_dir")
        ) from error


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    path = getattr(tokenizer, "vocab_file", None)
    return sha256(Path(path).read_bytes()).hexdigest() if path and os.path.isfile(path) else ""


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
