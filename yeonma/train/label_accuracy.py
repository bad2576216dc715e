"""Which label of a classification a model finds most likely for a validation row.

The labels hang below the row's prompt as siblings in the forest, so that the prompt is computed once. A label's score
is the log-probability of its whole answer with the tokens that end it; a tie goes to the more frequent label. No answer
is generated. The ids of a label are the same for all rows, so that nothing in them tells the row's own label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.batch.batch import Batch
from yeonma.data.classification import accuracy, confusion_matrix, macro_f1
from yeonma.tokenization.answer_labels import AnswerLabels, answer_labels, labels_of_others
from yeonma.tokenization.dataset import Dataset, PreparedSet

MOST_ROWS = 500
"""Validation rows of a data set that are scored, evenly spaced among all."""
MOST_TOKENS = 8_000_000
"""Of these rows with all labels, in memory; fewer rows are scored if there would be more."""


@dataclass(frozen=True, eq=False)
class LabelTrial:
    """Validation rows of one data set with every label as their answer. R rows, L labels."""

    labels: tuple[str, ...]
    batch: Batch
    """R units of L examples each, in the order of `labels`."""
    own_R: NDArray[np.int64]
    """The rows' own labels, as indices; L for a text that is no label of the training rows."""

    def confusion(self, logprob_E: NDArray[np.float64]) -> NDArray[np.int64]:
        """The confusion matrix of `yeonma/data/classification.py` for these log-probabilities of the examples."""
        predicted_R = logprob_E.reshape(len(self.own_R), len(self.labels)).argmax(axis=1)
        return confusion_matrix(self.own_R, predicted_R, len(self.labels))


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
    positions = store.examples_of(one.validation.units)
    if len(np.unique(store.row_numbers[positions])) != len(positions):
        return None  # the validation rows have other turns than the training rows
    longest = max(map(len, labels.token_ids))
    positions = positions[store.prompt_lengths[positions] + longest <= cutoff_len]
    positions = positions[store.prompt_lengths[positions] > 0]
    if not len(positions):
        return None
    count, mean = len(labels.token_ids), float(store.prompt_lengths[positions].mean()) + longest
    most = MOST_ROWS if shares_prompts else MOST_ROWS // count
    positions = _spread(positions, max(1, min(most, int(MOST_TOKENS / (count * mean)))))
    examples = []
    for position in positions.tolist():
        example = store.example(position)
        prompt = example.token_ids[: example.prompt_length]
        for ids, trained in zip(labels.token_ids, labels.trained, strict=True):
            mask = np.concatenate([np.zeros(len(prompt), dtype=np.bool_), trained])
            tokens = np.concatenate([prompt, ids])
            examples.append(replace(example, token_ids=tokens, trained=mask, weights=None))
    batch = Batch.of(examples, units=np.repeat(np.arange(len(positions)), count).tolist())
    return LabelTrial(tuple(labels.texts), batch, labels_of_others(labels, store, positions, tokenizer))


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
