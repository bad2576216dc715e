"""The logs of a run and what a checkpoint knows of them: damage is seen, and what comes after it is removed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from yeonma.errors import UserError
from yeonma.run_folder.progress import EvaluationRecord, StepRecord
from yeonma.run_folder.run_log import (
    METRICS,
    TRAINED_ROWS,
    LogSums,
    check_logs,
    open_metrics,
    open_trained_rows,
    read_metrics,
)
from yeonma.run_folder.trackers import tracked

STEP = StepRecord(1, 0.1, 2.5, 1e-3, 1.0, 4, 100, 50, 0.123, 1000, {"reward_margin": 0.1})


def write_logs(output: Path, steps: int, seconds: float = 0.1) -> LogSums:
    """The logs of some steps, and their sums."""
    with open_metrics(output / METRICS, None) as metrics, open_trained_rows(output / TRAINED_ROWS, 0) as rows:
        for step in range(1, steps + 1):
            metrics.write(replace(STEP, step=step, loss=1 / step, seconds=seconds * step))
            rows.write(step, [step, step + 1])
        return {METRICS: metrics.sum.as_record(), TRAINED_ROWS: rows.sum.as_record()}


def test_sums_do_not_depend_on_time_and_are_the_same_when_read_again(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sums = write_logs(tmp_path, 5)
    assert write_logs(tmp_path / "other", 5, seconds=7.7) == sums
    assert sums[METRICS]["lines"] == 5
    longer = write_logs(tmp_path / "other", 6)
    assert longer != sums
    with open_metrics(tmp_path / "other" / METRICS, 5, lines=5) as metrics:
        assert metrics.sum.as_record() == sums[METRICS]
    with open_metrics(tmp_path / METRICS, 5) as metrics:  # of a checkpoint that does not say how many lines
        assert metrics.sum.as_record() == sums[METRICS]
        metrics.write(replace(STEP, step=6, loss=1 / 6))
        assert metrics.sum.as_record() == longer[METRICS]


def changed_loss(content: bytes) -> bytes:
    return content.replace(b'"loss": 0.5', b'"loss": 0.6').replace(b"[2, 3]", b"[2, 4]")


DAMAGE = {
    "a changed number": changed_loss,
    "a line less": lambda content: b"".join(content.splitlines(keepends=True)[1:]),
    "a line twice": lambda content: content.splitlines(keepends=True)[0] + content,
    "cut within its lines": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "without the last line end": lambda content: content[:-1],
    "two lines changed round": lambda content: b"".join(reversed(content.splitlines(keepends=True))),
}


@pytest.mark.parametrize("name", [METRICS, TRAINED_ROWS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_fault_90_a_log_that_was_changed_between_runs_is_refused(
    tmp_path: Path, name: str, damage: str
) -> None:
    sums = write_logs(tmp_path, 3)
    check_logs(tmp_path, sums, 3, pytest.fail)
    path = tmp_path / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        check_logs(tmp_path, sums, 3, pytest.fail)
    assert str(caught.value) == (
        f"{path}: its first 3 lines are not those that the run wrote up to step 3; restore a copy, or delete "
        "the file: the run then continues, and it begins after step 3"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize("rubbish", [b'{"step": 4', b"\x00" * 40, b"not json\n", b"[]\n" * 3])
def test_fault_90_what_follows_the_lines_of_a_checkpoint_is_removed_whatever_it_is(
    tmp_path: Path, rubbish: bytes
) -> None:
    sums = write_logs(tmp_path, 3)
    whole = {name: (tmp_path / name).read_bytes() for name in sums}
    for name in sums:
        (tmp_path / name).write_bytes(whole[name] + rubbish)
    check_logs(tmp_path, sums, 3, pytest.fail)
    open_metrics(tmp_path / METRICS, 3, lines=3).file.close()
    open_trained_rows(tmp_path / TRAINED_ROWS, 3, lines=3).file.close()
    assert {name: (tmp_path / name).read_bytes() for name in sums} == whole


def test_fault_90_a_log_that_is_gone_is_said_and_begins_anew(tmp_path: Path) -> None:
    sums, messages = write_logs(tmp_path, 3), list[str]()
    (tmp_path / METRICS).unlink()
    check_logs(tmp_path, sums, 3, messages.append)
    assert messages == [f"warning: {tmp_path / METRICS} is missing: it will begin after step 3"]
    with open_metrics(tmp_path / METRICS, 3, lines=3) as metrics:
        metrics.write(replace(STEP, step=4))
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [4]


def test_checkpoints_of_earlier_versions_know_nothing_of_the_logs(tmp_path: Path) -> None:
    check_logs(tmp_path, {}, 3, pytest.fail)


@pytest.mark.parametrize(("name", "key", "value"), [(METRICS, "loss", 2.0), (TRAINED_ROWS, "rows", [1])])
def test_a_wrong_line_is_found_before_anything_is_cut_in_checkpoints_of_earlier_versions(
    tmp_path: Path, name: str, key: str, value: object
) -> None:
    """Without sums the lines are all that can be looked at, and opening the log would find it too late."""
    lines = [{"step": 1, key: value}, {"step": 2, key: value}, {"step": 3, key: "x"}]
    (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    check_logs(tmp_path, {}, 1, print)
    with pytest.raises(UserError, match=f"{name}:3: .*delete this line"):
        check_logs(tmp_path, {}, 3, print)


EVALUATION = EvaluationRecord(
    4, 0.5, 1.25, 3.49, 12, 60, 0.1, {"accuracy": 0.75, "macro_f1": 0.7}, {}, {"a": {"x": {"x": 9, "y": 3}}}
)


def test_confusion_of_labels_is_written_read_and_no_number_for_trackers(tmp_path: Path) -> None:
    with open_metrics(tmp_path / METRICS, None) as metrics:
        metrics.write(EVALUATION)
    (line,) = read_metrics(tmp_path / METRICS)
    assert (line["accuracy"], line["macro_f1"]) == (0.75, 0.7)
    assert line["confusion"] == {"a": {"x": {"x": 9, "y": 3}}}
    numbers = tracked(EVALUATION)
    assert numbers["validation/accuracy"] == 0.75 and numbers["validation/macro_f1"] == 0.7
    assert all(isinstance(value, int | float) for value in numbers.values())


@pytest.mark.parametrize(
    "confusion", [1, {"a": 1}, {"a": {"x": 1}}, {"a": {"x": {"y": "1"}}}, {"a": {"x": {"y": -1}}}, []]
)
def test_confusion_that_no_run_writes_is_damage(confusion: object, tmp_path: Path) -> None:
    record = {"evaluation": True, "step": 1, "loss": 1.0, "confusion": confusion}
    (tmp_path / METRICS).write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a record"):
        read_metrics(tmp_path / METRICS)
