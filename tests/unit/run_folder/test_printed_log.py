"""log.txt: what a run printed, over all its calls, bounded, and never in the way of a run."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.runs import articles, left_behind, model_folder, sft, trained, unfinished_copy, write_jsonl
from yeonma.errors import UserError
from yeonma.run_folder import printed_log
from yeonma.run_folder.printed_log import EARLIER_CUT, NO_MORE, PrintedLog
from yeonma.streams import log_line
from yeonma.train.interrupt import Stopped

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


def lines_of(path: Path) -> list[str]:
    """The lines, without the times before them."""
    lines = path.read_text("utf-8").splitlines()
    assert all(TIME.match(line) for line in lines)
    return [TIME.sub("", line, count=1) for line in lines]


def test_lines_before_and_after_opening_are_kept_and_appended(tmp_path: Path) -> None:
    path, shown = tmp_path / "log.txt", list[str]()
    for call in ("one", "two"):
        with PrintedLog() as printed:
            log = printed.also(shown.append)
            log(f"{call}: before")
            assert call == "two" or not path.exists()
            printed.open(path)
            log(f"{call}: after\nwith a line end")
            log_line(f"{call}: a warning")
        log_line("not within the run")
    assert shown == [
        text for call in ("one", "two") for text in (f"{call}: before", f"{call}: after\nwith a line end")
    ]
    assert lines_of(path) == [
        text
        for call in ("one", "two")
        for text in (f"{call}: before", f"{call}: after\\nwith a line end", f"yeonma: {call}: a warning")
    ]


def test_the_end_of_a_call_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    for error in (
        UserError("the disk is full", place="out", cure="make room"),
        Stopped("stopped by SIGTERM", 143),
        Stopped("said already", 143, printed=True),
        ValueError("a bug"),
    ):
        with pytest.raises(type(error)), PrintedLog() as printed:
            printed.open(path)
            raise error
    assert lines_of(path) == [
        "failed: out: the disk is full; make room",
        "ended by Stopped: stopped by SIGTERM",
        "ended by ValueError: a bug",
    ]


def test_it_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.txt"
    monkeypatch.setattr(printed_log, "MOST_KEPT", 500)
    monkeypatch.setattr(printed_log, "MOST_WRITTEN", 2000)
    for _ in range(5):
        with PrintedLog() as printed:
            printed.open(path)
            for number in range(100):
                printed.keep(f"line {number} 연마")
        text = path.read_text("utf-8")
        assert text.endswith(f"{NO_MORE}\n") and len(text.encode()) < 3500
    assert text.startswith(f"{EARLIER_CUT}\n20")


def test_what_cannot_be_opened_or_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("folder", "link", "no/such/log.txt"):
        with PrintedLog() as printed:
            printed.open(tmp_path / name)
            printed.keep("a line")
    assert not (tmp_path / "elsewhere").exists()

    def full(file: object, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with PrintedLog() as printed:
        printed.open(tmp_path / "log.txt")
        monkeypatch.setattr(printed_log, "write_all", full)
        printed.keep("a line")
    assert (tmp_path / "log.txt").read_bytes() == b""


@pytest.mark.skipif(os.name != "posix", reason="needs descriptors")
def test_a_file_that_standard_output_goes_into_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.txt"
    with path.open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with PrintedLog() as printed:
            printed.open(path)
            printed.keep("a line")
        monkeypatch.undo()
    assert path.read_text() == ""


# Runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(20))


def test_a_run_keeps_all_that_it_printed_and_a_resumed_one_appends(
    tmp_path: Path, base: Path, data: Path
) -> None:
    settings = {"val_set_size": 4, "card_rows": 1, "save_steps": 2, "max_steps": 4}
    done = trained(tmp_path / "out", base, data, **settings)
    lines = lines_of(done.folder / "log.txt")
    printed = [line for line in done.out.splitlines() if line]
    assert [line for line in lines if not line.startswith("yeonma: ")] == printed
    assert any(line.startswith("step 4/4  epoch") for line in lines)
    assert any(line.startswith("took ") for line in lines)
    assert lines[-1] == f"Adapter saved to {done.folder}"
    before = left_behind(done.folder)

    again = sft(done.folder, base, data, **settings)  # finished: nothing changes, log.txt included
    assert again.status == 0 and lines_of(done.folder / "log.txt") == lines

    resumed_folder = unfinished_copy(done.folder, tmp_path / "copy" / "out")
    shutil.rmtree(resumed_folder / "checkpoint-4")
    resumed = trained(resumed_folder, base, data, **settings)
    assert lines_of(resumed_folder / "log.txt")[: len(lines)] == lines
    more = lines_of(resumed_folder / "log.txt")[len(lines) :]
    assert any(line.startswith("continuing after step 2 of 4") for line in more)
    assert left_behind(resumed.folder)["adapter_model.safetensors"] == before["adapter_model.safetensors"]

    overwritten = trained(done.folder, base, data, **settings, overwrite=True)
    assert lines_of(overwritten.folder / "log.txt")[: len(lines)] == lines


def test_a_refused_run_leaves_no_log(tmp_path: Path, base: Path, data: Path) -> None:
    done = sft(tmp_path / "out", base, data, cutoff_len=1, over_limit="error")
    assert done.status == 2 and not (tmp_path / "out" / "log.txt").exists()
