"""A run that is stopped by kill -9, SIGTERM, Ctrl-C or its time limit, or that ends itself because of NaN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import ROOT, in_save, left_behind, prepare
from tests.faults.zygote import Zygote
from tests.runs import sft
from yeonma.train.interrupt import seconds_of

COMMANDS = "sft", "dpo"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return prepare(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def whole(
    zygotes: Zygote, commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What a run leaves that nobody stops."""
    results = {}
    for verb in COMMANDS:
        place = tmp_path_factory.mktemp(f"whole-{verb}")
        assert zygotes.run(commands[verb], place) == 0, (place / "log.txt").read_text()
        results[verb] = left_behind(place / "out", checkpoints=False)
    return results


def test_kills_at_random_moments() -> None:
    """The same with 200 is `make faults`; the seed that is printed repeats the moments it aims at."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", "--kills", "10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1].removeprefix("kills: "))
    for verb in COMMANDS:
        assert counts[verb]["signals"] >= 5
        assert 2 * counts[verb]["in a save"] >= counts[verb]["signals"]


# What a run does when the signal comes: the function that it is about to call, and which call of it.
LOADING = "yeonma.train.run:load_model", 1
REFERENCE = "yeonma.train.run:reference_extras", 1
FIRST_LOOK = "yeonma.train.loop:evaluate", 1
STEPPING = "yeonma.train.loop:train_step", 5
EVALUATING = "yeonma.train.loop:evaluate", 3
SAVING = "yeonma.train.loop:write_checkpoint", 2
INSTALLING = "yeonma.run_folder.output_folder:install", 1
BEFORE_THE_FIRST_STEP = (LOADING, REFERENCE, FIRST_LOOK)
NUMBERS = {"SIGTERM": 143, "SIGINT": 130}
NAMES = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "phase",
    [LOADING, REFERENCE, FIRST_LOOK, STEPPING, EVALUATING, SAVING, INSTALLING],
    ids=lambda p: p[0][17:],
)
def test_a_signal_saves_and_the_same_command_ends_as_if_it_had_not_come(
    zygotes: Zygote,
    commands: dict[str, list[str]],
    whole: dict[str, dict[str, Any]],
    tmp_path: Path,
    phase: tuple[str, int],
    name: str,
    verb: str,
) -> None:
    place = tmp_path / "run"
    status = zygotes.run(commands[verb], place, (*phase, [name]))
    log = (place / "log.txt").read_text()
    assert status == NUMBERS[name], log
    assert (
        f"yeonma: {NAMES[name]}: saving a checkpoint, then stopping; a second signal kills the run at once"
        in log
    )
    assert f"stopped by {NAMES[name]}" in log
    assert "Traceback" not in log
    saved = sorted((place / "out").glob("checkpoint-*"))
    assert bool(saved) == (phase not in BEFORE_THE_FIRST_STEP)
    assert not in_save(place / "out")
    if phase == STEPPING:  # the step that it was in is finished and saved
        assert place / "out" / "checkpoint-5" in saved
        assert "out/checkpoint-5 is saved: run the same command to continue" in log
    assert zygotes.run(commands[verb], place) == 0
    log = (place / "log.txt").read_text()
    assert ("continuing after step" in log) == (phase not in BEFORE_THE_FIRST_STEP)
    assert left_behind(place / "out", checkpoints=False) == whole[verb]


@pytest.mark.parametrize("phase", [LOADING, STEPPING, EVALUATING, SAVING], ids=lambda phase: phase[0][17:])
def test_a_second_signal_ends_it_at_once_and_harms_nothing(
    zygotes: Zygote,
    commands: dict[str, list[str]],
    whole: dict[str, dict[str, Any]],
    tmp_path: Path,
    phase: tuple[str, int],
) -> None:
    place = tmp_path / "run"
    assert zygotes.run(commands["sft"], place, (*phase, ["SIGTERM", "SIGTERM"])) == 143
    assert zygotes.run(commands["sft"], place) == 0
    assert left_behind(place / "out", checkpoints=False) == whole["sft"]


def test_the_time_limit_stops_with_a_checkpoint(
    zygotes: Zygote, commands: dict[str, list[str]], whole: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    place, words = tmp_path / "run", [*commands["sft"], "--time_limit", "1h"]
    assert zygotes.run(words, place, (*STEPPING, ["HOUR"])) == 75
    log = (place / "log.txt").read_text()
    assert "stopped by time_limit after step 5 of 27; out/checkpoint-5 is saved" in log
    assert zygotes.run(words, place, (*LOADING, ["HOUR"])) == 75
    assert "stopped by time_limit; all work so far is kept" in (place / "log.txt").read_text()
    assert zygotes.run(commands["sft"], place) == 0  # the limit is no part of what is trained
    results = left_behind(place / "out", checkpoints=False)
    assert results == whole["sft"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("11h30m", 41400), ("90m", 5400), ("45s", 45), ("1d", 86400), ("1:30:00", 5400), ("1-12:00:00", 129600)],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0s", "-5m", "30", "1h 30m", "h", ""])
def test_what_is_no_time_is_told_before_anything_else(tmp_path: Path, text: str) -> None:
    done = sft(tmp_path / "out", tmp_path, tmp_path / "none.jsonl", time_limit=text)
    assert done.status == 2
    assert f'time_limit: "{text}" is not a duration; write it as 11h30m, 90m, 45s or 1:30:00' in done.err
    assert not done.folder.exists()


def test_two_processes_stop_after_the_same_step(
    zygotes: Zygote, commands: dict[str, list[str]], tmp_path: Path
) -> None:
    """The signal goes to the process that was started, as a job queue sends it; it passes it on."""
    words = [*commands["sft"], "--nproc", "2", "--num_epochs", "12", "--early_stopping_patience", "50"]
    environment = {**os.environ, "YEONMA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    place = tmp_path / "stopped"
    place.mkdir()
    command = [sys.executable, "-m", "yeonma", *words]
    stopped = subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert stopped.stdout is not None
    lines = []
    for line in stopped.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 143, "".join(lines)
    assert sum("stopped by SIGTERM after step" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    assert zygotes.run_together(words, tmp_path / "untouched") == 0
    assert (tmp_path / "untouched" / "log.txt").read_text()
    assert zygotes.run_together(words, place) == 0
    assert "continuing after step" in (place / "log.txt").read_text()
    results = left_behind(place / "out", checkpoints=False)
    assert results == left_behind(tmp_path / "untouched" / "out", checkpoints=False)
