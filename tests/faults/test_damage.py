"""Every file of a checkpoint is truncated, changed by one bit, zeroed and deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import everything_in
from tests.runs import Done, articles, left_behind, sft, trained, unfinished_copy, write_jsonl
from yeonma.run_folder.checkpoint import newest_whole

SETTINGS: dict[str, object] = {"save_steps": 2, "num_epochs": 2, "lora_dropout": 0.1}


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {"cut": cut, "flip": flip, "zero": zero, "delete": Path.unlink}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(12))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **SETTINGS)


@pytest.fixture
def unfinished(tmp_path: Path, uninterrupted: Done) -> Path:
    """The folder of a run that was killed just before its end, with all checkpoints but not marked as finished."""
    return unfinished_copy(uninterrupted.folder, tmp_path / "out")


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_or_missing_checkpoint_file_is_named(unfinished: Path, damage: str) -> None:
    newest = unfinished / "checkpoint-6"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 9
    for path in files:
        content = path.read_bytes()
        if content or damage == "delete":
            DAMAGES[damage](path)
        else:  # an empty file, such as the chat template of a base without one
            path.write_bytes(b"x")
        messages: list[str] = []
        newest = newest_whole(unfinished, messages.append)
        assert newest is not None
        assert newest[0].name == "checkpoint-4"
        (line,) = messages
        assert line.startswith("skipping checkpoint-6, which is damaged: ")
        if path.name != "manifest.json":  # its damage may be in the checksum or name of another file
            reason = "it is missing" if damage == "delete" else "its SHA-256 differs from the manifest's"
            assert f"checkpoint-6/{path.name}: {reason}" in line
        path.write_bytes(content)
    assert newest_whole(unfinished, print) is not None


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(
    unfinished: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    flip(unfinished / "checkpoint-6" / "optimizer.safetensors")
    done = trained(unfinished, base, data, **SETTINGS)
    path = f"{unfinished}/checkpoint-6/optimizer.safetensors"
    assert (
        f"skipping checkpoint-6, which is damaged: {path}: its SHA-256 differs from the manifest's"
        in done.out
    )
    assert "continuing after step 4 of 6" in done.out
    assert left_behind(unfinished) == left_behind(uninterrupted.folder)


def test_nothing_is_deleted_if_all_checkpoints_are_damaged(unfinished: Path, base: Path, data: Path) -> None:
    names = ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for name in names:
        zero(unfinished / name / "adapter_model.safetensors")
    before = everything_in(unfinished)
    done = sft(unfinished, base, data, **SETTINGS)
    assert done.status == 2
    assert [f"skipping {name}" in done.out for name in names] == [True] * 3
    assert f"all of its checkpoints are damaged ({', '.join(names)})" in done.err
    assert "--resume_from_checkpoint none" in done.err
    assert everything_in(unfinished) == before


def test_fault_30_data_that_changed_since_the_checkpoint(
    unfinished: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    before = everything_in(unfinished)
    for change in ("added", "removed", "edited", "in another order"):
        rows = articles(12)
        if change == "added":
            rows.append({"document": "new", "title": "new"})
        elif change == "removed":
            del rows[3]
        elif change == "edited":
            rows[3]["title"] += "."
        else:
            rows.reverse()
        done = sft(unfinished, base, write_jsonl(tmp_path / "changed.jsonl", rows), **SETTINGS)
        assert done.status == 2
        assert f"yeonma: {unfinished}: the content of data_path has changed\n" in done.err
        assert everything_in(unfinished) == before
    assert sft(unfinished, base, data, **SETTINGS).status == 0
