"""Real faults of the output folder: a small disk, a disk that fills up, no write permission, two runs at once."""

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

# without sample answers, which are shorter in this process than in others
SETTINGS: dict[str, object] = {**RUN_SETTINGS, **TWO_EPOCHS, "card_rows": 0}
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(23))


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """A run without faults."""
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **SETTINGS)


class SmallDisk:
    """A small file system, and runs of `yeonma sft` with their output on it."""

    def __init__(self, saver: Workshop, folder: Path, base: Path, data: Path) -> None:
        self.saver, self.folder, self.base, self.data = saver, folder, base, data
        self.mount, self.copies = folder / "room", folder / "kept"
        self.mount.mkdir()
        self.output = self.mount / "out"

    def run(
        self, number: int, before_step: list[object] | None = None, settings: dict[str, object] = SETTINGS
    ) -> dict[str, Any]:
        paths = {"base_model": self.base, "data_path": self.data, "output_dir": self.output}
        return {
            "output": str(self.output),
            "command": ["sft", *arguments({**paths, **settings})],
            "environment": {"YEONMA_CACHE": str(self.folder / "cache")},
            "log": str(self.folder / f"log-{number}"),
            **({} if before_step is None else {"before_step": before_step}),
        }

    def run_all(self, options: str, *runs: dict[str, Any]) -> list[int]:
        """The exit statuses of consecutive runs. Space taken by other processes is freed before each."""
        job = {"room": str(self.mount), "options": options, "keep": str(self.copies), "jobs": list(runs)}
        self.saver.take(job)
        answer = self.saver.go_on("ended")
        if "skip" in answer:
            pytest.skip(answer["skip"])
        assert "bug" not in answer, answer["bug"]
        return list(answer["statuses"])

    def errors(self, number: int) -> list[str]:
        lines = (self.folder / f"log-{number}").read_text(encoding="utf-8").splitlines()
        assert not any("Traceback" in line for line in lines), lines
        return [line.removeprefix("yeonma: ") for line in lines if line.startswith("yeonma: ")]


@pytest.fixture
def disk(saver: Workshop, tmp_path: Path, base: Path, data: Path) -> SmallDisk:
    return SmallDisk(saver, tmp_path, base, data)


def test_run_that_does_not_fit_on_the_disk_is_refused_before_it_starts(disk: SmallDisk) -> None:
    statuses = disk.run_all("size=3m", disk.run(0))
    (line,) = disk.errors(0)
    assert statuses == [2]
    location, problem, cure = line.partition(": ")[0], *line.partition(": ")[2].split("; ")
    assert location == f"output_dir {disk.output}"
    match = re.fullmatch(
        r"the run needs ([\d,]+) bytes here \(([\d,]+) checkpoints of ([\d,]+) at once, and the adapter\), "
        r"and ([\d,]+) are free",
        problem,
    )
    assert match is not None, problem
    needed, count, checkpoint_bytes, free = (int(number.replace(",", "")) for number in match.groups())
    assert count == 5
    assert needed > count * checkpoint_bytes > free
    assert 3 * MEGABYTE - 100_000 < free <= 3 * MEGABYTE
    assert "make room" in cure and "--save_total_limit" in cure
    assert "parameters trained" not in (disk.folder / "log-0").read_text()  # no weights were read
    assert not (disk.copies / "0").exists() or list((disk.copies / "0").iterdir()) == []


FULL = {
    "bytes": ("take_bytes", 0, r"the checkpoint of step 4 needs [\d,]+ bytes, and [\d,]+ are free"),
    "names": (
        "take_names",
        4,
        r"the checkpoint of step 4 cannot be written: No space left on device; it needs [\d,]+ bytes, "
        r"and [\d,]+ are free",
    ),
}


@pytest.mark.parametrize("resource", FULL)
def test_run_on_a_full_disk_stops_and_resumes_with_equal_results(
    disk: SmallDisk, uninterrupted_run: Done, resource: str
) -> None:
    """No space for more bytes, which is known in advance, or none for another file, which only a failed call shows."""
    action, remaining, pattern = FULL[resource]
    before_step = [4, action, str(disk.mount), remaining]
    statuses = disk.run_all("size=16m,nr_inodes=400", disk.run(0, before_step=before_step), disk.run(1))
    assert statuses == [2, 0]
    (line,) = disk.errors(0)
    assert re.search(pattern, line), line
    assert "make room or lower --save_total_limit" in line
    assert "then run the same command to continue from the last checkpoint" in line
    stopped = disk.copies / "0"
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-2", "checkpoint-3"]
    assert [read_whole(path).step for path in checkpoints(stopped)] == [2, 3]
    assert [path.name for path in stopped.iterdir() if path.name.startswith(".")] == []
    assert disk.errors(1) == []
    assert "continuing after step 3 of 10" in (disk.folder / "log-1").read_text()
    assert left_behind(disk.copies / "1", disk.mount) == left_behind(uninterrupted_run.folder)


def test_disk_without_space_for_a_metrics_line_stops_the_run(disk: SmallDisk, tmp_path: Path) -> None:
    """Saved checkpoints stay. The resumed run removes an incomplete line."""
    settings = {**RUN_SETTINGS, "num_epochs": 10, "save_steps": 40}
    before_step = [41, "take_bytes", str(disk.mount), 0]
    runs = disk.run(0, before_step, settings), disk.run(1, settings=settings)
    assert disk.run_all("size=16m", *runs) == [2, 0]
    (line,) = disk.errors(0)
    assert re.search(
        r"metrics\.jsonl: a step's line cannot be written: No space left on device; it needs", line
    )
    assert line.endswith(
        "0 are free; make room, then run the same command to continue from the last checkpoint"
    )
    assert [path.name for path in checkpoints(disk.copies / "0")] == ["checkpoint-40"]
    assert "continuing after step 40 of 60" in (disk.folder / "log-1").read_text()
    uninterrupted = trained(tmp_path / "plain" / "out", disk.base, disk.data, **settings)
    assert left_behind(disk.copies / "1", disk.mount) == left_behind(uninterrupted.folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_unwritable_output_folder_is_refused(tmp_path: Path, refused: Refused, data: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    cure = "give an output_dir that you may write to"
    for output in (tmp_path / "mine", tmp_path / "mine" / "new" / "out"):
        assert refused(data, output_dir=output) == [f"mine: cannot be written; {cure}"]


def test_read_only_file_system_is_refused(disk: SmallDisk) -> None:
    """Also for root."""
    assert disk.run_all("size=16m,ro", disk.run(0)) == [2]
    assert disk.errors(0) == [f"{disk.mount}: cannot be written; give an output_dir that you may write to"]
    assert "parameters trained" not in (disk.folder / "log-0").read_text()


def test_second_run_in_a_folder_is_refused_until_the_first_is_killed(
    saver: Workshop, tmp_path: Path, base: Path, data: Path, uninterrupted_run: Done, loaded: list[str]
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
        overwriting = sft(output, base, data, **SETTINGS, overwrite=True)
        assert (overwriting.status, overwriting.err) == (2, second.err)
        assert everything_in(output) == before
    finally:
        os.kill(first, signal.SIGKILL)
        assert saver.hear("ended")["ended"] == -signal.SIGKILL
    assert (output / ".lock").exists()  # the lock file remains, but no longer locks
    done = trained(output, base, data, **SETTINGS)
    assert "continuing after step 3 of 10" in done.out
    assert left_behind(done.folder) == left_behind(uninterrupted_run.folder)
    assert not (output / ".lock").exists()


LOCKING_SCRIPT = """
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
    """Four processes lock and release as fast as they can. Each creates and removes the lock file."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", LOCKING_SCRIPT, str(tmp_path / "out"), str(tmp_path / "inside"), "100"]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    results = [(process.communicate()[1], process.returncode) for process in processes]
    assert results == [("", 0)] * 4
    assert list((tmp_path / "out").iterdir()) == []
