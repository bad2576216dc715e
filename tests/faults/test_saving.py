"""kill -9 and failing calls at every write, sync, rename and removal of a save, of a rotation and of the end of a run.

A real process (tests/faults/saver.py) writes a run's folder under strace. The first pass lists its system calls. Then
the process is repeated once for each of them, and is killed at that call, or the call fails.
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
    CALLS,
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
from yeonma.run_folder.entries import RUN, SEAL
from yeonma.run_folder.lock import hold

Calls = Sequence[Sequence[object]]


@dataclass(frozen=True)
class Scenario:
    """The calls of a process on a folder that earlier processes have filled (`before`, then `renamed`).

    `newest`: the step of the newest whole checkpoint, before the first call and after each one. `values`: the values
    that the weights of a step's checkpoint may have, if not the step's number. `ends_with`: the checkpoints at the end.
    """

    before: Calls
    calls: Calls
    newest: Sequence[int]
    values: dict[int, set[float]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    ends_with: set[str] = field(default_factory=set)


SCENARIOS = {
    "save and rotate": Scenario(
        before=[["begin"], ["save", 1, 1.0], ["save", 2, 2.0, 1]],
        calls=[["save", 3, 3.0, 1], ["rotate", 1, 1]],
        newest=[2, 3, 3],
        ends_with={"checkpoint-1", "checkpoint-3"},  # the best, and the newest
    ),
    "save a step again": Scenario(
        before=[["begin"], ["save", 1, 1.0], ["save", 2, 2.0]],
        calls=[["save", 2, 2.5]],
        newest=[2, 2],
        values={2: {2.0, 2.5}},
        ends_with={"checkpoint-1", "checkpoint-2"},
    ),
    "begin among what kills have left": Scenario(
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
    "begin at a named checkpoint": Scenario(
        before=[["begin"], *(["save", step, float(step)] for step in (1, 2, 3))],
        calls=[["begin_at", 1]],
        newest=[1, 1],
        ends_with={"checkpoint-1"},
    ),
    "finish": Scenario(
        before=[["begin"], ["save", 1, 1.0], ["save", 2, 2.0]],
        calls=[["finish", 2.0]],
        newest=[2, 2],
        ends_with={"checkpoint-1", "checkpoint-2"},
    ),
}


class Trial:
    """A scenario's folder, which is filled anew for each kill."""

    def __init__(self, saver: Workshop, scenario: Scenario, parent: Path) -> None:
        self.saver, self.scenario = saver, scenario
        self.output, self.filled = parent / "out", parent / "filled"
        self.job = {"output": str(self.output), "calls": scenario.calls}
        saver.succeed({"output": str(self.filled), "calls": scenario.before})
        for name, hidden in scenario.renamed.items():
            (self.filled / name).rename(self.filled / hidden)
        self.continued_from: set[frozenset[tuple[str, str]]] = set()
        self.fill()
        self.calls = calls_on(self.output, saver.trace(self.job, parent / "trace"))

    def fill(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.copytree(self.filled, self.output)

    def check(self, completed: int, context: object) -> None:
        """Checks the folder after `completed` of the calls, and that the same command then completes."""
        run = json.loads((self.output / RUN).read_text("utf-8"))
        if run["finished"]:
            check_finished(self.output)
        with hold(self.output, print):
            recover(self.output)
            damaged: list[str] = []
            newest = newest_whole(self.output, damaged.append)
            assert newest is not None, context
            assert damaged == [], context
            step = newest[1].step
            assert step >= self.scenario.newest[completed], context
            check_weights(newest[0] / "adapter_model.safetensors", self.values(step))
            folder.begin(self.output, IDENTITY, "seed: 1\n", folder.Start(*newest))
            assert read_whole(newest[0]) == newest[1], context
        contents = frozenset(hashes_of(self.output).items())
        if contents not in self.continued_from:  # after all the kills, recovery leaves few different folders
            self.saver.succeed({"output": str(self.output), "calls": [["begin"], *self.scenario.calls]})
            self.check_end(context)
            self.continued_from.add(contents)

    def values(self, step: int) -> set[float]:
        return self.scenario.values.get(step, {float(step)})

    def check_end(self, context: object) -> None:
        assert {path.name for path in self.output.glob("*checkpoint-*")} == self.scenario.ends_with, context
        assert hidden_in(self.output) == set(), context
        for name in self.scenario.ends_with:
            read_whole(self.output / name)
        if self.scenario.calls[-1][0] == "finish":
            assert json.loads((self.output / RUN).read_text("utf-8"))["finished"], context
            check_finished(self.output)


def calls_on(output: Path, calls: Sequence[Call]) -> list[Call]:
    """The calls that name the folder or something in it, and the flushes of its parent."""
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
    """Checks that a run that is finished according to run.json has all files, with the hashes of its manifest."""
    hashes = json.loads((output / SEAL).read_text("utf-8"))["sha256"]
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "yeonma.json",
        "template.txt",
    } <= hashes.keys()
    assert {name: file_hash(output / name) for name in hashes} == hashes
    check_weights(output / "adapter_model.safetensors", {2.0})


@pytest.fixture
def trial(saver: Workshop, tmp_path: Path, request: pytest.FixtureRequest) -> Trial:
    return Trial(saver, SCENARIOS[request.param], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trial", SCENARIOS, indirect=True)
def test_a_kill_at_every_call_leaves_a_whole_checkpoint(trial: Trial) -> None:
    trial.check_end("without a kill")
    for call in trial.calls:
        trial.fill()
        outcome = trial.saver.kill(trial.job, call)
        trial.check(outcome.done, call)
    print(f"{len(trial.calls)} kills")


CALL_KINDS = {
    "open": OPENS,
    "write": WRITES,
    "flush": SYNCS,
    "rename": RENAMES,
    "removal": REMOVALS,
    "folder": FOLDERS,
}


@pytest.mark.parametrize("trial", ["save and rotate"], indirect=True)
def test_traced_calls_include_every_kind_and_flush_every_saved_file(trial: Trial) -> None:
    counts = Counter(kind for call in trial.calls for kind, names in CALL_KINDS.items() if call.name in names)
    assert set(counts) == set(CALL_KINDS)
    flushed = [call for call in trial.calls if call.name in SYNCS]
    saved = {path.name for path in trial.output.glob("checkpoint-3/*")}
    assert len(flushed) >= len(saved) + 2  # also the folder and its parent


@pytest.mark.parametrize("trial", SCENARIOS, indirect=True)
def test_no_call_relies_on_unflushed_data(trial: Trial) -> None:
    assert breaches(trial.calls, trial.output) == []


@pytest.mark.parametrize("trial", ["save and rotate", "save a step again"], indirect=True)
def test_omission_of_any_flush_of_a_save_is_detected(trial: Trial) -> None:
    """Checks the test above: without any one of its flushes, a save is reported as unsafe."""
    flushes = [number for number, call in enumerate(trial.calls) if call.name in SYNCS]
    assert len(flushes) > 10
    for number in flushes:
        without = [*trial.calls[:number], *trial.calls[number + 1 :]]
        if trial.scenario.calls[-1][0] == "rotate" and number == flushes[-1]:
            continue  # nothing relies on the flush of a removal
        assert breaches(without, trial.output) != [], trial.calls[number]


@pytest.mark.parametrize("trial", ["save and rotate"], indirect=True)
def test_nothing_is_written_through_memory(trial: Trial, tmp_path: Path) -> None:
    """No file is mapped for writing, which the other traced calls would not show."""
    trial.fill()
    calls = trial.saver.trace(trial.job, tmp_path / "trace", also="mmap")
    mapped = [call for call in calls if call.name == "mmap" and "MAP_SHARED" in call.text]
    assert [call for call in mapped if "PROT_WRITE" in call.text and str(trial.output) in call.text] == []


FREE_SPACE = re.compile(r"[\d,]+( bytes)? are free; (make room|check the disk)")
NEEDED_SPACE = re.compile(r"it needs [\d,]+ bytes, and [\d,]+ are free; (make room|check the disk)")
ERROR_OF_CALL = {
    **dict.fromkeys((*OPENS, *WRITES, *FOLDERS, *RENAMES), "ENOSPC"),
    **dict.fromkeys((*SYNCS, *REMOVALS), "EIO"),
}


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["save and rotate", "save a step again", "finish"], indirect=True)
def test_failing_call_is_reported_and_keeps_earlier_checkpoints(trial: Trial) -> None:
    reported = 0
    for call in trial.calls:
        trial.fill()
        outcome = trial.saver.fail(trial.job, call, ERROR_OF_CALL[call.name])
        assert (outcome.status, outcome.bug) == (0, ""), (call, outcome)
        if outcome.error:
            reported += 1
            assert FREE_SPACE.search(outcome.error), (call, outcome)
            if ".partial/" in call.text and call.name not in REMOVALS:
                assert NEEDED_SPACE.search(outcome.error), (call, outcome)
        if call.name not in REMOVALS:
            assert not {name for name in hidden_in(trial.output) if name.endswith(".partial")}, call
        trial.check(outcome.done, call)
    assert reported > len(trial.calls) / 2


IN_WORDS = {
    "EMFILE": "Too many open files; let this process open more files (ulimit -n)",
    "EACCES": "Permission denied; let this user write there",
    "EIO": "Input/output error; ",
}
LOCKED = "cannot be locked: Permission denied; remove it, or give another output_dir"
FAILING = {"EMFILE": (*OPENS, *FOLDERS), "EACCES": (*OPENS, *FOLDERS), "EIO": CALLS}
FAILED_CALLS = int(os.environ.get("YEONMA_FAILED_CALLS", "6"))
"""Of each case and error, spread over its calls; 1,000 are more than it makes, and each of them fails."""


@pytest.mark.slow
@pytest.mark.parametrize("trial", SCENARIOS, indirect=True)
def test_fault_91_other_errors_of_the_system_are_said_in_words(trial: Trial) -> None:
    """Nothing half-written stays, and the same calls then end normally."""
    for error, names in FAILING.items():
        calls = [call for call in trial.calls if call.name in names]
        failed = calls[:: max(1, len(calls) // FAILED_CALLS)]
        reported = 0
        for call in failed:
            trial.fill()
            outcome = trial.saver.fail(trial.job, call, error)
            assert (outcome.status, outcome.bug) == (0, ""), (error, call, outcome)
            if outcome.error:
                reported += 1
                is_lock = error == "EACCES" and call.text.count("/.lock")  # perhaps another user's
                words = LOCKED if is_lock else f"cannot be written: {IN_WORDS[error]}"
                assert words in outcome.error, (call, outcome)
                assert error != "EIO" or FREE_SPACE.search(outcome.error), (call, outcome)
            if call.name not in REMOVALS and "begin" not in str(trial.scenario.calls):
                partial = {name for name in hidden_in(trial.output) if name.endswith(".partial")}
                assert not partial, (error, call)
            trial.check(outcome.done, (error, call))
        told = sum(call.name not in REMOVALS for call in failed)  # what cannot be removed may stay
        assert reported >= told / 2, (error, reported, told)
        print(f"{error}: {len(failed)} failures of {len(calls)} calls, {reported} reported")


# A short run, killed at each of its calls


def contents_of(folder: Path) -> dict[str, bytes | None]:
    """The list of all names, with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


SHORT_RUN_KILLS = int(os.environ.get("YEONMA_SHORT_RUN_KILLS", "16"))
"""For each limit, spread over its calls; 1,000 are more than it makes, and it is killed at each of them."""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, None])
def test_fault_87_a_short_run_killed_at_any_of_its_calls_leaves_the_same_files(
    saver: Workshop, tmp_path: Path, limit: int | None
) -> None:
    """From the lock to the end, rotation included: the list of names and every byte."""
    output = tmp_path / "out"
    job = {"output": str(output), "calls": [["run", 3, limit]]}
    calls = calls_on(output, saver.trace(job, tmp_path / "trace"))
    whole = contents_of(output)
    kept = {1: {2, 3}, 2: {2, 3}, None: {1, 2, 3}}[limit]
    assert {name for name in whole if re.fullmatch(r"\.?checkpoint-[^/]*", name)} == {
        f"checkpoint-{step}" for step in kept
    }
    assert hidden_in(output) == set()
    assert breaches(calls, output) == []
    killed = calls[:: max(1, len(calls) // SHORT_RUN_KILLS)]
    for call in killed:
        shutil.rmtree(output)
        saver.kill(job, call)
        saver.succeed(job)
        assert contents_of(output) == whole, call
    print(f"limit {limit}: {len(killed)} kills of {len(calls)} calls")


# Whole runs

KILLS_OF_A_RUN = int(os.environ.get("YEONMA_KILLS", "6"))
"""Spread over all its calls; 1,000 are more than it makes, and kill it at each of them."""
SETTINGS: dict[str, object] = {
    "num_epochs": 2,
    "save_steps": 2,
    "eval_steps": 3,
    "val_set_size": 5,
    "lora_dropout": 0.1,
    "card_rows": 1,
}


class Command:
    """`yeonma sft` in its own process, the files that it leaves and its system calls."""

    def __init__(self, saver: Workshop, parent: Path, limit: int | None) -> None:
        self.saver, self.output = saver, parent / "out"
        self.environment = {"YEONMA_CACHE": str(parent / "cache")}
        base, data = model_folder(parent / "model"), write_jsonl(parent / "rows.jsonl", articles(23))
        paths = {"base_model": base, "data_path": data, "output_dir": self.output}
        settings = {**paths, **RUN_SETTINGS, **SETTINGS, "save_total_limit": limit}
        self.job = {
            "command": ["sft", *arguments(settings)],
            "environment": self.environment,
            "log": str(parent / "log"),
        }
        saver.succeed(self.job)  # from here on, the tokens are in the cache
        self.expected, self.names = left_behind(self.output), set(contents_of(self.output))
        shutil.rmtree(self.output)
        self.calls = calls_on(self.output, saver.trace(self.job, parent / "trace"))
        assert left_behind(self.output) == self.expected

    def kill_and_resume(self, calls: Sequence[Call]) -> None:
        for call in calls:
            shutil.rmtree(self.output, ignore_errors=True)
            self.saver.kill(self.job, call)
            self.saver.succeed(self.job)
            assert left_behind(self.output) == self.expected, call
            assert set(contents_of(self.output)) == self.names, call
            assert hidden_in(self.output) == set(), call


@pytest.fixture(
    scope="module", params=[1, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (2, None))]
)
def command(
    saver: Workshop, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Command:
    return Command(saver, tmp_path_factory.mktemp("run"), request.param)


def test_no_call_of_a_whole_run_relies_on_unflushed_data(command: Command) -> None:
    assert breaches(command.calls, command.output) == []
    lines = [call for call in command.calls if call.name in WRITES and "metrics.jsonl" in call.text]
    assert len(lines) >= 10


@pytest.mark.slow
def test_a_run_killed_at_any_of_its_calls_ends_with_the_bytes_of_one_that_was_not(command: Command) -> None:
    interval = max(1, len(command.calls) // KILLS_OF_A_RUN)
    calls = command.calls[interval // 2 :: interval]
    command.kill_and_resume(calls)
    print(f"{len(calls)} kills of {len(command.calls)} calls")
