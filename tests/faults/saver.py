"""A process that imports everything once and then forks a child for each job, which saves while a tracer watches it.

tests/faults/tracing.py runs it with one end of a socket pair as its standard input. A job is a line of JSON. The child
sends its process id, waits for a byte, and reports its progress and result. All of that goes through the socket, so
that the child's writes and renames are those of the job alone.
"""

from __future__ import annotations

import _pickle
import ctypes
import gc
import json
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

# All that a run imports on its way, so that no child reads modules where a tracer counts what is opened.
import datasets  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import get_scheduler  # noqa: F401

from tests.faults.room import mount_small, take_bytes, take_names
from tests.faults.tracing import IDENTITY
from tests.models import tiny_model
from tests.runs import TEMPLATE, characters
from yeonma.adapter import adapter_folder as adapters
from yeonma.cli import main
from yeonma.data.template import Template
from yeonma.errors import UserError
from yeonma.files import delete, disk_errors_as_user_errors
from yeonma.model import load
from yeonma.run_folder import checkpoint
from yeonma.run_folder import output_folder as folder
from yeonma.run_folder.checkpoint import AdapterWriter, RunProgress, newest_whole, recover, write_checkpoint
from yeonma.run_folder.lock import hold
from yeonma.run_folder.progress import StepRecord
from yeonma.run_folder.run_log import METRICS, TRAINED_ROWS, LogSums, open_metrics, open_trained_rows
from yeonma.tokenization.chat_template_export import export_chat_template
from yeonma.tokenization.example import TokenRules
from yeonma.train import loop
from yeonma.train import run as _run  # noqa: F401

PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, -1


class Saver:
    """A tiny model with an adapter, its tokenizer and template, and the calls of a run that save them."""

    def __init__(self) -> None:
        base = tiny_model("llama")
        self.model = load.add_lora(base, load.LoraShape(2, 4, 0.0, ["q_proj"]), 0)
        self.tokenizer = characters()
        self.template = Template.parse(TEMPLATE, "test")
        self.carried = export_chat_template(self.template, self.tokenizer)
        self.details = adapters.describe(
            adapters.base_identity(base, load.BaseSource("tiny", None, False)),
            self.template,
            None,
            TokenRules(512),
            tokenizer=self.tokenizer,
            trust_remote_code=False,
            trained_on={},
        )
        self.parameters = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    def _adapter(self, value: float) -> AdapterWriter:
        """An adapter whose weights are all `value`, so that a reader knows which one was saved."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(value)

        def write(place: Path) -> None:
            adapters.write_adapter(
                place, self.model, self.tokenizer, self.template, self.details, self.carried
            )

        return AdapterWriter(write, 10_000)

    def save(
        self, output: Path, step: int, value: float, best: int | None = None, logs: LogSums | None = None
    ) -> None:
        optimizer = {f"{name}/exp_avg": torch.full((8,), value) for name in self.parameters}
        loss = None if best is None else 1.0
        state = RunProgress(step, {}, loss, best, 0, dict(IDENTITY), logs=logs or {})
        write_checkpoint(output, state, self._adapter(value), optimizer, {"cpu/0": torch.get_rng_state()})

    def rotate(self, output: Path, limit: int, keep: int | None) -> None:
        checkpoint.rotate(output, limit, keep)

    def begin(self, output: Path) -> None:
        """What a run does with its folder before the first step."""
        with hold(output, lambda _: None):
            recover(output)
            newest = newest_whole(output, lambda _: None)
            folder.begin(output, IDENTITY, "seed: 1\n", folder.Start(*newest or ()))

    def begin_at(self, output: Path, step: int) -> None:
        """The same, from a named checkpoint."""
        with hold(output, lambda _: None):
            recover(output)
            place = checkpoint.checkpoint_path(output, step)
            start = folder.Start(place, checkpoint.read_whole(place))
            folder.begin(output, IDENTITY, "seed: 1\n", start)

    def finish(self, output: Path, value: float) -> None:
        """What a run does after the last step."""
        folder.install(output, self._adapter(value))
        folder.seal(output)
        folder.write_run_json(output, IDENTITY, finished=True)

    def run(self, output: Path, steps: int, limit: int | None) -> None:
        """What a run does with its folder from its start to its end, or what is left of it: the second step is the
        best, and each is saved."""
        with hold(output, lambda _: None):
            recover(output)
            start = folder.find_start(output, IDENTITY, "latest", False, lambda _: None)
            if start.finished:
                return
            folder.begin(output, IDENTITY, "seed: 1\n", start, limit)
            done, logs = 0, LogSums()
            if start.progress is not None:
                done, logs = start.progress.step, start.progress.logs
            lines = {name: recorded["lines"] for name, recorded in logs.items()}
            with (
                open_metrics(output / METRICS, done or None, lines=lines.get(METRICS)) as metrics,
                open_trained_rows(output / TRAINED_ROWS, done, lines.get(TRAINED_ROWS)) as rows,
            ):
                for step in range(done + 1, steps + 1):
                    metrics.write(StepRecord(step, step / 2, 1 / step, 1e-3, 1.0, 4, 100, 50, 0.1, 1))
                    rows.write(step, [step])
                    metrics.sync()
                    rows.sync()
                    logs = {METRICS: metrics.sum.as_record(), TRAINED_ROWS: rows.sum.as_record()}
                    self.save(output, step, float(step), min(step, 2), logs)
                    checkpoint.rotate(output, limit, min(step, 2))
            self.finish(output, 2.0)

    def unpickle(self, output: Path) -> None:
        forbid_pickle()
        pickle.loads(b"N.")

    def torch_load(self, output: Path) -> None:
        forbid_pickle()
        torch.load(output)


def work(saver: Saver, job: dict[str, Any], say: Callable[..., None]) -> str:
    """Empty if the job succeeded, else the message of the UserError."""
    output = Path(job["output"])
    try:
        with disk_errors_as_user_errors(output, "the run's files"):  # as run_training does
            for number, (name, *arguments) in enumerate(job["calls"], start=1):
                getattr(saver, name)(output, *arguments)
                say(done=number)
    except UserError as error:
        return str(error)
    return ""


def command(job: dict[str, Any], say: Callable[..., None]) -> None:
    """Runs `yeonma` with the job's words and exits with its status. A job may name something to do before a step."""
    number = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)
    os.environ |= job["environment"]
    if job.get("without_pickle"):
        forbid_pickle()
    if "before_step" in job:
        before_step(*job["before_step"], say)
    try:
        status = main(job["command"])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def before_step(step: int, name: str, *arguments: Any) -> None:
    """Calls a function of this file when the run reaches a step, counted from its start."""
    train_step, steps = loop.train_step, count(1)

    def noted(*its: Any) -> Any:
        if next(steps) == step:
            AMONG_STEPS[name](*arguments)
        return train_step(*its)

    loop.train_step = noted


def pause(say: Callable[..., None]) -> None:
    """Waits to be killed."""
    say(paused=True)
    while True:
        signal.pause()


AMONG_STEPS: dict[str, Callable[..., None]] = {
    "pause": pause,
    "take_bytes": lambda place, leave, say: take_bytes(Path(place), leave),
    "take_names": lambda place, leave, say: take_names(Path(place), leave),
}


def in_small_room(job: dict[str, Any], say: Callable[..., None]) -> None:
    """One job after another, each in a process of its own, on a file system of little room; what is left there when
    one has ended, and how it has, is kept outside."""
    place = Path(job["room"])
    if why := mount_small(place, job["options"]):
        say(skip=why)
        return
    statuses = []
    for number, inner in enumerate(job["jobs"]):
        for hog in place.glob("hog*"):
            delete(hog)
        process = os.fork()
        if process == 0:
            command(inner, say)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        if Path(inner["output"]).exists():
            shutil.copytree(inner["output"], Path(job["keep"]) / str(number))
    say(statuses=statuses)


def forbid_pickle() -> None:
    """Makes any pickling or unpickling in this process raise an error."""

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("something was pickled or unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
            setattr(module, name, refuse)
    pickle._Unpickler = pickle._Pickler = refuse  # type: ignore[attr-defined]
    torch.load = torch.save = refuse


def child(saver: Saver, job: dict[str, Any], line: socket.socket) -> None:
    """Does the job and exits."""

    def say(**what: object) -> None:
        line.sendall(json.dumps(what).encode() + b"\n")

    # else a kernel may let only our parents trace us
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)
    say(process=os.getpid())
    line.recv(1)
    try:
        if "room" in job:
            in_small_room(job, say)
        elif "command" in job:
            command(job, say)
        else:
            say(error=work(saver, job, say))
    except BaseException:
        say(bug=traceback.format_exc())
    os._exit(0)


def serve() -> None:
    line = socket.socket(fileno=os.dup(0))
    saver = Saver()
    with tempfile.TemporaryDirectory() as place:
        # What is imported late, or made once, is then there when a child begins.
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
