"""Answers at evaluations in two processes, with the base sharded, with all weights trained, and after a fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.zygote import Zygote, together
from tests.runs import SETTINGS, Done, articles, model_folder, sft, write_jsonl
from tests.unit.train.test_answer_metrics import SCORES

pytestmark = pytest.mark.slow
RUN: dict[str, object] = {
    "val_set_size": 7,
    "max_steps": 6,
    "num_epochs": None,
    "eval_steps": 2,
    "save_steps": 2,
    "answer_rows": 5,
    "keep_best": "letters",
}


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]


def metrics_of(done: Done) -> list[tuple[float, ...]]:
    return [tuple(look[f"answers/{name}"] for name in ("exact", "letters", "vowels")) for look in done.looks]


@pytest.mark.parametrize(
    "more", [{}, {"shard": True}, {"train": "full", "lora_r": None, "lora_alpha": None}], ids=str
)
def test_two_processes_answer_as_one_does(zygotes: Zygote, tmp_path: Path, more: dict[str, object]) -> None:
    base = model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(25))
    (tmp_path / "scores.py").write_text(SCORES)
    options = {**SETTINGS, **RUN, "answer_metrics": f"exact,{tmp_path / 'scores.py'}:measured", **more}
    alone = {name: value for name, value in options.items() if name != "shard"}
    one = sft(tmp_path / "one", base, data, **alone)
    assert one.status == 0, one.err
    paths = {"base_model": base, "data_path": data, "output_dir": tmp_path / "two"}
    two = together(zygotes, "sft", {**paths, **options})
    assert two.status == 0, two.err
    assert answers(two.folder) == answers(one.folder)
    assert metrics_of(two) == metrics_of(one) and len(two.looks) == 4
    assert len({*metrics_of(one)}) > 1
    best = [
        int(line.partition("step ")[2].split()[0].strip(","))
        for line in one.out.splitlines()
        if "using" in line
    ]
    assert [f"of step {step}, which had the highest letters" in two.out for step in best] == [True] * len(
        best
    )


def test_a_fault_in_a_function_ends_both_processes_with_a_checkpoint(zygotes: Zygote, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(25))
    place = tmp_path / "strict.py"
    place.write_text(
        "calls = 0\ndef strict(row, answer):\n    global calls\n    calls += 1\n"
        "    assert calls <= 10, 'enough'\n    return 1\n"
    )
    options = {**SETTINGS, **RUN, "keep_best": True, "answer_metrics": f"{place}:strict"}
    paths = {"base_model": base, "data_path": data, "output_dir": tmp_path / "two"}
    failed = together(zygotes, "sft", {**paths, **options})
    assert failed.status == 2
    assert f"{place}:5: the function strict failed on the answer" in failed.err
    assert (tmp_path / "two" / "checkpoint-4").is_dir()
    place.write_text("def strict(row, answer):\n    return 1\n")
    again = together(zygotes, "sft", {**paths, **options})
    assert again.status == 0, again.err
    assert [line["step"] for line in answers(tmp_path / "two")] == [
        step for step in (0, 2, 4, 6) for _ in range(5)
    ]
