"""One run at a time in an output folder: a lock of the system's on OUT/.lock, which ends with the holding process.

The file says who holds it. It goes at the end of a run; a killed one leaves the file, but not the lock, and the next
run takes it over.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from yeonma.errors import Log, UserError
from yeonma.files import sync, user_path

LOCK = ".lock"
HELD = frozenset({errno.EWOULDBLOCK, errno.EACCES})


def check_unlocked(output_dir: str) -> None:
    """Raises UserError where a run holds the folder now. Changes nothing; `hold` is what keeps others out."""
    try:
        output = user_path(output_dir)
        number = os.open(output / LOCK, os.O_RDONLY)
    except (OSError, UserError):  # no such file: nobody is there. What cannot be opened, others will tell of.
        return
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return
    except OSError as error:
        if error.errno in HELD:
            raise _refused(output, number) from None
    finally:
        os.close(number)


@contextmanager
def hold(output: Path, say: Log) -> Iterator[None]:
    """Holds the folder, made where it is not there, until the block or the process ends.

    Raises UserError where another run holds it. Where the file system has no locks it says so, and goes on: two runs
    would then not see each other. A process forked in the block would hold the folder too; Yeonma forks none.
    """
    made = _make(output)
    number = None
    try:
        number = _locked(output, say)
        yield
    finally:
        if number is not None:
            # Removed while it is held: whoever has opened it meanwhile finds that it no longer has this name.
            with suppress(OSError):
                os.unlink(output / LOCK)
            os.close(number)
        for folder in made:  # that nothing was put into
            with suppress(OSError):
                folder.rmdir()


def _locked(output: Path, say: Log) -> int | None:
    """The open file, locked; None where locks are unknown."""
    while True:
        number = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl
        except ImportError:  # Windows
            os.close(number)
            with suppress(OSError):
                os.unlink(output / LOCK)
            say(
                f"warning: {output} cannot be locked (no flock on this system): do not start a second run there"
            )
            return None
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                os.close(number)
                with suppress(OSError):
                    os.unlink(output / LOCK)
                say(f"warning: {output} cannot be locked ({error.strerror}): do not start a second run there")
                return None
            try:  # a run holds it, or somebody only looks, for a moment, with a shared lock
                fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                refused = _refused(output, number)
                os.close(number)
                raise refused from None
        else:
            if _is_named(number, output / LOCK):
                about = {
                    "process": os.getpid(),
                    "host": socket.gethostname(),
                    "since": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                }
                os.ftruncate(number, 0)
                os.pwrite(number, json.dumps(about).encode(), 0)
                return number
        os.close(number)


def _is_named(number: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now: a run that ends removes it."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


def _refused(output: Path, number: int) -> UserError:
    try:
        about = json.loads(os.pread(number, 4096, 0))
        who = f"process {about['process']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and has not yet written who it is
        who = "its process is not known yet"
    cure = "wait for its end, or give another output_dir"
    return UserError(f"another run is writing here ({who})", place=f"output_dir {output}", cure=cure)


def _make(folder: Path) -> list[Path]:
    """The folders that had to be made, the innermost first. Their names are on the disk when this returns."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)
    return missing
