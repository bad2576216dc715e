"""A full disk, a disk that fills up, an unwritable folder, two runs in one folder: all real."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Refused, everything_in
from tests.faults.tracing import ROOT, Workshop
from tests.runs import SETTINGS as RUN_SETTINGS
from tests.runs import TWO_EPOCHS, Done, arguments, articles, left_behind, sft, trained, write_jsonl
from yeonma.run_folder.checkpoint import checkpoints, read_whole

SETTINGS: dict[str, object] = {**RUN_SETTINGS, **TWO_EPOCHS}
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(23))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """An undisturbed run."""
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **SETTINGS)


class Room:
    """A small file system, and runs of `yeonma sft` with their output on it."""

    def __init__(self, saver: Workshop, place: Path, base: Path, data: Path) -> None:
        self.saver, self.place, self.base, self.data = saver, place, base, data
        self.room, self.copies = place / "room", place / "kept"
        self.room.mkdir()
        self.output = self.room / "out"

    def run(
        self, number: int, before_step: list[object] | None = None, settings: dict[str, object] = SETTINGS
    ) -> dict[str, Any]:
        paths = {"base_model": self.base, "data_path": self.data, "output_dir": self.output}
        return {
            "output": str(self.output),
            "command": ["sft", *arguments({**paths, **settings})],
            "environment": {"YEONMA_CACHE": str(self.place / "cache")},
            "log": str(self.place / f"log-{number}"),
            **({} if before_step is None else {"before_step": before_step}),
        }

    def do(self, options: str, *runs: dict[str, Any]) -> list[int]:
        """Exit statuses of consecutive runs. Before each, the space that others took is free again."""
        job = {"room": str(self.room), "options": options, "keep": str(self.copies), "jobs": list(runs)}
        self.saver.take(job)
        said = self.saver.go_on("ended")
        if "skip" in said:
            pytest.skip(said["skip"])
        assert "bug" not in said, said["bug"]
        return list(said["statuses"])

    def errors(self, number: int) -> list[str]:
        lines = (self.place / f"log-{number}").read_text(encoding="utf-8").splitlines()
        assert not any("Traceback" in line for line in lines), lines
        return [line.removeprefix("yeonma: ") for line in lines if line.startswith("yeonma: ")]


@pytest.fixture
def small(saver: Workshop, tmp_path: Path, base: Path, data: Path) -> Room:
    return Room(saver, tmp_path, base, data)


def test_a_run_that_will_not_fit_is_told_before_it_begins(small: Room) -> None:
    statuses = small.do("size=3m", small.run(0))
    (line,) = small.errors(0)
    assert statuses == [2]
    place, what, cure = line.partition(": ")[0], *line.partition(": ")[2].split("; ")
    assert place == f"output_dir {small.output}"
    match = re.fullmatch(
        r"the run needs ([\d,]+) bytes here \(([\d,]+) checkpoints of ([\d,]+) at once, and the adapter\), "
        r"and ([\d,]+) are free",
        what,
    )
    assert match is not None, what
    needed, count, checkpoint_bytes, free = (int(number.replace(",", "")) for number in match.groups())
    assert count == 5
    assert needed > count * checkpoint_bytes > free
    assert 3 * MEGABYTE - 100_000 < free <= 3 * MEGABYTE
    assert "make room" in cure and "--save_total_limit" in cure
    assert "parameters trained" not in (small.place / "log-0").read_text()  # the weights were not read
    assert not (small.copies / "0").exists() or list((small.copies / "0").iterdir()) == []


FULL = {
    "bytes": ("take_bytes", 0, r"the checkpoint of step 4 needs [\d,]+ bytes, and [\d,]+ are free"),
    "names": (
        "take_names",
        4,
        r"the checkpoint of step 4 cannot be written: No space left on device; it needs [\d,]+ bytes, "
        r"and [\d,]+ are free",
    ),
}


@pytest.mark.parametrize("of", FULL)
def test_a_disk_that_fills_up_between_saves(small: Room, whole: Done, of: str) -> None:
    """No space for bytes, which can be seen in advance, or none for another file, which only a failing call shows."""
    takes, leave, what = FULL[of]
    before_step = [4, takes, str(small.room), leave]
    statuses = small.do("size=16m,nr_inodes=400", small.run(0, before_step=before_step), small.run(1))
    assert statuses == [2, 0]
    (line,) = small.errors(0)
    assert re.search(what, line), line
    assert "make room or lower --save_total_limit" in line
    assert "then run the same command to continue from the last checkpoint" in line
    stopped = small.copies / "0"
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-2", "checkpoint-3"]
    assert [read_whole(path).step for path in checkpoints(stopped)] == [2, 3]
    assert [path.name for path in stopped.iterdir() if path.name.startswith(".")] == []
    assert small.errors(1) == []
    assert "continuing after step 3 of 10" in (small.place / "log-1").read_text()
    assert left_behind(small.copies / "1", small.room) == left_behind(whole.folder)


def test_a_disk_where_not_even_a_line_fits(small: Room, tmp_path: Path) -> None:
    """Saved checkpoints stay. The resumed run removes an incomplete line."""
    settings = {**RUN_SETTINGS, "num_epochs": 10, "save_steps": 40}
    before_step = [41, "take_bytes", str(small.room), 0]
    runs = small.run(0, before_step, settings), small.run(1, settings=settings)
    assert small.do("size=16m", *runs) == [2, 0]
    (line,) = small.errors(0)
    assert re.search(
        r"metrics\.jsonl: a step's line cannot be written: No space left on device; it needs", line
    )
    assert line.endswith(
        "0 are free; make room, then run the same command to continue from the last checkpoint"
    )
    assert [path.name for path in checkpoints(small.copies / "0")] == ["checkpoint-40"]
    assert "continuing after step 40 of 60" in (small.place / "log-1").read_text()
    plain = trained(tmp_path / "plain" / "out", small.base, small.data, **settings)
    assert left_behind(small.copies / "1", small.room) == left_behind(plain.folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, refused: Refused, data: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    cure = "give an output_dir that you may write to"
    for output in (tmp_path / "mine", tmp_path / "mine" / "new" / "out"):
        assert refused(data, output_dir=output) == [f"mine: cannot be written; {cure}"]


def test_a_file_system_that_is_read_only(small: Room) -> None:
    """Also for root."""
    assert small.do("size=16m,ro", small.run(0)) == [2]
    assert small.errors(0) == [f"{small.room}: cannot be written; give an output_dir that you may write to"]
    assert "parameters trained" not in (small.place / "log-0").read_text()


def test_the_second_of_two_runs_on_one_folder_is_refused_and_kill_9_frees_it(
    saver: Workshop, tmp_path: Path, base: Path, data: Path, whole: Done, loaded: list[str]
) -> None:
    output, settings = tmp_path / "out", {"base_model": base, "data_path": data, **SETTINGS}
    job = {
        "command": ["sft", *arguments({**settings, "output_dir": output})],
        "environment": {},
        "log": str(tmp_path / "log"),
        "before_step": [4, "pause"],
    }
    first = saver.take(job)["process"]
    saver.go_on("paused")
    try:
        before = everything_in(output)
        second = sft(output, base, data, **SETTINGS)
        assert (second.status, loaded) == (2, [])
        assert re.fullmatch(
            rf"yeonma: output_dir {output}: another run is writing here \(process {first} on "
            rf"{re.escape(socket.gethostname())}, since .* UTC\); wait until it ends, or give another output_dir\n",
            second.err,
        )
        over = sft(output, base, data, **SETTINGS, overwrite=True)
        assert (over.status, over.err) == (2, second.err)
        assert everything_in(output) == before
    finally:
        os.kill(first, signal.SIGKILL)
        assert saver.hear("ended")["ended"] == -signal.SIGKILL
    assert (output / ".lock").exists()  # the file stays, and locks nobody out
    done = trained(output, base, data, **SETTINGS)
    assert "continuing after step 3 of 10" in done.out
    assert left_behind(done.folder) == left_behind(whole.folder)
    assert not (output / ".lock").exists()


TAKING_TURNS = """
import os, sys
from pathlib import Path
from yeonma.errors import UserError
from yeonma.run_folder.lock import hold
output, inside, turns = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
while turns:
    try:
        with hold(output, print):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is inside
            os.unlink(inside)
            turns -= 1
    except UserError as error:
        assert "another run is writing here" in str(error)
"""


def test_no_two_processes_hold_a_folder_at_once(tmp_path: Path) -> None:
    """Four processes lock and release as fast as they can; the lock file appears and disappears with each."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", TAKING_TURNS, str(tmp_path / "out"), str(tmp_path / "inside"), "100"]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    assert ended == [("", 0)] * 4
    assert list((tmp_path / "out").iterdir()) == []
