"""Runs found again from their folders: state, numbers, and what stopping and resuming does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tracemalloc import get_traced_memory, start, stop

import pytest

from tests.studios import evaluation_line, locked_by, run_folder, step_line
from yeonma.errors import UserError
from yeonma.language import speaking
from yeonma.messages import tr
from yeonma.run_folder.lock import hold
from yeonma.run_folder.printed_log import ENDED_BY, FAILED, PrintedLog
from yeonma.studio.charts import charts, sparkline
from yeonma.studio.curves import MOST_EVALUATIONS, WHOLE_BYTES, read_curves
from yeonma.studio.found_runs import failures_in, log_tail, read_run
from yeonma.studio.run_control import RunControl, resume_command

TIME = "2026-12-01 00:00:00  "


# state


def test_a_folder_tells_the_state_of_its_run(tmp_path: Path) -> None:
    assert read_run(run_folder(tmp_path / "a", finished=True)).state == "finished"
    assert read_run(run_folder(tmp_path / "b", log=f"{TIME}step 20/20")).state == "stopped"
    running = run_folder(tmp_path / "c", log=f"{TIME}failed: of an earlier call")
    with hold(running, print):
        run = read_run(running)
        assert (run.state, run.process, run.message) == ("running", os.getpid(), "")
    assert read_run(running).state == "failed"
    assert read_run(running).total_steps == 20


@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_run_that_failed_says_why(tmp_path: Path, language: str) -> None:
    folder = run_folder(tmp_path / "run")
    with speaking(language):  # type: ignore[arg-type]
        problems = [tr(FAILED, problem=text) for text in ("rows.jsonl:3: damaged", "the disk is full")]
        bug = tr(ENDED_BY, name="ValueError", error="x: y")
    assert failures_in([f"{TIME}step 3/9", *(TIME + line for line in problems)]) == [
        "rows.jsonl:3: damaged",
        "the disk is full",
    ]
    assert failures_in([f"{TIME}{bug}"]) == ["ValueError: x: y"]
    assert failures_in([f"{TIME}ended by Stopped: stopped by SIGTERM"]) == []
    assert failures_in([TIME + problems[0], f"{TIME}step 4/9"]) == []
    (folder / "log.txt").write_text(TIME + problems[1] + "\n", "utf-8")
    assert (read_run(folder).state, read_run(folder).message) == ("failed", "the disk is full")


def test_a_printed_log_ends_with_why_its_call_failed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for error in (UserError("the disk is full", place="out"), ValueError("a bug")):
        with pytest.raises(type(error)), PrintedLog() as printed:
            printed.open(folder / "log.txt")
            raise error
        assert read_run(folder).state == "failed"
        assert str(error).splitlines()[0] in read_run(folder).message


@pytest.mark.parametrize("record", ["", "[]", "{", '{"identity": 3, "finished": 1}', "[" * 100_000, "{}"])
def test_a_damaged_record_is_a_run_that_stopped(tmp_path: Path, record: str) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "run.json").write_text(record)
    assert (read_run(folder).state, read_run(folder).total_steps) == ("stopped", None)


def test_a_lock_file_that_a_killed_run_left_is_no_running_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for process, host in ((os.getpid(), None), (1, None), (os.getpid(), "elsewhere"), (2**30, None)):
        locked_by(folder, process, host)
        assert (read_run(folder).state, read_run(folder).process) == ("stopped", None)
    (folder / ".lock").write_bytes(b' {"process": "x"')
    assert read_run(folder).state == "stopped"


def test_links_and_pipes_are_passed_over(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", log="secret\n")
    for name in ("metrics.jsonl", "log.txt", "settings.yaml", ".lock"):
        (folder / name).unlink(missing_ok=True)
    (folder / "metrics.jsonl").symlink_to("/etc/passwd")
    os.mkfifo(folder / "log.txt")
    os.mkfifo(folder / ".lock")
    assert read_curves(folder).steps == () and log_tail(folder) == []
    assert read_run(folder).state == "stopped"
    with pytest.raises(UserError, match="no settings"):
        resume_command(read_run(folder), allow_code=True)


# curves


def test_a_short_file_is_read_whole(tmp_path: Path) -> None:
    curves = read_curves(run_folder(tmp_path / "run", steps=50))
    assert curves.is_whole and [one["step"] for one in curves.steps] == list(range(1, 51))
    assert [one["step"] for one in curves.evaluations] == [10, 20, 30, 40, 50]
    assert curves.seconds_left(60) == pytest.approx(5.0)
    assert curves.tokens_per_second()[-1] == (50, 800)


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            'nonsense\n[]\n{"step": 3}\n' + step_line(4).replace("4.0", "null", 1) + step_line(5)[:-20]
        )
    curves = read_curves(folder)
    assert [one["step"] for one in curves.steps][:2] == [1, 2] and curves.last_step in (2, 4)
    assert "<svg" in charts(curves) and "<svg" in sparkline(curves)


def test_a_run_of_100_000_steps_is_read_quickly_and_in_little_memory(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps=100_000, every=100)
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write(evaluation_line(100_000, 0.125))
    assert path.stat().st_size > 19_000_000 > WHOLE_BYTES
    curves = read_curves(folder)  # the file is in the system's cache now
    start()
    curves = read_curves(folder)
    _, peak = get_traced_memory()
    stop()
    assert peak < 20_000_000
    began = time.process_time()
    curves = read_curves(folder)
    drawn = charts(curves)
    assert time.process_time() - began < 0.3
    assert not curves.is_whole and curves.last_step == 100_000
    steps = [one["step"] for one in curves.steps]
    assert steps[0] == 1 and len(steps) > 500 and max(b - a for a, b in pairwise(steps)) < 400
    assert len(curves.evaluations) < 2 * MOST_EVALUATIONS
    assert (curves.evaluations[0]["step"], curves.evaluations[-1]["loss"]) == (100, 0.125)
    assert len(drawn) < 100_000


def test_evaluations_are_found_wherever_the_pieces_of_a_file_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yeonma.studio import curves as module

    folder = run_folder(tmp_path / "run", steps=60, every=7)
    whole = [one["step"] for one in read_curves(folder).evaluations]
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    for size in (1, 20, 33, 500, 4096):
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        monkeypatch.setattr(module, "PLACE_BYTES", 4096)
        if size >= 400:
            assert [one["step"] for one in read_curves(folder).evaluations] == whole, size
        else:
            with (folder / "metrics.jsonl").open("rb", buffering=0) as file:
                content = file.read()
                places = list(module._evaluation_places(file, len(content)))
            assert len(places) == len(whole)
            assert all(content[place:].startswith(module.EVALUATION) for place in places)


# stopping and resuming


def test_stopping_sends_one_signal_to_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    program = (
        "import signal, sys; from pathlib import Path; from yeonma.run_folder.lock import hold\n"
        "received = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: received.append(1))\n"
        "with hold(Path(sys.argv[1]), print):\n"
        "    print('held', flush=True); sys.stdin.readline(); print(len(received))\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "held\n"
    control, run = RunControl(allow_code=False), read_run(folder)
    assert (run.state, run.process) == ("running", process.pid)
    control.stop(run)
    control.stop(read_run(folder))
    assert control.is_stopping(run)
    assert process.communicate("\n", timeout=60)[0] == "1\n"
    assert read_run(folder).state == "stopped" and not control.is_stopping(read_run(folder))


def test_a_process_that_does_not_hold_the_lock_is_never_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path / "run")
    locked_by(folder, os.getpid())
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    RunControl(allow_code=False).stop(read_run(folder))


def test_the_command_of_a_resumed_run_is_that_of_a_terminal(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "it's a run"))
    command = resume_command(run, allow_code=False)
    assert command.words == ("sft", "--config", str(run.folder / "settings.yaml"))
    started_over = {"overwrite": True, "resume_from_checkpoint": "none", "output_dir": "work/other"}
    run = read_run(run_folder(tmp_path / "work" / "other", **started_over))
    command = resume_command(run, allow_code=False)
    assert command.words[3:] == ("--overwrite", "false", "--resume_from_checkpoint", "latest")
    assert command.folder == tmp_path  # from which work/other was meant


@pytest.mark.parametrize("value", [True, "true", "True", 1, "on", "yes"])
def test_a_run_that_executes_code_is_not_resumed_unless_allowed(tmp_path: Path, value: object) -> None:
    run = read_run(run_folder(tmp_path / "run", trust_remote_code=value))
    with pytest.raises(UserError, match="allow_code"):
        RunControl(allow_code=False).resume(run)
    assert resume_command(run, allow_code=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"answer_metrics": "exact,scores.py:short"},
        {"reward": "rewards.py"},
        {"reward": ["exact", "r.py:right"]},
    ],
)
def test_a_run_with_functions_of_the_users_is_not_resumed_unless_allowed(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    run = read_run(run_folder(tmp_path / "run", **settings))
    with pytest.raises(UserError, match="allow_code"):
        RunControl(allow_code=False).resume(run)
    assert resume_command(run, allow_code=True)
    assert resume_command(read_run(run_folder(tmp_path / "other", answer_metrics="exact")), allow_code=False)


def test_a_folder_that_was_moved_is_not_resumed(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", output_dir=str(tmp_path / "elsewhere")))
    with pytest.raises(UserError, match="name another folder"):
        resume_command(run, allow_code=False)
    run = read_run(run_folder(tmp_path / "b", output_dir="a"))
    with pytest.raises(UserError, match="name another folder"):
        resume_command(run, allow_code=False)


def test_what_a_command_says_that_refuses_to_resume_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YEONMA_API_KEY", "secret")
    run = read_run(run_folder(tmp_path / "run", no_such_setting=1))
    control = RunControl(allow_code=False)
    control.resume(run)
    assert control.is_starting(run)
    control._resumed[run.key].process.wait(60)
    assert control.failure(run) is not None
    status, lines = control.failure(run) or (0, [])
    assert status == 2 and "no_such_setting" in "\n".join(lines)
    assert os.getsid(0) != control._resumed[run.key].process.pid
    assert signal.getsignal(signal.SIGTERM) is not None
