"""Settings -> the examples of a run: choose the template, tokenise the rows, draw validation rows, warn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.data.column_paths import with_paths
from yeonma.data.rows import Row, Rows, draw_validation, open_rows
from yeonma.data.splits import without_slices
from yeonma.data.task import ANSWERS, Task, choose_template, lost_columns, using
from yeonma.data.template import BUILT_IN, Template
from yeonma.data.text_checks import (
    CARRIAGE_RETURN,
    DECOMPOSED,
    INTEGER,
    LARGE,
    NO_BREAK_EDGE,
    NOTHING,
    SPACED_APART,
    WHOLE_FRACTION,
    ZERO_WIDTH,
)
from yeonma.errors import Log, UserError
from yeonma.files import user_path
from yeonma.tokenization.cache import build_store, default_cache_dir
from yeonma.tokenization.example import WITHIN_LIMIT, AnswerRole, LeftOut, TokenRules
from yeonma.tokenization.store import TokenStore

LISTED_ROWS = 10
"""Row numbers that a warning lists."""
LISTED_FAULTS = 10
"""Faults of bad rows that are listed one by one."""


@dataclass(frozen=True)
class DatasetPart:
    """Some examples of a token store, by position, and the rows that they come from."""

    rows: Rows
    store: TokenStore
    positions: np.ndarray

    @property
    def examples(self) -> tuple[TokenStore, np.ndarray]:
        return self.store, self.positions

    @cached_property
    def units(self) -> np.ndarray:
        """The units of these examples, from which a plan is made: examples or pairs."""
        return np.unique(self.store.units[self.positions])

    @property
    def trained_tokens(self) -> int:
        return int(self.store.trained_counts[self.store.trained_of(self.units)].sum())

    def first_rows(self, count: int) -> list[Row]:
        """The first `count` rows of this part. Does not read past the last of them."""
        numbers = set(used_rows(self.store, self.positions)[:count].tolist())
        rows: list[Row] = []
        for row in self.rows:
            if len(rows) == len(numbers):
                break
            if row.number in numbers:
                rows.append(row)
        return rows


@dataclass(frozen=True)
class Dataset:
    task: Task
    template: Template
    columns: dict[str, str] | None
    rules: TokenRules
    train: DatasetPart
    validation: DatasetPart | None

    @property
    def sources(self) -> list[DatasetPart]:
        """One part per data set: only one if validation rows were drawn from the training rows."""
        parts = {self.train.store.key: self.train}
        if self.validation is not None:
            parts.setdefault(self.validation.store.key, self.validation)
        return list(parts.values())


def token_rules(tokens: TokenSettings) -> TokenRules:
    return TokenRules(
        cutoff_len=tokens.cutoff_len,
        shrink=tokens.shrink,
        shrink_side=tokens.shrink_side,
        over_limit=tokens.over_limit,
        train_on_inputs=tokens.train_on_inputs,
        add_eos_token=tokens.add_eos_token,
        thinking=tokens.thinking,
        train_on=tokens.train_on,
        row_weights=tokens.row_weights,
        chat_template_kwargs=tokens.chat_template_kwargs,
        parse_special_tokens=tokens.parse_special_tokens,
    )


def cache_folder(tokens: TokenSettings) -> Path:
    return user_path(tokens.cache_dir) if tokens.cache_dir else default_cache_dir()


def prepare_dataset(
    data: DataSettings,
    tokens: TokenSettings,
    tokenizer: Any,
    seed: int,
    log: Log,
    progress: Callable[[int], None],
    task: Task = ANSWERS,
    continued: str | None = None,
) -> Dataset:
    """Read the rows, tokenise them or load their tokens from the cache, and draw validation rows.

    `continued` is the adapter folder to continue. Raises UserError for faults in data, template or settings.
    """
    if data.val_data_path is not None and data.val_set_size:
        raise UserError(
            "val_set_size and val_data_path are both given",
            place="val_set_size",
            cure="give only one of them",
        )
    opened = open_rows(
        data.data_path,
        split=data.data_split,
        revision=data.data_revision,
        encoding=data.encoding,
        delimiter=data.delimiter,
        max_rows=data.max_rows,
        skip_bad=data.bad_rows == "skip",
    )
    for note in opened.notes:
        log(note)
    rows = with_paths(opened, data.columns)
    choice = choose_template(task, data.template, rows, data.columns, continued)
    rules = token_rules(tokens)
    choice = choice.without_unused(rows, tokens.row_weights)
    template, columns = choice.template, choice.columns
    for note in choice.notes:
        log(note)
    cache = cache_folder(tokens)

    told: set[str] = set()

    def part(rows: Rows) -> DatasetPart:
        rows = with_paths(rows, columns)
        store = build_store(
            rows, template, columns, tokenizer, rules, cache, progress, task, skip_bad=data.bad_rows == "skip"
        )
        for line in (f"column {name} holds {kind}, written as text" for name, kind in store.number_columns):
            if line not in told:
                log(line)
            told.add(line)
        _check_unused(store, template, columns, task, log, chosen=data.template is None)
        return DatasetPart(rows, store, np.arange(len(store)))

    train = part(rows)
    validation = None
    if data.val_data_path is not None:
        revision = data.data_revision if data.val_data_path == data.data_path else None
        held_out_rows = open_rows(
            data.val_data_path,
            split=without_slices(data.data_split),
            revision=revision,
            encoding=data.encoding,
            delimiter=data.delimiter,
            skip_bad=data.bad_rows == "skip",
        )
        for note in held_out_rows.notes:
            log(note)
        validation = part(held_out_rows)
    elif data.val_set_size:
        numbers = used_rows(train.store, train.positions)
        _, drawn = draw_validation(len(numbers), data.val_set_size, seed)
        held_out = np.isin(train.store.row_numbers, numbers[drawn])
        validation = replace(train, positions=np.flatnonzero(held_out))
        train = replace(train, positions=np.flatnonzero(~held_out))
    return Dataset(task, template, columns, rules, train, validation)


def _check_unused(
    store: TokenStore,
    template: Template,
    columns: Mapping[str, str] | None,
    task: Task,
    log: Log,
    *,
    chosen: bool,
) -> None:
    """Names columns of prompts that some rows fill and the template does not use. Raises UserError instead if the
    template is a built-in one that the columns have `chosen`."""
    if chosen and template.name in BUILT_IN and store.unused:
        names = [column.name for column in store.unused]
        first = store.unused[0]
        better = using(task, template.name, names, columns)
        raise lost_columns(template.name, names, format_rows(first.rows, first.count), better)
    for column in store.unused:
        what = "which usually belongs to the prompt, is not used; rows that hold something in it"
        log(f"column {column.name}, {what}: {column.count:,} ({format_rows(column.rows, column.count)})")


def describe(dataset: Dataset, log: Log) -> None:
    """Log the counts, what was shortened or left out, and warnings."""
    for part in dataset.sources:
        _describe(part.rows.name, part.store, dataset.task, log)
    if dataset.validation is not None:
        overlap = overlap_of(dataset.train.examples, dataset.validation.examples)
        if overlap is not None:
            log(f"{dataset.validation.rows.name}: {overlap}")


def _describe(name: str, store: TokenStore, task: Task, log: Log) -> None:
    counts = store.counts
    line = f"{name}: {counts.rows:,} rows, {counts.units:,} {task.units}, {counts.tokens:,} tokens"
    log(f"{line}, {counts.trained_tokens:,} of them trained")
    if counts.shortened:
        cuts = [f"by {counts.cut_characters:,} characters"] if counts.cut_characters else []
        cuts += [f"by {counts.dropped_turns:,} old turns of conversations"] if counts.dropped_turns else []
        log(f"{name}: {counts.shortened:,} examples shortened {' and '.join(cuts)} to fit")
    if counts.dropped_turns:
        numbers = np.unique(store.row_numbers[store.dropped_turns > 0]).tolist()
        log(f"{name}: conversations without their oldest turns: {format_rows(numbers)}")
    left_out = store.left_out if counts.left_out else []
    for reason in WITHIN_LIMIT:
        numbers = [left.row for left in left_out if left.reason == reason]
        if numbers:
            log(f"{name}: {reason}: {len(numbers):,} left out ({format_rows(numbers)})")
    numbers = [left.row for left in left_out if left.reason not in WITHIN_LIMIT and not left.fault]
    if numbers:
        log(f"{name}: {len(numbers):,} left out: {format_rows(numbers)}")
    for fault in faults_of(left_out):
        log(f"{name}: bad rows left out, {fault}")
    for warning in data_warnings(store, np.arange(len(store))):
        log(f"{name}: {warning}")


# Warnings. They come from the token store: no row is read again


@dataclass(frozen=True)
class DataWarning:
    """A warning about some rows. `what` describes them; `rows` are their first few numbers."""

    kind: str
    count: int
    rows: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.what}: {self.count:,} ({format_rows(self.rows, self.count)})"


@dataclass(frozen=True)
class Repeats:
    """Ascending numbers of rows that repeat an earlier row, or its prompt with another answer."""

    rows: np.ndarray
    prompts: np.ndarray


def data_warnings(store: TokenStore, positions: np.ndarray) -> list[DataWarning]:
    """Warnings about the rows of the examples at `positions`, the most serious first."""
    rows = used_rows(store, positions)
    flags = store.row_flags[rows - 1]
    repeats = repeated_rows(store, rows)
    chosen = positions[store.roles[positions] == AnswerRole.CHOSEN]
    paired, pairs = np.unique(store.row_numbers[chosen], return_counts=True)
    special = np.unique(store.row_numbers[positions][store.special_text[positions] > 0])
    straddling = np.unique(store.row_numbers[positions][store.straddles[positions]])
    return [
        warning
        for warning in (
            rows_warning("large", rows[flags & LARGE > 0], "rows over 10 MB"),
            rows_warning(
                "nothing",
                rows[flags & NOTHING > 0],
                "rows whose answer is a word for nothing, such as NaN, None or null",
            ),
            rows_warning(
                "whole_fraction",
                _whole_fractions(rows, flags),
                "rows whose answer is a whole number with .0, where no answer is a fraction",
            ),
            rows_warning(
                "decomposed",
                rows[flags & DECOMPOSED > 0],
                "rows with decomposed Hangul (NFD)",
            ),
            rows_warning(
                "spaced_apart",
                rows[flags & SPACED_APART > 0],
                "pairs whose chosen and rejected answers differ only in white space",
            ),
            rows_warning(
                "several_rejected",
                paired[pairs > 1],
                "rows with several rejected answers, each in a pair of its own",
            ),
            rows_warning("zero_width", rows[flags & ZERO_WIDTH > 0], "rows with zero-width characters"),
            rows_warning(
                "carriage_return",
                rows[flags & CARRIAGE_RETURN > 0],
                "rows with carriage returns (line ends of Windows)",
            ),
            rows_warning(
                "no_break_edge",
                rows[flags & NO_BREAK_EDGE > 0],
                "rows with a text that begins or ends with a no-break space",
            ),
            *(rows_warning(kind, rows[flags & bit > 0], what) for kind, bit, what in store.remarks.by_bit),
            rows_warning("special_text", special, "rows with special-token text, encoded as ordinary text"),
            rows_warning("repeated", repeats.rows, "rows that repeat an earlier row"),
            rows_warning(
                "asked_again",
                repeats.prompts,
                "rows that repeat an earlier prompt with another answer",
            ),
            rows_warning(
                "straddling", straddling, "rows whose answer's first token would have merged with the prompt"
            ),
        )
        if warning is not None
    ]


def _whole_fractions(rows: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """The rows whose answer is like `1.0`, if all other answers are whole numbers or words for nothing.

    pandas writes whole numbers so in a column with a gap.
    """
    others = flags & (WHOLE_FRACTION | INTEGER | NOTHING) == 0
    return rows[:0] if others.any() else rows[flags & WHOLE_FRACTION > 0]


def faults_of(left_out: Sequence[LeftOut]) -> list[DataWarning]:
    """The faults of the bad rows among those left out, with their rows: the most frequent first, rare ones together."""
    rows_of_fault: dict[str, list[int]] = {}
    for left in left_out:
        if left.fault:
            rows_of_fault.setdefault(left.fault, []).append(left.row)
    faults = sorted(rows_of_fault.items(), key=lambda entry: -len(entry[1]))
    if len(faults) > LISTED_FAULTS:
        rare = sorted(row for _, rows in faults[LISTED_FAULTS:] for row in rows)
        faults = [*faults[:LISTED_FAULTS], (f"{len(faults) - LISTED_FAULTS:,} other faults", rare)]
    return [DataWarning("bad_row", len(rows), tuple(rows[:LISTED_ROWS]), fault) for fault, rows in faults]


def overlap_of(
    train: tuple[TokenStore, np.ndarray], validation: tuple[TokenStore, np.ndarray]
) -> DataWarning | None:
    """A warning about validation rows that repeat a training row. Both arguments are a store and positions in it."""
    train_rows, held_out = used_rows(*train), used_rows(*validation)
    in_training = np.isin(validation[0].row_digests[held_out - 1], train[0].row_digests[train_rows - 1])
    return rows_warning("overlap", held_out[in_training], "validation rows that are also training rows")


def used_rows(store: TokenStore, positions: np.ndarray) -> np.ndarray:
    """The distinct row numbers of the examples at `positions`, ascending."""
    return np.unique(store.row_numbers[positions])


def repeated_rows(store: TokenStore, rows: np.ndarray) -> Repeats:
    repeated = _is_repeat(store.row_digests[rows - 1])
    repeated_prompt = _is_repeat(store.prompt_digests[rows - 1]) & ~repeated
    return Repeats(rows[repeated], rows[repeated_prompt])


def format_rows(numbers: Sequence[int], count: int | None = None, most: int = LISTED_ROWS) -> str:
    """The first of these row numbers, of `count` rows in all: `rows 3, 17 and 5 more`."""
    count = len(numbers) if count is None else count
    shown = ", ".join(str(number) for number in numbers[:most])
    more = count - min(len(numbers), most)
    return f"{'row' if count == 1 else 'rows'} {shown}" + (f" and {more:,} more" if more else "")


def _is_repeat(digests: np.ndarray) -> np.ndarray:
    """Whether a digest equals an earlier one."""
    is_first = np.zeros(len(digests), dtype=bool)
    is_first[np.unique(digests, return_index=True)[1]] = True
    return ~is_first


def rows_warning(kind: str, rows: np.ndarray, what: str) -> DataWarning | None:
    """A warning about these rows; None if there are none."""
    return DataWarning(kind, len(rows), tuple(rows[:LISTED_ROWS].tolist()), what) if len(rows) else None
