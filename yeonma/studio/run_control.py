"""Stopping and resuming runs: as the signal and the command of a terminal would.

A resumed run is a process of its own, in a session of its own, so that it outlives the studio. Its command is a list of
words, never a line for a shell.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any

from yeonma.config.parse import config_text
from yeonma.config.settings import GROUPS
from yeonma.config.yaml_text import read_items
from yeonma.errors import UserError, system_reason
from yeonma.files import end_of
from yeonma.messages import tr
from yeonma.serve.listen import KEY
from yeonma.studio.found_runs import FoundRun
from yeonma.train.interrupt import REASONS

SETTINGS = "settings.yaml"
CODE_SETTINGS = ("trust_remote_code",)
"""Settings with which a run executes code that came with a model or with data."""
FUNCTION_SETTINGS = ("answer_metrics", "reward")
"""Settings that may name functions in Python files, which a run executes."""
OUTPUT_BYTES = 16_384
"""Of the end of what a resumed run printed."""
_NO = (False, None, "false", "no", "off")


def child_environment() -> dict[str, str]:
    """Of a process that the studio starts: without the key of its pages, and without modules of the folder that the
    command is run in."""
    return {name: value for name, value in os.environ.items() if name != KEY} | {"PYTHONSAFEPATH": "1"}


@dataclass(frozen=True)
class ResumeCommand:
    """How a run is continued from a terminal. words: without the program."""

    words: tuple[str, ...]
    folder: Path
    """The working directory, from which the settings' relative paths count."""

    @property
    def shown(self) -> list[str]:
        return ["yeonma", *self.words]


def resume_command(run: FoundRun, *, allow_code: bool) -> ResumeCommand:
    """Raises UserError if the run's settings cannot be read, if they belong to another folder, or if they let it run
    code and that is not allowed."""
    path = run.folder / SETTINGS
    settings = _settings_in(path)
    code = [name for name in CODE_SETTINGS if settings.get(name) not in _NO]
    code += [name for name in FUNCTION_SETTINGS if ".py" in str(settings.get(name, ""))]
    if code and not allow_code:
        raise UserError(
            tr("{setting} lets a run execute code that lies beside it or its model", setting=code[0]),
            place=str(path),
            cure=tr("resume it in a terminal, or start the studio with --allow_code true"),
        )
    words = [run.objective if run.objective in GROUPS else "dpo", "--config", str(path)]
    if settings.get("overwrite") not in _NO:
        words += ["--overwrite", "false"]
    if settings.get("resume_from_checkpoint", "latest") != "latest":
        words += ["--resume_from_checkpoint", "latest"]
    return ResumeCommand(tuple(words), _working_directory(run.folder, str(settings.get("output_dir", ""))))


def settings_text(run: FoundRun) -> str:
    """The YAML of a run; empty without one."""
    path = run.folder / SETTINGS
    try:
        return config_text(str(path)) if path.is_file() else ""
    except UserError:
        return ""


def _settings_in(path: Path) -> Mapping[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise UserError(
            tr("the run has no settings to resume it with"),
            place=str(path),
            cure=tr("run the command again with which it began"),
        )
    return {str(key): value for key, value, _ in read_items(config_text(str(path)), str(path))}


def _working_directory(folder: Path, output: str) -> Path:
    """Where the run was started, by its output folder as it was written."""
    written = Path(output).expanduser()
    start = folder
    for name in reversed(written.parts if not written.is_absolute() else ()):
        if name != start.name:
            break
        start = start.parent
    if not output or (start / written).resolve() != folder:
        raise UserError(
            tr("its settings name another folder, {output}", output=output or "-"),
            place=str(folder),
            cure=tr("resume it in a terminal, with --output_dir"),
        )
    return Path.cwd() if written.is_absolute() else start


@dataclass
class _Resumed:
    """A process that was started here, and the file that it prints into, which has no name."""

    process: subprocess.Popen[bytes]
    printed: IO[bytes]
    began: float
    """As time.time()."""

    def printed_lines(self, most: int = 20) -> list[str]:
        return end_of(self.printed, OUTPUT_BYTES).splitlines()[-most:]


@dataclass
class RunControl:
    """What was asked of runs since the studio began."""

    allow_code: bool
    _lock: Lock = field(default_factory=Lock)
    """Two requests at once must not send two signals."""
    _stopping: dict[str, int] = field(default_factory=dict)
    """Key of a run -> its process, which has been asked to stop. A second signal would end it without a checkpoint."""
    _resumed: dict[str, _Resumed] = field(default_factory=dict)

    def stop(self, run: FoundRun) -> None:
        """Asks a run to save a checkpoint and to end, once. Raises UserError if that is not possible."""
        if run.process is None:
            if run.state == "running":
                raise UserError(
                    tr("it runs on another machine, or as another user"),
                    place=str(run.folder),
                    cure=tr("stop it there, with Ctrl-C"),
                )
            return
        with self._lock:
            if self._stopping.get(run.key) == run.process:
                return
            try:
                os.kill(run.process, signal.SIGTERM)
            except ProcessLookupError:
                return
            except OSError as error:
                raise UserError(
                    tr("it cannot be stopped from here: {reason}", reason=system_reason(error)),
                    place=str(run.folder),
                    cure=tr("stop it where it was started, with Ctrl-C"),
                ) from None
            self._stopping[run.key] = run.process

    def is_stopping(self, run: FoundRun) -> bool:
        return run.process is not None and self._stopping.get(run.key) == run.process

    def resume(self, run: FoundRun) -> None:
        """Starts the command that continues a run. Raises UserError if that is not possible."""
        if run.state in ("running", "finished"):
            return
        command = resume_command(run, allow_code=self.allow_code)
        with self._lock:
            if not self.is_starting(run):
                self._start(run, command)

    def _start(self, run: FoundRun, command: ResumeCommand) -> None:
        printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended and was seen)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "yeonma", *command.words],
                cwd=command.folder,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            printed.close()
            raise UserError(
                tr("its command cannot be started: {reason}", reason=system_reason(error)),
                place=str(run.folder),
                cure=tr("resume it in a terminal"),
            ) from None
        if (earlier := self._resumed.pop(run.key, None)) is not None:
            earlier.printed.close()
        self._resumed[run.key] = _Resumed(process, printed, time.time())

    def is_starting(self, run: FoundRun) -> bool:
        """Whether a process that was started here lives; it holds the folder after some seconds."""
        resumed = self._resumed.get(run.key)
        return resumed is not None and resumed.process.poll() is None

    def failure(self, run: FoundRun) -> tuple[int, list[str]] | None:
        """Status and last lines of a command that was started here and failed before it wrote into the folder; later
        failures are in the run's log. None if there is none."""
        resumed = self._resumed.get(run.key)
        if resumed is None or run.state in ("running", "finished") or run.changed > resumed.began:
            return None
        status = resumed.process.poll()
        if status is None or status in (0, *REASONS):
            return None
        return status, resumed.printed_lines()
