"""`--replay`: general rows beside those of the task, as a data set with a share of every step."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Done, articles, left_behind, model_folder, sft, trained, write_jsonl
from yeonma.config.data_sets import data_sets
from yeonma.config.settings import DataSettings
from yeonma.errors import UserError
from yeonma.train import loop

TASK, GENERAL = "{document}\n{title}", "prompt-completion"
SETTINGS: dict[str, Any] = {
    "batch_size": 6,
    "num_epochs": 2,
    "save_steps": 3,
    "val_set_size": 3,
    "card_rows": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    general = [{"prompt": f"say {number} ", "completion": f"said {number}"} for number in range(40)]
    return {
        "task": write_jsonl(folder / "task.jsonl", articles(23)),
        "more": write_jsonl(folder / "more.jsonl", articles(11, seed=1)),
        "general": write_jsonl(folder / "general.jsonl", general),
    }


def with_replay(output: Path, base: Path, rows: dict[str, Path], **settings: Any) -> Done:
    replay = {"replay": str(rows["general"]), "replay_share": 0.25}
    return trained(output, base, rows["task"], **{**SETTINGS, "template": TASK, **replay, **settings})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path, rows: dict[str, Path]) -> Done:
    return with_replay(tmp_path_factory.mktemp("runs") / "replayed", base, rows)


def rows_of(folder: Path) -> list[dict[str, list[int]]]:
    lines = (folder / "trained_rows.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["rows"] for line in lines]


def test_an_epoch_has_the_share_and_every_row_of_the_task_once(done: Done) -> None:
    steps = rows_of(done.folder)
    per_epoch = ceil(ceil(20 / (1 - 0.25)) / 6)  # 20 rows of the task, after 3 that are held out
    assert len(steps) == 2 * per_epoch
    for epoch in range(2):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        replayed = sum(len(step.get("general.jsonl", ())) for step in part)
        assert abs(replayed - Fraction(1, 4) * 6 * per_epoch) <= Fraction(1, 2)
        assert all(1 <= len(step["general.jsonl"]) <= 2 for step in part)
    first = [row for step in steps[:per_epoch] for row in step["task.jsonl"]]
    assert len(set(first[:20])) == 20


def test_it_is_the_entry_of_a_mixture_byte_by_byte(
    done: Done, base: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    entries = [str(rows["task"]), {"path": str(rows["general"]), "share": 0.25}]
    by_hand = trained(tmp_path / "replayed", base, entries, **SETTINGS, template=TASK)  # type: ignore[arg-type]
    assert rows_of(by_hand.folder) == rows_of(done.folder)
    assert by_hand.weight_bytes == done.weight_bytes
    records = [json.loads((run.folder / "run.json").read_text("utf-8")) for run in (by_hand, done)]
    assert records[0] == records[1]


def test_its_rows_are_named_and_stay_out_of_the_validation_loss(done: Done) -> None:
    assert "general.jsonl: 40 rows" in done.out
    assert "general.jsonl: 25.0% of each step's examples" in done.out
    assert all(look["examples"] == 3 and "losses" not in look for look in done.looks)
    card = (done.folder / "README.md").read_text("utf-8")
    assert "| `general.jsonl` | 40 |" in card and "| 25.0% of each step |" in card
    assert "| 75.0% of each step |" in card
    assert "of general.jsonl\n" not in card  # no row of it is answered for the card


def test_a_replay_may_have_validation_rows_of_its_own(
    base: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    entry = {"path": str(rows["general"]), "template": GENERAL, "val_set_size": 4, "limit": 20}
    look = with_replay(tmp_path / "out", base, rows, replay=entry, max_steps=1).looks[0]
    assert list(look["losses"]) == ["task.jsonl", "general.jsonl"] and look["examples"] == 7


@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    stop_after: int,
    done: Done,
    base: Path,
    rows: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, train_step = 0, loop.train_step

    def killed(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > stop_after:
            raise KeyboardInterrupt
        return train_step(*arguments)

    output = tmp_path / "replayed"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", killed)
        settings = {"replay": str(rows["general"]), "replay_share": 0.25, "template": TASK}
        assert sft(output, base, rows["task"], **SETTINGS, **settings).status == 130
    with_replay(output, base, rows)
    assert left_behind(output) == left_behind(done.folder)


@pytest.mark.parametrize(
    ("entries", "shares"),
    [
        ([{"weight": 3}, {"weight": 1}], (Fraction(9, 16), Fraction(3, 16))),
        ([{}, {}], (Fraction(3, 4) * Fraction(23, 34), Fraction(3, 4) * Fraction(11, 34))),
        ([{}, {"repeats": 2}], (Fraction(3, 4) * Fraction(23, 45), Fraction(3, 4) * Fraction(22, 45))),
    ],
)
def test_other_data_sets_keep_their_parts_among_themselves(
    entries: list[dict[str, Any]],
    shares: tuple[Fraction, Fraction],
    base: Path,
    rows: dict[str, Path],
    tmp_path: Path,
) -> None:
    paths = [
        {"path": str(rows[name]), **entry} for name, entry in zip(("task", "more"), entries, strict=True)
    ]
    settings = {"replay": str(rows["general"]), "replay_share": 0.25, "template": TASK, "card_rows": 0}
    run = trained(tmp_path / "out", base, paths, **settings, batch_size=9, num_epochs=1)  # type: ignore[arg-type]
    steps = rows_of(run.folder)
    for name, share in zip(
        ("task.jsonl", "more.jsonl", "general.jsonl"), (*shares, Fraction(1, 4)), strict=True
    ):
        assert abs(sum(len(step.get(name, ())) for step in steps) - share * 9 * len(steps)) < 2
    own = sum(23 if name == "task" else 11 * entries[1].get("repeats", 1) for name in ("task", "more"))
    assert len(steps) == ceil(ceil(own / Fraction(3, 4)) / 9)


def test_a_replay_follows_none_of_the_settings_of_the_tasks_data() -> None:
    settings: dict[str, Any] = {
        "data_path": "a.csv",
        "data_split": "train[:9]",
        "template": "title",
        "columns": {"document": "body"},
        "delimiter": ";",
        "max_rows": 7,
        "val_data_path": "b.csv",
        "replay": "c.jsonl",
    }
    _, replay = data_sets(DataSettings(**settings))
    assert (replay.path, replay.share, replay.weight) == ("c.jsonl", Fraction(1, 10), None)
    assert (replay.split, replay.template, replay.columns, replay.delimiter) == ("train", None, None, None)
    assert (replay.limit, replay.val_set_size, replay.val_path) == (None, 0, None)


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        (
            {"replay_share": 0.2},
            ["replay_share: there are no rows to replay; give the rows with --replay, or leave it out"],
        ),
        (
            {"replay": {"path": "b", "weight": 2, "tempalte": "chat"}},
            [
                "replay: it has a weight; give --replay_share instead",
                'replay: unknown key "tempalte"; did you mean "template"?',
            ],
        ),
        (
            {"data_path": ["a", {"path": "b", "share": 0.95}], "replay": "c"},
            [
                "replay_share: the shares leave no examples to the other data sets; let the shares be less than 1 "
                "together"
            ],
        ),
        (
            {"data_path": [{"path": "b", "share": 0.5}]},
            [
                "data_path: every data set has a share, so that none says how long an epoch is; give at least one "
                "data set without a share, or give weights instead"
            ],
        ),
        (
            {"data_path": ["a", {"path": "b", "share": 0.5, "repeats": 2}]},
            ["b: it has a share, and a weight or repeats as well; give only its share"],
        ),
        (
            {"data_path": ["a", {"path": "b", "share": 1}]},
            ["data_path[2].share: 1 is not valid; give a fraction between 0 and 1"],
        ),
    ],
)
def test_mistakes_name_the_place_and_the_cure(settings: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(UserError) as error:
        data_sets(DataSettings(**{"data_path": "a", **settings}))
    assert [str(problem) for problem in error.value.problems] == problems
