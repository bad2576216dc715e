"""Answers that are a few texts again and again: the labels of a classification, their counts, and their scores.

Accuracy and macro F1 are functions of a confusion matrix, as in scikit-learn's `accuracy_score` and `f1_score(...,
labels=labels, average="macro")`. Shapes: L labels; a confusion matrix is (L + 1, L + 1): entry [i, j] counts the rows
whose own label is i and whose predicted label is j, and the last row and column are texts that are no label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.messages import later, tr

MOST_LABELS = 30
ROWS_PER_LABEL = 5
"""Rows that there must be for each label, on average."""
LONGEST_LABEL = 100
"""Characters."""
NO_LABEL = later("(no label)")
"""The name of texts that are no label, in a confusion."""
IMBALANCED = 10
"""From this ratio of the most to the least frequent label on, a warning says so."""

Confusion = Mapping[str, Mapping[str, int]]
"""A label -> a predicted label -> how many rows, without the pairs that no row has."""


def label_counts(texts: Iterable[str]) -> dict[str, int] | None:
    """The labels among the texts with their counts, the most frequent first, without blanks at their edges.

    None if the texts are no labels: only one or more than MOST_LABELS of them are distinct, there are fewer than
    ROWS_PER_LABEL for each, or one is long. Stops reading as soon as there are too many.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts[text.strip()] += 1
        if len(counts) > MOST_LABELS:
            return None
    return as_labels(counts)


def as_labels(counts: Mapping[str, int]) -> dict[str, int] | None:
    """The counts in their order, or None if these texts are no labels; see `label_counts`."""
    total = sum(counts.values())
    if not 2 <= len(counts) <= MOST_LABELS or total < ROWS_PER_LABEL * len(counts):
        return None
    if "" in counts or any(len(text) > LONGEST_LABEL for text in counts):
        return None
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def confusion_matrix(
    own_R: Sequence[int] | NDArray[np.int64], predicted_R: Sequence[int] | NDArray[np.int64], labels: int
) -> NDArray[np.int64]:
    """The matrix of R rows' own and predicted labels, as indices; `labels` stands for none of them."""
    size = labels + 1
    flat = np.asarray(own_R, dtype=np.int64) * size + np.asarray(predicted_R, dtype=np.int64)
    return np.bincount(flat, minlength=size * size).reshape(size, size)


def accuracy(matrix: NDArray[np.int64]) -> float:
    """The fraction of rows whose predicted label is their own."""
    right = np.trace(matrix[:-1, :-1])
    return float(right / matrix.sum())


def f1_of_counts(right: NDArray[Any], predicted: NDArray[Any], own: NDArray[Any]) -> NDArray[np.float64]:
    """Macro F1 from counts of shape (..., L): rows predicted rightly, rows with this prediction, rows with this label.

    The mean over the labels that occur, as a row's own label or as a prediction; NaN if none does.
    """
    both = predicted + own
    f1 = np.where(both > 0, 2 * right / np.maximum(both, 1), 0.0)
    occurs = (both > 0).sum(axis=-1)
    return np.where(occurs > 0, f1.sum(axis=-1) / np.maximum(occurs, 1), np.nan)


def macro_f1(matrix: NDArray[np.int64]) -> float:
    """The mean over the labels of F1, the harmonic mean of precision and recall. A row whose prediction is no label
    counts against its own label only."""
    return float(f1_of_counts(np.diag(matrix)[:-1], matrix.sum(axis=0)[:-1], matrix.sum(axis=1)[:-1]))


def f1_of(confusion: Confusion, label: str) -> float | None:
    """A label's F1; None for texts that are no label, and if no row has or gets the label."""
    own = sum(confusion.get(label, {}).values())
    predicted = sum(row.get(label, 0) for row in confusion.values())
    if label == NO_LABEL or not own + predicted:
        return None
    return 2 * confusion.get(label, {}).get(label, 0) / (own + predicted)


def as_confusion(matrix: NDArray[np.int64], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """The matrix by names, without zeros."""
    names = [*labels, NO_LABEL]
    return {
        own: {predicted: int(count) for predicted, count in zip(names, row, strict=True) if count}
        for own, row in zip(names, matrix, strict=True)
        if row.any()
    }


def confusion_table(
    confusion: Confusion, labels: Sequence[str]
) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """The names of the columns, and each row's name with its counts: the labels, and texts that are no label where
    there are some."""
    columns = [*labels, *([NO_LABEL] if any(NO_LABEL in row for row in confusion.values()) else [])]
    rows = [*labels, *([NO_LABEL] if NO_LABEL in confusion else [])]
    return columns, [(own, [confusion.get(own, {}).get(name, 0) for name in columns]) for own in rows]


def label_name(label: str) -> str:
    """A label of a confusion as people read it: the label itself, or in their language that it is none."""
    return tr(NO_LABEL) if label == NO_LABEL else label


def labels_of(confusion: Confusion) -> list[str]:
    """The labels of a confusion by names, the most frequent first."""
    totals: Counter[str] = Counter()
    for own, row in confusion.items():
        totals[own] += sum(row.values())
        for predicted in row:
            totals[predicted] += 0
    del totals[NO_LABEL]
    return sorted(totals, key=lambda label: (-totals[label], label))
