"""What stays private in the files of a push besides secrets: paths, home directories, names; and what only looks so."""

from __future__ import annotations

import json
import zlib

import pytest

from tests.secret_shapes import png
from yeonma.export.publish_check import Private, find_problems, png_text, with_other_base, without_paths

NAMES = ("minsu", "김민수")


@pytest.mark.parametrize(
    ("text", "shortened"),
    [
        ("data_path: /home/mina/news.jsonl", "data_path: news.jsonl"),
        ("'/data/x/rows.jsonl', /srv/y/", "'rows.jsonl', y"),
        (r"C:\Users\mina\rows.csv", "rows.csv"),
        (r"\\server\share\rows.csv", "rows.csv"),
        ("file:///home/mina/a.txt", "a.txt"),
        ("경로는 /자료/뉴스/기사.jsonl 입니다", "경로는 기사.jsonl 입니다"),
        # home directories are hidden whole
        ("/home/minsu", "~"),
        ("in /Users/minsu/ there", "in ~ there"),
        (r"C:\Users\minsu", "~"),
        ("C:/Users/minsu", "~"),
        (r'path = "C:\\Users\\minsu\\rows.csv"', 'path = "rows.csv"'),
        ("/mnt/c/Users/minsu", "~"),
        ("file:///home/minsu", "~"),
        ("/home/minsu/minsu", "~"),
        ("/home/somebody/somebody-rows.csv", "user-rows.csv"),
        # blanks and Korean letters
        ("/home/김 민수/내 자료/기사 1.jsonl", "기사 1.jsonl"),
        (r"C:\Users\Min Su\내 문서\rows.csv", "rows.csv"),
        ("`/data/my files/a b.csv`", "`a b.csv`"),
        # names as words
        ("trained by minsu, minsu_run-2, minsu가 김민수의", "trained by user, user_run-2, user가 user의"),
        ("/data/minsu", "user"),
    ],
)
def test_paths_are_shortened_and_homes_and_names_hidden_whole(text: str, shortened: str) -> None:
    private = Private(NAMES)
    assert find_problems("README.md", text, {}, private)
    assert without_paths("README.md", text, NAMES) == shortened
    assert not find_problems("README.md", shortened, {}, private)
    as_json = json.dumps({"a": [text]})
    assert find_problems("x.json", as_json, {}, private)[0].place == "x.json: a[0]"
    assert json.loads(without_paths("x.json", as_json, NAMES)) == {"a": [shortened]}


@pytest.mark.parametrize(
    "text",
    [
        "and/or, 11/25/2026, km/h/s",
        "https://example.org/a/b/c.html https://example.org/home/minna/x",
        "<b>x</b> </div></p>",
        "/think and /no_think",
        "./rows/news.jsonl ../a/b ~/models/x",
        "a // b /* c */",
        "sk-learn, hf_hub, AKIA",
        "Minsu, minsung and xminsu",
        "data:image/png;base64,iVBORw0+/E/NRSp5/2FnDk=",
    ],
)
def test_other_slashes_and_words_are_neither_paths_nor_names(text: str) -> None:
    assert find_problems("README.md", text, {}, Private(NAMES)) == []
    assert without_paths("README.md", text, NAMES) == text


def test_json_without_paths_keeps_its_bytes() -> None:
    text = '{"a":  "b", "n": 1.0}'
    assert without_paths("x.json", text) is text
    assert with_other_base("x.json", text, "/m/base", "o/base") is text


def test_keys_of_json_that_would_become_one_stay_and_are_reported() -> None:
    text = json.dumps({"/a/b/x": 1, "/c/d/x": 2, "e": "/f/g/y"})
    hidden = without_paths("x.json", text)
    assert json.loads(hidden) == {"/a/b/x": 1, "/c/d/x": 2, "e": "y"}
    assert len(find_problems("x.json", hidden, {})) == 2


def test_a_name_is_replaced_only_as_a_whole() -> None:
    text = "/m/base /m/base2 /m/base/x /m/base. x/m/base '/m/base'"
    assert (
        with_other_base("README.md", text, "/m/base", "o/b") == "o/b /m/base2 /m/base/x o/b. x/m/base 'o/b'"
    )


def test_short_environment_variables_are_not_secrets() -> None:
    assert find_problems("README.md", "key: main", {"X_KEY": "main"}) == []
    assert (
        find_problems("README.md", "key: 0123456789ab", {"X_KEY": "0123456789ab"})[0].place == "README.md:1"
    )


def test_deeply_nested_json_is_read_as_text() -> None:
    text = "[" * 5000 + '"/home/minsu"' + "]" * 5000
    assert find_problems("x.json", text, {})[0].what == "contains a path of this machine, /home/minsu"


def test_all_text_of_a_picture_is_read() -> None:
    packed = zlib.compress(b"in iTXt")
    picture = png(
        (b"tEXt", b"Title\0in tEXt"),
        (b"zTXt", b"Title\0\0" + zlib.compress(b"in zTXt")),
        (b"iTXt", b"Title\0\x01\0ko\0\xec\xa0\x9c\xeb\xaa\xa9\0" + packed),
        (b"eXIf", b"in eXIf"),
        (b"zTXt", b"Title\0\0damaged"),
    )
    text = png_text(picture + b"after the end")
    for part in ("in tEXt", "in zTXt", "in iTXt", "in eXIf", "after the end"):
        assert part in text
    assert "cut off" in png_text(picture[:8] + b"\0\0\xff\xfftEXtcut off")
    assert png_text(b"no picture") == "no picture"
