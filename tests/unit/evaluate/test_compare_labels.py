"""`yeonma compare` on answers that are labels: accuracy, macro F1 and confusion of what the models answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.comparing import compare
from tests.runs import Done, model_folder, trained, write_jsonl
from yeonma.data.classification import NO_LABEL, as_confusion, confusion_matrix, confusion_table, f1_of
from yeonma.data.text_scores import metric_tokenizer
from yeonma.evaluate.metrics import ScoredAnswer, compute_metrics
from yeonma.evaluate.report import ComparisonReport, print_report

TEMPLATE = "a word: {word}\n\nits kind: {kind}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A base that never answers with a label, and an adapter that has learned what follows every prompt."""
    place = tmp_path_factory.mktemp("labels")
    base = model_folder(place / "base")
    rows = [
        {"word": "aaa" if number % 3 else "zzz", "kind": "x" if number % 3 else "y"} for number in range(30)
    ]
    data = write_jsonl(place / "rows.jsonl", rows)
    settings = {"template": TEMPLATE, "max_steps": 60, "learning_rate": 3e-2, "lora_r": 8, "batch_size": 8}
    run = trained(place / "kinds", base, data, **settings)
    return compare(place / "report", base, run.folder, data_path=data)


def test_scores_and_confusion_are_those_of_the_answers(done: Done) -> None:
    assert done.status == 0, done.err
    report = json.loads((done.folder / "report.json").read_text("utf-8"))
    assert report["labels"]["counts"] == {"x": 20, "y": 10}
    for model, confusion in enumerate(report["labels"]["confusions"]):
        expected: dict[str, dict[str, int]] = {}
        for row in report["rows"]:
            answer = row["answers"][model]["text"].strip()
            predicted = answer if answer in ("x", "y") else NO_LABEL
            counts = expected.setdefault(row["wanted"], {})
            counts[predicted] = counts.get(predicted, 0) + 1
        assert confusion == expected
        accuracy = sum(row.get(own, 0) for own, row in expected.items()) / 30
        values = {metric["key"]: metric["values"][model] for metric in report["metrics"]}
        assert values["accuracy"] == pytest.approx(accuracy)
        f1s = [
            2
            * expected[own].get(own, 0)
            / (sum(expected[own].values()) + sum(row.get(own, 0) for row in expected.values()))
            for own in ("x", "y")
        ]
        assert values["macro_f1"] == pytest.approx(sum(f1s) / 2)
        assert "accuracy" in report["rows"][0]["answers"][model]["scores"]
        assert "macro_f1" not in report["rows"][0]["answers"][model]["scores"]


def test_report_begins_with_the_verdict_then_answers_then_numbers(done: Done) -> None:
    report = json.loads((done.folder / "report.json").read_text("utf-8"))
    verdict = report["verdict"][0]
    assert verdict.startswith("kinds is better than base: its accuracy is ") and "95% interval" in verdict
    page = (done.folder / "report.html").read_text("utf-8")
    places = [page.index(text) for text in (verdict, 'id="rows-heading"', 'id="numbers"', 'id="labels"')]
    assert places == sorted(places)
    assert page.count('<table class="confusion">') == 2
    places = [done.out.index(text) for text in (verdict, "\nrow 1\n", "  kinds: ", " macro F1")]
    assert places == sorted(places)


def report_of(labels: Sequence[str], rows: int) -> ComparisonReport:
    """A report of one model that mostly answers rightly, and sometimes with no label."""
    draw = np.random.default_rng(0)
    own = draw.integers(0, len(labels), rows)
    predicted = np.where(draw.random(rows) < 0.8, own, draw.integers(0, len(labels) + 1, rows))
    matrix = confusion_matrix(own, predicted, len(labels))
    counts = dict(zip(labels, matrix.sum(axis=1).tolist(), strict=False))
    found = {"counts": counts, "confusions": [as_confusion(matrix, labels)]}
    return {
        "verdict": [],
        "rows": [],
        "models": [{"name": "kinds"}],
        "metrics": [],
        "notes": [],
        "labels": found,
    }


def printed(report: ComparisonReport, width: int) -> str:
    console = Console(file=StringIO(), width=width, highlight=False, markup=False)
    print_report(console, report)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_terminal_has_the_confusion_of_each_model(done: Done) -> None:
    report = json.loads((done.folder / "report.json").read_text("utf-8"))
    for model, confusion in zip(report["models"], report["labels"]["confusions"], strict=True):
        caption = f"{model['name']}: rows of a label, by the label that was answered\n"
        lines = done.out.partition(caption)[2].splitlines()
        columns, rows = confusion_table(confusion, ["x", "y"])
        heads = lines[1].split()
        assert heads[0] == "label" and heads[-1] == "F1"
        assert [line.split()[: len(columns) + 1] for line in lines[3:5]] == [
            [own, *map(str, counts)] for own, counts in rows
        ]


@pytest.mark.parametrize("language", ["en", "ko"])
@pytest.mark.parametrize(
    ("labels", "columns_have"),
    [
        (["positive", "negative"], "names"),
        (["긍정", "부정", "어느 쪽도 아님"], "names"),
        ([f"아주 긴 이름의 분류 항목 {number}" for number in range(12)], "numbers"),
        ([f"a rather long label {number}" for number in range(5)], "numbers"),
        ([f"label {number}" for number in range(13)], "nothing"),
    ],
)
def test_confusion_fits_into_80_columns(
    labels: list[str], columns_have: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YEONMA_LANG", language)
    report = report_of(labels, 4000)
    text = printed(report, 80)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    (confusion,) = report["labels"]["confusions"]
    rows = confusion_table(confusion, labels)[1]
    if columns_have == "nothing":
        assert "report.html" in text and labels[0] not in text
        return
    for number, (own, counts) in enumerate(rows, 1):
        begins = own if columns_have == "names" else f" {number} {own[:6]}"
        (line,) = [
            line
            for line in text.splitlines()
            if line.strip().startswith(begins.strip() + " " * (columns_have == "names"))
        ]
        assert line.split()[-len(counts) - 1 :] == [
            *(f"{count:,}" for count in counts),
            f"{f1_of(confusion, own):.3f}",
        ]
    head = text.splitlines()[-len(rows) - 3]
    assert (labels[0] in head) == (columns_have == "names")
    if columns_have == "numbers":
        assert head.split()[1:-2] == [str(number) for number in range(1, len(labels) + 1)]


def test_confusion_without_room_is_left_to_the_page() -> None:
    assert "report.html" in printed(report_of([f"a label {number}" for number in range(12)], 40_000), 60)


def test_titles_have_no_labels() -> None:
    answers = [[ScoredAnswer(f"title {number}", (1,), True) for number in range(40)]]
    references = [f"title {number}" for number in range(40)]
    metrics = compute_metrics(answers, references, metric_tokenizer(references))
    assert not {"accuracy", "macro_f1"} & {metric.key for metric, _ in metrics}


def test_blanks_at_the_edges_do_not_count_and_rows_without_a_label_are_left_out() -> None:
    references: list[str | None] = [*["yes"] * 8, *["no"] * 8, None]
    texts = [*[" yes\n"] * 8, *["No"] * 4, *["no"] * 4, "yes"]
    answers = [[ScoredAnswer(text, (1,), True) for text in texts]]
    tables = {
        metric.key: (metric, table[0])
        for metric, table in compute_metrics(answers, references, metric_tokenizer(["yes"]))
    }
    metric, table = tables["accuracy"]
    assert metric.value(table.sum(axis=0)) == 12 / 16
    metric, table = tables["macro_f1"]
    assert metric.value(table.sum(axis=0)) == pytest.approx((1 + 2 * 4 / (4 + 8)) / 2)
