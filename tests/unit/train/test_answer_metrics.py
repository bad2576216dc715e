"""Answers to validation rows while a model is trained: what is asked, measured, logged and kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pairs import pairs, tuned
from tests.runs import (
    SAMPLE_TOKENS,
    SETTINGS,
    Done,
    arguments,
    articles,
    command,
    left_behind,
    model_folder,
    sft,
    trained,
    write_jsonl,
)
from tests.unit.train.test_label_accuracy import SETTINGS as LABELS
from tests.unit.train.test_label_accuracy import reviews
from yeonma.train.answer_rows import _shares

RUN: dict[str, object] = {
    "val_set_size": 7,
    "num_epochs": 2,
    "eval_steps": 4,
    "save_steps": 3,
    "lora_dropout": 0.1,
}
SCORES = """
def measured(row, answer):
    return {"letters": len(answer), "vowels": sum(answer.count(letter) for letter in "aeiou")}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    model_folder(root / "model")
    write_jsonl(root / "rows.jsonl", articles(25))
    (root / "scores.py").write_text(SCORES)
    return root


def run(place: Path, output: Path, **settings: object) -> Done:
    return sft(output, place / "model", place / "rows.jsonl", **{**RUN, **settings})


@pytest.fixture(scope="module")
def done(place: Path) -> Done:
    metrics = f"exact,chrf,rougeL,{place / 'scores.py'}:measured"
    result = run(place, place / "out", answer_metrics=metrics, answer_rows=3, keep_best="letters")
    assert result.status == 0, result.err
    return result


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]


def test_the_same_rows_are_answered_at_every_evaluation(done: Done) -> None:
    steps = [look["step"] for look in done.looks]
    assert steps == [0, 4, 8, 10]
    by_step = {step: [line["row"] for line in answers(done.folder) if line["step"] == step] for step in steps}
    rows = by_step[0]
    assert len(rows) == 3 and rows == sorted(rows) and all(by_step[step] == rows for step in steps)
    lines = (done.folder / "trained_rows.jsonl").read_text().splitlines()
    assert not {*rows} & {row for line in lines for row in json.loads(line)["rows"]}


def test_answers_are_those_of_generate(place: Path, done: Done) -> None:
    data, best = articles(25), keep(done)
    lines = [line for line in answers(done.folder) if line["step"] == best]
    asked = write_jsonl(place / "asked.jsonl", [data[line["row"] - 1] for line in lines])
    words = ["generate", str(done.folder), "--data_path", str(asked), "--output", str(place / "theirs.jsonl")]
    words += ["--max_new_tokens", str(SAMPLE_TOKENS)]
    assert command(place, *words).status == 0
    theirs = [json.loads(line) for line in (place / "theirs.jsonl").read_text("utf-8").splitlines()]
    assert [line["answer"] for line in lines] == [line["answer"] for line in theirs]
    assert any(line["answer"] for line in lines)


def keep(done: Done) -> int:
    scores = {look["step"]: look["answers/letters"] for look in done.looks if look["step"]}
    return max(scores, key=lambda step: (scores[step], -step))


def test_numbers_are_means_over_the_rows(done: Done) -> None:
    for look in done.looks:
        lines = [line for line in answers(done.folder) if line["step"] == look["step"]]
        for name in ("exact", "rougeL", "letters", "vowels"):
            assert look[f"answers/{name}"] == pytest.approx(np.mean([line["scores"][name] for line in lines]))
        assert [line["scores"]["letters"] for line in lines] == [len(line["answer"]) for line in lines]
        assert 0 <= look["answers/chrf"] <= 100
    assert "  answers: exact 0" in done.out and "letters " in done.out


def test_the_best_step_by_a_metric_is_kept(done: Done) -> None:
    best = keep(done)
    weights = done.folder / f"checkpoint-{best}" / "adapter_model.safetensors"
    assert done.weight_bytes == weights.read_bytes()
    state = json.loads((done.folder / f"checkpoint-{best}" / "state.json").read_text())
    look = next(look for look in done.looks if look["step"] == best)
    assert (state["best_step"], state["best_score"]) == (best, look["answers/letters"])


@pytest.mark.slow
def test_the_folder_is_whole_and_takes_no_report(place: Path, done: Done) -> None:
    verified = command(place, "verify", str(done.folder))
    assert verified.status == 0, verified.out + verified.err
    words = ["compare", "--models", str(done.folder), "--data_path", str(place / "rows.jsonl")]
    refused = command(place, *words, "--output_dir", str(done.folder))
    assert refused.status == 2 and "it is a model's folder" in refused.err


def test_weights_do_not_depend_on_answers(place: Path, done: Done, tmp_path: Path) -> None:
    plain = run(place, tmp_path / "plain")
    assert plain.status == 0, plain.err
    assert [look["loss"] for look in plain.looks] == [look["loss"] for look in done.looks]
    for step in (3, 6, 10):
        name = f"checkpoint-{step}/adapter_model.safetensors"
        assert (plain.folder / name).read_bytes() == (done.folder / name).read_bytes()
    assert not (plain.folder / "answers.jsonl").exists()
    state = json.loads((plain.folder / "checkpoint-10" / "state.json").read_text())
    assert "best_score" not in state and "answer_metrics" not in state["identity"]


def test_a_run_that_was_killed_ends_with_the_same_bytes(place: Path, done: Done, tmp_path: Path) -> None:
    """Killed after the evaluation of step 8, whose lines it had written, and before its checkpoint."""
    copy = tmp_path / "out"
    untouched = left_behind(done.folder)
    shutil.copytree(done.folder, copy)
    for step in (8, 9, 10):
        shutil.rmtree(copy / f"checkpoint-{step}", ignore_errors=True)
    record = (copy / "run.json").read_text("utf-8").replace('"finished": true', '"finished": false')
    (copy / "run.json").write_text(record, "utf-8")
    metrics = f"exact,chrf,rougeL,{place / 'scores.py'}:measured"
    again = run(place, copy, answer_metrics=metrics, answer_rows=3, keep_best="letters")
    assert again.status == 0, again.err
    assert "continuing after step 6 of 10" in again.out
    found = left_behind(copy, done.folder.parent)
    for files in (untouched, found):
        for name in ("settings.yaml", "README.md", "manifest.json"):
            files.pop(name, None)
    assert found == untouched


FAILS = """
from pathlib import Path
calls = 0
def strict(row, answer):
    global calls
    calls += 1
    if calls > 2 * 3:  # the base, and step 4
        raise ValueError("too many")
    return 1.5
"""


def test_a_function_that_fails_stops_the_run_with_a_checkpoint(place: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.py").write_text(FAILS)
    settings = {"answer_metrics": f"{tmp_path / 'strict.py'}:strict", "answer_rows": 3}
    failed = run(place, tmp_path / "out", **settings)
    assert failed.status == 2
    assert f"{tmp_path / 'strict.py'}:8: the function strict failed on the answer" in failed.err
    row = answers(tmp_path / "out")[0]["row"]
    assert f"rows.jsonl:{row}: ValueError: too many" in failed.err
    assert [look["step"] for look in failed.looks] == [0, 4]
    assert (tmp_path / "out" / "checkpoint-8").is_dir()
    (tmp_path / "strict.py").write_text("def strict(row, answer):\n    return 1.5\n")
    again = run(place, tmp_path / "out", **settings)
    assert again.status == 0, again.err
    assert "continuing after step 8" in again.out
    assert "warning: the functions in answer_metrics have changed since the run began" in again.out
    assert [line["step"] for line in answers(again.folder)] == [0, 0, 0, 4, 4, 4, 8, 8, 8, 10, 10, 10]


def test_a_function_that_chooses_the_best_step_cannot_change(place: Path, done: Done) -> None:
    other = place / "other" / "scores.py"
    other.parent.mkdir()
    other.write_text(SCORES + "\n# otherwise\n")
    again = run(
        place,
        done.folder,
        answer_metrics=f"exact,chrf,rougeL,{other}:measured",
        answer_rows=3,
        keep_best="letters",
    )
    assert again.status == 2
    assert "the content of the functions in answer_metrics has changed" in again.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_metrics": "exact,chr"}, 'answer_metrics: no metric "chr"; did you mean "chrf"?'),
        ({"answer_metrics": "SCORES:lost"}, 'scores.py: it defines no "lost"; it defines measured'),
        ({"answer_metrics": "lost.py:lost"}, "lost.py: cannot be read (No such file or directory)"),
        ({"answer_metrics": "exact", "keep_best": "chrf"}, "keep_best: the run does not measure chrf"),
        ({"keep_best": "exact"}, "give --answer_metrics exact as well"),
        ({"answer_metrics": "SCORES:measured", "keep_best": "lettres"}, 'did you mean "letters"?'),
        ({"answer_metrics": "exact", "val_set_size": 0}, "it measures answers to validation rows"),
        ({"answer_metrics": "accuracy"}, "accuracy needs answers that are the labels of a classification"),
        ({"answer_metrics": "json"}, "its wanted answer is no JSON"),
        ({"answer_metrics": "exact", "answer_rows": 0}, "answer_rows: 0 is out of range"),
    ],
)
def test_what_cannot_be_measured_is_said_before_weights_are_loaded(
    place: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    if "answer_metrics" in settings:
        named = settings["answer_metrics"].replace("SCORES", str(place / "scores.py"))
        settings = {**settings, "answer_metrics": named}
    refused = run(place, tmp_path / "out", **settings)
    assert refused.status == 2 and message in refused.err
    assert "parameters trained" not in refused.out


@pytest.mark.slow
def test_f1_of_labels_needs_no_answers(place: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    kept = trained(
        tmp_path / "out", place / "model", data, **LABELS, answer_metrics="accuracy,f1", keep_best="f1"
    )
    assert not (kept.folder / "answers.jsonl").exists()
    scores = {look["step"]: look["macro_f1"] for look in kept.looks if look["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert kept.weight_bytes == (kept.folder / f"checkpoint-{best}/adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_pairs_are_measured_against_the_chosen_answer(place: Path, tmp_path: Path) -> None:
    rows = pairs(20)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "seen.py").write_text(
        "def same(row, answer):\n    return answer == row['chosen']\n", encoding="utf-8"
    )
    done = tuned(
        tmp_path / "out",
        place / "model",
        data,
        val_set_size=6,
        answer_metrics=f"exact,{tmp_path / 'seen.py'}:same",
        answer_rows=2,
    )
    for look in done.looks:
        assert look["answers/exact"] == 100 * look["answers/same"]
    assert len(answers(done.folder)) == 2 * len(done.looks)


def test_rows_are_shared_out_over_data_sets() -> None:
    assert _shares([100, 100, 100], 32) == [11, 11, 10]
    assert _shares([3, 100], 32) == [3, 29]
    assert _shares([3, 0, 4], 32) == [3, 0, 4]
    assert _shares([5, 5], 1) == [1, 0]


@pytest.mark.slow
def test_no_row_is_left_out_of_a_mixture(place: Path, tmp_path: Path) -> None:
    """Rows of both data sets, each asked with its own template."""
    other = write_jsonl(
        tmp_path / "other.jsonl",
        [{"document": row["title"], "title": row["document"]} for row in articles(14, 1)],
    )
    done = run(
        place,
        tmp_path / "out",
        data_path=[
            {"path": str(place / "rows.jsonl")},
            {"path": str(other), "template": "{document} = {title}"},
        ],
        answer_metrics="exact,json",
        answer_rows=4,
        max_steps=1,
        num_epochs=None,
    )
    assert done.status == 2 and done.err.count("its wanted answer is no JSON") == 4


@pytest.mark.slow
@pytest.mark.parametrize("page", ["evaluate.md", "evaluate.ko.md"])
def test_the_function_of_the_page_works(place: Path, tmp_path: Path, page: str) -> None:
    text = (Path(__file__).parents[3] / "docs" / page).read_text("utf-8")
    source = re.search(r"`scores.py`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert source is not None
    (tmp_path / "scores.py").write_text(source[1])
    metrics = f"exact,chrf,rougeL,{tmp_path / 'scores.py'}:headline"
    done = run(
        place, tmp_path / "out", answer_metrics=metrics, keep_best="chrf", max_steps=2, num_epochs=None
    )
    assert done.status == 0, done.err
    assert all(0 <= look["answers/short"] <= 1 for look in done.looks)
    card = (done.folder / "README.md").read_text("utf-8")
    assert "| answers | exact | chrf | rougeL | short | marked | step |" in card
    plot = (done.folder / "loss.svg").read_text("utf-8")
    assert all(f">{name}</text>" in plot for name in ("exact", "chrf", "rougeL", "short", "marked"))


@pytest.mark.slow
def test_the_forecast_counts_the_answers(place: Path) -> None:
    def time(**settings: object) -> dict[str, Any]:
        wanted = {
            "base_model": place / "model",
            "data_path": place / "rows.jsonl",
            "rows": "none",
            "json": True,
        }
        done = command(place, "inspect", *arguments({**SETTINGS, **RUN, **wanted, **settings}))
        assert done.status == 0, done.err
        return dict(json.loads(done.out.splitlines()[-1])["forecast"]["time"])

    without = time()
    assert without["answer_seconds"] == 0
    every, once = (time(answer_metrics="exact", answer_rows=3, eval_steps=steps) for steps in (2, 100))
    assert every["answer_seconds"] == pytest.approx(3 * once["answer_seconds"])  # 6 evaluations and 2
    for one in (every, once):
        assert one["seconds"] == pytest.approx(without["seconds"] + one["answer_seconds"])
        assert one["tokens_per_second"] == without["tokens_per_second"]
