"""A generated answer beside the wanted one -> numbers: ROUGE, chrF, JSON. No model is needed.

ROUGE counts words, Korean morphemes or characters, depending on the script of the references. Shapes: R rows, K sums of
a metric.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from yeonma.data.strict_json import SPACE, Fault, parse
from yeonma.messages import later, tr
from yeonma.packages import install
from yeonma.resampling import Array

UNSPACED = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO"}
)
SCRIPT_SHARE = 0.2  # the fraction of letters from which on a script determines the tokenizer

INSTALL_SACREBLEU = install("sacrebleu")

Split = Callable[[str], list[str]]


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


def chrf_counts(answers: Sequence[str], references: Sequence[str]) -> Array:
    from sacrebleu.metrics.chrf import CHRF

    return sacrebleu_counts(CHRF(), answers, references)


def chrf(sums: Array) -> Array:
    """chrF2 (Popovic 2015). K = 18: n-grams of 1 to 6 characters in the answer, in the reference, and in both."""
    hypothesis, reference, both = (sums[..., part::3].astype(float) for part in range(3))
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = np.where(counted, both / np.maximum(hypothesis, 1), 0).sum(axis=-1) / orders
    recall = np.where(counted, both / np.maximum(reference, 1), 0).sum(axis=-1) / orders
    denominator = 4 * precision + recall
    return np.asarray(100 * 5 * precision * recall / np.where(denominator > 0, denominator, 1))


def sacrebleu_counts(metric: Any, answers: Sequence[str], references: Sequence[str]) -> Array:
    """sacrebleu's statistics per row, as its own significance tests use them."""
    return np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), dtype=float)


def has_sacrebleu() -> bool:
    return find_spec("sacrebleu") is not None


def json_value(text: str) -> Any:
    """The value that a text is in JSON, with blanks at its edges or without. Raises Fault if it is none: a mark of code
    around it is a fault, too, and so are NaN and a key given twice."""
    value, end = parse(text, len(text) - len(text.lstrip(SPACE)))
    if rest := text[end:].lstrip(SPACE):
        raise Fault(tr("more text after the value"), len(text) - len(rest))
    return value


def json_scores(answer: str, reference: str) -> tuple[float, float]:
    """(1 if the answer is the reference's value in JSON, else 0; the fraction of the reference's fields that the answer
    has with the same value). A field is a value that is no object and no list with something in it, at its path.

    An answer that is no JSON has 0 in both. Raises Fault if the reference is no JSON.
    """
    wanted = _fields(json_value(reference))
    try:
        found = _fields(json_value(answer))
    except Fault:
        return 0.0, 0.0
    right = sum(path in found and _is_same(found[path], value) for path, value in wanted.items())
    return float(right == len(wanted) == len(found)), right / len(wanted)


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    fields: dict[tuple[str | int, ...], Any] = {}
    for key, inner in items:
        fields |= _fields(inner, (*path, key))
    return fields or {path: value}


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of fields are equal in JSON, where 1 is 1.0 and true is no number."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
