"""Allows one run at a time in an output folder, by a file lock on OUT/.lock (filelock).

The operating system releases the lock when the process that holds it ends, for whatever reason. The file names that
process. A run deletes the file at its end; a killed run leaves it behind, unlocked, and the next run reuses it.

On a disk that cannot lock files, a file that only one process can create takes its place, OUT/.lock.held. If its
process has ended on this machine, the next run takes it over; of another machine's process nobody here knows.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout, lock_descriptor

from yeonma.errors import Log, UserError, brief, system_reason
from yeonma.files import DISK_ERRORS, NO_LOCKS, kind_of, open_regular, read_regular, sync, user_path
from yeonma.messages import tr
from yeonma.run_folder.entries import LOCK, SOFT_LOCK, check_entries

WAIT_SECONDS, POLL_SECONDS = 0.2, 0.02
"""`is_locked` itself holds the lock for a moment. Waiting keeps others from mistaking that for a run."""


@dataclass(frozen=True)
class LockHolder:
    """The process that wrote itself into a lock file."""

    process: int
    host: str
    since: str

    def is_here_with(self, output: Path) -> bool:
        """Whether the process runs on this machine and has the folder's lock file open. False where /proc does not
        tell."""
        if self.host != socket.gethostname():
            return False
        try:
            lock = os.stat(output / LOCK, follow_symlinks=False)
            files = [
                os.stat(entry.path) for entry in os.scandir(f"/proc/{self.process}/fd") if _is_there(entry)
            ]
        except OSError:
            return False
        return any((file.st_dev, file.st_ino) == (lock.st_dev, lock.st_ino) for file in files)


def _is_there(entry: os.DirEntry[str]) -> bool:
    """Whether a descriptor is still open, and to a file."""
    try:
        return entry.is_file()
    except OSError:
        return False


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
    return _is_file_locked(output / LOCK) or _is_name_taken(output / SOFT_LOCK)


def _is_file_locked(path: Path) -> bool:
    descriptor = _open_existing(path)
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


def _is_name_taken(path: Path) -> bool:
    if kind_of(path) != "file":
        return False
    try:
        with SoftFileLock(path, timeout=WAIT_SECONDS, poll_interval=POLL_SECONDS):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _open_existing(path: Path) -> int | None:
    """Opens for writing if possible, which NFS needs for a lock; else for reading, as in a read-only folder."""
    for access in (os.O_RDWR, os.O_RDONLY):
        with suppress(OSError, UserError):
            return open_regular(path, access)
    return None


@contextmanager
def hold(output: Path, log: Log) -> Iterator[None]:
    """Holds the lock until the block or the process ends. Creates the folder if needed, and deletes it at the end if it
    is still empty.

    Raises UserError if another run holds the lock, as `check_entries`, or if OUT/.lock belongs to another user. On a
    file system without locks it says so, and keeps others out all the same.
    """
    check_entries(output)
    created = _create(output)
    lock: BaseFileLock | None = None
    try:
        lock = _acquired(output, log)
        yield
    finally:
        if lock is not None:
            # Deleted while locked: filelock in a waiting process notices, and creates a new file.
            if Path(lock.lock_file).name == LOCK:
                with suppress(OSError):
                    os.unlink(lock.lock_file)
            lock.release()
        for folder in created:  # rmdir fails if it is not empty
            with suppress(OSError):
                folder.rmdir()


def _acquired(output: Path, log: Log) -> BaseFileLock:
    """The lock of the folder, held by this process."""
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
        if kind_of(output / SOFT_LOCK):  # of a run on a machine for which this disk has no locks
            with SoftFileLock(output / SOFT_LOCK, timeout=WAIT_SECONDS, poll_interval=POLL_SECONDS):
                pass
        lock.acquire()
        return lock
    except Timeout:
        raise _locked_error(output) from None
    except OSError as error:
        if error.errno in (*DISK_ERRORS, errno.EMFILE, errno.ENFILE):
            raise
        if error.errno not in NO_LOCKS:
            cure = tr("remove it, or give another output_dir")
            what = tr("cannot be locked: {strerror}", strerror=system_reason(error))
            raise UserError(what, place=str(output / LOCK), cure=cure) from error
        reason = system_reason(error)
    with suppress(OSError):
        os.unlink(output / LOCK)
    soft = SoftFileLock(
        output / SOFT_LOCK, WAIT_SECONDS, 0o644, thread_local=False, poll_interval=POLL_SECONDS
    )
    try:
        soft.acquire()
    except Timeout:
        raise _locked_error(output) from None
    log(
        tr(
            "{output}: the disk cannot lock files ({reason}), so {soft_lock} keeps other runs out",
            output=output,
            reason=reason,
            soft_lock=SOFT_LOCK,
        )
    )
    return soft


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


def lock_holder(output: Path) -> LockHolder | None:
    """Who holds the lock of a folder by its file, which a killed run leaves behind; None if that is not known."""
    try:
        with open(output / LOCK, "rb", buffering=0, opener=open_regular) as file:
            file.seek(1)
            holder = json.loads(file.read(4096))
        process = holder["process"]
        if type(process) is not int or process <= 0:
            return None
        return LockHolder(process, str(holder["host"]), str(holder["since"]))
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _locked_error(output: Path) -> UserError:
    cure = tr("wait until it ends, or give another output_dir")
    if kind_of(output / SOFT_LOCK):
        with suppress(OSError, UserError, ValueError):
            process, host, *_ = read_regular(output / SOFT_LOCK).decode("utf-8", "replace").splitlines()
            what = tr(
                "another run is writing here (process {process} on {host})",
                process=brief(process),
                host=brief(host),
            )
            cure = tr(
                "wait until it ends, or give another output_dir; if that process has ended, delete {file}",
                file=output / SOFT_LOCK,
            )
            return UserError(what, place=f"output_dir {output}", cure=cure)
    if (holder := lock_holder(output)) is not None:
        what = tr(
            "another run is writing here (process {process} on {host}, since {since})",
            process=holder.process,
            host=brief(holder.host),
            since=brief(holder.since),
        )
    else:  # locked a moment ago, not written yet
        what = tr("another run is writing here (its process is not known yet)")
    return UserError(what, place=f"output_dir {output}", cure=cure)


def _create(folder: Path) -> list[Path]:
    """Creates the folder and its parents. Returns those that were missing, innermost first, synced to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)
    return missing
