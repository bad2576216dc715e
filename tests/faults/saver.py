"""A process that saves: it imports everything once, then forks a child for each job, for a tracer to watch or kill.

Run by tests/faults/tracing.py with one end of a socket pair as its standard input. A job is a line of JSON; the child
sends its process id, waits for a line before it begins, and sends what came of it. All of it goes through the socket, so that
the child's writes, renames and the like are those of the work alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.models import tiny_model
from tests.runs import TEMPLATE, characters
from yeonma.cli import main
from yeonma.errors import UserError
from yeonma.model import adapter as adapters
from yeonma.model import load
from yeonma.text.template import Template
from yeonma.tokens.example import TokenRules
from yeonma.train import folder, run
from yeonma.train.checkpoint import AdapterWriter, RunState, newest_whole, recover, rotate, write_checkpoint
from yeonma.train.lock import hold

IDENTITY = {"objective": "sft", "seed": 1}
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, -1


class Saver:
    """A tiny model with an adapter, its tokenizer and template, and what its checkpoints hold."""

    def __init__(self) -> None:
        base = tiny_model("llama")
        source = load.BaseSource("tiny", None, False)
        identity = adapters.base_identity(base, source)
        shape = load.LoraShape(2, 4, 0.0, ["q_proj"])
        self.model = load.add_lora(base, shape, 0)
        self.tokenizer = characters()
        self.template = Template.parse(TEMPLATE, "test")
        self.details = adapters.describe(
            identity, self.template, None, TokenRules(), trust_remote_code=False, trained_on={}
        )
        self.parameters = {
            name: each for name, each in self.model.named_parameters() if each.requires_grad
        }

    def adapter(self, value: float) -> AdapterWriter:
        """Its weights are all `value`."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(value)

        def write(place: Path) -> None:
            adapters.write_adapter(place, self.model, self.tokenizer, self.template, self.details)

        return AdapterWriter(write, 10_000)

    def save(self, output: Path, step: int, value: float, best: int | None = None) -> None:
        state = replace(RunState(step, {}, None, None, 0, dict(IDENTITY)), best_step=best)
        optimizer = {f"{name}/exp_avg": torch.full((8,), value) for name in self.parameters}
        write_checkpoint(output, state, self.adapter(value), optimizer, {"cpu/0": torch.get_rng_state()})

    def rotate(self, output: Path, limit: int, keep: int | None) -> None:
        rotate(output, limit, keep)

    def install(self, output: Path, value: float) -> None:
        folder.install(output, self.adapter(value))

    def begin(self, output: Path) -> None:
        """What a run does with the folder before its first step, and its end."""
        with hold(output, lambda _: None):
            recover(output)
            found = newest_whole(output, lambda _: None)
            start = folder.Start() if found is None else folder.Start(*found)
            folder.begin(output, IDENTITY, "seed: 1\n", start)

    def mark(self, output: Path, finished: bool) -> None:
        folder.mark(output, IDENTITY, finished=finished)


def work(saver: Saver, job: dict[str, Any]) -> str:
    """Empty where all went well; else the message of the user's mistake."""
    try:
        if "command" in job:
            if job.get("without_pickle"):
                _forbid_pickle()
            status = main(job["command"])
            return "" if status == 0 else f"exit status {status}"
        for name, arguments in job["calls"]:
            getattr(saver, name)(Path(job["output"]), *arguments)
        return ""
    except UserError as error:
        return str(error)


def _forbid_pickle() -> None:
    import pickle

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("something was unpickled")

    pickle.load = pickle.loads = refuse  # type: ignore[assignment]
    pickle.Unpickler = pickle._Unpickler = refuse  # type: ignore[attr-defined,assignment,misc]
    torch.load = refuse


def child(saver: Saver, job: dict[str, Any], line: socket.socket) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)  # where a process may trace its own children alone
    if log := job.get("log"):
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(number, 1)
        os.dup2(number, 2)
    line.sendall(json.dumps({"process": os.getpid()}).encode() + b"\n")
    line.recv(1)
    try:
        said = {"error": work(saver, job)}
    except BaseException:
        said = {"bug": traceback.format_exc()}
    line.sendall(json.dumps(said).encode() + b"\n")
    os._exit(0)


def serve() -> None:
    line = socket.socket(fileno=os.dup(0))
    saver = Saver()
    run.make_schedule  # noqa: B018  (all that a run imports is there)
    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    from transformers import get_scheduler  # noqa: F401

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
    sys.exit(serve())
