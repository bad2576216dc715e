"""One of several processes is killed, stopped or has other settings: the others end, name it, and lose no work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from tests.faults.kills import ROOT, left_behind, prepare
from tests.faults.zygote import Zygote
from yeonma.errors import ProcessLost
from yeonma.train import heartbeat
from yeonma.train.interrupt import Stopped

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
LONG = ["--num_epochs", "3", "--early_stopping_patience", "50", "--save_steps", "5"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return prepare(tmp_path_factory.mktemp("ranks"))


def start(arguments: Sequence[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "YEONMA_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError("".join(lines))


def process_of(rank: int, started: subprocess.Popen[str]) -> int:
    """The id of the process with that rank."""
    for child in _children(started.pid):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return child
    raise AssertionError(f"no process of rank {rank}")


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from _children(int(child))


@pytest.fixture(scope="module")
def uninterrupted(
    zygotes: Zygote, commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("whole")
    status = zygotes.run_together([*commands["sft"], *LONG, "--nproc", "2"], folder)
    assert status == 0, (folder / "log.txt").read_text()
    return left_behind(folder / "out", checkpoints=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "signal_sent", "says"),
    [(1, signal.SIGKILL, ""), (0, signal.SIGKILL, ""), (1, signal.SIGSTOP, "has been silent for 10 seconds")],
    ids=["second killed", "first killed", "second stopped"],
)
def test_lost_process_is_named_and_ends_the_run_and_a_rerun_is_identical(
    zygotes: Zygote,
    commands: dict[str, list[str]],
    uninterrupted: dict[str, object],
    tmp_path: Path,
    rank: int,
    signal_sent: signal.Signals,
    says: str,
) -> None:
    arguments = [*commands["sft"], *LONG, "--nproc", "2"]
    run = start(["-m", "yeonma", *arguments], tmp_path, YEONMA_SILENCE_SECONDS="10")
    lines = lines_until(run, "step 7/")
    os.kill(process_of(rank, run), signal_sent)
    sent_at = monotonic()
    lines.append(run.communicate()[0])
    out = "".join(lines)
    assert run.returncode not in (0, 2), out
    assert monotonic() - sent_at < 60
    assert f"process {rank} " in out
    assert says in out
    assert "Traceback" not in out
    if (rank, signal_sent) != (1, signal.SIGKILL):
        return
    shutil.copytree(tmp_path / "out", tmp_path / "alone" / "out")
    status = zygotes.run([*commands["sft"], *LONG], tmp_path / "alone")
    out = (tmp_path / "alone" / "log.txt").read_text()
    assert status == 0, out
    assert "processes was 2 and is now 1" in out
    assert (
        "the result equals that of an uninterrupted run only to rounding; dropout draws other numbers" in out
    )
    rows = (tmp_path / "alone" / "out" / "trained_rows.jsonl").read_bytes()
    assert rows == uninterrupted["trained_rows.jsonl"]
    status = zygotes.run_together(arguments, tmp_path)
    out = (tmp_path / "log.txt").read_text()
    assert status == 0, out
    assert "continuing after step 5" in out
    assert left_behind(tmp_path / "out", checkpoints=False) == uninterrupted


@pytest.mark.parametrize("in_a_collective", [False, True])
def test_silent_process_is_named_even_if_torchrun_sends_sigterm(
    in_a_collective: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat kills the silent process, and torchrun then sends SIGTERM to all others."""
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", 0.2)
    silent = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    store = dist.HashStore()
    store.set("who/1", json.dumps({"host": socket.gethostname(), "pid": silent.pid}))
    store.set("beat/1", "1")
    stopped = Stopped("stopped by SIGTERM", 143)
    with pytest.raises(ProcessLost, match=f"process id {silent.pid}. has been silent"):  # noqa: SIM117
        with heartbeat.watch_processes(store, rank=0, count=2):
            assert silent.wait(timeout=30) == -signal.SIGKILL
            if not in_a_collective:
                raise stopped
            monkeypatch.setattr(heartbeat.Heartbeat, "wait_for_loss", Mock(side_effect=stopped))
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")


def test_sigterm_without_a_lost_process_raises_stopped() -> None:
    store = dist.HashStore()
    with pytest.raises(Stopped, match="SIGTERM"), heartbeat.watch_processes(store, rank=0, count=2):
        raise Stopped("stopped by SIGTERM", 143)


def test_default_time_to_detect_a_lost_process_is_under_a_minute() -> None:
    assert heartbeat.SILENCE_SECONDS + 4 * heartbeat.INTERVAL_SECONDS < 60


@pytest.mark.slow
def test_killed_process_is_named_without_a_common_torchrun(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    """Like a run on several machines, where one torchrun does not see the processes of another."""
    arguments = ["-m", "yeonma", *commands["sft"], *LONG]
    port = "29531"
    group_variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [
        start(arguments, tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **group_variables)
        for rank in range(2)
    ]
    lines_until(runs[0], "step 7/")
    runs[1].kill()
    out = runs[0].communicate()[0]
    runs[1].communicate()
    assert runs[0].returncode == heartbeat.LOST, out
    assert f"yeonma: process 1 ({os.uname().nodename}, process id {runs[1].pid}) has ended; " in out
    assert "run the same command to continue from the last checkpoint" in out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_process_with_other_settings_is_refused_before_weights_are_read(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from yeonma.cli import main\n"
        "rate = '1e-3' if os.environ['RANK'] == '0' else '2e-3'\n"
        "sys.exit(main([*sys.argv[1:], '--learning_rate', rate]))\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    options = [word for pair in _pairs(commands["sft"][1:]) if pair[0] != "--learning_rate" for word in pair]
    run = start([*torchrun, "sft", *options], tmp_path)
    out = run.communicate()[0]
    assert run.returncode == 1, out
    cure = "give every process the same command, files and versions"
    assert f"process 1 of 2 has other settings, data, base weights or versions than process 0; {cure}" in out
    assert not (tmp_path / "out").exists()


def _pairs(words: Sequence[str]) -> list[Sequence[str]]:
    return [words[i : i + 2] for i in range(0, len(words), 2)]
