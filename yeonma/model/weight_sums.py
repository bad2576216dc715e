"""SHA-256 of weight files and of the tensors in them, kept on disk, so that a large file is read once on a machine."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from yeonma.errors import UserError, system_reason
from yeonma.files import kind_of, replace_file
from yeonma.messages import tr

FORMAT = 1
"""Of the sums on disk."""
CHUNK_BYTES = 4 << 20
FINE_NS, COARSE_NS = 50_000_000, 2_000_000_000
"""How long after a change a file system may still give another change the same time: those with fractions of a second,
and those without."""
SHA256 = re.compile("[0-9a-f]{64}")
MODULO = 1 << 256


class Stopping(Exception):
    """Raised in threads that read when nobody waits for them any more."""


@dataclass(frozen=True)
class FileSums:
    sha256: str
    tensors: int | None
    """The sum of the tensors' hashes, so that their order and file do not matter; None if it is no safetensors file."""


@dataclass(eq=False)
class WeightSums:
    """Sums of weight files, from a folder in which they are kept or newly computed."""

    folder: Path
    trust_cache: bool
    stopped: threading.Event = field(default_factory=threading.Event)
    reading: bool = False
    """Whether any file had to be read."""
    not_kept: str = ""
    """Why a new sum could not be kept."""

    def sums(self, path: Path) -> FileSums:
        """Of one file. Several processes of a machine do not compute it twice."""
        path = Path(os.path.realpath(path))
        place = self.folder / f"{sha256(os.fsencode(path)).hexdigest()}.weights"
        if self.trust_cache and (kept := _kept(place, path)) is not None:
            return kept
        self.reading = True
        with self._locked(place):
            if self.trust_cache and (kept := _kept(place, path)) is not None:
                return kept
            return self._computed(path, place)

    def _computed(self, path: Path, place: Path) -> FileSums:
        started_ns = time.time_ns()
        try:
            with path.open("rb") as file:
                before = os.fstat(file.fileno())
                if not self.trust_cache and hasattr(os, "posix_fadvise"):  # from the disk, not from memory
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                sums = _sums_of(file, before.st_size, self.stopped)
                is_same = _state(os.fstat(file.fileno())) == _state(before) == _state(os.stat(path))
        except OSError as error:
            problem = tr("cannot be read ({value})", value=system_reason(error))
            raise UserError(
                problem, place=str(path), cure=tr("download it again, or check the disk")
            ) from error
        if not is_same:
            cure = tr("run the command again when nothing writes to it")
            raise UserError(tr("it changed while it was read"), place=str(path), cure=cure)
        if _is_settled(before, started_ns):
            record = {"format": FORMAT, "path": str(path), "state": _state(before), "sha256": sums.sha256}
            tensors = None if sums.tensors is None else f"{sums.tensors:064x}"
            try:
                replace_file(place, json.dumps({**record, "tensors": tensors}).encode())
            except (OSError, UserError) as error:
                self.not_kept = str(error)
        return sums

    @contextmanager
    def _locked(self, place: Path) -> Iterator[None]:
        """Lets one process at a time compute a sum. Without any effect where files cannot be written or locked."""
        path = place.with_name(f"{place.name}.lock")
        lock = FileLock(path, fallback_to_soft=False)
        try:
            with suppress(OSError):  # what cannot be written will be said when the sum is kept
                self.folder.mkdir(parents=True, exist_ok=True)
                while not lock.is_locked and kind_of(path) in ("", "file"):
                    with suppress(Timeout):
                        lock.acquire(timeout=1)
                    if self.stopped.is_set():
                        raise Stopping
            yield
        finally:
            lock.release()


def _state(status: os.stat_result) -> list[int]:
    """What changes when a file is replaced or written. Its device is left out, because its number may change when the
    machine starts. The time of the last change of the inode shows writes whose time of modification was set back."""
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _is_settled(status: os.stat_result, now_ns: int) -> bool:
    """Whether any later change of the file gets another time than its last one, however coarse the clock is."""
    changed_ns = status.st_ctime_ns  # on Windows when it was made
    if os.name != "posix":
        changed_ns = max(changed_ns, status.st_mtime_ns)
    return now_ns - changed_ns > (FINE_NS if changed_ns % 1_000_000_000 else COARSE_NS)


def _kept(place: Path, path: Path) -> FileSums | None:
    """The sums kept for a file, if it is still the same; None if there are none or they cannot be read."""
    try:
        record = json.loads(place.read_bytes())
        known = [record["format"], record["path"], record["state"]]
        if known != [FORMAT, str(path), _state(os.stat(path))] or not SHA256.fullmatch(record["sha256"]):
            return None
        tensors = record["tensors"]
        return FileSums(record["sha256"], None if tensors is None else int(tensors, 16))
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _sums_of(file: BufferedReader, size: int, stopped: threading.Event) -> FileSums:
    """Reads a file once."""
    whole, total, buffer = sha256(), 0, memoryview(bytearray(CHUNK_BYTES))
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if length <= size - 8:
        head += file.read(length)
    whole.update(head)
    regions = _regions(head, size)

    def read_on(count: int, *digests: Any) -> int:
        """Reads up to `count` bytes into the digests. Returns how many were there."""
        done = 0
        while done < count and (got := file.readinto(buffer[: min(CHUNK_BYTES, count - done)])):
            if stopped.is_set():
                raise Stopping
            for digest in digests:
                digest.update(buffer[:got])
            done += got
        return done

    for key, count in regions or ():
        tensor = sha256(key)
        read_on(count, whole, tensor)
        total += int.from_bytes(tensor.digest(), "big")
    read_on(size + 1, whole)
    return FileSums(whole.hexdigest(), None if regions is None else total % MODULO)


def _regions(head: bytes, size: int) -> list[tuple[bytes, int]] | None:
    """The tensors of a safetensors file in the order of their bytes: name, format and shape, and the number of bytes.
    None if the header is not that of such a file, which loading will report."""
    try:
        header = json.loads(head[8:])
        tensors = sorted(
            (tensor["data_offsets"], json.dumps([name, tensor["dtype"], tensor["shape"]]))
            for name, tensor in header.items()
            if name != "__metadata__"
        )
        ends = [0, *(end for (_, end), _ in tensors)]
        starts = [*(start for (start, _), _ in tensors), size - len(head)]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    if starts != ends or any(type(end) is not int for end in ends):
        return None
    sizes = [end - start for start, end in pairwise(ends)]
    if any(count < 0 for count in sizes):
        return None
    return [(key.encode(), count) for count, (_, key) in zip(sizes, tensors, strict=True)]
