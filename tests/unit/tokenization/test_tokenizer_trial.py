"""A tokenizer that no one could use is refused before it is read; real ones pass, and are tried once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.bounded import child
from yeonma.bounded.child import MIB
from yeonma.errors import UserError
from yeonma.tokenization import tokenizer_trial
from yeonma.tokenization.tokenizer_trial import try_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer_trial, "_passed", set())


@pytest.fixture(autouse=True, scope="module")
def ended() -> Iterator[None]:
    yield
    child.end()


def saved(folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    description = json.loads((tokenizer or byte_level()).backend_tokenizer.to_str())
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(description | changes))
    return path


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replaced(old: str, new: str, times: int) -> dict[str, Any]:
    one = {"type": "Replace", "pattern": {"String": old}, "content": new}
    return {"type": "Sequence", "normalizers": [one] * times}


ATTACKS: dict[str, dict[str, Any]] = {
    "an expression that runs back and forth": {"pre_tokenizer": split("(x+x+)+y")},
    "one of letters": {"pre_tokenizer": split(r"(\w+\w+)+\d\d\d$")},
    "one of a word": {"pre_tokenizer": split("((pain)+(pain)+)+!")},
    "a normalizer that multiplies": {"normalizer": replaced("a", "a" * 1000, 3)},
    "a normalizer that makes long texts": {"normalizer": replaced("a", "a" * 200, 1)},
    "a decoder that multiplies": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000} for _ in range(4)
            ],
        }
    },
}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_tokenizer_without_end_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.5)
    monkeypatch.setattr(tokenizer_trial, "MEMORY", 128 * MIB)
    path = saved(tmp_path / "base", **ATTACKS[name])
    with pytest.raises(UserError) as raised:
        try_tokenizer(path)
    (problem,) = raised.value.problems
    assert problem.place == str(path) and problem.cure
    assert re.search("did not end within|needs more than|makes .* tokens|stops the library", problem.what)


def test_attacks_are_refused_when_a_base_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yeonma.model.load import load_tokenizer
    from yeonma.model.source import BaseSource

    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.5)
    path = saved(tmp_path / "base", pre_tokenizer=split("(x+x+)+y"))
    with pytest.raises(UserError, match=r"stops the library|did not end within"):
        load_tokenizer(BaseSource(str(path.parent)))


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, unigram])
def test_a_real_tokenizer_passes_and_is_tried_once(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "base", make())
    try_tokenizer(path)
    monkeypatch.setattr(tokenizer_trial, "ask", None)  # nobody is asked again
    try_tokenizer(path)
    monkeypatch.setattr(tokenizer_trial, "_passed", set())  # another process
    try_tokenizer(path)
    copy = saved(tmp_path / "copy", make())
    copy.write_bytes(path.read_bytes())
    try_tokenizer(copy)


def test_what_is_no_tokenizer_is_left_to_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for text in ("", "{}", "[" * 100_000, '{"model": 5}', "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try_tokenizer(path)


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "file" / "cache"))
    try_tokenizer(saved(tmp_path / "base"))


def test_a_pipe_and_a_huge_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="it is no file"):
        try_tokenizer(tmp_path / "tokenizer.json")
    path = saved(tmp_path / "base")
    monkeypatch.setattr(tokenizer_trial, "LARGEST", 100)
    with pytest.raises(UserError, match="are not read"):
        try_tokenizer(path)
