"""The sandbox of a case: a folder, bounds on time and memory, and a check afterwards that nothing was written."""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import ClassVar

MAX_SECONDS = 20
"""Of the processor, for one case. A model's chat template may take 10 of them; everything else takes far less than one.
"""
WAITS = 6
"""So many times as long by the clock: a busy machine makes no case a hang, and a case that waits for ever is one."""
MAX_BYTES = 2 << 30
"""Of address space, in addition to what the process uses before its first case."""


class Hang(BaseException):
    """Raised in a case when its time is up. Not an Exception, so that code under test does not catch it."""


@dataclass(frozen=True)
class Sandbox:
    """`root` is the working directory of every case; `pristine` are the files that are always there.

    The token cache is next to it, in `cache`.
    """

    ROOT: ClassVar[str] = "case"
    """The name of `root` in the folder in which a sandbox is made."""

    root: Path
    cache: Path
    pristine: Mapping[str, bytes]

    @staticmethod
    def make(folder: Path, pristine: Mapping[str, bytes]) -> Sandbox:
        sandbox = Sandbox(folder / Sandbox.ROOT, folder / "cache", pristine)
        (sandbox.root / "home").mkdir(parents=True, exist_ok=True)
        for name, content in pristine.items():
            _write(sandbox.root / name, content)
        return sandbox

    @contextmanager
    def with_files(self, files: Mapping[str, bytes | None]) -> Iterator[None]:
        """Write these files, and delete those that are None. Afterwards `root` must be unchanged, without additional
        files, and no incomplete token store may be left."""
        for name, content in files.items():
            if content is None:
                (self.root / name).unlink(missing_ok=True)
            else:
                _write(self.root / name, content)
        before = _tree(self.root)
        try:
            with working_in(self.root, self.cache):
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
    """Name -> size and modification time of everything below `root`. Folders have size -1."""
    tree = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            tree[os.path.relpath(os.path.join(folder, name), root)] = (-1, 0)
        for name in files:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            tree[os.path.relpath(path, root)] = (state.st_size, state.st_mtime_ns)
    return tree


@contextmanager
def working_in(root: Path, cache: Path) -> Iterator[None]:
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
def bounded(case: str, last_case: Path, seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Raises Hang in this thread when the time is up: `seconds` of the processor, or WAITS times as many by the clock.

    If no signal gets through (a loop in C), the process ends some time later, and `last_case` has the case and its
    traceback. The file is written before every case, so it also names the case of a crash.
    """
    started, used = time.monotonic(), time.process_time()

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        left = used + seconds - time.process_time()
        if left > 0 and time.monotonic() < started + WAITS * seconds:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))
            return
        raise Hang(f"not done in {seconds:g} seconds")

    with open(last_case, "w", encoding="utf-8", errors="backslashreplace") as log:
        log.write(f"{case}\n")
        log.flush()
        former = signal.signal(signal.SIGALRM, on_alarm)
        faulthandler.dump_traceback_later((WAITS + 1) * seconds, exit=True, file=log)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, former)


@contextmanager
def bounded_memory(extra_bytes: int = MAX_BYTES) -> Iterator[None]:
    """MemoryError for allocations of `extra_bytes` beyond what the process uses now. No limit if the system does not
    tell how much that is."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use + extra_bytes if hard == resource.RLIM_INFINITY else min(in_use + extra_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
