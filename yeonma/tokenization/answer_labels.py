"""The labels of a classification among the examples of a token store, with their token ids. No row is read again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.data.classification import LONGEST_LABEL, MOST_LABELS, as_labels
from yeonma.tokenization.example import AnswerRole
from yeonma.tokenization.store import TokenStore

_MOST_SEQUENCES = 4 * MOST_LABELS
"""Distinct sequences of tokens from which on answers are taken to be no labels: a text may have a few."""
_MOST_TOKENS = 2 * LONGEST_LABEL
"""Of an answer, with those that end it."""


@dataclass(frozen=True, eq=False)
class AnswerLabels:
    """The labels of some examples, the most frequent first."""

    counts: dict[str, int]
    """Label -> number of examples."""
    token_ids: tuple[NDArray[np.int32], ...]
    """Label by label: the ids of its answer, with those that end it, as most of its examples have them."""
    trained: tuple[NDArray[np.bool_], ...]
    """Which of these ids are trained."""
    label_E: NDArray[np.int64]
    """The label of each example, as an index; the number of labels for texts that are none of them."""

    @property
    def texts(self) -> list[str]:
        return list(self.counts)


def answer_labels(store: TokenStore, positions: NDArray[np.int64], tokenizer: Any) -> AnswerLabels | None:
    """The labels of the examples at `positions`; None if their answers are no labels (`data/classification.py`), or if
    rows have no answer or several: conversations, pairs, whole texts."""
    sequences = _sequences(store, positions)
    if sequences is None:
        return None
    kinds, kind_E = sequences
    texts = [_text(ids, tokenizer) for ids, _ in kinds]
    of_kind = np.bincount(kind_E, minlength=len(kinds)).tolist()
    counts: Counter[str] = Counter()
    for text, count in zip(texts, of_kind, strict=True):
        counts[text] += count
    labels = as_labels(counts)
    if labels is None:
        return None
    names = list(labels)
    usual = {}
    for index in sorted(range(len(kinds)), key=lambda kind: (of_kind[kind], [-id for id in kinds[kind][0]])):
        usual[texts[index]] = kinds[index]  # the most frequent comes last
    return AnswerLabels(
        labels,
        tuple(np.array(usual[name][0], dtype=np.int32) for name in names),
        tuple(np.array(usual[name][1], dtype=np.bool_) for name in names),
        np.array([names.index(text) for text in texts], dtype=np.int64)[kind_E],
    )


def labels_of_others(
    labels: AnswerLabels, store: TokenStore, positions: NDArray[np.int64], tokenizer: Any
) -> NDArray[np.int64]:
    """The label of other examples, such as validation rows, as `AnswerLabels.label_E`."""
    names = {text: index for index, text in enumerate(labels.texts)}
    return np.array(
        [
            names.get(_text(ids, tokenizer), len(names))
            for ids, _ in (_answer(store, i) for i in positions.tolist())
        ],
        dtype=np.int64,
    )


_Sequence = tuple[tuple[int, ...], tuple[bool, ...]]


def _answer(store: TokenStore, position: int) -> _Sequence:
    """The ids of an example's answer, and which are trained."""
    start = int(store.starts[position])
    answer = slice(start + int(store.prompt_lengths[position]), start + int(store.lengths[position]))
    return tuple(store.token_ids[answer].tolist()), tuple(store.trained[answer].tolist())


def _sequences(
    store: TokenStore, positions: NDArray[np.int64]
) -> tuple[list[_Sequence], NDArray[np.int64]] | None:
    """The distinct answers, in order of their appearance, and which of them each example has. None if they are too many
    or too long, or if a row has not exactly one answer behind a prompt."""
    prompts, totals = store.prompt_lengths[positions], store.lengths[positions]
    if not len(positions) or int((totals - prompts).max()) > _MOST_TOKENS or int(prompts.min()) == 0:
        return None
    if (store.roles[positions] != AnswerRole.ANSWER).any():
        return None
    if len(np.unique(store.row_numbers[positions])) != len(positions):
        return None
    starts = store.starts[positions]
    kinds: dict[tuple[bytes, bytes], int] = {}
    firsts: list[int] = []
    kind_E = np.zeros(len(positions), dtype=np.int64)
    bounds = zip((starts + prompts).tolist(), (starts + totals).tolist(), strict=True)
    for index, (start, end) in enumerate(bounds):
        answer = store.token_ids[start:end].tobytes(), store.trained[start:end].tobytes()
        kind_E[index] = kind = kinds.setdefault(answer, len(kinds))
        if kind == len(firsts):
            firsts.append(int(positions[index]))
            if len(firsts) > _MOST_SEQUENCES:
                return None
    sequences = [_answer(store, position) for position in firsts]
    trained_E = np.array([sum(trained) for _, trained in sequences])[kind_E]
    counts = store.trained_counts[positions]
    if (trained_E == 0).any() or ((counts != trained_E) & (counts != totals - 1)).any():
        return None  # conversations with earlier answers
    return sequences, kind_E


def _text(ids: tuple[int, ...], tokenizer: Any) -> str:
    """The answer as text, without the tokens that end it; with them if it has no others."""
    text, whole = (
        str(tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)).strip()
        for skip in (True, False)
    )
    return text or whole
