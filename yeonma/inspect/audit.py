"""Statistics of a data set before training: rows used, shortened, left out and repeated; lengths; computation saved.

All of it comes from the token store and the plan: no row is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from math import ceil
from typing import Any

import numpy as np

from yeonma.batch.micro_batches import forest_of
from yeonma.batch.plan import Plan, micro_batches
from yeonma.config.settings import PreferenceSettings
from yeonma.data.template import Template
from yeonma.data.text_checks import script_names
from yeonma.inspect.label_counts import LabelCounts, label_counts_of
from yeonma.messages import tr
from yeonma.tokenization.dataset import (
    LISTED_ROWS,
    Dataset,
    DatasetPart,
    DataWarning,
    PreparedSet,
    data_warnings,
    faults_of,
    overlaps_of,
    rows_warning,
    used_rows,
)
from yeonma.tokenization.example import NOTHING_TO_CHOOSE, AnswerRole, LeftOut
from yeonma.tokenization.store import TokenStore
from yeonma.train.label_balance import LabelBalance, label_balance
from yeonma.train.prepare import mixture_parts

MAX_BINS = 10
MEASURED_STEPS = 50
CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Bin:
    """`count` examples have `least` to `most` tokens."""

    least: int
    most: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts or answers in tokens. `p95`: the 95th percentile."""

    least: int
    median: int
    mean: float
    p95: int
    most: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Scripts:
    """Rows whose answer uses these scripts. Without names: answers without letters."""

    names: tuple[str, ...]
    count: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Bias:
    """Difference in length between chosen and rejected answers. If it is large, a model may learn only that."""

    chosen_longer: int
    """Pairs whose chosen answer has more tokens."""
    rejected_longer: int
    chosen_mean: float
    rejected_mean: float


@dataclass(frozen=True)
class PartAudit:
    """Statistics of the training rows or the validation rows. Lists of row numbers have only the first few."""

    name: str
    rows: int
    """Number of rows used."""
    units: int
    """Examples or, in preference data, pairs."""
    examples: int
    """A pair has two."""
    tokens: int
    trained_tokens: int
    shortened: int
    """Examples with a shortened prompt field, or without old turns."""
    shortened_rows: tuple[int, ...]
    cut_characters: int
    dropped_turns: int
    prompt_tokens: Lengths
    answer_tokens: Lengths
    variants: tuple[int, ...]
    """Number of examples by variant of the template."""
    scripts: tuple[Scripts, ...]
    """The most frequent first."""
    bias: Bias | None
    """Only for pairs."""
    labels: LabelBalance | None
    """Only for labelled answers."""
    answer_labels: LabelCounts | None
    """Only for answers that are the labels of a classification."""
    remarks: tuple[DataWarning, ...]


@dataclass(frozen=True)
class Work:
    """Token positions computed in `steps` steps: with padding to the longest example of a micro-batch, without padding,
    and as a forest, in which shared prefixes are computed once."""

    steps: int
    padded: int
    unpadded: int
    forest: int

    @property
    def saved(self) -> float:
        """The fraction of padded positions that a forest does not compute."""
        return 1 - self.forest / self.padded


@dataclass(frozen=True)
class AuditedSource:
    """A data set, and its rows that did not become examples."""

    name: str
    template: str
    rows: int
    left_out: int
    """Number of rows, or of answers of turn lists."""
    identical: int
    """Pairs among them with equal answers, as text or as tokens."""
    left_out_rows: tuple[LeftOut, ...]
    bad_rows: tuple[DataWarning, ...]
    """The faults of the bad rows among them."""


@dataclass(frozen=True)
class SetAudit:
    """One of several data sets."""

    name: str
    part: str
    """Its part in the mixture."""
    train: PartAudit
    validation: PartAudit | None
    overlaps: tuple[DataWarning, ...]
    """Rows that other parts of the data have as well."""


@dataclass(frozen=True)
class Audit:
    sources: tuple[AuditedSource, ...]
    template: str
    """The template with which the adapter is asked."""
    kind: str
    """`answers`, `pairs` or `labelled answers`."""
    sets: tuple[SetAudit, ...]
    """Empty for a single data set."""
    train: PartAudit
    """With several data sets, all of them together, without the numbers of rows."""
    validation: PartAudit | None
    """None for several data sets."""
    overlap: DataWarning | None
    """None for several data sets."""
    warnings: tuple[str, ...]
    """About the run as a whole, as at its start."""
    steps_per_epoch: int
    steps: int
    """Steps of the whole run."""
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
    tokenizer: Any,
    preference: PreferenceSettings | None = None,
    warnings: Sequence[str] = (),
) -> Audit:
    """The audit of a run's data. `unknown_id`: the unknown token, if the tokenizer uses it for nothing else.
    `warnings`: about the run as a whole."""
    sources = [_source(name, part, one.template.name) for one in dataset.sets for name, part in one.sources]
    overlaps = overlaps_of(dataset)
    sets = _sets(dataset, plan, overlaps, unknown_id, tokenizer, preference)
    if len(sets) == 1:
        (only,) = sets
        train, validation = only.train, only.validation
        overlap = next((warning for _, warning in overlaps), None)
        sets = ()
    else:
        train, validation, overlap = _mixture(dataset, tokenizer, preference), None, None
    tokens, trained_tokens = _tokens_per_epoch(dataset, plan)
    return Audit(
        sources=tuple(sources),
        template=dataset.template.name,
        kind=dataset.task.name,
        sets=sets,
        train=train,
        validation=validation,
        overlap=overlap,
        warnings=tuple(warnings),
        steps_per_epoch=plan.steps_per_epoch,
        steps=plan.total_steps,
        tokens_per_epoch=tokens,
        trained_tokens_per_epoch=trained_tokens,
        work=work_of(dataset.train.store, plan, micro_batch_size, micro_batch_tokens, share_prefix),
    )


def _sets(
    dataset: Dataset,
    plan: Plan,
    overlaps: Sequence[tuple[str, DataWarning]],
    unknown_id: int | None,
    tokenizer: Any,
    preference: PreferenceSettings | None,
) -> tuple[SetAudit, ...]:
    def audit(one: PreparedSet, part: DatasetPart) -> PartAudit:
        return _part_audit(part, dataset, one.template, unknown_id, tokenizer, preference)

    return tuple(
        SetAudit(
            name=one.name,
            part=part,
            train=audit(one, one.train),
            validation=None if one.validation is None else audit(one, one.validation),
            overlaps=tuple(warning for name, warning in overlaps if name == one.name),
        )
        for one, part in zip(dataset.sets, mixture_parts(dataset, plan), strict=True)
    )


def _mixture(dataset: Dataset, tokenizer: Any, preference: PreferenceSettings | None) -> PartAudit:
    """All training rows together. Warnings and numbers of rows stand with each data set."""
    audit = _part_audit(dataset.train, dataset, None, None, tokenizer, preference)
    scripts = tuple(replace(entry, rows=()) for entry in audit.scripts)
    return replace(audit, shortened_rows=(), scripts=scripts, remarks=())


def _tokens_per_epoch(dataset: Dataset, plan: Plan) -> tuple[int, int]:
    """Tokens and trained tokens of an epoch; with weights, on average."""
    tokens = trained = 0.0
    weights = plan.shares.weights if plan.shares is not None else ()
    for index, one in enumerate(dataset.sets):
        times: float = one.settings.repeats
        if weights:
            times = len(plan.positions) * weights[index] / sum(weights) / len(one.train.units)
        positions = one.train.store.examples_of(one.train.units)
        tokens += times * int(one.train.store.lengths[positions].sum())
        trained += times * one.train.trained_tokens
    return round(tokens), round(trained)


def work_of(
    store: TokenStore, plan: Plan, micro_batch_size: int, micro_batch_tokens: int | None, share_prefix: bool
) -> Work:
    """The work of the first steps of the plan, at most MEASURED_STEPS.

    Padding is that of a trainer with padding: micro-batches of `micro_batch_size` units in the order of the step, in
    which both answers of a pair have their own copy of the prompt.
    """
    steps = padded = unpadded = forest = 0
    for units in islice(plan.steps(), min(MEASURED_STEPS, plan.steps_per_epoch)):
        steps += 1
        for start in range(0, len(units), micro_batch_size):
            lengths = store.lengths[store.examples_of(units[start : start + micro_batch_size])]
            padded += len(lengths) * int(lengths.max())
            unpadded += int(lengths.sum())
        for members in micro_batches(
            store.unit_lengths[units].tolist(), micro_batch_size, micro_batch_tokens
        ):
            forest += len(forest_of(store, units[members], share_prefix).token_ids_T)
    return Work(steps, padded, unpadded, forest)


def lengths_of(counts: np.ndarray) -> Lengths:
    """Summary and histogram of `counts`: token counts, at least one."""
    least, most = int(counts.min()), int(counts.max())
    width = _round_up(ceil((most - least + 1) / MAX_BINS))
    first = least // width * width
    numbers = np.bincount((counts - first) // width)
    bins = [
        Bin(first + number * width, first + (number + 1) * width - 1, int(count))
        for number, count in enumerate(numbers)
    ]
    median, p95 = np.percentile(counts, [50, 95], method="inverted_cdf")
    return Lengths(least, int(median), float(counts.mean()), int(p95), most, tuple(bins))


def _round_up(width: int) -> int:
    """The first of 1, 2, 5, 10, 20, 25, 50, 100, 200, 250, ... that is at least `width`."""
    steps = (step * 10**power // 100 for power in count() for step in (100, 200, 250, 500))
    return next(step for step in steps if step >= width)


def _source(name: str, part: DatasetPart, template: str) -> AuditedSource:
    counts = part.store.counts
    left_out = part.store.left_out if counts.left_out else []
    return AuditedSource(
        name=name,
        template=template,
        rows=counts.rows,
        left_out=counts.left_out,
        identical=sum(row.reason in NOTHING_TO_CHOOSE for row in left_out),
        left_out_rows=tuple(left_out[:LISTED_ROWS]),
        bad_rows=tuple(faults_of(left_out)),
    )


def _part_audit(
    part: DatasetPart,
    dataset: Dataset,
    template: Template | None,
    unknown_id: int | None,
    tokenizer: Any,
    preference: PreferenceSettings | None,
) -> PartAudit:
    """Without a `template`, variants and labels are not counted."""
    store, positions = part.store, part.store.examples_of(part.units)
    lengths, cut = store.lengths[positions], store.cut_characters[positions]
    answers = lengths - store.prompt_lengths[positions]
    if not dataset.rules.train_on_inputs:  # a turn list may have several answers
        answers = store.trained_counts[positions]
    rows = used_rows(store, positions)
    dropped = store.dropped_turns[positions]
    shortened = np.unique(store.row_numbers[positions][(cut > 0) | (dropped > 0)])
    unknown = _rows_with(store, positions, unknown_id) if unknown_id is not None else rows[:0]
    unknown_warning = rows_warning(
        "unknown", unknown, tr("rows with text that the tokenizer has no tokens for")
    )
    return PartAudit(
        name=part.rows.name,
        rows=len(rows),
        units=len(part.units),
        examples=len(positions),
        tokens=int(lengths.sum()),
        trained_tokens=part.trained_tokens,
        shortened=int(np.count_nonzero((cut > 0) | (dropped > 0))),
        shortened_rows=tuple(shortened[:LISTED_ROWS].tolist()),
        cut_characters=int(cut.sum()),
        dropped_turns=int(dropped.sum()),
        prompt_tokens=lengths_of(lengths - answers),
        answer_tokens=lengths_of(answers),
        variants=()
        if template is None
        else tuple(np.bincount(store.variants[positions], minlength=len(template.variants)).tolist()),
        bias=_bias(store, positions, answers),
        labels=label_balance(part, preference),
        answer_labels=None if template is None else label_counts_of(part, tokenizer),
        scripts=_scripts(store.row_scripts[rows - 1], rows),
        remarks=(*data_warnings(store, positions), *([unknown_warning] if unknown_warning else [])),
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
    scripts = [
        Scripts(script_names(int(kind)), int(count), tuple(rows[bits == kind][:LISTED_ROWS].tolist()))
        for kind, count in zip(kinds, counts, strict=True)
    ]
    return tuple(sorted(scripts, key=lambda entry: -entry.count))


def _rows_with(store: TokenStore, positions: np.ndarray, token_id: int) -> np.ndarray:
    """Row numbers of the examples at `positions` that contain the token."""
    contains = np.zeros(len(store), dtype=bool)
    for start, token_ids in _chunks(store.token_ids):
        flat = start + np.flatnonzero(token_ids == token_id)
        contains[np.searchsorted(store.starts, flat, side="right") - 1] = True
    return np.unique(store.row_numbers[positions[contains[positions]]])


def _chunks(tokens: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(tokens), CHUNK_TOKENS):
        yield start, np.asarray(tokens[start : start + CHUNK_TOKENS])
