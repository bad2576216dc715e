"""How often each label of a classification is the answer, and what an imbalance of the labels does to accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from yeonma.data.classification import IMBALANCED
from yeonma.tokenization.answer_labels import answer_labels
from yeonma.tokenization.dataset import DatasetPart

SHOWN = 8
"""Labels that are listed with their counts."""


@dataclass(frozen=True)
class LabelCounts:
    """The labels with their numbers of rows, the most frequent first."""

    labels: tuple[tuple[str, int], ...]

    @property
    def most_frequent_share(self) -> float:
        """The accuracy of always answering with the most frequent label."""
        return self.labels[0][1] / sum(count for _, count in self.labels)

    @property
    def is_imbalanced(self) -> bool:
        return self.labels[0][1] >= IMBALANCED * self.labels[-1][1]


def label_counts_of(part: DatasetPart, tokenizer: Any) -> LabelCounts | None:
    """The labels of these examples; None if their answers are no labels."""
    found = answer_labels(part.store, part.store.examples_of(part.units), tokenizer)
    return None if found is None else LabelCounts(tuple(found.counts.items()))


def label_lines(counts: LabelCounts) -> Iterator[str | tuple[str, str]]:
    """Lines about the labels, of which a warning has its style."""
    total = sum(count for _, count in counts.labels)
    listed = ", ".join(f"{label}: {count:,} ({count / total:.0%})" for label, count in counts.labels[:SHOWN])
    more = len(counts.labels) - SHOWN
    rest = (
        f" and {more:,} more, the rarest {counts.labels[-1][0]}: {counts.labels[-1][1]:,}" if more > 0 else ""
    )
    yield f"{len(counts.labels)} labels: {listed}{rest}"
    share = (
        f"always answering {counts.labels[0][0]} would give an accuracy of {counts.most_frequent_share:.3f}"
    )
    if counts.is_imbalanced:
        yield f"! the labels are imbalanced: {share}, so judge by macro F1 as well", "yellow"
    else:
        yield share
