"""`python -m tests.faults.kills`: real runs that are killed at random moments end with the bytes of uninterrupted ones.

Each run is the command line of `yeonma sft` or `yeonma dpo` in a process of its own, with dropout, evaluations, early
stopping, checkpoints within epochs and rotation, half of them with an empty cache. How often it saves and how many
checkpoints it keeps is drawn at random. The run gets a signal and is started again, up to six times, and then runs to
its end. Its folder must then equal that of an uninterrupted run: the list of names, and every byte, checkpoints
included. Most processes are forked from this one, which has imported the libraries and computed nothing. They are as
real to kill -9 as others, and start at once. Every tenth process starts a new interpreter.

A kill counts as one during a save if the hidden folder of a checkpoint that is being written, replaced or removed is
still there afterwards; another signal, if the folder is there when the signal is sent. The program under test knows
nothing of this.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

if __name__ == "__main__":  # as tests/conftest.py has it; torch and huggingface_hub read these once
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

ROOT = Path(__file__).resolve().parents[2]
MOST_KILLS_A_RUN = 6
PLAIN_EVERY = 10
LOOK_SECONDS = 0.0005
IN_SAVE_SECONDS = 0.02  # about what a save takes; the kill comes at a random moment of it
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
SETTINGS: Mapping[str, object] = {
    "output_dir": "out",
    "template": "below is an article.\n\n{document}\n\ntitle: {title}",
    "val_set_size": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "num_epochs": 3,
    "learning_rate": 3e-3,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "eval_steps": 4,
    "early_stopping_patience": 2,
    "card_rows": 1,
}
VERBS: Mapping[str, Mapping[str, object]] = {
    "sft": {"early_stopping_threshold": 0.3},  # stops early, between two checkpoints or at one
    "dpo": {"template": None, "learning_rate": 1e-3},  # goes on to its end
}


SHORT_ANSWERS = """
import sys
from tests.runs import SAMPLE_TOKENS
from yeonma.cli import main
from yeonma.train import model_card

model_card.MAX_NEW_TOKENS = SAMPLE_TOKENS
sys.exit(main(sys.argv[1:]))
"""
ROTATION: Mapping[str, object] = {"save_steps": 2, "save_total_limit": 2}
"""Of the tests that use these commands elsewhere."""
SAVE_STEPS, LIMITS = (1, 2, 3, 5), (None, 1, 2, 3)
"""A run keeps one of these numbers of checkpoints, None all of them, and saves after so many steps, drawn for each
limit. Each rotation of a verb needs an uninterrupted run to compare with."""


@dataclass(frozen=True)
class Course:
    """A command, and the files of its uninterrupted run."""

    verb: str
    words: Sequence[str]
    whole: Mapping[str, Any]
    seconds: float
    steps: int


@dataclass
class Tally:
    """Counts of signals by what the run was doing, of finished runs, and the differences found."""

    signals: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    plain: int = 0
    again: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return self.signals.total()


@dataclass(frozen=True)
class Process:
    """A run's process. `wait` returns its status, negative for a signal, or None if it still runs."""

    pid: int
    wait: Callable[[bool], int | None]


def warm() -> None:
    """Imports what a run imports without using it, because a fork must find no threads. Its runs have short sample
    answers, as those of tests/conftest.py."""
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import yeonma.train.run  # noqa: F401
    from tests.runs import SAMPLE_TOKENS
    from yeonma.train import model_card

    model_card.MAX_NEW_TOKENS = SAMPLE_TOKENS


def hear_signals() -> None:
    """As in a terminal, even if the tests themselves run in the background or under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def forked(
    words: Sequence[str], place: Path, cache: Path, before: Callable[[], object] = lambda: None
) -> Process:
    """Runs `yeonma` with these words in a child of this process, in the folder `place`, after calling `before`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            log = os.open(place / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            os.chdir(place)
            os.environ["YEONMA_CACHE"] = str(cache)
            hear_signals()
            from yeonma.cli import main

            before()
            status = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(block: bool) -> int | None:
        ended, status = os.waitpid(pid, 0 if block else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    return Process(pid, wait)


def started(words: Sequence[str], place: Path, cache: Path) -> Process:
    """The same, with a new interpreter, and sample answers as short as those of a fork."""
    environment = {**os.environ, "YEONMA_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    with (place / "log.txt").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", SHORT_ANSWERS, *words],
            cwd=place,
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=hear_signals,
        )
    return Process(child.pid, lambda block: child.wait() if block else child.poll())


def left_behind(output: Path, checkpoints: bool) -> dict[str, Any]:
    """Every name, and every file's bytes but those of log.txt; metrics.jsonl as lines, without times and memory, and
    without its sum."""
    from tests.runs import untimed

    contents: dict[str, Any] = {
        str(path.relative_to(output)): path.read_bytes() if path.is_file() else "a folder"
        for path in sorted(output.rglob("*"))
        if checkpoints or (path.parent == output and path.is_file())
    }
    contents["log.txt"] = "what was printed"
    lines = untimed(contents["metrics.jsonl"])
    sums = json.loads(contents["manifest.json"])
    sums["sha256"].pop("metrics.jsonl")
    return {**contents, "metrics.jsonl": [json.dumps(line) for line in lines], "manifest.json": sums}


def in_save(output: Path) -> bool:
    """Whether a checkpoint is being written, replaced or removed."""
    try:
        return any(name.startswith(".checkpoint-") for name in os.listdir(output))
    except FileNotFoundError:
        return False


def phase(output: Path, steps: int) -> str:
    """What a killed process was doing, judged by the files that it left."""
    if in_save(output):
        return "in a save"
    try:
        lines = (output / "trained_rows.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return "before the first step"
    done = json.loads(lines[-1])["step"] if lines else 0
    return (
        "before the first step" if not done else "among the steps" if done < steps else "after the last step"
    )


def prepare(place: Path, rotation: Mapping[str, object] = ROTATION) -> dict[str, list[str]]:
    """A tiny base, rows and pairs; the command of each verb."""
    from tests.pairs import pairs
    from tests.runs import arguments, articles, model_folder, write_jsonl

    place.mkdir(exist_ok=True)
    base = model_folder(place / "base")
    data = {
        "sft": write_jsonl(place / "rows.jsonl", articles(42)),
        "dpo": write_jsonl(place / "pairs.jsonl", pairs(42)),
    }
    return {
        verb: [
            verb,
            *arguments({"base_model": base, "data_path": data[verb], **SETTINGS, **own, **rotation}),
        ]
        for verb, own in VERBS.items()
    }


def in_child(function: Callable[[], object]) -> Any:
    """The result of a function as JSON, computed in a fork, so that this process starts no threads."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(function()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(content)


def reference(verb: str, words: Sequence[str], place: Path, checkpoints: bool) -> Course:
    """The uninterrupted run."""
    place.mkdir()
    began = monotonic()
    status = forked(words, place, place / "cache").wait(True)
    seconds = monotonic() - began
    log = (place / "log.txt").read_text()
    if status != 0:
        raise SystemExit(f"{verb} failed by itself:\n{log}")
    whole = left_behind(place / "out", checkpoints)
    steps = json.loads(whole["trained_rows.jsonl"].splitlines()[-1])["step"]
    return Course(verb, words, whole, seconds, steps)


def moment(process: Process, output: Path, course: Course, aim: bool, draw: random.Random) -> bool:
    """Waits for a random moment, with `aim` during one of the next saves. False if the process ended before it."""
    if not aim:
        until = monotonic() + draw.uniform(0, course.seconds)
        while monotonic() < until:
            if process.wait(False) is not None:
                return False
            sleep(0.005)
        return True
    for _ in range(draw.randint(1, 4)):
        while in_save(output):  # what a killed process has left lies there until the folder is taken up
            if process.wait(False) is not None:
                return False
            sleep(LOOK_SECONDS)
        while not in_save(output):
            if process.wait(False) is not None:
                return False
            sleep(LOOK_SECONDS)
    sleep(draw.uniform(0, IN_SAVE_SECONDS))
    return True


def one_run(
    course: Course, place: Path, tally: Tally, number: signal.Signals, most: int, draw: random.Random
) -> None:
    """One run from start to end, with up to `most` signals."""
    output, cache = place / "out", place / ("cache" if draw.random() < 0.5 else "../shared-cache")
    place.mkdir()
    for left in range(draw.randint(1, MOST_KILLS_A_RUN), -1, -1):
        tally.again += 1
        plain = tally.again % PLAIN_EVERY == 0
        tally.plain += plain
        process = (started if plain else forked)(course.words, place, cache)
        if not left or tally.sent >= most:
            status = process.wait(True)
            break
        saves = tally.signals["in a save"]
        if not moment(process, output, course, 2 * saves < tally.sent + 2, draw):
            status = 0 if (output / "README.md").exists() else 1
            break
        saving = number != signal.SIGKILL and in_save(output)  # it will have been finished
        os.kill(process.pid, number)
        if number != signal.SIGKILL and draw.random() < 0.3:
            sleep(draw.uniform(0, 0.05))
            os.kill(process.pid, number)  # at once
        status = process.wait(True)
        if status not in (STATUS[number], -number):
            break  # it was about to end, and did, or something is wrong
        tally.signals["in a save" if saving else phase(output, course.steps)] += 1
    tally.runs += 1
    log = (place / "log.txt").read_text()
    if status != 0:
        tally.failures.append(f"{course.verb} in {place}: status {status}\n{log}")
        return
    contents = left_behind(output, number == signal.SIGKILL)
    different = [name for name in {*contents, *course.whole} if contents.get(name) != course.whole.get(name)]
    if different:
        tally.failures.append(f"{course.verb} in {place}: {', '.join(sorted(different))}\n{log}")


def kill(
    place: Path, verbs: Sequence[str], kills: int, number: signal.Signals, draw: random.Random
) -> dict[str, Tally]:
    """Sends the signals to runs of each verb, at least half of them during a save. `place` is an empty folder."""
    warm()
    rotations = [{"save_steps": draw.choice(SAVE_STEPS), "save_total_limit": limit} for limit in LIMITS]
    print(f"rotations {json.dumps(rotations)}", flush=True)
    commands = [
        in_child(partial(prepare, place / f"inputs-{index}", rotation))
        for index, rotation in enumerate(rotations)
    ]
    tallies: dict[str, Tally] = {}
    for verb in verbs:
        courses = [
            reference(verb, words[verb], place / f"whole-{verb}-{index}", number == signal.SIGKILL)
            for index, words in enumerate(commands)
        ]
        tally = tallies[verb] = Tally()
        while tally.sent < kills or 2 * tally.signals["in a save"] < tally.sent:
            most = max(kills, 2 * (tally.sent - tally.signals["in a save"]))
            one_run(draw.choice(courses), place / f"{verb}-{tally.runs}", tally, number, most, draw)
            if len(tally.failures) >= 5:
                break
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="over both verbs together")
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, where it is not given")
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--verbs", nargs="*", choices=VERBS, default=list(VERBS))
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    began = monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kills_per_verb = -(-arguments.kills // len(arguments.verbs))
        number = signal.Signals[f"SIG{arguments.signal}"]
        tallies = kill(Path(folder), arguments.verbs, kills_per_verb, number, random.Random(seed))
    for failure in (failure for tally in tallies.values() for failure in tally.failures):
        print(failure, file=sys.stderr)
    lines = {
        verb: {
            "signals": tally.sent,
            **dict(sorted(tally.signals.items())),
            "runs": tally.runs,
            "processes": tally.again,
            "started from nothing": tally.plain,
            "failures": len(tally.failures),
        }
        for verb, tally in tallies.items()
    }
    summary = {"seed": seed, "signal": arguments.signal, "seconds": round(monotonic() - began, 1), **lines}
    print(f"kills: {json.dumps(summary)}")
    return 1 if any(tally.failures for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
