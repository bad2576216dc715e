"""Durations in words, in both languages."""

from __future__ import annotations

import pytest

from yeonma.durations import estimated, in_two_units


@pytest.mark.parametrize(
    ("seconds", "english", "korean"),
    [
        (0, "0s", "0초"),
        (59.6, "1m00s", "1분 00초"),
        (3599.4, "59m59s", "59분 59초"),
        (3661, "1h01m", "1시간 01분"),
        (90_000, "1d01h", "1일 01시간"),
    ],
)
def test_durations_have_two_units(
    seconds: float, english: str, korean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_two_units(seconds) == english
    monkeypatch.setenv("YEONMA_LANG", "ko")
    assert in_two_units(seconds) == korean


@pytest.mark.parametrize(
    ("seconds", "english", "korean"),
    [
        (0.4, "under 1s", "1초 미만"),
        (99.4, "99s", "99초"),
        (725, "12m", "12분"),
        (6010, "1h40m", "1시간 40분"),
    ],
)
def test_estimates_are_as_coarse_as_they_are(
    seconds: float, english: str, korean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert estimated(seconds) == english
    monkeypatch.setenv("YEONMA_LANG", "ko")
    assert estimated(seconds) == korean
