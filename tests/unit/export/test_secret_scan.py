"""Absolute paths and secrets in exported text, and text that only resembles them."""

from __future__ import annotations

import json

import pytest

from yeonma.export.secret_scan import find_problems, replace_name, without_paths


@pytest.mark.parametrize(
    ("text", "shortened"),
    [
        ("data_path: /home/mina/news.jsonl", "data_path: news.jsonl"),
        ("'/data/x/rows.jsonl', /srv/y/", "'rows.jsonl', y"),
        (r"C:\Users\mina\rows.csv", "rows.csv"),
        (r"\\server\share\rows.csv", "rows.csv"),
        ("file:///home/mina/a.txt", "a.txt"),
        ("경로는 /자료/뉴스/기사.jsonl 입니다", "경로는 기사.jsonl 입니다"),
    ],
)
def test_paths_are_shortened_to_their_last_part(text: str, shortened: str) -> None:
    assert find_problems("README.md", text, {})
    assert without_paths("README.md", text) == shortened
    assert not find_problems("README.md", shortened, {})
    as_json = json.dumps({"a": [text]})
    assert find_problems("x.json", as_json, {})[0].place == "x.json: a[0]"
    assert json.loads(without_paths("x.json", as_json)) == {"a": [shortened]}


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
def test_other_slashes_are_not_paths(text: str) -> None:
    assert find_problems("README.md", text, {}) == []
    assert without_paths("README.md", text) == text


def test_json_without_paths_keeps_its_bytes() -> None:
    text = '{"a":  "b", "n": 1.0}'
    assert without_paths("x.json", text) is text
    assert replace_name("x.json", text, "/m/base", "o/base") is text


def test_a_name_is_replaced_only_as_a_whole() -> None:
    text = "/m/base /m/base2 /m/base/x /m/base. x/m/base '/m/base'"
    assert replace_name("README.md", text, "/m/base", "o/b") == "o/b /m/base2 /m/base/x o/b. x/m/base 'o/b'"


def test_short_environment_variables_are_not_secrets() -> None:
    assert find_problems("README.md", "key: main", {"X_KEY": "main"}) == []
    assert (
        find_problems("README.md", "key: 0123456789ab", {"X_KEY": "0123456789ab"})[0].place == "README.md:1"
    )
