"""What of a text is counted: words, Korean morphemes or characters, by the script of the wanted answers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

UNSPACED = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO"}
)
NOTABLE = 0.2  # a script's share of the letters from which on it decides

Split = Callable[[str], list[str]]


@dataclass(frozen=True)
class Units:
    """A way to take texts apart, its name, and sacrebleu's tokenizer that suits the same texts."""

    name: str
    split: Split
    bleu: str
    note: str = ""
    """What would have been better, and how to have it."""


def units_for(texts: Iterable[str]) -> Units:
    """Words where they stand apart; of Korean morphemes where kiwipiepy is installed, else characters; of scripts that
    are written without spaces characters."""
    scripts = Counter(_script(char) for text in texts for char in unicodedata.normalize("NFC", text))
    letters = sum(scripts.values()) - scripts[""]
    if scripts["HANGUL"] > NOTABLE * letters:
        if find_spec("kiwipiepy") is not None:
            return Units("morphemes (kiwipiepy)", morphemes, "char")
        note = "for ROUGE by morphemes: pip install kiwipiepy"
        return Units("characters", characters, "char", note)
    unspaced = sum(scripts[name] for name in UNSPACED)
    if unspaced > NOTABLE * letters:
        return Units("characters", characters, "zh" if scripts["CJK"] == unspaced else "char")
    return Units("words", words, "13a")


@cache
def _script(char: str) -> str:
    """The first word of a letter's name: LATIN, HANGUL, CJK; empty for what is no letter."""
    return unicodedata.name(char, " ").split(" ")[0] if char.isalpha() else ""


@cache
def _text_counts(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits in lower case; of a text that has none, its characters."""
    text = unicodedata.normalize("NFC", text).lower()
    return "".join(char if _text_counts(char) else " " for char in text).split() or _visible(text)


def characters(text: str) -> list[str]:
    """Letters, marks and digits one by one; of a text that has none, whatever is visible."""
    text = unicodedata.normalize("NFC", text).lower()
    return [char for char in text if _text_counts(char)] or _visible(text)


def morphemes(text: str) -> list[str]:
    """Korean morphemes by kiwipiepy, without punctuation; foreign words and numbers are morphemes too."""
    text = unicodedata.normalize("NFC", text)
    found = [
        token.form.lower()
        for token in _kiwi().tokenize(text)
        if not token.tag.startswith("S") or token.tag in ("SL", "SH", "SN")
    ]
    return found or characters(text)


def _visible(text: str) -> list[str]:
    return [char for char in text if not char.isspace()]


@cache
def _kiwi() -> Any:
    from kiwipiepy import Kiwi

    return Kiwi()


ORDER = 4  # tokens: runs of so many are looked at for repetition
INSTALL = "pip install sacrebleu==2.6.0"

Array = np.ndarray


@dataclass(frozen=True)
class Metric:
    """What a number is called, which way is better, and how it comes from sums over rows."""

    key: str
    name: str
    better: str  # "higher", "lower", or empty where neither is
    about: str
    value: Callable[[Array], Array]
    """(..., K) sums -> (...)."""
    tested: bool = True
    """Whether two models are tested for a difference in it."""


@dataclass(frozen=True, eq=False)
class Wrote:
    """What one model wrote for a row, and what the wanted answer cost it."""

    text: str
    token_ids: tuple[int, ...]
    ended: bool
    nll: float | None = None
    """Minus the log-probability of the wanted answer's tokens, summed; None where there is none or it was too long."""
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
    """K = 18: characters in the answer, in the wanted one, and in both, for runs of 1 to 6 (Popovic 2015): chrF2."""
    hypothesis, wanted, both = (sums[..., part::3].astype(float) for part in range(3))
    counted = (hypothesis > 0) & (wanted > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = np.where(counted, both / np.maximum(hypothesis, 1), 0).sum(axis=-1) / orders
    recall = np.where(counted, both / np.maximum(wanted, 1), 0).sum(axis=-1) / orders
    bottom = 4 * precision + recall
    return np.asarray(100 * 5 * precision * recall / np.where(bottom > 0, bottom, 1))


def bleu(sums: Array) -> Array:
    """K = 10: lengths of answers and wanted ones, then matching and all runs of 1 to 4 tokens (Papineni et al. 2002),
    smoothed as sacrebleu does by default (Chen & Cherry 2014, method 3)."""
    length, wanted = sums[..., 0].astype(float), sums[..., 1].astype(float)
    correct, total = sums[..., 2:6].astype(float), sums[..., 6:10].astype(float)
    halvings = np.where((correct == 0) & (total > 0), 1, 0).cumsum(axis=-1)
    matched = np.where(correct > 0, correct, 0.5**halvings)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(total > 0, np.log(matched / total), -np.inf).sum(axis=-1) / 4
        brevity = np.where(length < wanted, np.exp(1 - wanted / length), 1.0)
    return np.where((correct > 0).any(axis=-1), 100 * brevity * np.exp(logs), 0.0)


LOSS = Metric("loss", "loss", "lower", "a token of the wanted answer", mean)
PERPLEXITY = Metric("perplexity", "perplexity", "lower", "exp of the loss", perplexity, tested=False)
CHRF = Metric("chrf", "chrF", "higher", "by sacrebleu: chrF2, characters", chrf)
EXACT = Metric("exact", "exact match", "higher", "% of rows, without blanks at the ends, NFC", share)
TOKENS = Metric("tokens", "tokens", "", "length of an answer", mean)
CHARACTERS = Metric("characters", "characters", "", "length of an answer", mean)
REPETITION = Metric(
    "repetition", "repetition", "lower", f"% of runs of {ORDER} tokens that stood before", share
)
UNENDED = Metric("unended", "cut off", "lower", "% of answers that max_new_tokens ended", share)


def has_sacrebleu() -> bool:
    return find_spec("sacrebleu") is not None


def measured(
    wrote: Sequence[Sequence[Wrote]], wanted: Sequence[str | None], units: Units
) -> list[tuple[Metric, list[Array]]]:
    """Every metric that these rows allow, with (R, K) numbers for each model.

    `wrote[m][r]` is model m's answer to row r. Rows without a wanted answer have zeros where one is needed, and so do
    not count.
    """
    known = [row for row, text in enumerate(wanted) if text is not None]
    references = [unicodedata.normalize("NFC", wanted[row] or "").strip() for row in known]
    found: list[tuple[Metric, list[Array]]] = []
    losses = [_table([_loss(each) for each in model]) for model in wrote]
    if any(table[:, 1].any() for table in losses):
        found += [(LOSS, losses), (PERPLEXITY, losses)]
    texts = [[unicodedata.normalize("NFC", model[row].text).strip() for row in known] for model in wrote]

    def of_known(tables: Sequence[Array]) -> list[Array]:
        whole = [np.zeros((len(wanted), tables[0].shape[1])) for _ in tables]
        for all_rows, table in zip(whole, tables, strict=True):
            all_rows[known] = table
        return whole

    if known:
        if has_sacrebleu():
            found += [(CHRF, of_known([_chrf_counts(each, references) for each in texts]))]
            name = Metric("bleu", "BLEU", "higher", f"by sacrebleu, tokenizer {units.bleu}", bleu)
            found += [(name, of_known([_bleu_counts(each, references, units.bleu) for each in texts]))]
        split = [units.split(text) for text in references]
        scores = [
            np.array([rouge(units.split(a), b) for a, b in zip(each, split, strict=True)]) for each in texts
        ]
        for at, name_of in enumerate(("ROUGE-1", "ROUGE-2", "ROUGE-L")):
            metric = Metric(f"rouge{name_of[-1].lower()}", name_of, "higher", f"F1 by {units.name}", share)
            found += [(metric, of_known([_with_ones(each[:, at]) for each in scores]))]
        exact = [[a == b for a, b in zip(each, references, strict=True)] for each in texts]
        found += [(EXACT, of_known([_with_ones(np.array(each, dtype=float)) for each in exact]))]
    for metric, of in (
        (TOKENS, lambda each: len(each.token_ids)),
        (CHARACTERS, lambda each: len(each.text)),
        (REPETITION, lambda each: repetition(each.token_ids)),
        (UNENDED, lambda each: not each.ended),
    ):
        found += [
            (metric, [_with_ones(np.array([of(each) for each in model], dtype=float)) for model in wrote])
        ]
    return found


def _loss(wrote: Wrote) -> tuple[float, int]:
    return (0.0, 0) if wrote.nll is None else (wrote.nll, wrote.trained_tokens)


def _table(rows: Sequence[Sequence[float]]) -> Array:
    return np.array(rows, dtype=float)


def _with_ones(column: Array) -> Array:
    return np.stack([column, np.ones_like(column)], axis=1)


def repetition(ids: Sequence[int], order: int = ORDER) -> float:
    """The share of runs of `order` tokens that stood before in the same answer; 0 where there is none."""
    runs = [tuple(ids[at : at + order]) for at in range(len(ids) - order + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def rouge(answer: Sequence[str], wanted: Sequence[str]) -> tuple[float, float, float]:
    """F1 of runs of one and of two units and of the longest common subsequence (Lin 2004), in [0, 1]."""
    common = _common_subsequence(answer, wanted)
    longest = _f1(common, len(answer), len(wanted))
    one, two = (_runs_f1(answer, wanted, order) for order in (1, 2))
    return one, two, longest


def _runs_f1(answer: Sequence[str], wanted: Sequence[str], order: int) -> float:
    a, b = (Counter(zip(*(units[at:] for at in range(order)), strict=False)) for units in (answer, wanted))
    return _f1((a & b).total(), a.total(), b.total())


def _f1(both: int, answer: int, wanted: int) -> float:
    return 2 * both / (answer + wanted) if both else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, a whole row of the table at once as the bits of one number
    (Hyyrö 2004, "Bit-parallel LCS-length computation revisited")."""
    places: dict[str, int] = {}
    for at, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << at
    every = (1 << len(a)) - 1
    row = every
    for unit in b:
        matches = row & places.get(unit, 0)
        row = (row + matches | row - matches) & every
    return len(a) - row.bit_count()


def _chrf_counts(answers: Sequence[str], wanted: Sequence[str]) -> Array:
    from sacrebleu.metrics.chrf import CHRF

    return _counts(CHRF(), answers, wanted)


def _bleu_counts(answers: Sequence[str], wanted: Sequence[str], tokenizer: str) -> Array:
    from sacrebleu.metrics.bleu import BLEU

    return _counts(BLEU(tokenize=tokenizer, force=True), answers, wanted)


def _counts(metric: Any, answers: Sequence[str], wanted: Sequence[str]) -> Array:
    """sacrebleu's numbers of each row, as its own significance test takes them."""
    return _table(metric._extract_corpus_statistics(list(answers), [list(wanted)]))
