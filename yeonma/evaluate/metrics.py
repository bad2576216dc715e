"""Answers and references -> metrics per row and overall.

ROUGE counts words, Korean morphemes or characters, depending on the script of the references. A metric is a function of
sums over rows, so that resampled rows (`yeonma/resampling.py`) need only new sums. Shapes: R rows, K sums of a metric.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from yeonma.data.classification import f1_of_counts, label_counts
from yeonma.data.text_scores import (
    MetricTokenizer,
    chrf,
    chrf_counts,
    has_sacrebleu,
    rouge,
    sacrebleu_counts,
)
from yeonma.messages import later, tr
from yeonma.resampling import Array, Value, mean

REPETITION_ORDER = 4  # tokens in an n-gram


@dataclass(frozen=True)
class Metric:
    """A metric: its name, the better direction, and its value as a function of sums over rows."""

    key: str
    name: str
    better: str  # "higher", "lower", or empty if neither
    about: str
    value: Value
    """(..., K) sums -> (...)."""
    tested: bool = True
    """Whether differences between models are tested for significance."""


@dataclass(frozen=True, eq=False)
class ScoredAnswer:
    """A model's answer to a row, and its loss on the reference answer."""

    text: str
    token_ids: tuple[int, ...]
    ended: bool
    nll: float | None = None
    """Negative log-likelihood of the reference answer, summed; None if there is none or it is too long."""
    trained_tokens: int = 0


def share(sums: Array) -> Array:
    return 100 * mean(sums)


def perplexity(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(mean(sums))


def bleu(sums: Array) -> Array:
    """BLEU (Papineni et al. 2002), smoothed as sacrebleu does by default (Chen & Cherry 2014, method 3).

    K = 10: lengths of answer and reference, then matching and all n-grams of 1 to 4 tokens.
    """
    length, reference = sums[..., 0].astype(float), sums[..., 1].astype(float)
    correct, total = sums[..., 2:6].astype(float), sums[..., 6:10].astype(float)
    halvings = np.where((correct == 0) & (total > 0), 1, 0).cumsum(axis=-1)
    matched = np.where(correct > 0, correct, 0.5**halvings)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(total > 0, np.log(matched / total), -np.inf).sum(axis=-1) / 4
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
    return np.where((correct > 0).any(axis=-1), 100 * brevity * np.exp(logs), 0.0)


def macro_f1(sums: Array) -> Array:
    """Macro F1. K = 3 L for L labels: rows answered rightly with the label, rows answered with it, rows whose label it
    is."""
    return np.asarray(f1_of_counts(sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]))


ACCURACY = Metric(
    "accuracy",
    later("accuracy"),
    "higher",
    tr("fraction of rows whose answer is their label; blanks at its edges do not count"),
    mean,
)
MACRO_F1 = Metric("macro_f1", later("macro F1"), "higher", tr("mean over the labels of F1"), macro_f1)
LOSS = Metric("loss", later("loss"), "lower", tr("per token of the reference answer"), mean)
PERPLEXITY = Metric(
    "perplexity", later("perplexity"), "lower", tr("exp of the loss"), perplexity, tested=False
)
CHRF = Metric("chrf", "chrF", "higher", tr("by sacrebleu: chrF2, characters"), chrf)
EXACT = Metric(
    "exact",
    later("exact match"),
    "higher",
    tr("% of rows; every character counts, also blanks and line ends"),
    share,
)
TOKENS = Metric("tokens", later("tokens"), "", tr("mean length of an answer"), mean)
CHARACTERS = Metric("characters", later("characters"), "", tr("mean length of an answer"), mean)
REPETITION = Metric(
    "repetition",
    later("repetition"),
    "lower",
    tr("% of {order}-grams of tokens that occurred before", order=REPETITION_ORDER),
    share,
)
UNENDED = Metric("unended", later("cut off"), "lower", tr("% of answers that reached max_new_tokens"), share)


NOT_BY_ROW = (PERPLEXITY.key, MACRO_F1.key)
"""Metrics that say nothing about a single row."""


def compute_metrics(
    answers: Sequence[Sequence[ScoredAnswer]], references: Sequence[str | None], tokenizer: MetricTokenizer
) -> list[tuple[Metric, list[Array]]]:
    """Every metric that these rows allow, with one (R, K) table of sums per model.

    `answers[m][r]` is model m's answer to row r. A row without a reference does not count in metrics that need one: it
    has zeros in their tables.
    """
    scored_rows = [row for row, text in enumerate(references) if text is not None]
    labels = label_counts(text for text in references if text is not None)
    exact_references = [references[row] for row in scored_rows]
    scored_references = [unicodedata.normalize("NFC", text or "") for text in exact_references]
    metrics: list[tuple[Metric, list[Array]]] = []
    if labels is not None:
        predicted = [predicted_labels(model, labels) for model in answers]
        own = [None if text is None else text.strip() for text in references]
        rows = range(len(references))
        right = [
            [float(own[row] == model[row]) if own[row] is not None else 0.0 for row in rows]
            for model in predicted
        ]
        counted = [float(text is not None) for text in own]
        metrics.append((ACCURACY, [_table(list(zip(model, counted, strict=True))) for model in right]))
        metrics.append((MACRO_F1, [_label_table(model, own, list(labels)) for model in predicted]))
    losses = [_table([_loss(answer) for answer in model]) for model in answers]
    if any(table[:, 1].any() for table in losses):
        metrics += [(LOSS, losses), (PERPLEXITY, losses)]
    texts = [[unicodedata.normalize("NFC", model[row].text) for row in scored_rows] for model in answers]

    def over_all_rows(tables: Sequence[Array]) -> list[Array]:
        padded = [np.zeros((len(references), tables[0].shape[1])) for _ in tables]
        for all_rows, table in zip(padded, tables, strict=True):
            all_rows[scored_rows] = table
        return padded

    if scored_rows:
        if has_sacrebleu():
            metrics.append((CHRF, over_all_rows([chrf_counts(model, scored_references) for model in texts])))
            bleu_metric = Metric(
                "bleu", "BLEU", "higher", tr("by sacrebleu, tokenizer {name}", name=tokenizer.bleu), bleu
            )
            counts = [_bleu_counts(model, scored_references, tokenizer.bleu) for model in texts]
            metrics.append((bleu_metric, over_all_rows(counts)))
        split_references = [tokenizer.split(text) for text in scored_references]
        scores = [
            np.array([rouge(tokenizer.split(a), b) for a, b in zip(model, split_references, strict=True)])
            for model in texts
        ]
        for column, name in enumerate(("ROUGE-1", "ROUGE-2", "ROUGE-L")):
            metric = Metric(
                f"rouge{name[-1].lower()}", name, "higher", tr("F1 by {unit}", unit=tr(tokenizer.name)), share
            )
            metrics.append((metric, over_all_rows([_with_ones(model[:, column]) for model in scores])))
        exact = [
            [model[row].text == text for row, text in zip(scored_rows, exact_references, strict=True)]
            for model in answers
        ]
        tables = [_with_ones(np.array(model, dtype=float)) for model in exact]
        metrics.append((EXACT, over_all_rows(tables)))
    for metric, number in (
        (TOKENS, lambda answer: len(answer.token_ids)),
        (CHARACTERS, lambda answer: len(answer.text)),
        (REPETITION, lambda answer: repetition(answer.token_ids)),
        (UNENDED, lambda answer: not answer.ended),
    ):
        tables = [_with_ones(np.array([number(answer) for answer in model], float)) for model in answers]
        metrics.append((metric, tables))
    return metrics


def predicted_labels(answers: Sequence[ScoredAnswer], labels: Collection[str]) -> list[str | None]:
    """The label that each answer is, without blanks at its edges; None if it is none."""
    texts = (answer.text.strip() for answer in answers)
    return [text if text in labels else None for text in texts]


def _label_table(predicted: Sequence[str | None], own: Sequence[str | None], labels: Sequence[str]) -> Array:
    """The sums of `macro_f1` for each row; zeros for a row without a reference."""
    table = np.zeros((len(own), 3 * len(labels)))
    number = {label: index for index, label in enumerate(labels)}
    for row, (text, answer) in enumerate(zip(own, predicted, strict=True)):
        if text is None:
            continue
        table[row, 3 * number[text] + 2] = 1
        if answer is not None:
            table[row, 3 * number[answer] + 1] = 1
            table[row, 3 * number[answer]] = answer == text
    return table


def _loss(answer: ScoredAnswer) -> tuple[float, int]:
    return (0.0, 0) if answer.nll is None else (answer.nll, answer.trained_tokens)


def _table(rows: Sequence[Sequence[float]]) -> Array:
    return np.array(rows, dtype=float)


def _with_ones(column: Array) -> Array:
    return np.stack([column, np.ones_like(column)], axis=1)


def repetition(token_ids: Sequence[int], order: int = REPETITION_ORDER) -> float:
    """The fraction of n-grams of `order` tokens that already occurred in the same answer; 0 if there are none."""
    ngrams = [tuple(token_ids[start : start + order]) for start in range(len(token_ids) - order + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _bleu_counts(answers: Sequence[str], references: Sequence[str], tokenizer: str) -> Array:
    from sacrebleu.metrics.bleu import BLEU

    return sacrebleu_counts(BLEU(tokenize=tokenizer, force=True), answers, references)
