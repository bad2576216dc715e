"""The state of an output folder, faults 87 to 91: what a killed run, a copied folder or another hand leaves there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Refused, everything_in
from tests.faults.tracing import ROOT
from tests.runs import SETTINGS as RUN_SETTINGS
from tests.runs import Done, arguments, articles, left_behind, sft, trained, unfinished_copy, write_jsonl
from yeonma.run_folder import output_folder
from yeonma.train import loop, restore, saved_weights

SETTINGS: dict[str, object] = {"max_steps": 4, "save_steps": 1, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(23))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **SETTINGS)


@pytest.fixture
def unfinished(tmp_path: Path, uninterrupted: Done) -> Path:
    """The folder of a run that was killed just before its end: all checkpoints, not marked as finished."""
    return unfinished_copy(uninterrupted.folder, tmp_path / "out")


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def stops(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """Ctrl-C in place of the given call."""
    calls = 0

    def counted(*values: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*values, **named)

    return counted


@pytest.fixture(scope="module", params=[1, 2])
def rotated(
    tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path, request: pytest.FixtureRequest
) -> tuple[int, Done]:
    """A number of checkpoints to keep, and a run that has kept them."""
    place = tmp_path_factory.mktemp("rotated") / "out"
    return request.param, trained(place, base, data, **SETTINGS, save_total_limit=request.param)


@pytest.mark.parametrize("save", [3, 4])
def test_fault_87_a_stop_between_a_save_and_its_rotation_leaves_no_checkpoint_too_many(
    tmp_path: Path,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    rotated: tuple[int, Done],
    save: int,
) -> None:
    limit, whole = rotated
    settings = {**SETTINGS, "save_total_limit": limit}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "rotate", stops(loop.rotate, save))
        assert sft(tmp_path / "out", base, data, **settings).status == 130
    assert (tmp_path / "out" / f"checkpoint-{save}").is_dir()
    done = trained(tmp_path / "out", base, data, **settings)
    assert f"continuing after step {save} of 4" in done.out
    assert names_in(done.folder) == names_in(whole.folder)
    assert left_behind(done.folder) == left_behind(whole.folder)


def test_fault_88_checkpoints_whose_name_and_state_disagree_are_passed_over_loudly(
    unfinished: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    others = ["checkpoint-04", "checkpoint-٩", "checkpoint-1e3", "checkpoint--5", "Checkpoint-5"]
    for name in [*others, "checkpoint-3000"]:
        shutil.copytree(unfinished / "checkpoint-4", unfinished / name)
    before = {name: everything_in(unfinished / name) for name in others}
    done = trained(unfinished, base, data, **SETTINGS)
    for name in others:
        assert f"passing over {name}: a run names its checkpoints checkpoint-1" in done.out
    assert (
        f"skipping checkpoint-3000, which is damaged: {unfinished}/checkpoint-3000/state.json: it is the state of "
        "step 4: the folder has another checkpoint's name" in done.out
    )
    assert "continuing after step 4 of 4" in done.out
    assert {name: everything_in(unfinished / name) for name in others} == before
    for name in others:
        shutil.rmtree(unfinished / name)
    assert left_behind(unfinished) == left_behind(uninterrupted.folder)


def test_fault_88_a_folder_with_only_such_names_is_refused(unfinished: Path, base: Path, data: Path) -> None:
    for step in (1, 2, 3):
        shutil.rmtree(unfinished / f"checkpoint-{step}")
    (unfinished / "checkpoint-4").rename(unfinished / "checkpoint-04")
    before = everything_in(unfinished)
    done = sft(unfinished, base, data, **SETTINGS)
    assert done.status == 2
    assert (
        "none of its checkpoints has a name that a run gives (checkpoint-04); give each its name back"
        in done.err
    )
    assert everything_in(unfinished) == before
    (unfinished / "checkpoint-04").rename(unfinished / "checkpoint-4")  # the cure
    assert "continuing after step 4 of 4" in trained(unfinished, base, data, **SETTINGS).out


@pytest.mark.parametrize(
    "module, fails",
    [(saved_weights, "_load_adapter"), (restore, "read_tensors"), (restore, "restore_optimizer")],
)
def test_fault_88_nothing_is_deleted_before_what_a_run_continues_from_is_loaded(
    unfinished: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, module: Any, fails: str
) -> None:
    """Later checkpoints, and files of the former end, are there still if loading fails."""
    monkeypatch.setattr(module, fails, stops(getattr(module, fails), 1))
    before = everything_in(unfinished)
    done = sft(
        unfinished,
        base,
        data,
        **SETTINGS,
        resume_from_checkpoint=unfinished / "checkpoint-2",
        save_total_limit=1,
    )
    assert done.status == 130
    assert everything_in(unfinished) == before


def test_fault_89_links_and_pipes_are_refused_before_anything_is_written(
    tmp_path: Path, data: Path, refused: Refused
) -> None:
    output, precious = tmp_path / "out", tmp_path / "precious"
    output.mkdir()
    precious.mkdir()
    names = [".lock", "metrics.jsonl", "run.json", ".run.json.partial", "checkpoint-1", ".final.partial"]
    for name in names:
        (precious / name).write_text("as it was")
        (output / name).symlink_to(precious / name)
    os.mkfifo(output / "trained_rows.jsonl")
    lines = refused(data, output_dir=output, overwrite=True)
    assert [line.partition(": ")[0] for line in lines] == sorted(
        f"out/{name}" for name in [*names, "trained_rows.jsonl"]
    )
    assert all(line.endswith("remove it, or give another output_dir") for line in lines)
    assert {path.read_text() for path in precious.iterdir()} == {"as it was"}


def test_fault_89_hard_links_are_not_written_through(
    tmp_path: Path, unfinished: Path, base: Path, data: Path
) -> None:
    """As `cp -al` makes them. Files that a run replaces as a whole may have them."""
    backup = tmp_path / "backup"
    backup.mkdir()
    names = ("metrics.jsonl", "trained_rows.jsonl", ".lock", "settings.yaml", ".run.json.partial")
    for name in names:
        (unfinished / name).touch()
        os.link(unfinished / name, backup / name)
    before, there = everything_in(backup), everything_in(unfinished)
    done = sft(unfinished, base, data, **SETTINGS)
    assert done.status == 2
    refused = [line.split(": ")[1] for line in done.err.splitlines()]
    assert refused == [f"{unfinished}/{name}" for name in sorted(names[:3])]
    assert done.err.count("it has another name elsewhere (a hard link)") == 3
    assert everything_in(unfinished) == there
    (unfinished / ".lock").unlink()  # the cures
    for name in names[:2]:
        shutil.copy2(unfinished / name, unfinished / f"{name}.copy")
        (unfinished / f"{name}.copy").rename(unfinished / name)
    trained(unfinished, base, data, **SETTINGS)
    assert everything_in(backup) == before


def test_fault_89_an_output_folder_that_is_a_link_to_nothing(
    tmp_path: Path, data: Path, refused: Refused
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    for output in (tmp_path / "out", tmp_path / "out" / "run"):
        (line,) = refused(data, output_dir=output)
        assert "out is a link to a folder that is not there; make that folder, or remove the link" in line
    assert not (tmp_path / "gone").exists()


def test_the_folder_of_the_data_is_no_output_folder(tmp_path: Path, data: Path, refused: Refused) -> None:
    """The run's logs would be data when it continues, and it could not."""
    shutil.copy(data, tmp_path / "rows.jsonl")
    (line,) = refused(tmp_path, output_dir=tmp_path)
    assert line.endswith("whose files the run's own would be; give another folder, such as one in it")


@pytest.mark.parametrize("name", ["metrics.jsonl", "trained_rows.jsonl"])
def test_fault_90_a_log_that_was_cut_between_runs_is_refused_and_never_finished(
    unfinished: Path, base: Path, data: Path, name: str, loaded: list[str]
) -> None:
    path = unfinished / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    before = everything_in(unfinished)
    done = sft(unfinished, base, data, **SETTINGS)
    assert (done.status, loaded) == (2, [])
    assert (
        "lines are not those that the run wrote up to step 4; restore a copy, or delete the file" in done.err
    )
    assert everything_in(unfinished) == before
    path.unlink()  # the cure
    done = trained(
        unfinished, base, data, **{**SETTINGS, "resume_from_checkpoint": unfinished / "checkpoint-2"}
    )
    assert f"warning: {path} is missing: it will begin after step 2" in done.out
    assert path.read_bytes().splitlines() != []


def test_fault_90_lines_after_the_checkpoint_do_not_matter(
    unfinished: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    for name in ("metrics.jsonl", "trained_rows.jsonl"):
        with (unfinished / name).open("ab") as file:
            file.write(b'rubbish\n{"step": 5')
    trained(unfinished, base, data, **SETTINGS)
    assert left_behind(unfinished) == left_behind(uninterrupted.folder)


# The system's errors


def test_fault_91_a_folder_that_is_taken_away_while_a_run_saves(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = output_folder.install

    def without_folder(output: Path, adapter: Any) -> None:
        output.rename(tmp_path / "taken")
        install(output, adapter)

    monkeypatch.setattr(output_folder, "install", without_folder)
    done = sft(tmp_path / "out", base, data, **SETTINGS)
    assert done.status == 2
    assert "the adapter cannot be written: No such file or directory; leave the folder alone" in done.err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_fault_91_a_full_disk_behind_standard_output_ends_no_training(
    tmp_path: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    words = {
        "base_model": base,
        "data_path": data,
        "output_dir": tmp_path / "out",
        **RUN_SETTINGS,
        **SETTINGS,
    }
    del words["num_epochs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "yeonma", "sft", *arguments(words)]
        done = subprocess.run(command, stdout=full, stderr=full, env=environment, cwd=tmp_path)
    assert done.returncode == 0
    assert left_behind(tmp_path / "out") == left_behind(uninterrupted.folder)
