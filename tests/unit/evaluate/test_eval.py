"""`yeonma eval` on local tasks: what it leaves behind, what it costs again, and what it refuses.

tests/slow/test_eval.py compares every item with the harness's own class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

import yeonma
from tests.comparing import compare
from tests.harness_tasks import by_transformers, full_tokenizer, task_folder, write_task
from tests.runs import Done, articles, command, model_folder, trained, write_jsonl
from yeonma.errors import UserError
from yeonma.evaluate.harness_requests import RequestRunner


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run on it, and the folder of tasks."""
    root = tmp_path_factory.mktemp("eval")
    base = model_folder(root / "base")
    full_tokenizer().save_pretrained(base)
    rows = write_jsonl(root / "rows.jsonl", articles(24))
    trained(root / "run", base, rows, learning_rate=3e-2, num_epochs=2)
    tasks = task_folder(root / "tasks")
    body = (tasks / "own_answers.yaml").read_text("utf-8").replace("task: own_answers\n", "")
    write_task(tasks, "own_code", f"{body}unsafe_code: true\n")
    write_task(tasks, "own_missing", body.replace("test.jsonl", "nothing.jsonl"))
    return root


def evaluate(place: Path, tasks: str, output: Path, *words: str) -> Done:
    options = ["--tasks", tasks, "--include_path", str(place / "tasks"), "--output", str(output)]
    return command(place / "run", "eval", str(place / "run"), *options, *words)


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


def test_a_group_and_a_task_have_the_harness_own_values(place: Path, tmp_path: Path) -> None:
    tasks = ["own_group", "own_answers"]
    done = evaluate(place, ",".join(tasks), tmp_path / "eval.json")
    assert done.status == 0, done.err
    report = report_of(tmp_path / "eval.json")
    assert report["asked_for"] == tasks
    for index, adapter in enumerate((None, place / "run")):
        expected = by_transformers(place / "base", adapter, tasks, place / "tasks")["results"]
        for entry in report["scores"]:
            value = expected[entry["name"]][f"{entry['metric']},{entry['filter']}"]
            assert entry["values"][index] == pytest.approx(value, rel=1e-4)
    group = next(entry for entry in report["scores"] if entry["name"] == "own_group")
    assert group["group_of"] == ["own_bare", "own_options"] and group["items"] == 20
    low, high = group["interval"]
    assert low <= group["difference"] <= high and 0 < group["p"] <= group["p_corrected"] <= 1
    member = next(entry for entry in report["scores"] if entry["name"] == "own_bare")
    assert member["p"] is None and not member["asked_for"]
    shown = done.out.partition("Tuned against base")[0].splitlines()
    assert all(len(line) <= 80 for line in shown)
    assert any(line.strip() == "own_group" for line in shown) and "own_bare" not in done.out


def test_the_same_command_asks_nothing_again_and_another_task_only_what_is_new(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.json"
    assert evaluate(place, "own_bare", output).status == 0
    first, answers = report_of(output), tmp_path / "scores.answers.jsonl"
    lines = answers.read_text("utf-8").splitlines()
    answers.write_text("\n".join([*lines[:-3], lines[-3][:20]]))  # killed within the third last
    scored: list[int] = []
    score = RequestRunner._score

    def counted(runner: RequestRunner, block: Any) -> Any:
        scored.append(len(block))
        return score(runner, block)

    monkeypatch.setattr(RequestRunner, "_score", counted)
    assert evaluate(place, "own_bare", output).status == 0
    again = report_of(output)
    assert scored == [3]
    assert again["scores"] == first["scores"]  # the three responses may differ by rounding, in other company
    assert evaluate(place, "own_bare,own_texts", output).status == 0
    assert sum(scored[1:]) == 2 * 10 + 2 * sum(  # windows of texts over the model's positions
        len(json.loads(line)["text"]) > 512
        for line in (place / "tasks" / "test.jsonl").read_text("utf-8").splitlines()
    )


def test_from_python_and_in_the_report_of_compare(place: Path, tmp_path: Path) -> None:
    result = yeonma.evaluate(place / "run", tasks=["own_options"], include_path=place / "tasks")
    assert result.path == place / "run" / "eval.json" and len(result.items("own_options")) == 10
    assert {score["metric"] for score in result.scores} == {"acc", "acc_norm"} and "own_options" in repr(
        result
    )
    data = write_jsonl(tmp_path / "rows.jsonl", articles(4, seed=3))
    done = compare(tmp_path / "report", place / "base", place / "run", data_path=data)
    assert done.status == 0, done.err
    assert "Benchmarks of run" in done.out and "own_options" in done.out
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "own_options" in page and "Benchmarks of run" in page
    stale = report_of(result.path)
    result.path.write_text(json.dumps({**stale, "weights": "0" * 64}))
    done = compare(tmp_path / "report", place / "base", place / "run", data_path=data)
    assert done.status == 0 and "own_options" not in done.out
    result.path.unlink()


def test_one_model_alone_as_json(place: Path, tmp_path: Path) -> None:
    done = evaluate(place, "own_bare", tmp_path / "one.json", "--base", "false", "--json", "true")
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    assert [model["name"] for model in printed["models"]] == ["tuned"] and "tasks" not in printed
    assert all(len(score["values"]) == 1 and score["difference"] is None for score in printed["scores"])


REFUSED = {
    "none": (",", [], "name one or more tasks"),
    "chat": ("own_bare", ["--apply_chat_template", "true"], "the base model has no chat template"),
    "beams": ("own_answers", ["--gen_kwargs", "{num_beams: 4}"], "own_answers: its answers need settings"),
    "long": ("own_answers", ["--gen_kwargs", "{max_gen_toks: 600}"], "max_gen_toks: 256"),
    "folder": ("own_bare", ["--include_path", "nowhere"], "--include_path nowhere: no such folder"),
    "code": ("own_code", [], "--confirm_run_unsafe_code true"),
    "data": ("own_missing", [], "own_missing: its data"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_mistakes_are_named_with_their_cure(place: Path, tmp_path: Path, case: str) -> None:
    tasks, words, expected = REFUSED[case]
    done = evaluate(place, tasks, tmp_path / "eval.json", *words)
    assert done.status == 2 and expected in done.err, done.err
    assert not (tmp_path / "eval.json").exists()


def test_python_raises_the_same_errors(place: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        yeonma.evaluate(place / "run", tasks=["own_bare"], include_path="nowhere")
