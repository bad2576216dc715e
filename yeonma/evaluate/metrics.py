"""Answers and references -> metrics per row and overall, their confidence intervals and significance tests.

ROUGE counts words, Korean morphemes or characters, depending on the script of the references. A metric is a function of
sums over rows, so that resampled rows need only new sums. Shapes: R rows, K sums of a metric, B resamplings.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from yeonma.data.classification import f1_of_counts, label_counts
from yeonma.messages import later, tr
from yeonma.packages import install

UNSPACED = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO"}
)
SCRIPT_SHARE = 0.2  # the fraction of letters from which on a script determines the tokenizer

REPETITION_ORDER = 4  # tokens in an n-gram
RESAMPLES = 2000
BLOCK_NUMBERS = 4_000_000  # of a resampling, in memory at once
INSTALL_SACREBLEU = install("sacrebleu")

Array = np.ndarray
Split = Callable[[str], list[str]]
Value = Callable[[Array], Array]


@dataclass(frozen=True)
class MetricTokenizer:
    """The tokenizer of ROUGE, by name and function, and that of sacrebleu for the same texts."""

    name: str
    split: Split
    bleu: str
    note: str = ""
    """How to get a better tokenizer."""


def metric_tokenizer(texts: Iterable[str]) -> MetricTokenizer:
    """Words in general; characters for scripts without spaces; for Korean, morphemes if kiwipiepy is installed."""
    scripts = _scripts(texts)
    letters = sum(scripts.values()) - scripts[""]
    if _is_korean(scripts):
        if find_spec("kiwipiepy") is not None:
            return MetricTokenizer(later("morphemes (kiwipiepy)"), morphemes, "char")
        note = tr("for ROUGE by morphemes: {install}", install=install("kiwipiepy"))
        return MetricTokenizer(later("characters"), characters, "char", note)
    unspaced = sum(scripts[name] for name in UNSPACED)
    if unspaced > SCRIPT_SHARE * letters:
        return MetricTokenizer(
            later("characters"), characters, "zh" if scripts["CJK"] == unspaced else "char"
        )
    return MetricTokenizer(later("words"), words, "13a")


def is_korean(texts: Iterable[str]) -> bool:
    """Whether more than a fifth of the letters are Hangul."""
    return _is_korean(_scripts(texts))


def _is_korean(scripts: Counter[str]) -> bool:
    return scripts["HANGUL"] > SCRIPT_SHARE * (sum(scripts.values()) - scripts[""])


def _scripts(texts: Iterable[str]) -> Counter[str]:
    """Script -> letters of it; the empty name stands for other characters."""
    return Counter(_script(char) for text in texts for char in unicodedata.normalize("NFC", text))


@cache
def _script(char: str) -> str:
    """The script of a letter, by the first word of its Unicode name: LATIN, HANGUL, CJK. Empty for non-letters."""
    return unicodedata.name(char, " ").split(" ")[0] if char.isalpha() else ""


@cache
def _is_text(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, in lower case; the visible characters if there are none."""
    text = unicodedata.normalize("NFC", text).lower()
    return "".join(char if _is_text(char) else " " for char in text).split() or _visible(text)


def characters(text: str) -> list[str]:
    """Letters, marks and digits, in lower case; the visible characters if there are none."""
    text = unicodedata.normalize("NFC", text).lower()
    return [char for char in text if _is_text(char)] or _visible(text)


def morphemes(text: str) -> list[str]:
    """Korean morphemes by kiwipiepy, without punctuation. Foreign words and numbers count as morphemes."""
    text = unicodedata.normalize("NFC", text)
    forms = [
        token.form.lower()
        for token in _kiwi().tokenize(text)
        if not token.tag.startswith("S") or token.tag in ("SL", "SH", "SN")
    ]
    return forms or characters(text)


def _visible(text: str) -> list[str]:
    return [char for char in text if not char.isspace()]


@cache
def _kiwi() -> Any:
    from kiwipiepy import Kiwi

    return Kiwi()


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


def mean(sums: Array) -> Array:
    """K = 2: a sum and a count."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def share(sums: Array) -> Array:
    return 100 * mean(sums)


def perplexity(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(mean(sums))


def chrf(sums: Array) -> Array:
    """chrF2 (Popovic 2015). K = 18: n-grams of 1 to 6 characters in the answer, in the reference, and in both."""
    hypothesis, reference, both = (sums[..., part::3].astype(float) for part in range(3))
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = np.where(counted, both / np.maximum(hypothesis, 1), 0).sum(axis=-1) / orders
    recall = np.where(counted, both / np.maximum(reference, 1), 0).sum(axis=-1) / orders
    denominator = 4 * precision + recall
    return np.asarray(100 * 5 * precision * recall / np.where(denominator > 0, denominator, 1))


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


def has_sacrebleu() -> bool:
    return find_spec("sacrebleu") is not None


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
            metrics.append((CHRF, over_all_rows([_chrf_counts(model, scored_references) for model in texts])))
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


def rouge(answer: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004): F1 of unigrams, bigrams and longest common subsequence, in [0, 1]."""
    common = _common_subsequence(answer, reference)
    rouge_l = _f1(common, len(answer), len(reference))
    rouge_1, rouge_2 = (_ngram_f1(answer, reference, order) for order in (1, 2))
    return rouge_1, rouge_2, rouge_l


def _ngram_f1(answer: Sequence[str], reference: Sequence[str], order: int) -> float:
    a, b = (
        Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
        for tokens in (answer, reference)
    )
    return _f1((a & b).total(), a.total(), b.total())


def _f1(both: int, answer: int, reference: int) -> float:
    return 2 * both / (answer + reference) if both else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence. A row of the dynamic programming table is the bits of one number
    (Hyyrö 2004, "Bit-parallel LCS-length computation revisited")."""
    positions: dict[str, int] = {}
    for position, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << position
    all_bits = (1 << len(a)) - 1
    row = all_bits
    for token in b:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & all_bits
    return len(a) - row.bit_count()


def _chrf_counts(answers: Sequence[str], references: Sequence[str]) -> Array:
    from sacrebleu.metrics.chrf import CHRF

    return _counts(CHRF(), answers, references)


def _bleu_counts(answers: Sequence[str], references: Sequence[str], tokenizer: str) -> Array:
    from sacrebleu.metrics.bleu import BLEU

    return _counts(BLEU(tokenize=tokenizer, force=True), answers, references)


def _counts(metric: Any, answers: Sequence[str], references: Sequence[str]) -> Array:
    """sacrebleu's statistics per row, as its own significance tests use them."""
    return _table(metric._extract_corpus_statistics(list(answers), [list(references)]))


# Confidence intervals by resampling rows, paired randomisation tests by swapping the answers of two models


def resampled_sums(tables: Sequence[Array], seed: int, resamples: int = RESAMPLES) -> list[Array]:
    """One (B, K) per (R, K) table: sums over rows drawn with replacement, the same for all tables (Efron 1979)."""
    rows = len(tables[0])
    draw = np.random.Generator(np.random.PCG64(seed))
    blocks: list[list[Array]] = [[] for _ in tables]
    for count in _blocks(resamples, rows):
        times = draw.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(float)
        for block, table in zip(blocks, tables, strict=True):
            block.append(times @ table)
    return [np.concatenate(block) for block in blocks]


def interval(values: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Confidence interval of resampled values (percentile method); None if fewer than 100 are finite."""
    values = values[np.isfinite(values)]
    if len(values) < 100:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def swap_test(a: Array, b: Array, value: Value, seed: int, resamples: int = RESAMPLES) -> float:
    """p-value of the difference between two models, by paired approximate randomisation (Noreen 1989; Riezler & Maxwell
    2005).

    a, b: (R, K) sums. A resampling swaps the two answers of a row with probability 1/2. The smallest possible p-value
    is 1 / (resamples + 1).
    """
    totals = a.sum(axis=0), b.sum(axis=0)
    observed = float(abs(value(totals[0]) - value(totals[1])))
    if not np.isfinite(observed):
        return 1.0
    draw = np.random.Generator(np.random.PCG64(seed))
    extreme = 0
    for count in _blocks(resamples, len(a)):
        swapped = draw.integers(0, 2, size=(count, len(a))).astype(float) @ (b - a)
        differences = abs(value(totals[0] + swapped) - value(totals[1] - swapped))
        extreme += int((differences >= observed - 1e-12 * max(1.0, observed)).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for multiple tests (Holm 1979)."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _blocks(count: int, rows: int) -> list[int]:
    size = max(1, BLOCK_NUMBERS // rows)
    return [min(size, count - start) for start in range(0, count, size)]
