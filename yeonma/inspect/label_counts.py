"""How often each label of a classification is the answer, and what an imbalance of the labels does to accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from yeonma.data.classification import IMBALANCED
from yeonma.messages import tr
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
    if more > 0:
        yield tr(
            "{count} labels: {listed} and {more:,} more, the rarest {rarest}: {rows:,}",
            count=len(counts.labels),
            listed=listed,
            more=more,
            rarest=counts.labels[-1][0],
            rows=counts.labels[-1][1],
        )
    else:
        yield tr("{count} labels: {listed}", count=len(counts.labels), listed=listed)
    label, share = counts.labels[0][0], counts.most_frequent_share
    if counts.is_imbalanced:
        text = tr(
            "! the labels are imbalanced: always answering {label} would give an accuracy of {share:.3f}, so judge "
            "by macro F1 as well",
            label=label,
            share=share,
        )
        yield text, "yellow"
    else:
        yield tr("always answering {label} would give an accuracy of {share:.3f}", label=label, share=share)
