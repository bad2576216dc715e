"""Metrics of answers, compared with well-known packages where these exist, otherwise with values computed by hand."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest

from yeonma.evaluate import metrics
from yeonma.evaluate.metrics import (
    Metric,
    ScoredAnswer,
    bleu,
    characters,
    chrf,
    compute_metrics,
    metric_tokenizer,
    morphemes,
    repetition,
    rouge,
    words,
)
from yeonma.resampling import holm, interval, resampled_sums, swap_test

ENGLISH = (
    ("The old ferry will run every hour from June.", "The ferry runs every half hour from June"),
    ("[Town] Library reopens!", "[Town] Library reopens after repairs"),
    ("no", "Bees settle on the bus depot's roof, all nine hives of them"),
    ("", "Second boat doubles ferries"),
    ("It isn't a co-operative; it's 3.5% of 1,000", "it isn't a cooperative: it is 3.5% of 1000"),
)
KOREAN = (
    ("마을 도서관이 다시 문을 열었다", "마을 도서관, 석 달 만에 다시 문 열어"),
    ("새 배가 온다", "두 번째 배로 운항 두 배"),
)


def scored_answers(*texts: str, **more: Any) -> list[ScoredAnswer]:
    return [ScoredAnswer(text, tuple(text.encode()), True, **more) for text in texts]


def values(answers: list[list[ScoredAnswer]], references: list[str | None]) -> dict[str, list[float]]:
    results = compute_metrics(answers, references, metric_tokenizer(text for text in references if text))
    return {
        metric.key: [float(metric.value(table.sum(axis=0))) for table in tables] for metric, tables in results
    }


def scrambled(pairs: tuple[tuple[str, str], ...], count: int) -> list[tuple[str, str]]:
    rng = random.Random(3)
    pool = [word for pair in pairs for text in pair for word in text.split()]
    sides = [[" ".join(rng.choices(pool, k=rng.randint(1, 14))) for _ in range(count)] for _ in range(2)]
    return [*pairs, *zip(*sides, strict=True)]


@pytest.mark.parametrize("pairs", [ENGLISH, KOREAN], ids=["english", "korean"])
def test_chrf_and_bleu_equal_sacrebleu_for_any_resampling(pairs: Any) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    pairs = scrambled(pairs, 30)
    answers, references = [a for a, _ in pairs], [b for _, b in pairs]
    tokenizer = metric_tokenizer(references).bleu
    tables = metrics._chrf_counts(answers, references), metrics._bleu_counts(answers, references, tokenizer)
    rng = np.random.default_rng(0)
    for size in (1, 1, 1, 2, 3, 8, len(pairs)):
        rows = rng.integers(0, len(pairs), size)
        sample, refs = [answers[row] for row in rows], [[references[row] for row in rows]]
        for table, value, expected in (
            (tables[0], chrf, sacrebleu.corpus_chrf(sample, refs).score),
            (tables[1], bleu, sacrebleu.corpus_bleu(sample, refs, tokenize=tokenizer, force=True).score),
        ):
            assert float(value(table[rows].sum(axis=0))) == pytest.approx(expected, abs=1e-9)
    stacked = np.stack([tables[1][:5].sum(axis=0), tables[1].sum(axis=0)])
    assert bleu(stacked).tolist() == [float(bleu(row)) for row in stacked]


def test_english_rouge_equals_rouge_score() -> None:
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = scorers.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for answer, reference in scrambled(ENGLISH, 200):
        theirs = scorer.score(reference, answer)
        ours = rouge(words(answer), words(reference))
        assert ours == pytest.approx([theirs[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")])


def test_common_subsequence_equals_plain_dynamic_programming() -> None:
    rng = random.Random(1)
    for _ in range(20):
        a, b = (rng.choices("abcdef", k=rng.randint(0, 150)) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert metrics._common_subsequence(a, b) == table[-1, -1]


@pytest.mark.parametrize(
    "text",
    [
        "도서관이 문을 연다",
        "図書館が開く",
        "مكتبة القرية تفتح",
        "Библиотека открылась",
        "पुस्तकालय खुला",
        "🎉 🎉!",
        "?!",
    ],
)
@pytest.mark.parametrize("split", [words, characters, morphemes])
def test_rouge_of_a_text_with_itself_is_one(text: str, split: Any) -> None:
    if split is morphemes:
        pytest.importorskip("kiwipiepy")
    assert rouge(split(text), split(text))[0] == rouge(split(text), split(text))[2] == 1.0


def test_korean_uses_morphemes_with_kiwipiepy_and_else_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    references = [text for _, text in KOREAN]
    if metrics.find_spec("kiwipiepy") is not None:
        assert metric_tokenizer(references).name == "morphemes (kiwipiepy)"
        # particles are separate morphemes, so the nouns match
        assert rouge(morphemes("도서관이"), morphemes("도서관을"))[0] == 0.5
        assert morphemes("GPU 3대를, 샀다.")[:2] == ["gpu", "3"]
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    tokenizer = metric_tokenizer(references)
    assert (tokenizer.name, tokenizer.bleu) == ("characters", "char")
    assert 'pip install "kiwipiepy==' in tokenizer.note
    assert rouge(tokenizer.split("가나다!"), tokenizer.split("가 나라."))[0] == pytest.approx(2 / 3)


def test_decomposed_hangul_counts_as_composed() -> None:
    import unicodedata

    text = "도서관 문"
    results = values([scored_answers(unicodedata.normalize("NFD", text), "다름")], [text, "같음"])
    assert results["rouge1"][0] >= 50.0


def test_an_exact_match_has_every_blank_and_line_end() -> None:
    answers = scored_answers("  x\n", "x", "x ", "  x", "한", "x\r\n")
    references = ["  x\n", "  x\n", "x", "  x\n", "\u1112\u1161\u11ab", "x\n"]
    assert values([answers], references)["exact"] == [pytest.approx(100 / 6)]


@pytest.mark.parametrize(
    ("text", "name", "bleu_tokenizer"),
    [
        ("Bees settle on the roof", "words", "13a"),
        ("Библиотека открылась снова", "words", "13a"),
        ("図書館が再び開く", "characters", "char"),
        ("图书馆重新开放", "characters", "zh"),
        ("12:30 - 14:00", "words", "13a"),
    ],
)
def test_script_decides_the_metric_tokenizer(text: str, name: str, bleu_tokenizer: str) -> None:
    assert (metric_tokenizer([text]).name, metric_tokenizer([text]).bleu) == (name, bleu_tokenizer)


def test_mostly_korean_references_use_char_bleu() -> None:
    assert metric_tokenizer(["도서관이 다시 문을 열었다", "Library reopens"]).bleu == "char"


def test_repetition_is_the_share_of_repeated_4_grams() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0.0
    assert repetition([7] * 103) == 0.99
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_loss_is_per_token_and_perplexity_its_exponential() -> None:
    answers = [
        ScoredAnswer("a", (1,), True, 6.0, 2),
        ScoredAnswer("b", (1,), False, 2.0, 6),
        ScoredAnswer("c", (1,), True, None, 9),
    ]
    results = values([answers], ["x", "y", "z"])
    assert results["loss"] == [1.0]
    assert results["perplexity"] == [pytest.approx(np.e)]
    assert results["unended"] == [pytest.approx(100 / 3)]


def test_rows_without_references_count_only_for_other_metrics() -> None:
    results = values([scored_answers("same", "what a long one", "other")], ["same", None, "thing"])
    assert results["exact"] == [50.0]
    assert results["characters"] == [(4 + 15 + 5) / 3]
    without_references = values([scored_answers("a", "b")], [None, None])
    assert set(without_references) == {"tokens", "characters", "repetition", "unended"}


def test_chrf_and_bleu_are_omitted_without_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    results = values([scored_answers("a b")], ["a c"])
    assert {"chrf", "bleu"}.isdisjoint(results)
    assert results["rouge1"] == [50.0]


# Confidence intervals and significance tests


def two_models(rows: int, gain: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 3, rows)  # shared by both models
    ones = np.ones(rows)
    a = np.stack([difficulty + rng.normal(0, 1, rows), ones], axis=1)
    b = np.stack([difficulty + gain + rng.normal(0, 1, rows), ones], axis=1)
    return a, b


def test_interval_of_a_mean_matches_the_normal_approximation() -> None:
    a, _ = two_models(400, 0.0)
    low, high = interval(metrics.mean(resampled_sums([a], seed=1)[0])) or (0, 0)
    mean, standard_error = a[:, 0].mean(), a[:, 0].std() / 20
    assert low == pytest.approx(mean - 1.96 * standard_error, abs=0.1 * standard_error + 0.02)
    assert high == pytest.approx(mean + 1.96 * standard_error, abs=0.1 * standard_error + 0.02)


def test_pairing_rows_narrows_the_interval_of_a_difference() -> None:
    a, b = two_models(100, 0.5)
    first, second = (metrics.mean(sums) for sums in resampled_sums([a, b], seed=1))
    paired = np.ptp(interval(second - first) or (0, 0))
    unpaired = np.ptp(interval(second[::-1] - first) or (0, 0))
    assert paired < unpaired / 2


def test_resampling_depends_on_the_seed_but_not_on_the_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = list(two_models(50, 0.1))
    once = resampled_sums(tables, seed=5)
    monkeypatch.setattr("yeonma.resampling.BLOCK_NUMBERS", 999)
    for first, second in zip(once, resampled_sums(tables, seed=5), strict=True):
        np.testing.assert_allclose(first, second)
    assert not np.allclose(once[0], resampled_sums(tables, seed=6)[0])


def test_swap_test_finds_real_differences_and_few_false_ones() -> None:
    a, b = two_models(100, 1.0)
    assert swap_test(a, b, metrics.mean, seed=0) == pytest.approx(1 / 2001)
    assert swap_test(a, a.copy(), metrics.mean, seed=0) == 1.0
    p_values = [
        swap_test(*two_models(40, 0.0, seed), metrics.mean, seed=0, resamples=200) for seed in range(200)
    ]
    assert 0.02 <= np.mean([p_value <= 0.05 for p_value in p_values]) <= 0.09
    assert 0.4 <= np.mean(p_values) <= 0.6


def test_swap_test_of_few_rows_matches_the_exact_p_value() -> None:
    a, b = (np.array([[x, 1.0] for x in column]) for column in ([0, 0, 0, 0, 0], [1, 1, 1, 1, -0.5]))
    # of the 32 ways to swap, those with |sum| >= 3.5: all signs but the last's equal, 4 ways
    p_value = swap_test(a, b, metrics.mean, seed=0, resamples=20_000)
    assert p_value == pytest.approx(4 / 32, abs=0.01)


def test_holm_corrects_p_values_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_metric_keys_are_unique() -> None:
    results = compute_metrics([scored_answers("a b c")], ["a b"], metric_tokenizer(["a b"]))
    keys = [metric.key for metric, _ in results]
    assert len(keys) == len(set(keys))
    assert all(isinstance(metric, Metric) and metric.name for metric, _ in results)
