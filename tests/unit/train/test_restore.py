"""Checkpoints whose checksums are right and whose content no run has written: each is refused by name, before anything
is written, and the cure that the message names works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import Done, articles, model_folder, sft, trained, unfinished_copy, write_jsonl
from yeonma.files import file_hash, hashes_of

SETTINGS: dict[str, object] = {"max_steps": 4, "save_steps": 2, "val_set_size": 4, "eval_steps": 2}
WEIGHTS, OPTIMIZER, RANDOM = "adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Done:
    place = tmp_path_factory.mktemp("whole")
    base, data = model_folder(place / "base"), write_jsonl(place / "rows.jsonl", articles(12))
    return trained(place / "out", base, data, **SETTINGS)


@pytest.fixture
def unfinished(tmp_path: Path, whole: Done) -> Path:
    return unfinished_copy(whole.folder, tmp_path / "out")


def again(output: Path, whole: Done, **settings: object) -> Done:
    place = whole.folder.parent
    return sft(output, place / "base", place / "rows.jsonl", **{**SETTINGS, **settings})


def with_sums(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    sums = json.loads(manifest.read_text())["sha256"]
    manifest.write_text(json.dumps({"sha256": {name: file_hash(checkpoint / name) for name in sums}}))


def change_state(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_schedule(checkpoint: Path, **values: Any) -> None:
    schedule = json.loads((checkpoint / "state.json").read_text())["schedule"]
    change_state(checkpoint, schedule={**schedule, **values})


def change_tensors(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def of_optimizer(
    change: Callable[[str, torch.Tensor], torch.Tensor | None],
) -> Callable[[Path], None]:
    return lambda checkpoint: change_tensors(checkpoint / OPTIMIZER, change)


def without_first(checkpoint: Path) -> None:
    first = min(load_file(checkpoint / OPTIMIZER))
    change_tensors(checkpoint / OPTIMIZER, lambda name, tensor: None if name == first else tensor)


def of_another(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / OPTIMIZER)
    save_file({**tensors, "other.weight/exp_avg": torch.zeros(2)}, checkpoint / OPTIMIZER)


HOSTILE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "averages of other shapes": (
        of_optimizer(lambda name, tensor: tensor[:1].clone() if tensor.ndim else tensor),
        OPTIMIZER,
        "has the shape",
    ),
    "averages of integers": (of_optimizer(lambda name, tensor: tensor.int()), OPTIMIZER, "torch.int32"),
    "averages that are not finite": (
        of_optimizer(lambda name, tensor: torch.full_like(tensor, torch.nan)),
        OPTIMIZER,
        "numbers that it cannot have",
    ),
    "squares below zero": (
        of_optimizer(lambda name, tensor: tensor - 1 if "_sq" in name else tensor),
        OPTIMIZER,
        "numbers that it cannot have",
    ),
    "a missing average": (without_first, OPTIMIZER, "it has no "),
    "no averages": (of_optimizer(lambda name, tensor: None), OPTIMIZER, "it is empty"),
    "averages of another layer": (of_another, OPTIMIZER, "other.weight/exp_avg, which this run's optimizer"),
    "no tensors at all": (lambda place: (place / OPTIMIZER).write_bytes(b"x"), OPTIMIZER, "header"),
    "random numbers of another size": (
        lambda place: change_tensors(place / RANDOM, lambda name, tensor: tensor[:10].clone()),
        RANDOM,
        "fit this run",
    ),
    "random numbers of floats": (
        lambda place: change_tensors(place / RANDOM, lambda name, tensor: tensor.float()),
        RANDOM,
        "fit this run",
    ),
    "weights of another rank": (
        lambda place: change_tensors(place / WEIGHTS, lambda name, tensor: tensor[:1, :1].clone()),
        WEIGHTS,
        "fit this run",
    ),
    "weights that are not finite": (
        lambda place: change_tensors(place / WEIGHTS, lambda name, tensor: tensor / 0),
        WEIGHTS,
        "fit this run",
    ),
    "a schedule without its step": (
        lambda place: change_state(place, schedule={}),
        "state.json",
        "has no _last_lr, last_epoch",
    ),
    "a schedule at another step": (
        lambda place: change_schedule(place, last_epoch=3),
        "state.json",
        "the schedule is at step 3, and the run at step 4",
    ),
    "learning rates of words": (
        lambda place: change_schedule(place, _last_lr=["x"]),
        "state.json",
        "the schedule's _last_lr is ['x']",
    ),
    "numbers that the loss does not carry": (
        lambda place: change_state(place, carried={"x": 1.0}),
        "state.json",
        "carries no x",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_with_right_checksums_is_refused(
    unfinished: Path, whole: Done, kind: str
) -> None:
    change, name, words = HOSTILE[kind]
    checkpoint = unfinished / "checkpoint-4"
    change(checkpoint)
    with_sums(checkpoint)
    before = hashes_of(unfinished)
    done = again(unfinished, whole)
    assert done.status == 2
    assert f"yeonma: {checkpoint / name}: it does not fit this run: " in done.err and words in done.err
    assert done.err.rstrip().endswith("the same command then continues from the one before")
    assert hashes_of(unfinished) == before


def test_the_cure_of_such_a_checkpoint_works(unfinished: Path, whole: Done) -> None:
    shutil.rmtree(unfinished / "checkpoint-4")
    done = again(unfinished, whole)
    assert done.status == 0 and "continuing after step 2 of 4" in done.out
    assert (unfinished / WEIGHTS).read_bytes() == whole.weight_bytes


def test_the_best_checkpoint_is_checked_before_the_run_goes_on(unfinished: Path, whole: Done) -> None:
    change_state(unfinished / "checkpoint-4", best_step=2, best_loss=0.5)
    best = unfinished / "checkpoint-2"
    change_tensors(best / WEIGHTS, lambda name, tensor: tensor / 0)
    with_sums(best)
    with_sums(unfinished / "checkpoint-4")
    before = hashes_of(unfinished)
    done = again(unfinished, whole)
    assert done.status == 2
    assert f"{best / WEIGHTS}: it does not fit this run: " in done.err
    assert hashes_of(unfinished) == before


def test_what_a_schedule_of_another_version_has_besides_is_left_out(unfinished: Path, whole: Done) -> None:
    checkpoint = unfinished / "checkpoint-4"
    change_schedule(checkpoint, verbose=False, optimizer="x")
    with_sums(checkpoint)
    assert again(unfinished, whole).status == 0
    assert (unfinished / WEIGHTS).read_bytes() == whole.weight_bytes


def test_a_state_that_no_run_writes_counts_as_damage(unfinished: Path, whole: Done) -> None:
    checkpoint = unfinished / "checkpoint-4"
    change_state(checkpoint, micro_batches=[0, 0])
    with_sums(checkpoint)
    done = again(unfinished, whole)
    assert done.status == 0
    assert "skipping checkpoint-4, which is damaged" in done.out and "micro_batches is [0, 0]" in done.out
    assert (unfinished / WEIGHTS).read_bytes() == whole.weight_bytes


@pytest.mark.parametrize(
    "content",
    [
        {"finished": "no"},
        {"finished": None},
        {"finished": 1},
        {"identity": [["objective", "sft"]]},
        {"identity": None},
        {"identity": "x"},
    ],
)
def test_a_run_json_of_other_types_is_damaged(unfinished: Path, whole: Done, content: Any) -> None:
    """`"finished": "no"` counted as a finished run."""
    path = unfinished / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    before = hashes_of(unfinished)
    done = again(unfinished, whole)
    assert (done.status, done.out.count("is finished")) == (2, 0)
    assert f"{path}: damaged (" in done.err
    assert hashes_of(unfinished) == before


def test_a_run_json_of_thousands_of_brackets_is_damaged(unfinished: Path, whole: Done) -> None:
    (unfinished / "run.json").write_text("[" * 100_000)
    assert "run.json: damaged (" in again(unfinished, whole).err


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_whose_log_was_deleted_ends_without_a_table_of_validation(
    unfinished: Path, whole: Done, step: int
) -> None:
    """Deleting a log is the cure for one that was changed. The card then has nothing to compare."""
    (unfinished / "metrics.jsonl").unlink()
    if step == 2:
        shutil.rmtree(unfinished / "checkpoint-4")
    assert again(unfinished, whole).status == 0
    card = (unfinished / "README.md").read_text()
    assert ("does not have the validation losses of before and after" in card) == (step == 2)
    assert "| before |" not in card
    assert (unfinished / WEIGHTS).read_bytes() == whole.weight_bytes
