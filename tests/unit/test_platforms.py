"""Windows itself is refused in one line; what only Linux has is not needed elsewhere. None of this ran on a Mac."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import yeonma
from tests.missing_parts import POSIX_ONLY
from yeonma.errors import UserError
from yeonma.files import hashes_of, sync_and_verify
from yeonma.platforms import check_platform
from yeonma.run_folder import progress
from yeonma.train import heartbeat, memory_budget

ROOT = Path(__file__).resolve().parents[2]
LINE = (
    "yeonma: native Windows is not supported; use Linux inside Windows (WSL2): run `wsl --install`, "
    "and install Yeonma there\n"
)
AS_ON_WINDOWS = f"""
import os, sys
for name in {POSIX_ONLY!r}:
    sys.modules[name] = None
del os.sched_getaffinity, os.fork, os.getuid
import yeonma.cli
os.name = "nt"
status = yeonma.cli.main(sys.argv[1:])
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
os._exit(status)
"""


@pytest.mark.parametrize("words", [("sft", "--base_model", "x"), ("--help",), ()])
def test_the_command_line_names_wsl_on_windows(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", AS_ON_WINDOWS, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", LINE)


def test_python_calls_raise_the_same_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    check_platform()
    messages = []
    for call in (yeonma.sft, yeonma.dpo, lambda: yeonma.load("x")):
        with monkeypatch.context() as patched:  # pytest itself fails where the system is another one
            patched.setattr(os, "name", "nt")
            try:
                call()  # type: ignore[call-arg]
            except UserError as error:
                messages.append(str(error))
    assert len(messages) == 3 and all("wsl --install" in message for message in messages)


# macOS has neither /proc nor some calls of Linux


def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    read_text, exists = Path.read_text, Path.exists

    def read(self: Path, *args: object, **options: object) -> str:
        if str(self).startswith(("/proc", "/sys/fs/cgroup")):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return read_text(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(Path, "exists", lambda self: not str(self).startswith("/proc") and exists(self))


def test_memory_is_measured_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    import torch

    without_proc(monkeypatch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert progress.peak_memory_bytes(torch.device("cpu")) >= peak * 1024
    monkeypatch.setattr(sys, "platform", "darwin")  # where ru_maxrss counts bytes
    assert peak <= progress.peak_memory_bytes(torch.device("cpu")) < peak * 1024
    assert memory_budget.free_memory(torch.device("cpu")) is None


def test_processes_are_told_from_ended_ones_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proc(monkeypatch)
    assert heartbeat._is_alive(os.getpid())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not heartbeat._is_alive(ended.pid)


def test_files_are_verified_without_posix_fadvise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "a").write_text("b", encoding="utf-8")
    sync_and_verify(tmp_path, hashes_of(tmp_path))


def test_cores_are_counted_without_sched_getaffinity(monkeypatch: pytest.MonkeyPatch) -> None:
    from yeonma.commands import sft

    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert sft._cores_per_process(4) == "2"
