"""Resuming: interrupted runs end with the same bytes. Damaged checkpoints, changed settings, named checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import TWO_EPOCHS, Done, articles, left_behind, model_folder, sft, trained, write_jsonl
from yeonma.run_folder import checkpoint, run_log
from yeonma.run_folder import output_folder as folder
from yeonma.train import loop, run

# Two epochs of 5 steps; checkpoints at 2, 4, ... and wherever the validation loss was lowest.
SETTINGS: dict[str, object] = {
    **TWO_EPOCHS,
    "logging_steps": 5,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(23))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """An uninterrupted run."""
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **SETTINGS)


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool = False) -> None:
    """Ctrl-C at the given call of a function, before or after it runs."""
    calls, function = 0, getattr(owner, name)

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise KeyboardInterrupt
        result = function(*arguments, **keywords)
        if calls == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, loop, "train_step", 6)
        assert sft(output, base, data, **SETTINGS).status == 130
    return output


@pytest.fixture
def stopped(tmp_path: Path, _stopped: Path) -> Path:
    """The output folder of a run that was interrupted in step 6. Its checkpoints are 2, 3 (the best) and 4."""
    return Path(shutil.copytree(_stopped, tmp_path / "out"))


INTERRUPTIONS: dict[str, tuple[Any, str, int, bool]] = {
    "before the folder is written": (folder, "begin", 1, False),
    "as the folder has been written": (folder, "begin", 1, True),
    "before the first step": (loop, "train_step", 1, False),
    "in the second step, before the first checkpoint": (loop, "train_step", 2, False),
    "in the fourth step": (loop, "train_step", 4, False),
    "as the fifth step is recorded": (run_log.MetricsFile, "write", 7, True),
    "in the first evaluation": (loop, "evaluate", 1, False),
    "in the second evaluation": (loop, "evaluate", 2, True),
    "in writing the third checkpoint": (checkpoint, "save_file", 6, True),
    "before the third checkpoint is renamed": (checkpoint, "_rename", 3, False),
    "as old checkpoints are removed": (loop, "rotate", 2, False),
    "after the last checkpoint": (loop, "write_checkpoint", 6, True),
    "before the adapter is put into place": (folder, "install", 1, False),
    "as the adapter has been put into place": (folder, "install", 1, True),
    "before the plot": (run, "plot_loss", 1, False),
    "in the card": (run, "write_card", 1, True),
}


@pytest.mark.parametrize("where", INTERRUPTIONS)
def test_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, base: Path, data: Path, uninterrupted: Done, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    interrupt(monkeypatch, *INTERRUPTIONS[where])
    assert sft(tmp_path / "out", base, data, **SETTINGS).status == 130
    monkeypatch.undo()
    resumed = trained(tmp_path / "out", base, data, **SETTINGS)
    assert left_behind(resumed.folder) == left_behind(uninterrupted.folder)


def test_run_continues_from_its_newest_checkpoint(
    stopped: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *arguments: steps.append(1) or train_step(*arguments))
    done = trained(stopped, base, data, **SETTINGS)
    assert f"continuing after step 4 of 10, from {done.folder}/checkpoint-4\n" in done.out
    assert len(steps) == 6


def test_run_interrupted_twice_ends_with_the_same_bytes(
    tmp_path: Path, base: Path, data: Path, uninterrupted: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (4, 5):  # in the fourth step, then in the seventh
        with monkeypatch.context() as patch:
            interrupt(patch, loop, "train_step", call)
            assert sft(tmp_path / "out", base, data, **SETTINGS).status == 130
    assert left_behind(trained(tmp_path / "out", base, data, **SETTINGS).folder) == left_behind(
        uninterrupted.folder
    )


def test_resume_with_save_total_limit_gives_the_same_bytes(
    tmp_path: Path, base: Path, data: Path, uninterrupted: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "save_total_limit": 1}
    without_interruption = trained(tmp_path / "plain" / "out", base, data, **settings)
    assert without_interruption.weight_bytes == uninterrupted.weight_bytes
    interrupt(monkeypatch, loop, "train_step", 8)
    sft(tmp_path / "out", base, data, **settings)
    monkeypatch.undo()
    resumed = trained(tmp_path / "out", base, data, **settings)
    assert left_behind(resumed.folder) == left_behind(without_interruption.folder)


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}},
        {"lr_scheduler": "greedy", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "smooth": 1}},
        {"lr_scheduler": "constant", "early_stopping_patience": 2, "early_stopping_threshold": 1.0},
    ],
)
def test_resume_restores_schedulers_and_early_stopping(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, object]
) -> None:
    settings = {**SETTINGS, "eval_steps": 1, "card_rows": 0, **schedule}
    without_interruption = trained(tmp_path / "plain" / "out", base, data, **settings)
    interrupt(monkeypatch, loop, "train_step", 3)
    assert sft(tmp_path / "out", base, data, **settings).status == 130
    monkeypatch.undo()
    resumed = trained(tmp_path / "out", base, data, **settings)
    assert left_behind(resumed.folder) == left_behind(without_interruption.folder)


# Damaged checkpoints


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flip a bit":
        content[len(content) // 2] ^= 1
    elif kind == "cut off":
        del content[len(content) // 2 :]
    elif kind == "zero":
        content[:] = bytes(len(content))
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(content)


FILES = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
)


@pytest.mark.parametrize("kind", ["flip a bit", "cut off", "zero", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_reported_and_skipped(stopped: Path, name: str, kind: str) -> None:
    damage(stopped / "checkpoint-4" / name, kind)
    messages: list[str] = []
    newest = checkpoint.newest_whole(stopped, messages.append)
    assert newest is not None
    assert (newest[0].name, newest[1].step) == ("checkpoint-3", 3)
    assert len(messages) == 1
    assert messages[0].startswith(f"skipping checkpoint-4, which is damaged: {stopped}/checkpoint-4/")
    if (name, kind) != ("manifest.json", "flip a bit"):  # that bit lies in another file's name or checksum
        assert f"checkpoint-4/{name}: " in messages[0]


def test_resume_after_skipping_a_damaged_checkpoint_gives_the_same_bytes(
    stopped: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    damage(stopped / "checkpoint-4" / "adapter_model.safetensors", "flip a bit")
    done = trained(stopped, base, data, **SETTINGS)
    assert "skipping checkpoint-4, which is damaged: " in done.out
    assert "continuing after step 3 of 10" in done.out
    assert left_behind(done.folder) == left_behind(uninterrupted.folder)


def test_checkpoint_is_skipped_if_its_best_one_is_damaged(
    stopped: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    damage(stopped / "checkpoint-3" / "adapter_model.safetensors", "flip a bit")  # the best so far
    done = trained(stopped, base, data, **SETTINGS)
    assert "skipping checkpoint-4" in done.out
    assert "skipping checkpoint-3" in done.out
    assert "continuing after step 2 of 10" in done.out
    assert left_behind(done.folder) == left_behind(uninterrupted.folder)


def test_run_with_only_damaged_checkpoints_needs_resume_none(
    stopped: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    for damaged in stopped.glob("checkpoint-*"):
        damage(damaged / "state.json", "cut off")
    before = everything_in(stopped)
    done = sft(stopped, base, data, **SETTINGS)
    assert done.out.count("skipping checkpoint-") == 3
    assert (done.status, done.err) == (
        2,
        f"yeonma: output_dir {stopped}: all of its checkpoints are damaged (checkpoint-2, checkpoint-3, checkpoint-4); "
        "restore them, or give --resume_from_checkpoint none, which deletes them and starts over\n",
    )
    assert everything_in(stopped) == before
    done = trained(stopped, base, data, **SETTINGS, resume_from_checkpoint="none")
    assert "continuing" not in done.out
    assert done.weight_bytes == uninterrupted.weight_bytes
    assert left_behind(done.folder)["metrics.jsonl"] == left_behind(uninterrupted.folder)["metrics.jsonl"]


def test_damaged_checkpoint_does_not_cause_the_last_valid_ones_removal(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {"num_epochs": 2, "save_steps": 1, "save_total_limit": 1}
    interrupt(monkeypatch, loop, "train_step", 6)
    sft(tmp_path / "out", base, data, **{**settings, "save_total_limit": 2})
    monkeypatch.undo()
    damage(tmp_path / "out" / "checkpoint-5" / "state.json", "cut off")
    interrupt(monkeypatch, loop, "train_step", 1)  # the fifth step again
    assert sft(tmp_path / "out", base, data, **settings).status == 130
    monkeypatch.undo()
    assert "continuing after step 4" in trained(tmp_path / "out", base, data, **settings).out


# Changed settings and data


@pytest.fixture
def rerun(stopped: Path, base: Path, data: Path) -> Callable[..., Done]:
    """Repeats the command of the stopped run with changed settings."""

    def command(**changed: object) -> Done:
        rows = Path(str(changed.pop("data", data)))
        return sft(stopped, base, rows, **{**SETTINGS, **changed})

    return command


def everything_in(output: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(output)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-3}, ["learning_rate was 0.003 and is now 0.001"]),
        ({"batch_size": 8, "seed": 1},
         ["batch_size was 4 and is now 8", "seed was 42 and is now 1", "steps was 10 and is now 6"]),
        ({"lora_r": 8, "use_dora": True}, ["lora_r was 4 and is now 8", "use_dora was False and is now True"]),
        ({"num_epochs": 3}, ["steps was 10 and is now 15"]),
        ({"template": "{document}\n{title}"}, ["the content of the template has changed"]),
        ({"cutoff_len": 100}, ["cutoff_len was 2048 and is now 100"]),
        ({"val_set_size": 0, "eval_steps": None},
         ["val_set_size was 5.0 and is now 0.0", "eval_steps was 3 and is now None",
          "the content of the validation rows has changed", "steps was 10 and is now 12"]),
    ],
)  # fmt: skip
def test_changed_training_settings_are_refused_with_every_difference(
    rerun: Callable[..., Done], stopped: Path, changed: dict[str, object], said: list[str]
) -> None:
    before = everything_in(stopped)
    done = rerun(**changed)
    prefix = f"yeonma: {stopped}"
    cure = "give the earlier settings to continue it, another output_dir, or --overwrite true"
    lines = done.err.splitlines()
    assert done.status == 2
    assert sorted(lines[:-1]) == sorted(f"{prefix}: {difference}" for difference in said)
    assert lines[-1] == f"{prefix}: the folder holds another run; {cure}"
    assert everything_in(stopped) == before


def test_changed_rows_are_refused(rerun: Callable[..., Done], tmp_path: Path) -> None:
    rows = articles(23)
    rows[7]["title"] += " again"
    done = rerun(data=write_jsonl(tmp_path / "other.jsonl", rows))
    assert done.status == 2
    assert "the content of data_path has changed" in done.err


def test_same_rows_at_another_path_are_accepted(rerun: Callable[..., Done], tmp_path: Path) -> None:
    done = rerun(data=write_jsonl(tmp_path / "other.jsonl", articles(23)))
    assert "continuing after step 4 of 10" in done.out


@pytest.mark.parametrize(
    "changed",
    [
        {"micro_batch_size": 4},
        {"micro_batch_tokens": 100, "share_prefix": False},
        {"logging_steps": 3, "run_name": "x", "save_steps": 5, "save_total_limit": 1},
        {"gradient_checkpointing": True},
    ],
)
def test_changed_speed_and_logging_settings_are_accepted(
    rerun: Callable[..., Done], changed: dict[str, object]
) -> None:
    done = rerun(**changed)
    assert (done.status, done.err) == (0, "")
    assert "continuing after step 4 of 10" in done.out


def test_finished_run_is_not_trained_again_without_overwrite(tmp_path: Path, base: Path, data: Path) -> None:
    first = trained(tmp_path / "out", base, data, max_steps=2)
    before = everything_in(first.folder)
    second = trained(tmp_path / "out", base, data, max_steps=2)
    assert (
        f"{first.folder} holds this run, which is finished; use --overwrite true to run it again\n"
        in second.out
    )
    assert "step 1/2" not in second.out
    assert everything_in(first.folder) == before
    third = trained(tmp_path / "out", base, data, max_steps=2, overwrite=True)
    assert "step 1/2" in third.out
    assert third.weight_bytes == first.weight_bytes


# The choice of a checkpoint


def test_resume_from_a_named_checkpoint_gives_the_same_result(
    tmp_path: Path, base: Path, data: Path, uninterrupted: Done
) -> None:
    done = trained(tmp_path / "out", base, data, **SETTINGS)
    checkpoint_folder = done.folder / "checkpoint-4"
    (done.folder / "loss.svg").rename(done.folder / "loss.png")  # as an older version left it
    resumed = trained(tmp_path / "out", base, data, **SETTINGS, resume_from_checkpoint=checkpoint_folder)
    assert f"continuing after step 4 of 10, from {checkpoint_folder}" in resumed.out
    assert resumed.weight_bytes == uninterrupted.weight_bytes
    assert left_behind(resumed.folder)["metrics.jsonl"] == left_behind(uninterrupted.folder)["metrics.jsonl"]
    assert (resumed.folder / "loss.svg").exists() and not (resumed.folder / "loss.png").exists()


def test_run_resumed_from_a_named_checkpoint_ignores_later_ones(
    tmp_path: Path, base: Path, data: Path, uninterrupted: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_folder = trained(tmp_path / "out", base, data, **SETTINGS).folder / "checkpoint-4"
    interrupt(monkeypatch, loop, "train_step", 2)
    assert (
        sft(tmp_path / "out", base, data, **SETTINGS, resume_from_checkpoint=checkpoint_folder).status == 130
    )
    monkeypatch.undo()
    done = trained(tmp_path / "out", base, data, **SETTINGS)
    assert "continuing after step 4 of 10" in done.out
    assert left_behind(done.folder) == left_behind(uninterrupted.folder)


def test_resume_none_starts_from_the_first_step(rerun: Callable[..., Done]) -> None:
    done = rerun(resume_from_checkpoint="none")
    assert done.status == 0
    assert "continuing" not in done.out
    assert [line["step"] for line in done.steps] == list(range(1, 11))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out/checkpoint-5", "no such checkpoint; give its folder, or latest"),
        ("elsewhere/checkpoint-4", "it belongs to another output_dir; give --output_dir"),
    ],
)
def test_missing_checkpoint_or_one_of_another_folder_is_refused(
    rerun: Callable[..., Done], stopped: Path, tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "elsewhere" / "checkpoint-4").mkdir(parents=True)
    before = everything_in(stopped)
    done = rerun(resume_from_checkpoint=tmp_path / path)
    assert done.status == 2
    assert message in done.err
    assert everything_in(stopped) == before


def test_damaged_named_checkpoint_is_refused(rerun: Callable[..., Done], tmp_path: Path) -> None:
    checkpoint_folder = tmp_path / "out" / "checkpoint-2"
    damage(checkpoint_folder / "optimizer.safetensors", "flip a bit")
    done = rerun(resume_from_checkpoint=checkpoint_folder)
    assert (done.status, done.err) == (
        2,
        f"yeonma: {checkpoint_folder / 'optimizer.safetensors'}: its SHA-256 differs from the manifest's\n",
    )
