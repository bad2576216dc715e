"""Settings -> the examples of a run: choose templates, tokenise the rows, draw validation rows, warn.

A run may have several data sets, each with a template and validation rows of its own. Their training examples lie in
one joined store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from yeonma.config.data_sets import DataSetSettings, data_sets, problems_of_set
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.data.column_paths import with_paths
from yeonma.data.columns import Columns
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
    NOT_GIVEN_BACK,
    NOTHING,
    SPACED_APART,
    TRIMMED,
    WHOLE_FRACTION,
    ZERO_WIDTH,
)
from yeonma.data.words import all_of
from yeonma.errors import Log, UserError
from yeonma.files import default_cache_dir, user_path
from yeonma.messages import counted, in_english, later, tr, translated
from yeonma.tokenization.cache import build_store, join_stores
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
        return int(self.store.trained_counts[self.store.examples_of(self.units)].sum())

    def first_rows(self, count: int) -> list[Row]:
        """The first `count` rows of this part. Does not read past the last of them."""
        return self.rows_of(used_rows(self.store, self.positions)[:count].tolist())

    def rows_of(self, numbers: Iterable[int]) -> list[Row]:
        """The rows with these numbers, in the order of the data. Does not read past the last of them."""
        wanted = set(numbers)
        rows: list[Row] = []
        for row in self.rows:
            if len(rows) == len(wanted):
                break
            if row.number in wanted:
                rows.append(row)
        return rows


@dataclass(frozen=True)
class PreparedSet:
    """One data set of a run. Its parts have a store of their own, in which its rows count from 1."""

    name: str
    template: Template
    columns: dict[str, str] | None
    train: DatasetPart
    validation: DatasetPart | None
    settings: DataSetSettings

    @property
    def sources(self) -> list[tuple[str, DatasetPart]]:
        """(name, part) for each store: only one if validation rows were drawn from the training rows."""
        parts = [(self.name, self.train)]
        if self.validation is not None and self.validation.store.key != self.train.store.key:
            parts.append((self.validation.rows.name, self.validation))
        return parts


@dataclass(frozen=True)
class Dataset:
    task: Task
    rules: TokenRules
    sets: tuple[PreparedSet, ...]
    train: DatasetPart
    """The training examples of all sets, in a joined store if there are several. Rows and units are then numbered on
    from set to set."""

    @property
    def template(self) -> Template:
        """The template of the first data set, with which the adapter is asked."""
        return self.sets[0].template

    @property
    def columns(self) -> dict[str, str] | None:
        return self.sets[0].columns

    @property
    def validation(self) -> dict[str, DatasetPart]:
        """The validation rows of each data set that has some, by its name."""
        return {one.name: one.validation for one in self.sets if one.validation is not None}

    def units_of_sets(self) -> list[np.ndarray]:
        """The training units of each data set, as units of the joined store."""
        before = np.cumsum([0, *(one.train.store.counts.units for one in self.sets)])
        return [one.train.units + start for one, start in zip(self.sets, before.tolist(), strict=False)]

    def rows_by_set(self, numbers: Sequence[int]) -> dict[str, list[int]]:
        """Numbers of training rows, counted within each data set, by its name."""
        by_set: dict[str, list[int]] = {}
        starts = np.cumsum([0, *(one.train.store.counts.rows for one in self.sets)])
        for number in numbers:
            index = int(np.searchsorted(starts, number, side="left")) - 1
            by_set.setdefault(self.sets[index].name, []).append(number - int(starts[index]))
        return by_set

    def name_rows(self, numbers: Sequence[int]) -> str:
        """Training rows for a message: `rows 3, 5`, or in a mixture `a.jsonl rows 3, 5, b.csv row 1`."""
        if len(self.sets) == 1:
            return numbered_rows(numbers)
        rows = self.rows_by_set(numbers)
        return ", ".join(f"{name} {format_rows(rows[name], most=len(numbers))}" for name in rows)


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

    `continued` is the adapter folder to continue. Raises UserError for faults in data, templates or settings.
    """
    settings, rules = data_sets(data), token_rules(tokens)
    skip_bad, cache = data.bad_rows == "skip", cache_folder(tokens)

    def prepared(one: DataSetSettings) -> PreparedSet:
        def log_of_set(line: str) -> None:
            log(f"{one.name}: {line}" if len(settings) > 1 else line)

        def store_of(rows: Rows, template: Template, columns: Columns) -> TokenStore:
            if template.is_text and rules.cutoff_len < 2:
                what = tr("a piece of one token trains nothing, because it has none before it")
                raise UserError(what, place="cutoff_len 1", cure=tr("give at least 2 for whole texts"))
            return build_store(
                rows, template, columns, tokenizer, rules, cache, progress, task, skip_bad=skip_bad
            )

        with problems_of_set(one, is_named=len(settings) > 1):
            return _prepare_set(
                one,
                store_of,
                seed,
                log_of_set,
                task,
                continued,
                skip_bad=skip_bad,
                row_weights=rules.row_weights,
            )

    sets = tuple([prepared(one) for one in settings])
    if len(sets) == 1:
        return Dataset(task, rules, sets, sets[0].train)
    stores = [one.train.store for one in sets]
    before = np.cumsum([0, *map(len, stores)]).tolist()
    positions = [one.train.positions + start for one, start in zip(sets, before, strict=False)]
    rows = _joined_rows([one.train.rows for one in sets])
    train = DatasetPart(rows, join_stores(stores, cache), np.concatenate(positions))
    return Dataset(task, rules, sets, train)


def _prepare_set(
    one: DataSetSettings,
    store_of: Callable[[Rows, Template, Columns], TokenStore],
    seed: int,
    log: Log,
    task: Task,
    continued: str | None,
    *,
    skip_bad: bool,
    row_weights: str | None,
) -> PreparedSet:
    def opened(path: str, split: str, revision: str | None, limit: int | None = None) -> Rows:
        rows = open_rows(
            path,
            split=split,
            revision=revision,
            encoding=one.encoding,
            delimiter=one.delimiter,
            max_rows=limit,
            skip_bad=skip_bad,
        )
        for note in rows.notes:
            log(note)
        return rows

    rows = with_paths(opened(one.path, one.split, one.revision, one.limit), one.columns)
    choice = choose_template(task, one.template, rows, one.columns, continued)
    choice = choice.without_unused(rows, row_weights)
    template, columns = choice.template, choice.columns
    for note in choice.notes:
        log(note)
    told: set[str] = set()

    def part(rows: Rows) -> DatasetPart:
        rows = with_paths(rows, columns)
        store = store_of(rows, template, columns)
        for line in (
            tr("column {name} holds {kind}, written as text", name=name, kind=tr(kind))
            for name, kind in store.number_columns
        ):
            if line not in told:
                log(line)
            told.add(line)
        _check_unused(store, template, columns, task, log, chosen=one.template is None)
        return DatasetPart(rows, store, np.arange(len(store)))

    train = part(rows)
    validation = None
    if one.val_path is not None:
        revision = one.revision if one.val_path == one.path else None
        validation = part(opened(one.val_path, without_slices(one.split), revision))
    elif one.val_split is not None:
        held_out_rows = opened(one.path, one.val_split, one.revision)
        validation = part(replace(held_out_rows, name=f"{one.name} {one.val_split}"))
    elif one.val_set_size:
        numbers = used_rows(train.store, train.positions)
        _, drawn = draw_validation(len(numbers), one.val_set_size, seed)
        held_out = np.isin(train.store.row_numbers, numbers[drawn])
        validation = replace(train, positions=np.flatnonzero(held_out))
        train = replace(train, positions=np.flatnonzero(~held_out))
    return PreparedSet(one.name, template, columns, train, validation, one)


def _joined_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several data sets, numbered on from set to set."""

    def read() -> Iterator[Row]:
        for number, row in enumerate(chain.from_iterable(parts), 1):
            yield replace(row, number=number)

    columns = dict.fromkeys(column for rows in parts for column in rows.columns)
    identity = sha256("\0".join(rows.identity for rows in parts).encode()).hexdigest()
    return Rows(", ".join(rows.name for rows in parts), identity, tuple(columns), read)


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
        log(
            tr(
                "column {name}, which usually belongs to the prompt, is not used; rows that hold something in it: "
                "{count:,} ({rows})",
                name=column.name,
                count=column.count,
                rows=format_rows(column.rows, column.count),
            )
        )


def describe(dataset: Dataset, log: Log) -> None:
    """Log the counts, what was shortened or left out, and warnings."""
    for one in dataset.sets:
        for name, part in one.sources:
            _describe(name, part.store, dataset.task, log)
    for name, warning in overlaps_of(dataset):
        log(f"{name}: {warning}")


def overlaps_of(dataset: Dataset) -> list[tuple[str, DataWarning]]:
    """Warnings, with the names of data sets, about validation rows that are also training rows, and about training rows
    that an earlier data set has too."""
    found: list[tuple[str, DataWarning | None]] = []
    for name, part in dataset.validation.items():
        found.append(
            (
                part.rows.name if len(dataset.sets) == 1 else name,
                overlap_of(dataset.train.examples, part.examples),
            )
        )
    for index, one in enumerate(dataset.sets):
        for earlier in dataset.sets[:index]:
            found.append((one.name, _also_in(earlier, one)))
    return [(name, warning) for name, warning in found if warning is not None]


def _also_in(earlier: PreparedSet, one: PreparedSet) -> DataWarning | None:
    digests = earlier.train.store.row_digests[used_rows(*earlier.train.examples) - 1]
    rows = used_rows(*one.train.examples)
    repeated = rows[np.isin(one.train.store.row_digests[rows - 1], digests)]
    return rows_warning(
        "also_in", repeated, tr("training rows that {earlier} has as well", earlier=earlier.name)
    )


def _describe(name: str, store: TokenStore, task: Task, log: Log) -> None:
    counts = store.counts
    log(
        tr(
            "{name}: {rows}, {units}, {tokens}, {trained:,} of them trained",
            name=name,
            rows=counted(counts.rows, "row"),
            units=task.count(counts.units),
            tokens=counted(counts.tokens, "token"),
            trained=counts.trained_tokens,
        )
    )
    if counts.shortened:
        cuts = []
        if counts.cut_characters:
            cuts.append(tr("by {characters}", characters=counted(counts.cut_characters, "character")))
        if counts.dropped_turns:
            cuts.append(tr("by {turns} of conversations", turns=counted(counts.dropped_turns, "old turn")))
        log(
            tr(
                "{name}: {examples} shortened {cuts} to fit",
                name=name,
                examples=counted(counts.shortened, "example"),
                cuts=all_of(cuts),
            )
        )
    if counts.dropped_turns:
        numbers = np.unique(store.row_numbers[store.dropped_turns > 0]).tolist()
        log(
            tr(
                "{name}: conversations without their oldest turns: {numbers}",
                name=name,
                numbers=format_rows(numbers),
            )
        )
    left_out = store.left_out if counts.left_out else []
    for reason in WITHIN_LIMIT:
        numbers = [left.row for left in left_out if left.reason == reason]
        if numbers:
            log(
                tr(
                    "{name}: {reason}: {count:,} left out ({rows})",
                    name=name,
                    reason=translated(reason),
                    count=len(numbers),
                    rows=format_rows(numbers),
                )
            )
    numbers = [left.row for left in left_out if left.reason not in WITHIN_LIMIT and not left.fault]
    if numbers:
        log(
            tr(
                "{name}: {count:,} left out: {rows}",
                name=name,
                count=len(numbers),
                rows=format_rows(numbers),
            )
        )
    for fault in faults_of(left_out):
        log(tr("{name}: bad rows left out, {fault}", name=name, fault=fault))
    for warning in data_warnings(store, np.arange(len(store))):
        log(f"{name}: {warning}")


# Warnings. They come from the token store: no row is read again


@dataclass(frozen=True)
class DataWarning:
    """A warning about some rows. `what` describes them, in English; `rows` are their first few numbers."""

    kind: str
    count: int
    rows: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        rows = format_rows(self.rows, self.count)
        return tr("{what}: {count:,} ({rows})", what=translated(self.what), count=self.count, rows=rows)


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
            rows_warning("large", rows[flags & LARGE > 0], later("rows over 10 MB")),
            rows_warning(
                "nothing",
                rows[flags & NOTHING > 0],
                later("rows whose answer is a word for nothing, such as NaN, None or null"),
            ),
            rows_warning(
                "whole_fraction",
                _whole_fractions(rows, flags),
                later("rows whose answer is a whole number with .0, where no answer is a fraction"),
            ),
            rows_warning(
                "decomposed",
                rows[flags & DECOMPOSED > 0],
                later("rows with decomposed Hangul (NFD)"),
            ),
            rows_warning(
                "spaced_apart",
                rows[flags & SPACED_APART > 0],
                later("pairs whose chosen and rejected answers differ only in white space"),
            ),
            rows_warning(
                "several_rejected",
                paired[pairs > 1],
                later("rows with several rejected answers, each in a pair of its own"),
            ),
            rows_warning(
                "zero_width", rows[flags & ZERO_WIDTH > 0], later("rows with zero-width characters")
            ),
            rows_warning(
                "carriage_return",
                rows[flags & CARRIAGE_RETURN > 0],
                later("rows with carriage returns (line ends of Windows)"),
            ),
            rows_warning(
                "no_break_edge",
                rows[flags & NO_BREAK_EDGE > 0],
                later("rows with a text that begins or ends with a no-break space"),
            ),
            rows_warning(
                "trimmed",
                rows[flags & TRIMMED > 0],
                later(
                    "rows whose answer begins or ends with blanks or line ends that the chat template "
                    "removes: trained without them"
                ),
            ),
            rows_warning(
                "not_given_back",
                rows[flags & NOT_GIVEN_BACK > 0],
                later(
                    "rows whose tokens do not decode to their text: the tokenizer changes or drops "
                    "characters of it"
                ),
            ),
            *(rows_warning(kind, rows[flags & bit > 0], what) for kind, bit, what in store.remarks.by_bit),
            rows_warning(
                "special_text", special, later("rows with special-token text, encoded as ordinary text")
            ),
            rows_warning("repeated", repeats.rows, later("rows that repeat an earlier row")),
            rows_warning(
                "asked_again",
                repeats.prompts,
                later("rows that repeat an earlier prompt with another answer"),
            ),
            rows_warning(
                "straddling",
                straddling,
                later("rows whose answer's first token would have merged with the prompt"),
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
        faults = [
            *faults[:LISTED_FAULTS],
            (str(in_english(counted(len(faults) - LISTED_FAULTS, "other fault"))), rare),
        ]
    return [DataWarning("bad_row", len(rows), tuple(rows[:LISTED_ROWS]), fault) for fault, rows in faults]


def overlap_of(
    train: tuple[TokenStore, np.ndarray], validation: tuple[TokenStore, np.ndarray]
) -> DataWarning | None:
    """A warning about validation rows that repeat a training row. Both arguments are a store and positions in it."""
    train_rows, held_out = used_rows(*train), used_rows(*validation)
    in_training = np.isin(validation[0].row_digests[held_out - 1], train[0].row_digests[train_rows - 1])
    return rows_warning("overlap", held_out[in_training], tr("validation rows that are also training rows"))


def used_rows(store: TokenStore, positions: np.ndarray) -> np.ndarray:
    """The distinct row numbers of the examples at `positions`, ascending."""
    return np.unique(store.row_numbers[positions])


def repeated_rows(store: TokenStore, rows: np.ndarray) -> Repeats:
    repeated = _is_repeat(store.row_digests[rows - 1])
    repeated_prompt = _is_repeat(store.prompt_digests[rows - 1]) & ~repeated
    return Repeats(rows[repeated], rows[repeated_prompt])


def numbered_rows(numbers: Sequence[int]) -> str:
    """All of these row numbers: `rows 3, 17`."""
    shown = ", ".join(map(str, numbers))
    return tr("row {rows}", rows=shown) if len(numbers) == 1 else tr("rows {rows}", rows=shown)


def format_rows(numbers: Sequence[int], count: int | None = None, most: int = LISTED_ROWS) -> str:
    """The first of these row numbers, of `count` rows in all: `rows 3, 17 and 5 more`."""
    count = len(numbers) if count is None else count
    shown = ", ".join(str(number) for number in numbers[:most])
    more = count - min(len(numbers), most)
    if more:
        shown = tr("{names} and {more:,} more", names=shown, more=more)
    return tr("row {rows}", rows=shown) if count == 1 else tr("rows {rows}", rows=shown)


def _is_repeat(digests: np.ndarray) -> np.ndarray:
    """Whether a digest equals an earlier one."""
    is_first = np.zeros(len(digests), dtype=bool)
    is_first[np.unique(digests, return_index=True)[1]] = True
    return ~is_first


def rows_warning(kind: str, rows: np.ndarray, what: str) -> DataWarning | None:
    """A warning about these rows; None if there are none."""
    listed = tuple(rows[:LISTED_ROWS].tolist())
    return DataWarning(kind, len(rows), listed, str(in_english(what))) if len(rows) else None
