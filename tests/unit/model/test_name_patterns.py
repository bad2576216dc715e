"""Expressions of others, with bounds."""

from __future__ import annotations

import re
from dataclasses import replace
from time import monotonic

import pytest

from yeonma.bounded.expressions import EXPRESSION
from yeonma.errors import UserError
from yeonma.model.name_patterns import MAX_LENGTH, is_name, names_of

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
]


def test_names_that_match_are_those_of_the_re_module() -> None:
    patterns = [
        "lm_head",
        r".*\.q_proj",
        r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj",
        "nothing",
        "(?i)LM_.*",
    ]
    expected = [{name for name in NAMES if re.fullmatch(pattern, name)} for pattern in patterns]
    assert names_of(patterns, NAMES, "here") == expected
    assert names_of(patterns[:2], NAMES, "here") == expected[:2]  # without a child process


@pytest.mark.parametrize("pattern", [r"((.*)*)*\.x!", r"(([a-z_.0-9]+)+)+!", r"(.*.*)*(a|aa)+(.*)*x"])
def test_expression_that_does_not_end_is_an_error_in_bounded_time(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yeonma.model.name_patterns.BOUNDS", replace(EXPRESSION, seconds=0.5))
    started = monotonic()
    with pytest.raises(UserError, match=r"here: .*; name the layers instead"):
        names_of(["q_proj", pattern], NAMES, "here")
    assert monotonic() - started < 60


@pytest.mark.parametrize("pattern", ["(((", "*", "a{99999999999}", "x" * (MAX_LENGTH + 1)])
def test_text_that_is_no_expression_is_an_error(pattern: str) -> None:
    with pytest.raises(UserError, match=r"here: "):
        names_of([pattern], NAMES, "here")


def test_only_names_are_matched_in_this_process() -> None:
    assert all(map(is_name, ["q_proj", r"self_attn\.q_proj", r".*\.experts\.down_proj", "a-b.c"]))
    assert not any(map(is_name, ["a+", "(a)", ".*.*a", "a|b", "[a]", "a$", "a?", "", "a" * (MAX_LENGTH + 1)]))
