"""The program of the child process that runs functions of the user's: metrics of answers, rewards.

It is started by its path, with the user's packages and environment, and imports nothing of Yeonma. `user_functions.py`
is its other end. A request is a line of JSON on standard input: the file of a function, its name, a row and an answer.
A reply is a line of JSON: `{"values": {...}}`, or `{"error": ..., "line": ...}`. What the functions print goes to
standard error.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import sys
import threading
import time
from types import ModuleType
from typing import Any

_MOST = 1_000
"""Characters of an error that are sent back."""
_LOOK_SECONDS = 2.0
_modules: dict[str, ModuleType] = {}


def _module(path: str) -> ModuleType:
    """The module in a file, imported once. Files beside it can be imported by it."""
    if path not in _modules:
        folder = os.path.dirname(path)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        name = os.path.splitext(os.path.basename(path))[0]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _modules[path] = module
    return _modules[path]


def _answer(path: str, function: str, row: dict[str, Any], answer: str) -> dict[str, float]:
    """The numbers that a function gives: under its own name if it returns one, else under those of its dict."""
    called = getattr(_module(path), function)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    result = called(row, answer)
    values = result if isinstance(result, dict) else {function: result}
    if not values:
        raise ValueError("it returned an empty dict, not numbers")
    return {_name(name): _number(value) for name, value in values.items()}


def _name(name: object) -> str:
    if not isinstance(name, str) or not name or len(name) > 60 or not name.isprintable():
        raise TypeError(f"a key of its dict is {name!r:.100}, not a short text")
    return name


def _number(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # bool, int, float, and the numbers of other libraries
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise TypeError(f"it returned {value!r:.100}, not a finite number or a dict of numbers")
    return number


def _line(error: BaseException, path: str) -> int | None:
    """The last line of the user's file that the error has passed, or that cannot be parsed."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


def _reply(line: str) -> dict[str, Any]:
    request = json.loads(line)
    path = request["path"]
    try:
        if request.get("import_only"):
            _module(path)
            return {"values": {}}
        return {"values": _answer(path, request["function"], request["row"], request["answer"])}
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return {"error": what[:_MOST], "line": _line(error, path)}


def _end_with(parent: int) -> None:
    """Ends this process soon after the one that started it, even while a function runs."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def main() -> None:
    """Replies until standard input ends."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for line in requests:
        replies.write(json.dumps(_reply(line)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
