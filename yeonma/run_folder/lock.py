"""Allows one run at a time in an output folder, by a file lock on OUT/.lock (filelock).

The operating system releases the lock when the process that holds it ends, for whatever reason. The file names that
process. A run deletes the file at its end; a killed run leaves it behind, unlocked, and the next run reuses it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from yeonma.errors import Log, UserError
from yeonma.files import DISK_ERRORS, sync, user_path

LOCK = ".lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""Errors of a file system without locks."""
WAIT_SECONDS, POLL_SECONDS = 0.2, 0.02
"""`is_locked` itself holds the lock for a moment. Waiting keeps others from mistaking that for a run."""


def check_unlocked(output_dir: str) -> None:
    """Raises UserError if a run holds the folder now. Unlike `hold`, it creates nothing and keeps nobody out."""
    try:
        output = user_path(output_dir)
    except UserError:  # the checks of the path report it
        return
    if is_locked(output):
        raise _locked_error(output)


def is_locked(output: Path) -> bool:
    """Whether a run holds the folder now. False if there is no lock file, or if it cannot be opened or locked."""
    descriptor = _open_existing(output / LOCK)
    if descriptor is None:
        return False
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not lock_descriptor(descriptor, blocking=False):
            if time.monotonic() > deadline:
                return True
            time.sleep(POLL_SECONDS)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _open_existing(path: Path) -> int | None:
    """Opens for writing if possible, which NFS needs for a lock; else for reading, as in a read-only folder."""
    for access in (os.O_RDWR, os.O_RDONLY):
        with suppress(OSError):
            return os.open(path, access | getattr(os, "O_NOFOLLOW", 0))
    return None


@contextmanager
def hold(output: Path, log: Log) -> Iterator[None]:
    """Holds the lock until the block or the process ends. Creates the folder if needed, and deletes it at the end if it
    is still empty.

    Raises UserError if another run holds the lock, or if OUT/.lock is a symbolic link or belongs to another user. On a
    file system without locks it only warns: two runs there would not notice each other.
    """
    created = _create(output)
    lock = FileLock(
        output / LOCK,
        timeout=WAIT_SECONDS,
        mode=0o644,
        thread_local=False,
        poll_interval=POLL_SECONDS,
        fallback_to_soft=False,
        on_acquired=_write_holder,
    )
    try:
        try:
            lock.acquire()
        except Timeout:
            raise _locked_error(output) from None
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            if error.errno not in NO_LOCKS:
                cure = "remove it, or give another output_dir"
                what = f"cannot be locked: {error.strerror}"
                raise UserError(what, place=str(output / LOCK), cure=cure) from error
            with suppress(OSError):
                os.unlink(output / LOCK)
            log(f"warning: {output} cannot be locked ({error.strerror}): do not start a second run there")
        yield
    finally:
        if lock.is_locked:
            # Deleted while locked: filelock in a waiting process notices, and creates a new file.
            with suppress(OSError):
                os.unlink(output / LOCK)
            lock.release()
        for folder in created:  # rmdir fails if it is not empty
            with suppress(OSError):
                folder.rmdir()


def _write_holder(descriptor: int) -> None:
    """Writes this process's identity from byte 1 on. On Windows no other process can read byte 0 of a locked file."""
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f" {json.dumps(holder)}".encode())


def _locked_error(output: Path) -> UserError:
    try:
        with (output / LOCK).open("rb", buffering=0) as file:
            file.seek(1)
            holder = json.loads(file.read(4096))
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # locked a moment ago, not written yet
        who = "its process is not known yet"
    cure = "wait until it ends, or give another output_dir"
    return UserError(f"another run is writing here ({who})", place=f"output_dir {output}", cure=cure)


def _create(folder: Path) -> list[Path]:
    """Creates the folder and its parents. Returns those that were missing, innermost first, synced to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)
    return missing
