"""The lock of an output folder: one holder at a time, links, read-only files, file systems without locks."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from pathlib import Path

import pytest
from filelock import SoftFileLock

from yeonma.errors import UserError
from yeonma.files import disk_errors_as_user_errors
from yeonma.run_folder.entries import LOCK, SOFT_LOCK
from yeonma.run_folder.lock import check_unlocked, hold, is_locked


def test_held_lock_blocks_others_and_names_the_process(tmp_path: Path) -> None:
    output = tmp_path / "out"
    check_unlocked(str(output))
    with hold(output, print):
        assert is_locked(output)
        with pytest.raises(UserError, match=f"another run is writing here .process {os.getpid()} on "):
            check_unlocked(str(output))
        with pytest.raises(UserError, match="another run is writing here"), hold(output, print):
            pass
        assert is_locked(output)
    assert not is_locked(output)
    assert not output.exists()


def test_checking_creates_no_file_and_sees_read_only_locks(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path, print):
        (tmp_path / LOCK).chmod(0o400)
        assert is_locked(tmp_path)


def test_lock_file_of_a_killed_run_does_not_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"process": 1}')
    assert not is_locked(tmp_path)
    with hold(tmp_path, print):
        assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("as it was")
    (tmp_path / LOCK).symlink_to(target)
    assert not is_locked(tmp_path)
    message = r"\.lock: it is a symbolic link, and a run has a file of this name; remove it"
    with pytest.raises(UserError, match=message), hold(tmp_path, print):
        pass
    assert target.read_text() == "as it was"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    os.mkfifo(tmp_path / SOFT_LOCK)
    assert not is_locked(tmp_path)
    with (
        pytest.raises(UserError, match=r"\.lock: it is a pipe(.|\n)*\.lock\.held: it is a pipe"),
        hold(tmp_path, print),
    ):
        pass


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)


@pytest.mark.usefixtures("without_locks")
def test_fault_95_a_disk_without_locks_keeps_a_second_run_out_all_the_same(tmp_path: Path) -> None:
    output, messages = tmp_path / "out", list[str]()
    check_unlocked(str(output))
    with hold(output, messages.append):
        assert messages == [
            f"{output}: the disk cannot lock files ({os.strerror(errno.ENOLCK)}), "
            f"so {SOFT_LOCK} keeps other runs out"
        ]
        assert [path.name for path in output.iterdir()] == [SOFT_LOCK]
        assert is_locked(output)
        who = f"another run is writing here .process {os.getpid()} on {re.escape(socket.gethostname())}.; .*delete"
        with pytest.raises(UserError, match=who):
            check_unlocked(str(output))
        with pytest.raises(UserError, match=who), hold(output, print):
            pass
        assert is_locked(output)
    assert not is_locked(output)
    assert not output.exists()


@pytest.mark.usefixtures("without_locks")
def test_fault_95_a_killed_run_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        with hold(tmp_path, lambda _: None):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert (tmp_path / SOFT_LOCK).exists()
    with hold(tmp_path, lambda _: None):
        assert is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_holds_the_folder_by_name_is_seen_where_files_can_be_locked(tmp_path: Path) -> None:
    with SoftFileLock(tmp_path / SOFT_LOCK):
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="another run is writing here"), hold(tmp_path, print):
            pass


def test_fault_91_too_many_open_files_at_the_lock_are_no_fault_of_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing the lock, which helps against one that belongs to somebody else, would not help here."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("fcntl.flock", refuse)
    output = tmp_path / "out"
    what = re.escape("Too many open files; let this process open more files (ulimit -n)")
    with (
        pytest.raises(UserError, match=what),
        disk_errors_as_user_errors(output, "the run's files"),
        hold(output, print),
    ):
        pass
