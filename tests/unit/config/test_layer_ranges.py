"""Layers by their numbers: what a text names, and what it cannot."""

from __future__ import annotations

import pytest

from yeonma.config.layer_ranges import as_ranges, layer_ranges, layers_in, layers_lacking
from yeonma.config.parse import read_config
from yeonma.config.settings import LoraSettings
from yeonma.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-3", {0, 1, 2, 3}),
        ("0-1,4,6-", {0, 1, 4, 6, 7}),
        ("[2, 5]", {2, 5}),
        ("7", {7}),
        ("3-3", {3}),
    ],
)
def test_text_names_layers(text: str, expected: set[int]) -> None:
    assert layers_in(layer_ranges(text), range(8)) == expected
    assert layers_lacking(layer_ranges(text), range(8)) == []
    assert layers_in(layer_ranges(as_ranges(sorted(expected))), range(8)) == expected


def test_ranges_beyond_the_model_are_named() -> None:
    assert layers_lacking(layer_ranges("0-3,8,7-,6-9,8-"), range(8)) == ["8", "6-9", "8-"]


@pytest.mark.parametrize("text", ["x", "-3", "5-2", "3,,4", "1-2-3", "0.5"])
def test_text_that_names_no_layers_is_an_error_with_a_cure(text: str) -> None:
    with pytest.raises(UserError, match=r"names no layers: .*; give numbers and ranges such as 0-3,8,10-"):
        read_config(LoraSettings, ["--lora_layers", text], verb="sft")
