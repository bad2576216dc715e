from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import yeonma.tokenization.cache
from tests.tokenizers import byte_level
from yeonma.data.rows import Row, Rows
from yeonma.data.task import LABELLED
from yeonma.data.template import Template
from yeonma.tokenization.cache import build_store
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.store import TokenStore

TEMPLATE = Template.parse("{question}\n{answer}")


def labelled(count: int) -> Rows:
    def rows() -> Iterator[Row]:
        for number in range(1, count + 1):
            values = {"question": f"Why {number}?", "answer": "a" * (number % 5 + 1), "label": number % 3 > 0}
            yield Row(number, values, f"labels.jsonl:{number}")

    return Rows("labels.jsonl", "labels", ("question", "answer", "label"), rows)


def answers_of(store: TokenStore) -> list[tuple[Any, ...]]:
    """Row, role, tokens and mask of every answer that is trained."""
    return [
        (example.row, int(store.roles[index]), example.token_ids.tolist(), example.trained.tolist())
        for index, example in enumerate(map(store.example, range(len(store))))
    ]


@pytest.mark.parametrize("rows_a_chunk", [1, 4, 7])
def test_labelled_answers_read_in_several_chunks_keep_their_tokens(
    rows_a_chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> TokenStore:
        return build_store(
            labelled(20), TEMPLATE, None, byte_level(), TokenRules(cutoff_len=64), folder, task=LABELLED
        )

    in_one = build(tmp_path / "one")
    monkeypatch.setattr(yeonma.tokenization.cache, "ROWS_A_CHUNK", rows_a_chunk)
    assert answers_of(build(tmp_path / "several")) == answers_of(in_one)
