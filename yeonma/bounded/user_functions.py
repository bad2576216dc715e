"""Functions of the user's, `(row, answer) -> number or dict of numbers`, in a process of their own with a time limit.

They import what they like and have the user's environment, unlike what others wrote (`child.py`): the process keeps
their memory, their threads and their faults apart from training. A fault is an error that names it; it is never a 0.
"""

from __future__ import annotations

import ast
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic
from typing import Any

from yeonma.bounded import user_program
from yeonma.bounded.child import plain
from yeonma.errors import UserError, brief, did_you_mean, system_reason
from yeonma.files import end_of
from yeonma.messages import tr

CALL_SECONDS = 60.0
"""For one answer."""
IMPORT_SECONDS = 300.0
"""For importing a file, with all that it imports."""
MOST_SHOWN = 300
"""Characters of an answer, or of what a process last printed, in a message."""
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which libraries would take the process for one of the run's."""


def check_function(path: Path, function: str, place: str) -> None:
    """Raises UserError if the file does not define the function, or is no Python. Reads it without running it."""
    source = _source(path, place)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(
            tr("it is no Python: {error}", error=getattr(error, "msg", error)),
            place=f"{path}:{getattr(error, 'lineno', None) or 1}",
            cure=tr("mend the file named in {place}", place=place),
        ) from None
    names = [name for statement in ast.walk(tree) for name in _defined(statement)]
    if function in names:
        return
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    cure = did_you_mean(function, functions) or tr(
        "it defines {functions}", functions=", ".join(functions) or tr("no function")
    )
    raise UserError(tr('it defines no "{function}"', function=function), place=f"{place} {path}", cure=cure)


def _source(path: Path, place: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            tr("cannot be read ({reason})", reason=system_reason(error)),
            place=f"{place} {path}",
            cure=tr("give the path of a Python file, and the function in it: FILE.py:function"),
        ) from None


def _defined(statement: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def content_of_file(path: Path, place: str) -> str:
    """The SHA-256 of a file of functions. Raises UserError if it cannot be read."""
    return sha256(_source(path, place)).hexdigest()


class UserFunctions:
    """The process that runs them, started at the first call. A context manager; a call after its end starts another."""

    def __init__(self, call_seconds: float = CALL_SECONDS, import_seconds: float = IMPORT_SECONDS) -> None:
        self._call_seconds, self._import_seconds = call_seconds, import_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._printed: Any = None
        self._rest = b""
        self._imported: set[Path] = set()

    def values(
        self, path: Path, function: str, row: Mapping[str, object], answer: str, row_place: str
    ) -> dict[str, float]:
        """What the function gives for an answer to a row. `row_place` names the row in errors.

        Raises UserError that names file, line, function, row and answer if it raises an error, returns something else
        than finite numbers, ends its process, or takes too long.
        """
        file = path.resolve()
        if file not in self._imported:
            request = {"path": str(file), "import_only": True}
            outcome = self._ask(request, self._import_seconds)
            if "values" not in outcome:
                what = tr("importing it failed: {error}", error=outcome["error"])
                raise UserError(what, place=_place(path, outcome), cure=self._cure(outcome))
            self._imported.add(file)
        outcome = self._ask(
            {"path": str(file), "function": function, "row": plain(dict(row)), "answer": answer},
            self._call_seconds,
        )
        if "values" in outcome:
            return dict(outcome["values"])
        what = tr(
            'the function {function} failed on the answer "{answer}" to {row}: {error}',
            function=function,
            answer=brief(answer, MOST_SHOWN),
            row=row_place,
            error=outcome["error"],
        )
        raise UserError(what, place=_place(path, outcome), cure=self._cure(outcome))

    def _cure(self, outcome: Mapping[str, Any]) -> str:
        printed = outcome.get("printed")
        cure = tr("mend the function, then run the same command again")
        return tr("{cure} (it printed last: {printed})", cure=cure, printed=printed) if printed else cure

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, seconds)
        except BrokenPipeError:
            line = b""
        if line is None:
            outcome = {"error": tr("it did not end within {seconds:g} seconds", seconds=seconds)}
        elif line:
            return dict(json.loads(line))
        else:
            outcome = {"error": tr("it ended the process that ran it")}
        outcome["printed"] = self._last_printed()
        self.close()
        return outcome

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """A line of the process; None if it takes too long, and empty if the process has ended."""
        assert process.stdout is not None
        out, ends = process.stdout.fileno(), monotonic() + seconds
        poll = select.poll()
        poll.register(out, select.POLLIN)
        while b"\n" not in self._rest:
            if not poll.poll(max(0.0, ends - monotonic()) * 1000):
                return None
            part = os.read(out, 1 << 16)
            if not part:
                return b""
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {
                name: value
                for name, value in os.environ.items()
                if name not in _OF_RANKS and not name.startswith("TORCHELASTIC_")
            }
            environment |= {"PYTHONHASHSEED": "0"}
            self._printed = TemporaryFile()  # noqa: SIM115 (`close` does)
            python = sys.executable or str(Path(sys.prefix) / "bin" / "python")
            self._process = subprocess.Popen(
                [python, str(Path(user_program.__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if os.environ.get("YEONMA_DEBUG") else self._printed,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run, which ends a step first
            )
        return self._process

    def _last_printed(self) -> str:
        return " ".join(end_of(self._printed, MOST_SHOWN).split())

    def close(self) -> None:
        """Ends the process."""
        process, self._process, self._rest = self._process, None, b""
        self._imported.clear()
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            process.wait()
            self._printed.close()

    def __enter__(self) -> UserFunctions:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _place(path: Path, outcome: Mapping[str, Any]) -> str:
    line = outcome.get("line")
    return str(path) if line is None else f"{path}:{line}"
