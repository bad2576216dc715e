"""`yeonma eval` on local tasks: item by item what the harness's own class measures with transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from tests.harness_tasks import TASKS, by_transformers, full_tokenizer, task_folder
from tests.runs import Done, articles, command, model_folder, trained, write_jsonl

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run on it, and the folder of tasks."""
    root = tmp_path_factory.mktemp("eval")
    base = model_folder(root / "base")
    full_tokenizer(CHAT_TEMPLATE).save_pretrained(base)
    rows = write_jsonl(root / "rows.jsonl", articles(24))
    trained(root / "run", base, rows, learning_rate=3e-2, num_epochs=3)
    task_folder(root / "tasks")
    return root


def evaluate(place: Path, *tasks: str, **settings: object) -> Done:
    words = ["--tasks", ",".join(tasks), "--include_path", str(place / "tasks"), "--device", "cpu"]
    for name, value in settings.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return command(place / "run", "eval", str(place / "run"), *words)


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


def check_equal(
    report: Mapping[str, Any], results: Mapping[str, Any], model: str, tasks: tuple[str, ...]
) -> None:
    """Each item's scores and responses; log-likelihoods to 1e-4 a request, perplexities to 1e-4 of themselves."""
    for task in tasks:
        items, samples = report["tasks"][task]["items"], results["samples"][task]
        assert len(items) == len(samples) > 5
        for item, sample in zip(items, samples, strict=True):
            assert item["doc_id"] == sample["doc_id"]
            for response, expected in zip(item["responses"][model], sample["resps"], strict=True):
                for own, theirs in zip(response, expected, strict=True):
                    if isinstance(theirs, tuple):
                        assert own[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-4) and own[1] == theirs[1]
                    elif isinstance(theirs, float):
                        assert own == pytest.approx(theirs, rel=1e-5, abs=1e-4)
                    else:
                        assert own == theirs
            for metric in sample["metrics"]:
                own, theirs = item["scores"][model][metric], sample[metric]
                assert own == pytest.approx(list(theirs) if isinstance(theirs, tuple) else theirs, rel=1e-5)


def test_every_item_is_that_of_transformers_and_peft(place: Path) -> None:
    done = evaluate(place, *TASKS)
    assert done.status == 0, done.err
    report = report_of(place / "run" / "eval.json")
    for model, adapter in (("base", None), ("tuned", place / "run")):
        results = by_transformers(place / "base", adapter, TASKS, place / "tasks")
        check_equal(report, results, model, TASKS)
        index = ("base", "tuned").index(model)
        for entry in report["scores"]:
            expected = results["results"][entry["name"]][f"{entry['metric']},{entry['filter']}"]
            assert entry["values"][index] == pytest.approx(expected, rel=1e-4)
    texts = {
        item["responses"][model][0][0]
        for item in report["tasks"]["own_answers"]["items"]
        for model in ("base", "tuned")
    }
    assert len(texts) > 2  # the tasks tell the models apart
    assert "own_long: " in " ".join(report["notes"]) and "own_long_answers: " in " ".join(report["notes"])

    assert all(len(line) <= 80 for line in done.out.splitlines() if "p corrected" not in line)
