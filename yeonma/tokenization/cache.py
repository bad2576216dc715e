"""Tokenised data on disk: built once for each key, kept for all later runs.

A key is the SHA-256 of all that decides the tokens, and the name of a store's folder. The folder is written beside its
place and renamed; a lock file lets one process of the machine build it while the others wait.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from yeonma.data.rows import Row, Rows
from yeonma.data.task import ANSWERS, LABELLED, PAIRS, Task
from yeonma.data.template import Template
from yeonma.data.text_checks import Notes
from yeonma.errors import Problem, UserError
from yeonma.files import sync, user_path
from yeonma.tokenization.example import Example, LeftOut, TokenRules, Unit, check_rules, check_tokenizer
from yeonma.tokenization.example_encoder import encode
from yeonma.tokenization.preference_encoder import encode_labelled, encode_pairs
from yeonma.tokenization.store import Counts, StoreWriter, TokenStore, open_store

__all__ = ["TokenStore", "build_store", "default_cache_dir", "store_key", "tokenizer_identity"]

FORMAT = 3
"""Raised whenever the same rows would give other tokens or other files."""

ROWS_A_CHUNK = 2000
MOST_PROBLEMS = 20

Encode = Callable[
    [Sequence[Any], Sequence[Row], PreTrainedTokenizerBase, TokenRules], Sequence[Example | Unit | LeftOut]
]
ENCODERS: Mapping[str, Encode] = {
    ANSWERS.name: encode,
    PAIRS.name: encode_pairs,
    LABELLED.name: encode_labelled,
}
"""What the texts of each kind of data become."""

Chunk = tuple[list[Notes], Sequence[Example | Unit | LeftOut]]
"""What was noted of each row read, and what the rows gave."""


def default_cache_dir() -> Path:
    """$YEONMA_CACHE, or ~/.cache/yeonma."""
    return user_path(os.environ.get("YEONMA_CACHE") or "~/.cache/yeonma")


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True) -> str:
    """SHA-256 of what decides a tokenizer's ids: vocabulary, rules, special tokens, chat template; not its name.

    Without `chat_template`: of what decides the ids of plain text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        content = backend.to_str()
        content = content[
            content.index('"added_tokens"') :
        ]  # before it: truncation and padding, left by callers
    else:
        content = _canonical([type(tokenizer).__name__, tokenizer.get_vocab(), _vocabulary_sum(tokenizer)])
    special = [tokenizer.special_tokens_map, tokenizer.all_special_tokens]
    chat = tokenizer.chat_template if chat_template else None
    return sha256(f"{content}\0{_canonical([special, chat])}".encode()).hexdigest()


def store_key(
    rows: Rows,
    template: Template,
    columns: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    task: Task = ANSWERS,
) -> str:
    """SHA-256 of everything that decides the tokens, the versions of the libraries that make them included."""
    versions = [FORMAT, task.name, tokenizers.__version__, transformers.__version__]
    data = [rows.identity, template.text, dict(columns or {})]
    return sha256(
        _canonical([versions, data, tokenizer_identity(tokenizer), asdict(rules)]).encode()
    ).hexdigest()


def build_store(
    rows: Rows,
    template: Template,
    columns: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    cache_dir: Path,
    progress: Callable[[int], None] | None = None,
    task: Task = ANSWERS,
) -> TokenStore:
    """The rows' examples, from the cache or tokenised now. Memory does not grow with the rows.

    `progress` is told the rows read so far; it is never called where nothing is tokenised. A damaged store is built
    again. Raises UserError with up to 20 problems of the rows; where no row is left; where `cache_dir` cannot be
    written; and as `check_rules` and `check_tokenizer`.
    """
    check_rules(template, rules)
    check_tokenizer(tokenizer, rules)
    key = store_key(rows, template, columns, tokenizer, rules, task)
    folder = cache_dir / key
    if (store := open_store(folder, key)) is not None:
        return store
    with _locked(cache_dir, key):
        if (store := open_store(folder, key)) is not None:  # another process has built it meanwhile
            return store
        beside = cache_dir / f"{key}.tmp"
        try:
            with _keeping(cache_dir):
                _remove(beside)
                writer = StoreWriter.open(beside)
            for notes, found in _chunks(rows, template, columns, tokenizer, rules, progress, task):
                with _keeping(cache_dir):
                    writer.add(notes, found)
            _check_some_left(writer.counts, rows, rules, task)
            with _keeping(cache_dir):
                writer.finish({"key": key, "data": rows.name, "template": template.name})
                _remove(folder)
                os.rename(beside, folder)
                sync(cache_dir)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    if (store := open_store(folder, key)) is None:
        raise UserError(
            "the tokens just written cannot be read back", place=str(folder), cure="check the disk"
        )
    return store


def _chunks(
    rows: Rows,
    template: Template,
    columns: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    progress: Callable[[int], None] | None,
    task: Task,
) -> Iterator[Chunk]:
    """The encoded rows, a few thousand at a time. After a first problem the rest is only looked through for more."""
    problems: list[Problem] = []
    source, done = iter(rows), 0
    while len(problems) <= MOST_PROBLEMS and (chunk := _taken(source, problems)):
        rendered = [_rendered(row, template, columns, task, problems) for row in chunk]
        if not problems:
            try:
                found = ENCODERS[task.name](rendered, chunk, tokenizer, rules)
                yield [task.notes(text) for text in rendered], found
            except UserError as error:
                problems += error.problems
        done += len(chunk)
        if progress is not None:
            progress(done)
    if problems:
        more = [Problem("there are more such problems", rows.name)] if len(problems) > MOST_PROBLEMS else []
        raise UserError([*problems[:MOST_PROBLEMS], *more])


def _taken(source: Iterator[Row], problems: list[Problem]) -> list[Row]:
    """The next rows; those before one that cannot be read, whose problem is noted, are given too."""
    chunk: list[Row] = []
    try:
        for row in islice(source, ROWS_A_CHUNK):
            chunk.append(row)
    except UserError as error:
        problems += error.problems
    return chunk


def _rendered(
    row: Row, template: Template, columns: Mapping[str, str] | None, task: Task, problems: list[Problem]
) -> Any:
    try:
        return task.render(template, row, columns)
    except UserError as error:
        problems += error.problems
        return None


def _check_some_left(counts: Counts, rows: Rows, rules: TokenRules, task: Task) -> None:
    if counts.rows == 0:
        raise UserError("there are no rows", place=rows.name)
    if counts.examples == 0:
        what = f"no row fits into cutoff_len {rules.cutoff_len}: all {counts.rows} would be left out"
        cure = "raise --cutoff_len, or shorten the template"
        if task is not ANSWERS:
            what = f"no row is left: each is over cutoff_len {rules.cutoff_len} or has two equal answers"
        raise UserError(what, place=rows.name, cure=cure)


@contextmanager
def _locked(cache_dir: Path, key: str) -> Iterator[None]:
    """One process of this machine builds the store while the others wait. A process that dies releases the lock."""
    lock = FileLock(cache_dir / f"{key}.lock", fallback_to_soft=False)
    with _keeping(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _keeping(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"tokens cannot be kept here: {error.strerror or error}"
        raise UserError(what, place=str(cache_dir), cure="name another folder with --cache_dir") from error


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _vocabulary_sum(tokenizer: PreTrainedTokenizerBase) -> str:
    path = getattr(tokenizer, "vocab_file", None)
    return sha256(Path(path).read_bytes()).hexdigest() if path and os.path.isfile(path) else ""


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
