"""A process that saves: it imports everything once, then forks a child for each job, for a tracer to watch or kill.

Run by tests/faults/tracing.py with one end of a socket pair as its standard input. A job is a line of JSON; the child
sends its process id, waits for a byte before it begins, sends what it has done as it goes, and what came of it. All of
it goes through the socket, so that the child's writes, renames and the like are those of the work alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# All that a run imports on its way, so that no child reads modules where a tracer counts what is opened.
import datasets  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import get_scheduler  # noqa: F401

from tests.faults.tracing import IDENTITY
from tests.models import tiny_model
from tests.runs import TEMPLATE, characters
from yeonma.cli import main
from yeonma.disk import told
from yeonma.errors import UserError
from yeonma.model import adapter as adapters
from yeonma.model import load
from yeonma.text.template import Template
from yeonma.tokens.example import TokenRules
from yeonma.train import checkpoint, folder
from yeonma.train import run as _run  # noqa: F401
from yeonma.train.checkpoint import AdapterWriter, RunState, newest_whole, recover, write_checkpoint
from yeonma.train.lock import hold

PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, -1


class Saver:
    """A tiny model with an adapter, its tokenizer and template, and the calls that a run makes of them."""

    def __init__(self) -> None:
        base = tiny_model("llama")
        self.model = load.add_lora(base, load.LoraShape(2, 4, 0.0, ["q_proj"]), 0)
        self.tokenizer = characters()
        self.template = Template.parse(TEMPLATE, "test")
        self.details = adapters.describe(
            adapters.base_identity(base, load.BaseSource("tiny", None, False)),
            self.template,
            None,
            TokenRules(512),
            tokenizer=self.tokenizer,
            trust_remote_code=False,
            trained_on={},
        )
        self.parameters = {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def _adapter(self, value: float) -> AdapterWriter:
        """All its weights are `value`, by which a reader knows what was saved."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(value)

        def write(place: Path) -> None:
            adapters.write_adapter(place, self.model, self.tokenizer, self.template, self.details)

        return AdapterWriter(write, 10_000)

    def save(self, output: Path, step: int, value: float, best: int | None = None) -> None:
        optimizer = {f"{name}/exp_avg": torch.full((8,), value) for name in self.parameters}
        state = RunState(step, {}, None, best, 0, dict(IDENTITY))
        write_checkpoint(output, state, self._adapter(value), optimizer, {"cpu/0": torch.get_rng_state()})

    def rotate(self, output: Path, limit: int, keep: int | None) -> None:
        checkpoint.rotate(output, limit, keep)

    def begin(self, output: Path) -> None:
        """What a run does with its folder before the first step."""
        with hold(output, lambda _: None):
            recover(output)
            found = newest_whole(output, lambda _: None)
            folder.begin(output, IDENTITY, "seed: 1\n", folder.Start(*found or ()))

    def begin_at(self, output: Path, step: int) -> None:
        """The same, from a checkpoint that was named."""
        with hold(output, lambda _: None):
            recover(output)
            place = checkpoint.checkpoint_path(output, step)
            start = folder.Start(place, checkpoint.read_whole(place))
            folder.begin(output, IDENTITY, "seed: 1\n", start)

    def finish(self, output: Path, value: float) -> None:
        """What it does after the last one."""
        folder.install(output, self._adapter(value))
        folder.seal(output)
        folder.mark(output, IDENTITY, finished=True)


def work(saver: Saver, job: dict[str, Any], done: Callable[[int], None]) -> str:
    """Empty where all went well; else the message of the user's mistake."""
    if "command" in job:
        if job.get("without_pickle"):
            forbid_pickle()
        status = main(job["command"])
        return "" if status == 0 else f"exit status {status}"
    output = Path(job["output"])
    try:
        with told(output, "the run's files"):  # as run_training does
            for number, (name, *arguments) in enumerate(job["calls"], start=1):
                getattr(saver, name)(output, *arguments)
                done(number)
    except UserError as error:
        return str(error)
    return ""


def forbid_pickle() -> None:
    """From now on, whatever is unpickled or pickled in this process is a bug with a traceback."""
    import _pickle
    import pickle

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("something was pickled or unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
            setattr(module, name, refuse)
    pickle._Unpickler = pickle._Pickler = refuse  # type: ignore[attr-defined]
    torch.load = torch.save = refuse


def child(saver: Saver, job: dict[str, Any], line: socket.socket) -> None:
    """Does the job, and ends the process."""

    def say(**what: object) -> None:
        line.sendall(json.dumps(what).encode() + b"\n")

    ctypes.CDLL(None).prctl(
        PR_SET_PTRACER, PR_SET_PTRACER_ANY
    )  # else a kernel may let only our parents trace us
    if log := job.get("log"):
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.close(number)
    os.environ |= job.get("environment", {})
    say(process=os.getpid())
    line.recv(1)
    try:
        error = work(saver, job, lambda number: say(done=number))
        sys.stdout.flush()
        say(error=error)
    except BaseException:
        say(bug=traceback.format_exc())
    os._exit(0)


def serve() -> None:
    line = socket.socket(fileno=os.dup(0))
    saver = Saver()
    with (
        tempfile.TemporaryDirectory() as place
    ):  # what is imported late, or made once, is there when a child begins
        saver.save(Path(place), 1, 1.0)
        saver.begin(Path(place))
        saver.finish(Path(place), 1.0)
    gc.freeze()
    line.sendall(b'{"ready": true}\n')
    received = b""
    while piece := line.recv(1 << 16):
        received += piece
        if not received.endswith(b"\n"):
            continue
        job, received = json.loads(received), b""
        process = os.fork()
        if process == 0:
            child(saver, job, line)
        _, status = os.waitpid(process, 0)
        line.sendall(json.dumps({"ended": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


if __name__ == "__main__":
    serve()
