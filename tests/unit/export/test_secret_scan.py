"""Absolute paths, and what only looks like one."""

from __future__ import annotations

import json

import pytest

from yeonma.export.secret_scan import problems, renamed, without_paths


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("data_path: /home/mina/news.jsonl", "data_path: news.jsonl"),
        ("'/data/x/rows.jsonl', /srv/y/", "'rows.jsonl', y"),
        (r"C:\Users\mina\rows.csv", "rows.csv"),
        (r"\\server\share\rows.csv", "rows.csv"),
        ("file:///home/mina/a.txt", "a.txt"),
        ("경로는 /자료/뉴스/기사.jsonl 입니다", "경로는 기사.jsonl 입니다"),
    ],
)
def test_paths_lose_all_but_their_last_part(text: str, left: str) -> None:
    assert problems("README.md", text, {})
    assert without_paths("README.md", text) == left
    assert not problems("README.md", left, {})
    held = json.dumps({"a": [text]})
    assert problems("x.json", held, {})[0].place == "x.json: a[0]"
    assert json.loads(without_paths("x.json", held)) == {"a": [left]}


@pytest.mark.parametrize(
    "text",
    [
        "and/or, 11/25/2026, km/h/s",
        "https://example.org/a/b/c.html",
        "<b>x</b> </div></p>",
        "/think and /no_think",
        "./rows/news.jsonl ../a/b ~/models/x",
        "a // b /* c */",
        "sk-learn, hf_hub, AKIA",
    ],
)
def test_other_strokes_are_no_paths(text: str) -> None:
    assert problems("README.md", text, {}) == []
    assert without_paths("README.md", text) == text


def test_json_that_holds_no_path_keeps_its_bytes() -> None:
    text = '{"a":  "b", "n": 1.0}'
    assert without_paths("x.json", text) is text
    assert renamed("x.json", text, "/m/base", "o/base") is text


def test_a_name_is_replaced_only_as_a_whole() -> None:
    text = "/m/base /m/base2 /m/base/x /m/base. x/m/base '/m/base'"
    assert renamed("README.md", text, "/m/base", "o/b") == "o/b /m/base2 /m/base/x o/b. x/m/base 'o/b'"


def test_short_values_of_the_environment_are_no_secrets() -> None:
    assert problems("README.md", "key: main", {"X_KEY": "main"}) == []
    assert problems("README.md", "key: 0123456789ab", {"X_KEY": "0123456789ab"})[0].place == "README.md:1"
