"""The whole data set before it is trained on: what is used, shortened, left out, repeated, and the work it makes.

Everything comes out of the token store and the plan; the rows are not read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import ceil

import numpy as np

from yeonma.batch.micro_batches import forest_of
from yeonma.batch.plan import Plan, micro_batches
from yeonma.data.text_checks import script_names
from yeonma.tokenization.data_warnings import (
    FIRST,
    DataWarning,
    data_warnings,
    overlap_of,
    rows_warning,
    used_rows,
)
from yeonma.tokenization.dataset import Dataset, Part
from yeonma.tokenization.example import AnswerRole, LeftOut
from yeonma.tokenization.preference_encoder import NOTHING_TO_CHOOSE
from yeonma.tokenization.store import TokenStore

MOST_BINS = 10
STEPS_SEEN = 50
TOKENS_A_READ = 1 << 22


@dataclass(frozen=True)
class Bin:
    """`count` examples have from `least` to `most` tokens."""

    least: int
    most: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """How many tokens the examples have, of one kind. `p95`: all but a twentieth have no more."""

    least: int
    median: int
    mean: float
    p95: int
    most: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Scripts:
    """Rows whose answers are written in these scripts, all of them in one answer; no name: no letters."""

    names: tuple[str, ...]
    count: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Bias:
    """How the lengths of chosen and rejected answers differ: a model may learn that alone."""

    chosen_longer: int
    """Pairs whose chosen answer has more tokens."""
    rejected_longer: int
    chosen_mean: float
    rejected_mean: float


@dataclass(frozen=True)
class PartAudit:
    """Of the training or the validation rows. Row numbers are the first few."""

    name: str
    rows: int
    """Rows that something is trained of, or measured by."""
    units: int
    """What a step counts: examples or, in preference data, pairs."""
    examples: int
    """A pair has two."""
    tokens: int
    trained_tokens: int
    shortened: int
    """Examples that lost text of a prompt field."""
    shortened_rows: tuple[int, ...]
    cut_characters: int
    prompt_tokens: Lengths
    answer_tokens: Lengths
    variants: tuple[int, ...]
    """Examples of each variant of the template."""
    scripts: tuple[Scripts, ...]
    """The most frequent first."""
    bias: Bias | None
    """Of pairs alone."""
    remarks: tuple[DataWarning, ...]


@dataclass(frozen=True)
class Work:
    """Token positions that go through the model in `steps` steps: padded to the longest of each micro-batch, in
    sequences of their own lengths, and with shared beginnings computed once."""

    steps: int
    padded: int
    unpadded: int
    forest: int

    @property
    def saved(self) -> float:
        """The share of the padded positions that is never computed."""
        return 1 - self.forest / self.padded


@dataclass(frozen=True)
class Source:
    """A data set as it was read: rows, and those that became no example."""

    name: str
    rows: int
    left_out: int
    """Rows, or single answers of turn lists."""
    identical: int
    """Pairs among them with nothing to choose between, as they stand or as tokens."""
    left_out_rows: tuple[LeftOut, ...]


@dataclass(frozen=True)
class Audit:
    sources: tuple[Source, ...]
    template: str
    kind: str
    """`answers`, `pairs` or `labelled answers`."""
    train: PartAudit
    validation: PartAudit | None
    overlap: DataWarning | None
    steps_per_epoch: int
    steps: int
    """Of the whole run, as `num_epochs` and `max_steps` say."""
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    work: Work


def audit_of(
    dataset: Dataset,
    plan: Plan,
    *,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    share_prefix: bool,
    unknown_id: int | None,
) -> Audit:
    """`unknown_id`: the token that stands for what the tokenizer does not know, where it has one for just that."""
    train = _part_audit(dataset.train, dataset, unknown_id)
    held_out = dataset.validation
    return Audit(
        sources=tuple(_source(part) for part in dataset.sources),
        template=dataset.template.name,
        kind=dataset.task.name,
        train=train,
        validation=None if held_out is None else _part_audit(held_out, dataset, unknown_id),
        overlap=None if held_out is None else overlap_of(dataset.train.examples, held_out.examples),
        steps_per_epoch=plan.steps_per_epoch,
        steps=plan.total_steps,
        tokens_per_epoch=train.tokens,
        trained_tokens_per_epoch=train.trained_tokens,
        work=work_of(dataset.train.store, plan, micro_batch_size, micro_batch_tokens, share_prefix),
    )


def work_of(
    store: TokenStore, plan: Plan, micro_batch_size: int, micro_batch_tokens: int | None, share_prefix: bool
) -> Work:
    """Of the plan's first steps, at most 50. Padding is measured on micro-batches of `micro_batch_size` units in the
    order of the step, as a trainer with padding would form them, each answer of a pair with a prompt of its own."""
    steps = padded = unpadded = forest = 0
    for units in islice(plan.steps(), min(STEPS_SEEN, plan.steps_per_epoch)):
        steps += 1
        for start in range(0, len(units), micro_batch_size):
            together = store.lengths[store.trained_of(units[start : start + micro_batch_size])]
            padded += len(together) * int(together.max())
            unpadded += int(together.sum())
        for members in micro_batches(
            store.unit_lengths[units].tolist(), micro_batch_size, micro_batch_tokens
        ):
            forest += len(forest_of(store, units[members], share_prefix).token_ids_T)
    return Work(steps, padded, unpadded, forest)


def lengths_of(counts: np.ndarray) -> Lengths:
    """Of at least one count of tokens."""
    least, most = int(counts.min()), int(counts.max())
    width = _round(ceil((most - least + 1) / MOST_BINS))
    first = least // width * width
    numbers = np.bincount((counts - first) // width)
    bins = [
        Bin(first + number * width, first + (number + 1) * width - 1, int(found))
        for number, found in enumerate(numbers)
    ]
    median, p95 = np.percentile(counts, [50, 95], method="inverted_cdf")
    return Lengths(least, int(median), float(counts.mean()), int(p95), most, tuple(bins))


def _round(width: int) -> int:
    """The next of 1, 2, 5, 10, 20, 25, 50, 100, 200, 250, ... that is not below `width`."""
    steps = (step * 10**power // 100 for power in count() for step in (100, 200, 250, 500))
    return next(step for step in steps if step >= width)


def _source(part: Part) -> Source:
    counts = part.store.counts
    left_out = part.store.left_out if counts.left_out else []
    return Source(
        name=part.rows.name,
        rows=counts.rows,
        left_out=counts.left_out,
        identical=sum(one.reason in NOTHING_TO_CHOOSE for one in left_out),
        left_out_rows=tuple(left_out[:FIRST]),
    )


def _part_audit(part: Part, dataset: Dataset, unknown_id: int | None) -> PartAudit:
    store, positions = part.store, part.store.trained_of(part.units)
    lengths, cut = store.lengths[positions], store.cut_characters[positions]
    answers = lengths - store.prompt_lengths[positions]
    if not dataset.rules.train_on_inputs:  # a turn list may have several answers
        answers = store.trained_counts[positions]
    rows = used_rows(store, positions)
    shortened = np.unique(store.row_numbers[positions][cut > 0])
    unknown = _rows_with(store, positions, unknown_id) if unknown_id is not None else rows[:0]
    not_known = rows_warning("unknown", unknown, "rows with text that the tokenizer has no tokens for")
    return PartAudit(
        name=part.rows.name,
        rows=len(rows),
        units=len(part.units),
        examples=len(positions),
        tokens=int(lengths.sum()),
        trained_tokens=part.trained_tokens,
        shortened=int(np.count_nonzero(cut)),
        shortened_rows=tuple(shortened[:FIRST].tolist()),
        cut_characters=int(cut.sum()),
        prompt_tokens=lengths_of(lengths - answers),
        answer_tokens=lengths_of(answers),
        variants=tuple(
            np.bincount(store.variants[positions], minlength=len(dataset.template.variants)).tolist()
        ),
        bias=_bias(store, positions, answers),
        scripts=_scripts(store.row_scripts[rows - 1], rows),
        remarks=(*data_warnings(store, positions), *([not_known] if not_known else [])),
    )


def _bias(store: TokenStore, positions: np.ndarray, answers: np.ndarray) -> Bias | None:
    chosen, rejected = (
        answers[store.roles[positions] == role] for role in (AnswerRole.CHOSEN, AnswerRole.REJECTED)
    )
    if not len(chosen):
        return None
    return Bias(
        chosen_longer=int(np.count_nonzero(chosen > rejected)),
        rejected_longer=int(np.count_nonzero(chosen < rejected)),
        chosen_mean=float(chosen.mean()),
        rejected_mean=float(rejected.mean()),
    )


def _scripts(bits: np.ndarray, rows: np.ndarray) -> tuple[Scripts, ...]:
    kinds, counts = np.unique(bits, return_counts=True)
    found = [
        Scripts(script_names(int(kind)), int(count), tuple(rows[bits == kind][:FIRST].tolist()))
        for kind, count in zip(kinds, counts, strict=True)
    ]
    return tuple(sorted(found, key=lambda scripts: -scripts.count))


def _rows_with(store: TokenStore, positions: np.ndarray, token_id: int) -> np.ndarray:
    """The numbers of the rows of `positions` in whose examples a token stands."""
    found = np.zeros(len(store), dtype=bool)
    for start, ids in _pieces(store.token_ids):
        found[np.searchsorted(store.starts, start + np.flatnonzero(ids == token_id), side="right") - 1] = True
    return np.unique(store.row_numbers[positions[found[positions]]])


def _pieces(tokens: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(tokens), TOKENS_A_READ):
        yield start, np.asarray(tokens[start : start + TOKENS_A_READ])
