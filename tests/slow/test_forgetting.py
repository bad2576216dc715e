"""Runs on SmolLM2-135M-Instruct, which comes from the hub or from PyPI: the card warns of the one that forgets alone.

They are the runs of docs/evaluate.md, which has their numbers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import command
from yeonma.errors import UserError
from yeonma.model.smollm2 import fetch

TITLES = ["--data_path", "sample:news_en", "--max_rows", "60", "--template", "sample:title_en"]


@pytest.fixture(scope="module")
def smollm2() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE", raising=False)  # the default cache may hold the model
        try:
            return fetch(print)
        except UserError as error:
            pytest.skip(f"SmolLM2 is not here, and cannot be fetched: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(("learning_rate", "is_lost"), [("2e-3", True), ("1e-4", False)])
def test_a_run_that_forgets_is_named(learning_rate: str, is_lost: bool, smollm2: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [*TITLES, "--learning_rate", learning_rate, "--card_rows", "1", "--general_questions", "64"]
    done = command(output, "sft", "--base_model", smollm2, *words, "--output_dir", str(output))
    assert done.status == 0, done.err
    card = (output / "README.md").read_text("utf-8")
    for text in (done.out, card):
        assert ("This is a loss of general abilities." in text) is is_lost
    assert "32 general questions (English): the base finds the right answer the most likely in 22" in done.out
    assert "General questions (Korean): the base answers them by chance" in done.out
    share = float(done.out.partition("the trained model keeps ")[2].partition("%")[0])
    assert 70 < share < 90 if is_lost else share > 97
