"""kill -9 and failing calls at every write, sync, rename and removal of a save, of a rotation and of the end of a run.

A real process (tests/faults/saver.py) does what a run does with its folder, under strace. The first time its calls are
listed. Then it is repeated for each of these calls, and killed there, or the call fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.durable import breaches
from tests.faults.tracing import (
    FOLDERS,
    IDENTITY,
    OPENS,
    REMOVALS,
    RENAMES,
    SYNCS,
    WRITES,
    Call,
    Workshop,
)
from tests.runs import SETTINGS as RUN_SETTINGS
from tests.runs import arguments, articles, left_behind, model_folder, write_jsonl
from yeonma.files import file_hash, hashes_of
from yeonma.run_folder import output_folder as folder
from yeonma.run_folder.checkpoint import newest_whole, read_whole, recover
from yeonma.run_folder.lock import hold

Calls = Sequence[Sequence[object]]


@dataclass(frozen=True)
class Course:
    """What a process does with a folder that earlier ones have filled.

    `newest`: the step of the newest whole checkpoint, before it begins and after each of its calls. `values`: what the
    weights of a step's checkpoint may be, where that is not the step's number.
    """

    before: Calls
    calls: Calls
    newest: Sequence[int]
    values: dict[int, set[float]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    ends_with: set[str] = field(default_factory=set)


COURSES = {
    "save and rotate": Course(
        before=[["begin"], ["save", 1, 1.0], ["save", 2, 2.0, 1]],
        calls=[["save", 3, 3.0, 1], ["rotate", 1, 1]],
        newest=[2, 3, 3],
        ends_with={"checkpoint-1", "checkpoint-3"},  # the best, and the newest
    ),
    "save a step again": Course(
        before=[["begin"], ["save", 1, 1.0], ["save", 2, 2.0]],
        calls=[["save", 2, 2.5]],
        newest=[2, 2],
        values={2: {2.0, 2.5}},
        ends_with={"checkpoint-1", "checkpoint-2"},
    ),
    "begin among what kills have left": Course(
        before=[["begin"], *(["save", step, float(step)] for step in (1, 2, 3, 4))],
        calls=[["begin"]],
        newest=[3, 3],
        renamed={
            "checkpoint-1": ".checkpoint-1.removed",
            "checkpoint-3": ".checkpoint-3.former",
            "checkpoint-4": ".checkpoint-4.partial",
        },
        ends_with={"checkpoint-2", "checkpoint-3"},
    ),
    "begin at a named checkpoint": Course(
        before=[["begin"], *(["save", step, float(step)] for step in (1, 2, 3))],
        calls=[["begin_at", 1]],
        newest=[1, 1],
        ends_with={"checkpoint-1"},
    ),
    "finish": Course(
        before=[["begin"], ["save", 1, 1.0], ["save", 2, 2.0]],
        calls=[["finish", 2.0]],
        newest=[2, 2],
        ends_with={"checkpoint-1", "checkpoint-2"},
    ),
}


class Stage:
    """A course's folder, made anew for each kill."""

    def __init__(self, saver: Workshop, course: Course, place: Path) -> None:
        self.saver, self.course = saver, course
        self.output, self.filled = place / "out", place / "filled"
        self.job = {"output": str(self.output), "calls": course.calls}
        saver.succeed({"output": str(self.filled), "calls": course.before})
        for name, hidden in course.renamed.items():
            (self.filled / name).rename(self.filled / hidden)
        self.gone_on_from: set[frozenset[tuple[str, str]]] = set()
        self.fill()
        self.calls = calls_on(self.output, saver.trace(self.job, place / "trace"))

    def fill(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.copytree(self.filled, self.output)

    def check(self, done: int, at: object) -> None:
        """What the same command finds in the folder now, after `done` of the calls; and that it comes to its end."""
        run = json.loads((self.output / folder.RUN).read_text("utf-8"))
        if run["finished"]:
            check_finished(self.output)
        with hold(self.output, print):
            recover(self.output)
            damaged: list[str] = []
            newest = newest_whole(self.output, damaged.append)
            assert newest is not None, at
            assert damaged == [], at
            step = newest[1].step
            assert step >= self.course.newest[done], at
            check_weights(newest[0] / "adapter_model.safetensors", self.values(step))
            folder.begin(self.output, IDENTITY, "seed: 1\n", folder.Start(*newest))
            assert read_whole(newest[0]) == newest[1], at
        tidy = frozenset(hashes_of(self.output).items())
        if tidy not in self.gone_on_from:  # of many kills, few different folders are left once it is tidied
            self.saver.succeed({"output": str(self.output), "calls": [["begin"], *self.course.calls]})
            self.check_end(at)
            self.gone_on_from.add(tidy)

    def values(self, step: int) -> set[float]:
        return self.course.values.get(step, {float(step)})

    def check_end(self, at: object) -> None:
        assert {path.name for path in self.output.glob("*checkpoint-*")} == self.course.ends_with, at
        assert hidden_in(self.output) == set(), at
        for name in self.course.ends_with:
            read_whole(self.output / name)
        if self.course.calls[-1][0] == "finish":
            assert json.loads((self.output / folder.RUN).read_text("utf-8"))["finished"], at
            check_finished(self.output)


def calls_on(output: Path, calls: Sequence[Call]) -> list[Call]:
    """Those that name the folder or something in it; and the flushes of its own name."""
    parent = f"<{output.parent}>"
    return [
        call for call in calls if str(output) in call.text or (call.name in SYNCS and parent in call.text)
    ]


def hidden_in(output: Path) -> set[str]:
    return {path.name for path in output.iterdir() if path.name.startswith(".")}


def check_weights(path: Path, values: set[float]) -> None:
    numbers = {float(number) for weights in load_file(path).values() for number in weights.unique()}
    assert len(numbers) == 1
    assert numbers <= values


def check_finished(output: Path) -> None:
    """Where run.json says that a run is finished, everything is there, as its manifest says."""
    hashes = json.loads((output / folder.SEAL).read_text("utf-8"))["sha256"]
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "yeonma.json",
        "template.txt",
    } <= hashes.keys()
    assert {name: file_hash(output / name) for name in hashes} == hashes
    check_weights(output / "adapter_model.safetensors", {2.0})


@pytest.fixture
def stage(saver: Workshop, tmp_path: Path, request: pytest.FixtureRequest) -> Stage:
    return Stage(saver, COURSES[request.param], tmp_path)


@pytest.mark.parametrize("stage", COURSES, indirect=True)
def test_a_kill_at_every_call_leaves_a_whole_checkpoint(stage: Stage) -> None:
    stage.check_end("without a kill")
    for at in stage.calls:
        stage.fill()
        outcome = stage.saver.kill(stage.job, at)
        stage.check(outcome.done, at)
    print(f"{len(stage.calls)} kills")


KINDS = {
    "open": OPENS,
    "write": WRITES,
    "flush": SYNCS,
    "rename": RENAMES,
    "removal": REMOVALS,
    "folder": FOLDERS,
}


@pytest.mark.parametrize("stage", ["save and rotate"], indirect=True)
def test_every_kind_of_call_is_among_those_looked_at(stage: Stage) -> None:
    counts = Counter(kind for call in stage.calls for kind, names in KINDS.items() if call.name in names)
    assert set(counts) == set(KINDS)
    flushed = [call for call in stage.calls if call.name in SYNCS]
    saved = {path.name for path in stage.output.glob("checkpoint-3/*")}
    assert len(flushed) >= len(saved) + 2  # and the folder, and its parent


@pytest.mark.parametrize("stage", COURSES, indirect=True)
def test_nothing_relies_on_what_is_not_flushed(stage: Stage) -> None:
    assert breaches(stage.calls, stage.output) == []


@pytest.mark.parametrize("stage", ["save and rotate", "save a step again"], indirect=True)
def test_each_flush_of_a_save_is_missed_where_it_is_left_out(stage: Stage) -> None:
    """The test above can fail: without any one of its flushes a save is found to be unsafe."""
    flushes = [number for number, call in enumerate(stage.calls) if call.name in SYNCS]
    assert len(flushes) > 10
    for number in flushes:
        without = [*stage.calls[:number], *stage.calls[number + 1 :]]
        if stage.course.calls[-1][0] == "rotate" and number == flushes[-1]:
            continue  # that a removal is on the disk is not relied on
        assert breaches(without, stage.output) != [], stage.calls[number]


@pytest.mark.parametrize("stage", ["save and rotate"], indirect=True)
def test_nothing_is_written_through_memory(stage: Stage, tmp_path: Path) -> None:
    """Which no call would show: a file that is mapped to be written to."""
    stage.fill()
    calls = stage.saver.trace(stage.job, tmp_path / "trace", also="mmap")
    mapped = [call for call in calls if call.name == "mmap" and "MAP_SHARED" in call.text]
    assert [call for call in mapped if "PROT_WRITE" in call.text and str(stage.output) in call.text] == []


FREE = re.compile(r"[\d,]+( bytes)? are free; make room")
NEEDED = re.compile(r"it needs [\d,]+ bytes, and [\d,]+ are free; make room")
ERROR = {
    **dict.fromkeys((*OPENS, *WRITES, *FOLDERS, *RENAMES), "ENOSPC"),
    **dict.fromkeys((*SYNCS, *REMOVALS), "EIO"),
}


@pytest.mark.parametrize("stage", ["save and rotate", "save a step again", "finish"], indirect=True)
def test_a_call_that_fails_harms_no_earlier_checkpoint_and_is_told(stage: Stage) -> None:
    reported = 0
    for at in stage.calls:
        stage.fill()
        outcome = stage.saver.fail(stage.job, at, ERROR[at.name])
        assert (outcome.status, outcome.bug) == (0, ""), (at, outcome)
        if outcome.error:
            reported += 1
            assert FREE.search(outcome.error), (at, outcome)
            if ".partial/" in at.text and at.name not in REMOVALS:
                assert NEEDED.search(outcome.error), (at, outcome)
        if at.name not in REMOVALS:
            assert not {name for name in hidden_in(stage.output) if name.endswith(".partial")}, at
        stage.check(outcome.done, at)
    assert reported > len(stage.calls) / 2


# Whole runs

KILLS_OF_A_RUN = int(os.environ.get("YEONMA_KILLS", "6"))
"""Spread over all its calls; 1,000 are more than it makes, and kill it at each of them."""
SETTINGS: dict[str, object] = {
    "num_epochs": 2,
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_steps": 3,
    "val_set_size": 5,
    "lora_dropout": 0.1,
    "card_rows": 1,
}


class Command:
    """`yeonma sft` in a process of its own, what it leaves behind, and what it calls on the way."""

    def __init__(self, saver: Workshop, place: Path) -> None:
        self.saver, self.output = saver, place / "out"
        self.environment = {"YEONMA_CACHE": str(place / "cache")}
        base, data = model_folder(place / "model"), write_jsonl(place / "rows.jsonl", articles(23))
        paths = {"base_model": base, "data_path": data, "output_dir": self.output}
        self.job = {
            "command": ["sft", *arguments({**paths, **RUN_SETTINGS, **SETTINGS})],
            "environment": self.environment,
            "log": str(place / "log"),
        }
        saver.succeed(self.job)  # the tokens are in the cache from here on
        self.whole = left_behind(self.output)
        shutil.rmtree(self.output)
        self.calls = calls_on(self.output, saver.trace(self.job, place / "trace"))
        assert left_behind(self.output) == self.whole

    def kill_and_go_on(self, calls: Sequence[Call]) -> None:
        for at in calls:
            shutil.rmtree(self.output, ignore_errors=True)
            self.saver.kill(self.job, at)
            self.saver.succeed(self.job)
            assert left_behind(self.output) == self.whole, at
            assert hidden_in(self.output) == set(), at


@pytest.fixture(scope="module")
def command(saver: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(saver, tmp_path_factory.mktemp("run"))


def test_nothing_in_a_run_relies_on_what_is_not_flushed(command: Command) -> None:
    assert breaches(command.calls, command.output) == []
    lines = [call for call in command.calls if call.name in WRITES and "metrics.jsonl" in call.text]
    assert len(lines) >= 10


@pytest.mark.slow
def test_a_run_killed_at_any_of_its_calls_ends_with_the_bytes_of_one_that_was_not(command: Command) -> None:
    every = max(1, len(command.calls) // KILLS_OF_A_RUN)
    calls = command.calls[every // 2 :: every]
    command.kill_and_go_on(calls)
    print(f"{len(calls)} kills of {len(command.calls)} calls")
