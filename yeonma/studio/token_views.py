"""The process that tokenises, from the studio's side: one at a time, for the data, template and model chosen last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from threading import Lock, Thread
from time import monotonic
from typing import IO, Any

from yeonma.files import end_of
from yeonma.messages import tr
from yeonma.studio.run_control import child_environment

FIRST_SECONDS = 1.5
"""How long a page waits for the rows before it says that they are being tokenised."""
ANSWER_SECONDS = 60.0
"""How long one page of rows may take."""
IDLE_SECONDS = 900.0
"""After so long without a look the process is ended by the next one."""
PROGRAM = "yeonma.studio.token_worker"
ROWS_A_PAGE = 10
_ENDED: Mapping[str, Any] = {}


@dataclass(frozen=True)
class TokenPage:
    """What a look at the rows gave. One of the three: `problem`, `waiting`, or rows."""

    problem: str = ""
    waiting: str = ""
    """What it is doing: the rows are not tokenised yet."""
    about: Sequence[tuple[str, str]] = ()
    legend: str = ""
    rows: int = 0
    """How many there are to show."""
    html: str = ""


class _TokenProcess:
    """One process. Not for several threads at once."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self.words = tuple(words)
        read_end, write_end = os.pipe()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(write_end), *words],
                cwd=folder,
                env=child_environment(),
                stdin=subprocess.PIPE,
                stdout=self.errors,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                start_new_session=True,  # Ctrl-C in the terminal is for the studio, which ends it
            )
        finally:
            os.close(write_end)
        self.answers: Queue[Mapping[str, Any]] = Queue()
        self.is_ready = False
        self.about: list[tuple[str, str]] = []
        self.legend = self.last_log = self.problem = ""
        self.used = monotonic()
        Thread(target=self._read, args=(read_end,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):  # or it was ended within a line
                    self.answers.put(json.loads(line))
        self.answers.put(_ENDED)

    def get_ready(self, seconds: float) -> None:
        """Takes what has come, until the rows are tokenised, there is a problem, or so much time has passed."""
        end = monotonic() + seconds
        while not self.is_ready and not self.problem:
            try:
                answer = self.answers.get(timeout=max(0.01, end - monotonic()))
            except Empty:
                return
            if "log" in answer:
                self.last_log = answer["log"]
            elif "ready" in answer:
                self.is_ready, self.legend = True, answer["legend"]
                self.about = [(name, text) for name, text in answer["ready"]]
            else:
                self.problem = answer.get("problem") or self._reason()

    def rows(self, show: str, page: int) -> TokenPage:
        assert self.process.stdin is not None
        request = {"show": show, "page": page, "size": ROWS_A_PAGE}
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=ANSWER_SECONDS)
        except (OSError, Empty):
            answer = _ENDED
        if "html" not in answer:
            self.problem = answer.get("problem") or self._reason()
            return TokenPage(problem=self.problem)
        return TokenPage(about=self.about, legend=self.legend, rows=answer["rows"], html=answer["html"])

    def _reason(self) -> str:
        """The last line that it printed, if it has ended."""
        last = next((line for line in reversed(end_of(self.errors, 4096).splitlines()) if line.strip()), "")
        return tr("the rows cannot be shown: {reason}", reason=last or tr("the process has ended"))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.errors.close()


@dataclass
class TokenViews:
    """The process for the last choice."""

    folder: Path
    """The working directory of the process, from which relative paths count."""
    _lock: Lock = field(default_factory=Lock)
    _worker: _TokenProcess | None = None

    def look(self, words: Sequence[str], show: str, page: int, seconds: float | None = None) -> TokenPage:
        """A page of rows for the words of `yeonma inspect`. Starts tokenising, and after `seconds`, by default
        FIRST_SECONDS, says that it is under way."""
        with self._lock:
            worker = self._worker
            is_old = worker is not None and (
                worker.words != tuple(words)
                or bool(worker.problem)
                or monotonic() - worker.used > IDLE_SECONDS
                or worker.process.poll() is not None
            )
            if worker is not None and is_old:
                worker.end()
                worker = None
            if worker is None:
                worker = self._worker = _TokenProcess(words, self.folder)
            worker.used = monotonic()
            worker.get_ready(FIRST_SECONDS if seconds is None else seconds)
            if worker.problem:
                return TokenPage(problem=worker.problem)
            if not worker.is_ready:
                return TokenPage(waiting=worker.last_log or tr("starting"))
            return worker.rows(show, page)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._worker is not None:
                self._worker.end()
                self._worker = None
