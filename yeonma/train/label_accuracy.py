"""Which label of a classification a model finds most likely for a validation row.

The labels hang below the row's prompt as siblings in the forest. The row's own answer is one of them, and the
validation loss reads it there, so that an evaluation computes every token once. A label's score is the log-probability
of its whole answer with the tokens that end it; a tie goes to the more frequent label. No answer is generated. The ids
of a label are the same for all rows, so that nothing in them tells the row's own label.

Shapes: R scored rows, L labels, E examples, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yeonma.batch.batch import Batch
from yeonma.data.classification import accuracy, confusion_matrix, macro_f1
from yeonma.tokenization.answer_labels import AnswerLabels, answer_labels, labels_of_others
from yeonma.tokenization.dataset import Dataset, PreparedSet
from yeonma.tokenization.example import Example
from yeonma.train.losses import answer_logprobs

MOST_ROWS = 500
"""Validation rows of a data set that are scored, evenly spaced among all."""
MOST_TOKENS = 8_000_000
"""Of these rows with all labels, in memory; fewer rows are scored if there would be more."""


@dataclass(frozen=True, eq=False)
class LabelTrial:
    """Validation rows of one data set with every label as their answer."""

    labels: tuple[str, ...]
    batch: Batch
    """R units. A unit has an example for each label, in the order of `labels`, and after them the row's own answer if
    its ids are those of no label. Weights of 0 keep all other answers out of a supervised loss."""
    label_E: NDArray[np.int64]
    """The label of each example, as an index; L for a row's own answer behind them."""
    own_R: NDArray[np.int64]
    """The rows' own labels, as indices; L for a text that is no label of the training rows."""
    others: NDArray[np.int64]
    """Units of the validation rows that are not scored, as indices."""

    def label_logprobs(self, logprob_N: Tensor, micro_batch: Batch) -> Tensor:
        """logprob_E of the answers of a part of `batch`, in float64. Of an example whose prompt is trained, too, only
        the answer's tokens are counted."""
        parts = logprob_N.split(micro_batch.trained_counts_E.tolist())
        counts = self._answer_counts_E[micro_batch.index_E].tolist()
        answers = [part[len(part) - count :] for part, count in zip(parts, counts, strict=True)]
        return answer_logprobs(torch.cat(answers), counts)

    def confusion(self, logprob_E: NDArray[np.float64]) -> NDArray[np.int64]:
        """The confusion matrix of `yeonma/data/classification.py` for these log-probabilities of the examples."""
        of_labels = logprob_E[self.label_E < len(self.labels)]
        predicted_R = of_labels.reshape(len(self.own_R), len(self.labels)).argmax(axis=1)
        return confusion_matrix(self.own_R, predicted_R, len(self.labels))

    @cached_property
    def _answer_counts_E(self) -> NDArray[np.int64]:
        """The trained tokens of each example's answer."""
        masks, prompts = self.batch.trained, self.batch.prompt_lengths_E.tolist()
        return np.array([mask[prompt:].sum() for mask, prompt in zip(masks, prompts, strict=True)])


def label_trials(dataset: Dataset, tokenizer: Any, *, shares_prompts: bool) -> dict[str, LabelTrial]:
    """The trials of the data sets whose answers are labels, by their names.

    Without `shares_prompts` a prompt is computed once for each label, and fewer rows are scored. Rows that a label
    could take beyond `cutoff_len` are passed over.
    """
    trials = {}
    for one in dataset.sets:
        if one.validation is None:
            continue
        labels = answer_labels(one.train.store, one.train.store.examples_of(one.train.units), tokenizer)
        if labels is not None:
            trial = _trial(labels, one, tokenizer, dataset.rules.cutoff_len, shares_prompts)
            trials.update({} if trial is None else {one.name: trial})
    return trials


def _trial(
    labels: AnswerLabels, one: PreparedSet, tokenizer: Any, cutoff_len: int, shares_prompts: bool
) -> LabelTrial | None:
    assert one.validation is not None
    store = one.validation.store
    rows = store.examples_of(one.validation.units)
    if len(np.unique(store.row_numbers[rows])) != len(rows):
        return None  # the validation rows have other turns than the training rows
    longest = max(map(len, labels.token_ids))
    prompts = store.prompt_lengths[rows]
    scored = np.flatnonzero((prompts > 0) & (prompts + longest <= cutoff_len))
    if not len(scored):
        return None
    count, mean = len(labels.token_ids), float(prompts[scored].mean()) + longest
    most = MOST_ROWS if shares_prompts else MOST_ROWS // count
    scored = _spread(scored, max(1, min(most, int(MOST_TOKENS / (count * mean)))))
    examples, units, label_E = list[Example](), list[int](), list[int]()
    for unit, position in enumerate(rows[scored].tolist()):
        answers = _with_labels(store.example(position), labels)
        examples += answers
        units += [unit] * len(answers)
        label_E += range(len(answers))
    return LabelTrial(
        labels=tuple(labels.texts),
        batch=Batch.of(examples, units=units),
        label_E=np.array(label_E, dtype=np.int64),
        own_R=labels_of_others(labels, store, rows[scored], tokenizer),
        others=np.setdiff1d(np.arange(len(rows)), scored),
    )


def _with_labels(own: Example, labels: AnswerLabels) -> list[Example]:
    """A row's prompt with each label, and with the row's own answer, which stands in the place of the label that has
    its ids, else behind them. All other answers have weights of 0."""
    prompt, answer = own.token_ids[: own.prompt_length], own.token_ids[own.prompt_length :]
    untrained = np.zeros(len(prompt), dtype=np.bool_)
    examples, missing = [], True
    for ids, trained in zip(labels.token_ids, labels.trained, strict=True):
        if np.array_equal(ids, answer) and np.array_equal(trained, own.trained[own.prompt_length :]):
            examples.append(own)
            missing = False
            continue
        examples.append(
            replace(
                own,
                token_ids=np.concatenate([prompt, ids]),
                trained=np.concatenate([untrained, trained]),
                weights=np.zeros(len(prompt) + len(ids), dtype=np.float32),
            )
        )
    return [*examples, own] if missing else examples


def _spread(positions: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of the positions, evenly spaced: files may be sorted by label."""
    if len(positions) <= most:
        return positions
    return positions[np.arange(most) * len(positions) // most]


def label_scores(confusions: Mapping[str, NDArray[np.int64]]) -> dict[str, float]:
    """Accuracy over all rows, and macro F1 over all labels, of the data sets with labels: metrics of an evaluation."""
    if not confusions:
        return {}
    rows = np.array([matrix.sum() for matrix in confusions.values()])
    labels = np.array([len(matrix) - 1 for matrix in confusions.values()])
    accuracies = np.array([accuracy(matrix) for matrix in confusions.values()])
    f1s = np.array([macro_f1(matrix) for matrix in confusions.values()])
    return {
        "accuracy": float((accuracies * rows).sum() / rows.sum()),
        "macro_f1": float((f1s * labels).sum() / labels.sum()),
    }
