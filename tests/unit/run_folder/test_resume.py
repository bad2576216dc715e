"""A run that is stopped anywhere and started again gives the same bytes. Other contents of an output folder."""

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
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
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
    place = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, loop, "train_step", 6)
        assert sft(place, base, data, **SETTINGS).status == 130
    return place


@pytest.fixture
def stopped(tmp_path: Path, _stopped: Path) -> Path:
    """An output folder of a run that was stopped in its sixth step; its checkpoints are 2, 3 (the best) and 4."""
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
def test_an_interrupted_run_ends_with_the_bytes_of_one_that_was_not(
    tmp_path: Path, base: Path, data: Path, whole: Done, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    interrupt(monkeypatch, *INTERRUPTIONS[where])
    assert sft(tmp_path / "out", base, data, **SETTINGS).status == 130
    monkeypatch.undo()
    done = trained(tmp_path / "out", base, data, **SETTINGS)
    assert left_behind(done.folder) == left_behind(whole.folder)


def test_a_run_goes_on_from_its_newest_checkpoint(
    stopped: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *arguments: steps.append(1) or train_step(*arguments))
    done = trained(stopped, base, data, **SETTINGS)
    assert f"continuing after step 4 of 10, from {done.folder}/checkpoint-4\n" in done.out
    assert len(steps) == 6


def test_two_interruptions_are_as_good_as_one(
    tmp_path: Path, base: Path, data: Path, whole: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (4, 5):  # in the fourth step, then in the seventh
        with monkeypatch.context() as patch:
            interrupt(patch, loop, "train_step", call)
            assert sft(tmp_path / "out", base, data, **SETTINGS).status == 130
    assert left_behind(trained(tmp_path / "out", base, data, **SETTINGS).folder) == left_behind(whole.folder)


def test_a_limit_on_checkpoints_does_not_get_in_the_way(
    tmp_path: Path, base: Path, data: Path, whole: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "save_total_limit": 1}
    plain = trained(tmp_path / "plain" / "out", base, data, **settings)
    assert plain.weight_bytes == whole.weight_bytes
    interrupt(monkeypatch, loop, "train_step", 8)
    sft(tmp_path / "out", base, data, **settings)
    monkeypatch.undo()
    done = trained(tmp_path / "out", base, data, **settings)
    assert left_behind(done.folder) == left_behind(plain.folder)


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}},
        {"lr_scheduler": "greedy", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "smooth": 1}},
        {"lr_scheduler": "constant", "early_stopping_patience": 2, "early_stopping_threshold": 1.0},
    ],
)
def test_schedules_and_early_stopping_go_on_where_they_were(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, object]
) -> None:
    settings = {**SETTINGS, "eval_steps": 1, "card_rows": 0, **schedule}
    plain = trained(tmp_path / "plain" / "out", base, data, **settings)
    interrupt(monkeypatch, loop, "train_step", 3)
    assert sft(tmp_path / "out", base, data, **settings).status == 130
    monkeypatch.undo()
    done = trained(tmp_path / "out", base, data, **settings)
    assert left_behind(done.folder) == left_behind(plain.folder)


# Damage


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
def test_a_damaged_checkpoint_is_named_and_passed_over(stopped: Path, name: str, kind: str) -> None:
    damage(stopped / "checkpoint-4" / name, kind)
    said: list[str] = []
    newest = checkpoint.newest_whole(stopped, said.append)
    assert newest is not None
    assert (newest[0].name, newest[1].step) == ("checkpoint-3", 3)
    assert len(said) == 1
    assert said[0].startswith(f"skipping checkpoint-4, which is damaged: {stopped}/checkpoint-4/")
    if (name, kind) != ("manifest.json", "flip a bit"):  # there it is the file whose sum or name it changes
        assert f"checkpoint-4/{name}: " in said[0]


def test_from_the_checkpoint_before_a_damaged_one_the_result_is_the_same(
    stopped: Path, base: Path, data: Path, whole: Done
) -> None:
    damage(stopped / "checkpoint-4" / "adapter_model.safetensors", "flip a bit")
    done = trained(stopped, base, data, **SETTINGS)
    assert "skipping checkpoint-4, which is damaged: " in done.out
    assert "continuing after step 3 of 10" in done.out
    assert left_behind(done.folder) == left_behind(whole.folder)


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over_too(
    stopped: Path, base: Path, data: Path, whole: Done
) -> None:
    damage(stopped / "checkpoint-3" / "adapter_model.safetensors", "flip a bit")  # the best so far
    done = trained(stopped, base, data, **SETTINGS)
    assert "skipping checkpoint-4" in done.out
    assert "skipping checkpoint-3" in done.out
    assert "continuing after step 2 of 10" in done.out
    assert left_behind(done.folder) == left_behind(whole.folder)


def test_where_no_checkpoint_is_whole_the_run_is_refused_until_told_to_begin_anew(
    stopped: Path, base: Path, data: Path, whole: Done
) -> None:
    for place in stopped.glob("checkpoint-*"):
        damage(place / "state.json", "cut off")
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
    assert done.weight_bytes == whole.weight_bytes
    assert left_behind(done.folder)["metrics.jsonl"] == left_behind(whole.folder)["metrics.jsonl"]


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(
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


# What may change, and what not


@pytest.fixture
def again(stopped: Path, base: Path, data: Path) -> Callable[..., Done]:
    """Repeats the command of the stopped run with some other settings."""

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
def test_other_mathematics_is_refused_with_every_difference(
    again: Callable[..., Done], stopped: Path, changed: dict[str, object], said: list[str]
) -> None:
    before = everything_in(stopped)
    done = again(**changed)
    place = f"yeonma: {stopped}"
    cure = "give the earlier settings to continue it, another output_dir, or --overwrite true"
    lines = done.err.splitlines()
    assert done.status == 2
    assert sorted(lines[:-1]) == sorted(f"{place}: {difference}" for difference in said)
    assert lines[-1] == f"{place}: the folder holds another run; {cure}"
    assert everything_in(stopped) == before


def test_changed_rows_are_refused(again: Callable[..., Done], tmp_path: Path) -> None:
    rows = articles(23)
    rows[7]["title"] += " again"
    done = again(data=write_jsonl(tmp_path / "other.jsonl", rows))
    assert done.status == 2
    assert "the content of data_path has changed" in done.err


def test_the_same_rows_may_lie_elsewhere(again: Callable[..., Done], tmp_path: Path) -> None:
    done = again(data=write_jsonl(tmp_path / "other.jsonl", articles(23)))
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
def test_speed_and_records_may_change(again: Callable[..., Done], changed: dict[str, object]) -> None:
    done = again(**changed)
    assert (done.status, done.err) == (0, "")
    assert "continuing after step 4 of 10" in done.out


def test_a_finished_run_says_so_and_trains_nothing(tmp_path: Path, base: Path, data: Path) -> None:
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


# Which checkpoint


def test_a_named_checkpoint_is_continued_and_later_ones_go(
    tmp_path: Path, base: Path, data: Path, whole: Done
) -> None:
    done = trained(tmp_path / "out", base, data, **SETTINGS)
    place = done.folder / "checkpoint-4"
    (done.folder / "loss.svg").rename(done.folder / "loss.png")  # as a version before loss.svg left it
    named = trained(tmp_path / "out", base, data, **SETTINGS, resume_from_checkpoint=place)
    assert f"continuing after step 4 of 10, from {place}" in named.out
    assert named.weight_bytes == whole.weight_bytes
    assert left_behind(named.folder)["metrics.jsonl"] == left_behind(whole.folder)["metrics.jsonl"]
    assert (named.folder / "loss.svg").exists() and not (named.folder / "loss.png").exists()


def test_a_run_stopped_after_a_named_checkpoint_does_not_take_up_later_ones(
    tmp_path: Path, base: Path, data: Path, whole: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = trained(tmp_path / "out", base, data, **SETTINGS).folder / "checkpoint-4"
    interrupt(monkeypatch, loop, "train_step", 2)
    assert sft(tmp_path / "out", base, data, **SETTINGS, resume_from_checkpoint=place).status == 130
    monkeypatch.undo()
    done = trained(tmp_path / "out", base, data, **SETTINGS)
    assert "continuing after step 4 of 10" in done.out
    assert left_behind(done.folder) == left_behind(whole.folder)


def test_none_starts_anew(again: Callable[..., Done]) -> None:
    done = again(resume_from_checkpoint="none")
    assert done.status == 0
    assert "continuing" not in done.out
    assert [line["step"] for line in done.steps] == list(range(1, 11))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("out/checkpoint-5", "no such checkpoint; give its folder, or latest"),
        ("elsewhere/checkpoint-4", "it belongs to another output_dir; give --output_dir"),
    ],
)
def test_a_checkpoint_that_is_not_there_or_not_of_this_folder_is_refused(
    again: Callable[..., Done], stopped: Path, tmp_path: Path, path: str, said: str
) -> None:
    (tmp_path / "elsewhere" / "checkpoint-4").mkdir(parents=True)
    before = everything_in(stopped)
    done = again(resume_from_checkpoint=tmp_path / path)
    assert done.status == 2
    assert said in done.err
    assert everything_in(stopped) == before


def test_a_named_checkpoint_that_is_damaged_is_refused(again: Callable[..., Done], tmp_path: Path) -> None:
    place = tmp_path / "out" / "checkpoint-2"
    damage(place / "optimizer.safetensors", "flip a bit")
    done = again(resume_from_checkpoint=place)
    assert (done.status, done.err) == (
        2,
        f"yeonma: {place / 'optimizer.safetensors'}: its SHA-256 differs from the manifest's\n",
    )
