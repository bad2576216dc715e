"""Labels of a classification in `yeonma inspect`: their counts, and a warning about their imbalance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import arguments, command, model_folder, write_jsonl
from yeonma.inspect.label_counts import LabelCounts, label_lines

TEMPLATE = "a review: {review}\n\nis it good? {label}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("inspect") / "llama")


def inspected(base: Path, place: Path, labels: list[str], *words: str) -> str:
    rows = [{"review": f"number {number}", "label": label} for number, label in enumerate(labels)]
    data = write_jsonl(place / "rows.jsonl", rows)
    settings = {"base_model": base, "data_path": data, "template": TEMPLATE, "val_set_size": 10}
    done = command(place, "inspect", *arguments(settings), *words)
    assert done.status == 0, done.err
    return done.out


def test_labels_are_counted_on_the_terminal_in_json_and_on_the_page(base: Path, tmp_path: Path) -> None:
    labels = ["good"] * 30 + ["bad"] * 20
    page = tmp_path / "page.html"
    out = inspected(base, tmp_path, labels, "--html", str(page))
    assert "2 labels: good: " in out
    assert "always answering good would give an accuracy of 0." in out
    assert "2 labels: good: " in page.read_text("utf-8")
    line = inspected(base, tmp_path, labels, "--json", "true").splitlines()[-1]
    audit = json.loads(line)["audit"]
    counts = [dict(audit[part]["answer_labels"]["labels"]) for part in ("train", "validation")]
    assert {label: counts[0][label] + counts[1][label] for label in ("good", "bad")} == {
        "good": 30,
        "bad": 20,
    }
    assert sum(counts[0].values()) == 40


def test_free_answers_have_no_labels(base: Path, tmp_path: Path) -> None:
    out = inspected(base, tmp_path, [f"title {number}" for number in range(50)])
    assert "labels" not in out and "accuracy" not in out


def test_imbalance_is_a_warning_with_the_accuracy_of_the_most_frequent_label() -> None:
    lines = list(label_lines(LabelCounts((("ham", 900), ("spam", 90)))))
    assert lines[0] == "2 labels: ham: 900 (91%), spam: 90 (9%)"
    text, style = lines[1]
    assert text == (
        "! the labels are imbalanced: always answering ham would give an accuracy of 0.909, "
        "so judge by macro F1 as well"
    )
    assert style == "yellow"
    assert isinstance(list(label_lines(LabelCounts((("ham", 900), ("spam", 91)))))[1], str)


def test_many_labels_are_listed_in_part() -> None:
    counts = LabelCounts(tuple((f"l{number}", 30 - number) for number in range(12)))
    first = next(label_lines(counts))
    assert str(first).startswith("12 labels: l0: 30 (") and str(first).endswith(
        " and 4 more, the rarest l11: 19"
    )
