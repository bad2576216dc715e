"""The lock of an output folder: one holder at a time, links, read-only files, file systems without locks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from yeonma.errors import UserError
from yeonma.run_folder.lock import LOCK, check_unlocked, hold, is_locked


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
    with pytest.raises(UserError, match=r"\.lock: cannot be locked: .*; remove it"), hold(tmp_path, print):
        pass
    assert target.read_text() == "as it was"


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", without_locks)
    messages: list[str] = []
    with hold(tmp_path, messages.append):
        assert list(tmp_path.iterdir()) == []
    assert messages == [
        f"warning: {tmp_path} cannot be locked ({os.strerror(errno.ENOLCK)}): do not start a second run there"
    ]
