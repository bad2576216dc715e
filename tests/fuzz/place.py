"""Where a case runs: a folder of its own, bounds on time and memory, and a look afterwards at what was written."""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

MOST_SECONDS = 20
"""For one case. A model's chat template alone may take 10; all else takes far less than one."""
MOST_BYTES = 2 << 30
"""Of address space, more than the process held before its first case."""


class Hang(BaseException):
    """Raised in a case when its time is over. Not an Exception, so that nothing in the case takes it for its own."""


@dataclass(frozen=True)
class Place:
    """`root` is the working directory of every case; `pristine` holds the files that always lie there.

    The token cache lies beside it, in `cache`.
    """

    root: Path
    cache: Path
    pristine: Mapping[str, bytes]

    @staticmethod
    def make(folder: Path, pristine: Mapping[str, bytes]) -> Place:
        place = Place(folder / "case", folder / "cache", pristine)
        (place.root / "home").mkdir(parents=True)
        for name, content in pristine.items():
            _write(place.root / name, content)
        return place

    @contextmanager
    def holding(self, files: Mapping[str, bytes | None]) -> Iterator[None]:
        """With these files in place, or without those that are None. Afterwards every byte in `root` must be as it
        was, nothing may be added, and no half-made token store may be left."""
        for name, content in files.items():
            if content is None:
                (self.root / name).unlink(missing_ok=True)
            else:
                _write(self.root / name, content)
        before = _tree(self.root)
        try:
            with _working_in(self.root, self.cache):
                yield
            after = _tree(self.root)
            changed = sorted({name for name in {*before, *after} if before.get(name) != after.get(name)})
            assert not changed, f"written, changed or removed: {', '.join(changed)}"
            partial = [path.name for path in self.cache.glob("*.tmp")]
            assert not partial, f"left in the token cache: {', '.join(partial)}"
        finally:
            shutil.rmtree(self.cache, ignore_errors=True)
            self._restore(files)

    def _restore(self, files: Mapping[str, bytes | None]) -> None:
        for name in {*files, *(name for name in _tree(self.root) if name not in self.pristine)}:
            if name in self.pristine:
                _write(self.root / name, self.pristine[name])
            elif (self.root / name).is_dir():
                pass  # emptied below, or a folder of pristine files
            else:
                (self.root / name).unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _tree(root: Path) -> dict[str, tuple[int, int]]:
    """Name -> size and time of change, of everything below; folders count as files of no size."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            found[os.path.relpath(os.path.join(folder, name), root)] = (-1, 0)
        for name in files:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            found[os.path.relpath(path, root)] = (state.st_size, state.st_mtime_ns)
    return found


@contextmanager
def _working_in(root: Path, cache: Path) -> Iterator[None]:
    before, environment = os.getcwd(), {"HOME": str(root / "home"), "YEONMA_CACHE": str(cache)}
    former = {name: os.environ.get(name) for name in environment}
    os.chdir(root)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.chdir(before)
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def bounded(case: str, last_case: Path, seconds: float = MOST_SECONDS) -> Iterator[None]:
    """Raises Hang in this thread when the time is over.

    What no signal reaches, a loop in C, ends the process at twice the time; `last_case` then holds the case and where
    it was. The file is written before each case, so it also names the one that a crash ended with.
    """

    def over(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"not done in {seconds:g} seconds")

    with open(last_case, "w", encoding="utf-8", errors="backslashreplace") as told:
        told.write(f"{case}\n")
        told.flush()
        former = signal.signal(signal.SIGALRM, over)
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=told)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, former)


@contextmanager
def bounded_memory(more: int = MOST_BYTES) -> Iterator[None]:
    """MemoryError for what asks for `more` bytes than the process holds now; where the system does not say how much
    that is, no bound."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    held = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = held + more if hard == resource.RLIM_INFINITY else min(held + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
