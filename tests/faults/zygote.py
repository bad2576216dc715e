"""`python -m tests.faults.zygote`: forks runs of the command line from a process that has imported the libraries.

Requests come as JSON lines on its standard input, and each has an answer on its standard output: `{"words": [...],
"place": folder, "cache": folder, "sends": ...}` starts a run and gives its process id; `{"wait": id}` gives its exit
status. `sends` is `["module:function", n, ["SIGTERM", ...]]`: the run signals itself at the n-th call of a function.
In the place of a signal, `HOUR` lets an hour pass.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.kills import ROOT, Process, forked, warm


def let_an_hour_pass() -> None:
    """By the clock that the time limit looks at."""
    former = time.monotonic
    time.monotonic = lambda: former() + 3600


def send_at(place: str, call: int, signals: Sequence[str]) -> None:
    """Real signals, from the process to itself. After the second it waits to be ended."""
    module, name = place.split(":")
    home = importlib.import_module(module)
    function, calls = getattr(home, name), [0]

    def sending(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            for each in signals:
                if each == "HOUR":
                    let_an_hour_pass()
                else:
                    os.kill(os.getpid(), signal.Signals[each])
            while len(signals) > 1:
                signal.pause()
        return function(*arguments, **keywords)

    setattr(home, name, sending)


def main() -> None:
    warm()
    runs: dict[int, Process] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = runs.pop(request["wait"]).wait(True)
        else:
            sends = request["sends"]
            process = forked(
                request["words"],
                Path(request["place"]),
                Path(request["cache"]),
                before=lambda sends=sends: send_at(*sends) if sends else None,  # type: ignore[misc]
            )
            runs[process.pid], answer = process, process.pid
        print(json.dumps(answer), flush=True)


@dataclass(frozen=True)
class Zygote:
    """The other end of it."""

    child: subprocess.Popen[str]

    def ask(self, **request: object) -> int:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        return int(json.loads(self.child.stdout.readline()))

    def run(self, words: Sequence[str], place: Path, sends: tuple[str, int, list[str]] | None = None) -> int:
        """The exit status of a whole run in the folder `place`; what it printed is added to log.txt there."""
        place.mkdir(exist_ok=True)
        pid = self.ask(words=list(words), place=str(place), cache=str(place / "cache"), sends=sends)
        return self.ask(wait=pid)


def zygote() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    main()
