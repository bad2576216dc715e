"""Locks between the processes that read a token store and one that deletes it.

Without effect on systems and disks that lock no files: a deleted file stays readable there for who has it open.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

META = "meta.json"
"""The file of a store that is locked."""


class StoreInUse:
    """Keeps others from deleting a store for as long as this object lives."""

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)


class BeingDeleted(Exception):
    """Another process deletes the store."""


def use_store(folder: Path) -> StoreInUse:
    """Raises BeingDeleted, and OSError if there is no store."""
    descriptor = os.open(folder / META, os.O_RDONLY)
    in_use = StoreInUse(descriptor)
    if not _locked(descriptor, shared=True):
        raise BeingDeleted
    return in_use


@contextmanager
def nobody_uses(folder: Path) -> Iterator[bool]:
    """Whether no process uses the store. None begins to within the block."""
    try:
        descriptor = os.open(folder / META, os.O_RDONLY)
    except OSError:  # half a store, which nobody can read
        yield True
        return
    try:
        yield _locked(descriptor, shared=False)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, *, shared: bool) -> bool:
    """Locks the file until it is closed. False if another process has a lock in the way; True where none can be."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
