"""`python -m tests.faults.zygote`: forks runs of the command line from a process that has imported the libraries.

It reads requests as JSON lines on its standard input, and answers each on its standard output. `{"words": [...],
"place": folder, "cache": folder, "sends": ..., "variables": {...}}` starts a run; the answer is its process id.
`{"wait": [id, ...]}` waits for runs; the answer is the first exit status that is not 0, after which the others are
killed. `sends` is `["module:function", n, ["SIGTERM", ...]]`: the run signals itself at the n-th call of a function.
`HOUR` instead of a signal lets an hour pass.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.faults.kills import ROOT, forked, warm
from tests.runs import Done, arguments

Sends = tuple[str, int, list[str]]
"""A function, one of its calls, and the signals that the run sends itself then."""


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
            for name in signals:
                if name == "HOUR":
                    let_an_hour_pass()
                else:
                    os.kill(os.getpid(), signal.Signals[name])
            while len(signals) > 1:
                signal.pause()
        return function(*arguments, **keywords)

    setattr(home, name, sending)


def main() -> None:
    warm()
    for line in sys.stdin:
        request = json.loads(line)
        answer = ended(request["wait"]) if "wait" in request else begun(request)
        print(json.dumps(answer), flush=True)


def begun(request: Mapping[str, Any]) -> int:
    def before() -> None:
        os.environ.update(request["variables"])
        if request["errors"]:
            os.dup2(os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
        if request["sends"]:
            send_at(*request["sends"])

    return forked(request["words"], Path(request["place"]), Path(request["cache"]), before).pid


def ended(runs: Sequence[int]) -> int:
    """A process waits for those that it is to meet: when one has failed, the others are not waited for."""
    left, failed = set(runs), 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in left:
                os.kill(other, signal.SIGKILL)
    return failed


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

    def start(
        self,
        words: Sequence[str],
        place: Path,
        sends: Sends | None = None,
        errors: Path | None = None,
        **variables: str,
    ) -> int:
        return self.ask(
            words=list(words),
            place=str(place),
            cache=str(place / "cache"),
            sends=sends,
            errors=errors and str(errors),
            variables=variables,
        )

    def run(self, words: Sequence[str], place: Path, sends: Sends | None = None) -> int:
        """The exit status of a whole run in the folder `place`; what it printed is added to log.txt there."""
        place.mkdir(exist_ok=True)
        return self.ask(wait=[self.start(words, place, sends)])

    def run_together(self, words: Sequence[str], place: Path, errors: Path | None = None) -> int:
        """The same in two processes, which meet as those of torchrun do, whose store is its own. `errors`: a file for
        their standard error, which is in log.txt too otherwise."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
        meeting["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        place.mkdir(exist_ok=True)
        ranks = [
            self.start(words, place, errors=errors, RANK=rank, LOCAL_RANK=rank, **meeting) for rank in "01"
        ]
        return self.ask(wait=ranks)


def together(zygotes: Zygote, verb: str, settings: Mapping[str, object]) -> Done:
    """A run of two processes, with these settings alone, and what both print."""
    output = Path(str(settings["output_dir"]))
    place = output.with_name(f"{output.name}-processes")
    out, err = place / "log.txt", place / "errors.txt"
    for file in (out, err):
        file.unlink(missing_ok=True)
    status = zygotes.run_together([verb, *arguments(settings)], place, err)
    return Done(status, output, out.read_text(), err.read_text())


@contextmanager
def zygote() -> Iterator[Zygote]:
    """For as long as it is used. Its end is checked."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield Zygote(child)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait() == 0


if __name__ == "__main__":
    main()
