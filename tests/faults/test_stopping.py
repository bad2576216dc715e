"""Runs that are stopped by kill -9, SIGTERM, Ctrl-C, a closed terminal or their time limit, and continued."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import ROOT, hear_signals, in_save, left_behind, prepare
from tests.faults.zygote import Zygote
from tests.runs import sft
from yeonma.train.interrupt import seconds_of

COMMANDS = "sft", "dpo"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return prepare(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def uninterrupted(
    zygotes: Zygote, commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The files of a run that is not stopped, for each command."""
    results = {}
    for verb in COMMANDS:
        folder = tmp_path_factory.mktemp(f"whole-{verb}")
        assert zygotes.run(commands[verb], folder) == 0, (folder / "log.txt").read_text()
        results[verb] = left_behind(folder / "out", checkpoints=False)
    return results


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_uninterrupted_ones() -> None:
    """`make faults` runs it with 200 kills. The seed that is printed repeats the moments of the kills."""
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


# When the signal comes: the function that the run is about to call, and the number of that call.
LOADING = "yeonma.train.run:load_model", 1
REFERENCE = "yeonma.train.run:reference_extras", 1
FIRST_EVALUATION = "yeonma.train.loop:evaluate", 1
STEPPING = "yeonma.train.loop:train_step", 5
EVALUATING = "yeonma.train.loop:evaluate", 3
SAVING = "yeonma.train.loop:write_checkpoint", 2
INSTALLING = "yeonma.run_folder.output_folder:install", 1
BEFORE_THE_FIRST_STEP = (LOADING, REFERENCE, FIRST_EVALUATION)
EXIT_STATUS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
NAMES = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C", "SIGHUP": "SIGHUP"}


PHASES = LOADING, REFERENCE, FIRST_EVALUATION, STEPPING, EVALUATING, SAVING, INSTALLING
STOPS = [(phase, name, verb) for phase in PHASES for name in EXIT_STATUS for verb in COMMANDS]
QUICK = [stop for stop in STOPS if stop[2] == "sft" and (stop[0] == STEPPING or stop[1] == "SIGTERM")]
"""Every phase, and every signal."""


@pytest.mark.parametrize(
    ("phase", "name", "verb"),
    [pytest.param(*stop, marks=[] if stop in QUICK else pytest.mark.slow) for stop in STOPS],
    ids=[f"{phase[0][17:]}{phase[1]}-{name}-{verb}" for phase, name, verb in STOPS],
)
def test_rerun_after_a_signal_ends_with_the_files_of_an_uninterrupted_run(
    zygotes: Zygote,
    commands: dict[str, list[str]],
    uninterrupted: dict[str, dict[str, Any]],
    tmp_path: Path,
    phase: tuple[str, int],
    name: str,
    verb: str,
) -> None:
    folder = tmp_path / "run"
    status = zygotes.run(commands[verb], folder, (*phase, [name]))
    log = (folder / "log.txt").read_text()
    assert status == EXIT_STATUS[name], log
    assert (
        f"yeonma: {NAMES[name]}: saving a checkpoint, then stopping; a second signal kills the run at once"
        in log
    )
    assert f"stopped by {NAMES[name]}" in log
    assert "Traceback" not in log
    saved = sorted((folder / "out").glob("checkpoint-*"))
    assert bool(saved) == (phase not in BEFORE_THE_FIRST_STEP)
    assert not in_save(folder / "out")
    if phase == STEPPING:  # the current step is finished and saved
        assert folder / "out" / "checkpoint-5" in saved
        assert "out/checkpoint-5 is saved: run the same command to continue" in log
    assert zygotes.run(commands[verb], folder) == 0
    log = (folder / "log.txt").read_text()
    assert ("continuing after step" in log) == (phase not in BEFORE_THE_FIRST_STEP)
    assert left_behind(folder / "out", checkpoints=False) == uninterrupted[verb]


@pytest.mark.parametrize("phase", [LOADING, STEPPING, EVALUATING, SAVING], ids=lambda phase: phase[0][17:])
def test_run_killed_by_a_second_signal_resumes_to_the_same_result(
    zygotes: Zygote,
    commands: dict[str, list[str]],
    uninterrupted: dict[str, dict[str, Any]],
    tmp_path: Path,
    phase: tuple[str, int],
) -> None:
    folder = tmp_path / "run"
    assert zygotes.run(commands["sft"], folder, (*phase, ["SIGTERM", "SIGTERM"])) == 143
    assert zygotes.run(commands["sft"], folder) == 0
    assert left_behind(folder / "out", checkpoints=False) == uninterrupted["sft"]


def test_time_limit_stops_the_run_with_a_checkpoint(
    zygotes: Zygote, commands: dict[str, list[str]], uninterrupted: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    folder, arguments = tmp_path / "run", [*commands["sft"], "--time_limit", "1h"]
    assert zygotes.run(arguments, folder, (*STEPPING, ["HOUR"])) == 75
    log = (folder / "log.txt").read_text()
    assert "stopped by time_limit after step 5 of 27; out/checkpoint-5 is saved" in log
    assert zygotes.run(arguments, folder, (*LOADING, ["HOUR"])) == 75
    assert "stopped by time_limit; all work so far is kept" in (folder / "log.txt").read_text()
    assert zygotes.run(commands["sft"], folder) == 0  # the run may continue without the limit
    results = left_behind(folder / "out", checkpoints=False)
    assert results == uninterrupted["sft"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("11h30m", 41400), ("90m", 5400), ("45s", 45), ("1d", 86400), ("1:30:00", 5400), ("1-12:00:00", 129600)],
)
def test_durations_are_converted_to_seconds(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0s", "-5m", "30", "1h 30m", "h", ""])
def test_invalid_time_limit_is_refused_before_the_run_starts(tmp_path: Path, text: str) -> None:
    done = sft(tmp_path / "out", tmp_path, tmp_path / "none.jsonl", time_limit=text)
    assert done.status == 2
    assert f'time_limit: "{text}" is not a duration; write it as 11h30m, 90m, 45s or 1:30:00' in done.err
    assert not done.folder.exists()


def test_closed_terminal_leaves_a_checkpoint_and_the_run_continues_to_the_same_result(
    commands: dict[str, list[str]], uninterrupted: dict[str, dict[str, Any]], zygotes: Zygote, tmp_path: Path
) -> None:
    """The kernel sends SIGHUP, and all that the run prints afterwards fails."""
    folder = tmp_path / "run"
    folder.mkdir()
    terminal, inside = os.openpty()

    def in_terminal() -> None:
        hear_signals()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

    run = begun(commands["sft"], folder, in_terminal, stdout=inside)
    os.close(inside)
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        text = b""
        while not re.search(rb"step [1-9]", text):  # the display may pass over some steps
            text += screen.read(4096)
    assert run.wait(timeout=600) == 129
    assert sorted((folder / "out").glob("checkpoint-*"))
    assert zygotes.run(commands["sft"], folder) == 0
    assert "continuing after step" in (folder / "log.txt").read_text()
    assert left_behind(folder / "out", checkpoints=False) == uninterrupted["sft"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_under_nohup_outlives_its_terminal(
    commands: dict[str, list[str]], tmp_path: Path, processes: int
) -> None:
    """SIGHUP to all processes of the run, as when the shell that started them ends."""
    arguments = [*commands["sft"], "--nproc", str(processes)]
    run = begun(arguments, tmp_path, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line.decode())
        if line.startswith(b"step 3/"):
            os.killpg(run.pid, signal.SIGHUP)
    assert run.wait() == 0, "".join(lines)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def begun(
    arguments: Sequence[str],
    folder: Path,
    before: Callable[[], object] = hear_signals,
    stdout: int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """`yeonma` with these words in a session of its own, and with standard output and error in one."""
    environment = {**os.environ, "YEONMA_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "yeonma", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stdout if stdout != subprocess.PIPE else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=before,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to_all"), [("SIGTERM", False), ("SIGINT", True), ("SIGHUP", True)])
def test_two_processes_stop_after_the_same_step(
    zygotes: Zygote, commands: dict[str, list[str]], tmp_path: Path, name: str, to_all: bool
) -> None:
    """SIGTERM goes only to the process that was started, as from a job queue; that process passes it on. A terminal
    sends its signals to all processes."""
    arguments = [*commands["sft"], "--nproc", "2", "--num_epochs", "12", "--early_stopping_patience", "50"]
    folder = tmp_path / "stopped"
    folder.mkdir()
    stopped = begun(arguments, folder)
    assert stopped.stdout is not None
    lines = []
    for line in stopped.stdout:
        lines.append(line.decode())
        if line.startswith(b"step 3/"):
            (os.killpg if to_all else os.kill)(stopped.pid, signal.Signals[name])
    assert stopped.wait() == EXIT_STATUS[name], "".join(lines)
    assert sum(f"stopped by {NAMES[name]} after step" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    assert zygotes.run_together(arguments, tmp_path / "untouched") == 0
    assert zygotes.run_together(arguments, folder) == 0
    assert "continuing after step" in (folder / "log.txt").read_text()
    results = left_behind(folder / "out", checkpoints=False)
    assert results == left_behind(tmp_path / "untouched" / "out", checkpoints=False)
