"""A small file system that only one process and its children see, and ways to fill it."""

from __future__ import annotations

import ctypes
import os
from itertools import count
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def mount_small(place: Path, options: str) -> str:
    """A memory file system at `place`, an existing folder, in a user namespace of this process, which must have one
    thread. Returns why not where the system does not allow it."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return f"no user namespaces here: {os.strerror(ctypes.get_errno())}"
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        return f"no user namespaces here: {error}"
    if libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, options.encode()):
        return f"nothing can be mounted here: {os.strerror(ctypes.get_errno())}"
    return ""


def take_bytes(place: Path, leave: int) -> None:
    """Fills the file system except for `leave` bytes."""
    about = os.statvfs(place)
    with (place / "hog").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, about.f_bavail * about.f_frsize - leave)


def take_names(place: Path, leave: int) -> None:
    """Creates empty files until the file system accepts only `leave` more."""
    hogs = place / "hogs"
    hogs.mkdir()
    for number in count():
        if os.statvfs(place).f_ffree <= leave:
            return
        (hogs / str(number)).touch()
