"""Expressions are matched as `re.fullmatch` does, and end within their bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from yeonma.bounded import child
from yeonma.bounded.child import MIB, Bounds
from yeonma.bounded.expressions import bounded_match
from yeonma.errors import UserError

NAMES = [f"model.layers.{n}.{part}" for n in range(30) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.fixture(autouse=True, scope="module")
def ended() -> Iterator[None]:
    yield
    child.end()


@pytest.mark.parametrize(
    "pattern", [r".*\.q_proj", r"model\.layers\.[0-9]\.mlp\..*", "", "(?i).*PROJ", "나.*"]
)
def test_the_same_names_match_as_by_re(pattern: str) -> None:
    names = [*NAMES, "나비", ""]
    expected = [re.fullmatch(pattern, name) is not None for name in names]
    assert bounded_match(pattern, names, place="target_modules") == expected


def test_no_names() -> None:
    assert bounded_match(".*", [], place="x") == []


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(.*)*x\1", r"((a?)+){9}x", r"(a|aa)+b"])
def test_an_expression_without_end_is_an_error(pattern: str) -> None:
    with pytest.raises(UserError) as raised:
        bounded_match(
            pattern, ["a" * 60 + "!"], place="adapter_config.json", bounds=Bounds(0.3, 64 * MIB, MIB)
        )
    (problem,) = raised.value.problems
    assert problem.place == "adapter_config.json" and problem.cure
    assert "did not end within 0.3 seconds" in problem.what


@pytest.mark.parametrize("pattern", ["(", "*", "a{2,1}", "(?P<a>x)(?P<a>y)", "(" * 5000, "\\"])
def test_what_is_no_expression_is_an_error(pattern: str) -> None:
    with pytest.raises(UserError, match="is no regular expression") as raised:
        bounded_match(pattern, ["a"], place="p")
    assert len(str(raised.value)) < 1000
