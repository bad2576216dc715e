"""`yeonma compare` on answers that are labels: accuracy, macro F1 and confusion of what the models answered."""

from __future__ import annotations

import json

import pytest

from tests.comparing import compare
from tests.runs import Done, model_folder, trained, write_jsonl
from yeonma.data.classification import NO_LABEL
from yeonma.evaluate.metrics import ScoredAnswer, compute_metrics, metric_tokenizer

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
