"""A child process that runs what others wrote, with bounds of time and memory. `child_program.py` is its program.

It is started at its first use, and lives as long as this process. One request runs at a time. A request that exceeds
its bounds ends the child; the next one starts another.
"""

from __future__ import annotations

import atexit
import json
import marshal
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from yeonma.bounded import child_program
from yeonma.bounded.child_program import ANSWER, DONE, HEADER, OUT_OF_MEMORY, READY, REFUSED, TOO_LARGE
from yeonma.errors import UserError
from yeonma.messages import tr

MIB = 1024 * 1024
_SLICE = 0.25
"""Seconds between two looks at a child that takes long."""
_WALL = 3.0
"""How many times its processor time a child may take by the clock: other programs run as well."""
_START_SECONDS = 60.0
_MARSHAL = 2
"""marshal's last version whose bytes do not depend on which objects are the same one."""


@dataclass(frozen=True)
class Bounds:
    """What one request may take."""

    seconds: float
    """Of processor time. The clock may show three times as much, and five seconds."""
    memory: int
    """Bytes, besides those of the child itself and 64 for each byte of the request."""
    result: int
    """Bytes of the result, besides 16 for each byte of the request."""


class OverBounds(Exception):
    """A request has exceeded its bounds. The message says which, as in "did not end within 10 seconds"."""


class Refused(Exception):
    """What others wrote has raised an error, or is faulty. The message is the error's."""


def plain(value: Any) -> Any:
    """The value made of JSON's types alone; other objects become the name of their type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def packed(values: tuple[Any, ...]) -> bytes:
    """Values as the child reads them. Equal values have equal bytes."""
    try:
        return marshal.dumps(values, _MARSHAL)
    except ValueError:  # types of others among the values
        return marshal.dumps(tuple(plain(values)), _MARSHAL)


class _Child:
    """One child process, with the pipes to it."""

    def __init__(self) -> None:
        paths = [path for path in sys.path if os.path.isabs(path)]
        program = str(Path(child_program.__file__).resolve())
        python = sys.executable or str(Path(sys.prefix) / "bin" / "python")
        kept = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, "-I", "-S", "-B", program, json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("YEONMA_DEBUG") else subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.into, self.out = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.poll = select.poll()
        self.poll.register(self.out, select.POLLIN)
        self.requests = 0
        self.owner = os.getpid()
        if self._read(ANSWER.size, _START_SECONDS, None)[:1] != READY:
            raise _Gone

    def ask(self, request: bytes, bounds: Bounds) -> tuple[bytes, bytes]:
        """(kind, content) of the answer. Raises _Gone, _TooLong or _TooMuch; the child must then be ended."""
        most = bounds.result + 16 * len(request)
        memory = bounds.memory + 64 * len(request)
        self.requests += 1
        self._write(HEADER.pack(len(request), bounds.seconds, memory, most))
        self._write(request)
        header = self._read(ANSWER.size, _WALL * bounds.seconds + 5, memory)
        kind, count = ANSWER.unpack(header)
        if count > max(most, 4 * child_program.MOST_ERROR):
            raise _Gone
        return kind, self._read(count, _START_SECONDS, None)

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        try:
            while view:
                view = view[os.write(self.into, view) :]
        except BrokenPipeError:
            raise _Gone from None

    def _read(self, count: int, seconds: float, memory: int | None) -> bytes:
        """`count` bytes from the child. Time in which this process stood still does not count."""
        parts: list[bytes] = []
        waited = 0.0
        while count:
            before = monotonic()
            if not self.poll.poll(_SLICE * 1000):
                waited += min(monotonic() - before, 2 * _SLICE)
                if waited > seconds:
                    raise _TooLong
                if memory is not None and self._resident() > memory:
                    raise _TooMuch
                continue
            part = os.read(self.out, min(count, MIB))
            if not part:
                raise _Gone
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _resident(self) -> int:
        """The child's memory in bytes, where the kernel does not limit it (macOS); else 0."""
        return 0 if sys.platform.startswith("linux") else resident_bytes(self.process.pid)

    def end(self) -> int:
        """Ends the child at once. Returns its exit status, negative for a signal."""
        if self.owner != os.getpid():  # a fork of the process that has started it
            self.forget()
            return 0
        self.process.kill()
        self.forget()
        return self.process.wait()

    def forget(self) -> None:
        """Closes the pipes: the child ends when it has answered."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def finish(self) -> None:
        """Ends an idle child as the process ends, and waits for it."""
        if self.owner == os.getpid():
            self.end()


class _Gone(Exception):
    """The child has ended by itself."""


class _TooLong(Exception):
    """The clock has run out."""


class _TooMuch(Exception):
    """The child has more memory than it may have."""


def resident_bytes(process: int) -> int:
    """The memory of a process in bytes, as `ps` says; 0 if it does not."""
    try:
        text = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, timeout=10, check=False
        ).stdout
        return int(text) * 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


_lock = threading.RLock()
_running: list[_Child] = []


def ask(kind: str, arguments: Sequence[Any], bounds: Bounds) -> bytes:
    """The result of a request to the child: `kind` is a name in `child_program`.

    May be called from any thread. Raises OverBounds, Refused, and UserError if no process can be started.
    """
    request = packed((kind, tuple(arguments)))
    with _lock:
        while True:
            child = _child()
            first = child.requests == 0
            try:
                answer, content = child.ask(request, bounds)
            except BaseException as error:
                _running.clear()
                status = child.end()
                if isinstance(error, _TooLong) or (isinstance(error, _Gone) and status == -signal.SIGPROF):
                    raise OverBounds(
                        tr("did not end within {seconds:g} seconds", seconds=bounds.seconds)
                    ) from None
                without_memory = (
                    isinstance(error, _Gone) and status == -signal.SIGABRT and first
                )  # of libraries in Rust
                if isinstance(error, _TooMuch) or without_memory:
                    raise OverBounds(_more_memory(bounds)) from None
                if not isinstance(error, _Gone):
                    raise
                if first:
                    raise OverBounds(
                        tr("ended the process that ran it ({status})", status=_ending(status))
                    ) from None
                continue  # somebody ended it between two requests, or memory ran out: once more, in a fresh one
            if answer == OUT_OF_MEMORY:
                _running.clear()
                child.end()
                if first:
                    raise OverBounds(_more_memory(bounds))
                continue
            break
    if answer == REFUSED:
        raise Refused(content.decode("utf-8", "replace"))
    if answer == TOO_LARGE:
        raise OverBounds(tr("writes more than {result}", result=_size(bounds.result + 16 * len(request))))
    assert answer == DONE, answer
    return content


def _more_memory(bounds: Bounds) -> str:
    return tr("needs more than {memory} of memory", memory=_size(bounds.memory))


def _size(count: int) -> str:
    return f"{count / MIB:,.3g} MiB"


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else tr("status {status}", status=status)


def _child() -> _Child:
    if _running and _running[0].owner != os.getpid():
        _forget()
    if not _running:
        try:
            _running.append(_Child())
        except (OSError, _Gone, _TooLong) as error:
            raise UserError(
                tr(
                    "what others wrote (chat templates, expressions, tokenizers) runs in a process of its "
                    "own, and this could not be started ({name}: {value})",
                    name=type(error).__name__,
                    value=str(error) or tr("it ended"),
                ),
                cure=tr(
                    "free memory, file handles or processes (`ulimit -n -u -v`), and run the command again"
                ),
            ) from error
    return _running[0]


def _forget() -> None:
    """In a fork of the process: the pipes belong to the other one."""
    for child in _running:
        child.forget()
    _running.clear()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it
    _forget()


def end() -> None:
    """Ends the child, if one runs."""
    with _lock:
        for child in _running:
            child.finish()
        _running.clear()


atexit.register(end)
os.register_at_fork(after_in_child=_after_fork)
