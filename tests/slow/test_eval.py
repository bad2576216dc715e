"""`yeonma eval` on local tasks: item by item what the harness's own class measures with transformers and PEFT; and the
page's own task."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from tests.harness_tasks import CHAT_TEMPLATE, TASKS, by_transformers, full_tokenizer, task_folder
from tests.runs import articles, command, model_folder, trained, write_jsonl

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MODELS = ("base", "tuned")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, of which the second's tokenizer puts a token before every text, a run on each, and the tasks."""
    root = tmp_path_factory.mktemp("eval")
    rows = write_jsonl(root / "rows.jsonl", articles(24))
    for name in ("plain", "begin"):
        base = model_folder(root / name)
        tokenizer = full_tokenizer(CHAT_TEMPLATE)
        if name == "begin":
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        tokenizer.save_pretrained(base)
        trained(root / f"{name}-run", base, rows, learning_rate=3e-2, num_epochs=3)
    task_folder(root / "tasks")
    return root


def check_equal(
    report: Mapping[str, Any], results: Mapping[str, Any], model: str, tasks: tuple[str, ...]
) -> None:
    """Each item's scores and responses: log-likelihoods to 1e-4, or to 1e-5 of themselves if that is more."""
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
    for entry in report["scores"]:
        if entry["name"] in results["results"]:
            expected = results["results"][entry["name"]][f"{entry['metric']},{entry['filter']}"]
            assert entry["values"][MODELS.index(model)] == pytest.approx(expected, rel=1e-4)


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("plain", {}),
    "begin": ("begin", {}),
    "chat": ("plain", {"apply_chat_template": True}),
    "chat in one turn, begin": (
        "begin",
        {"apply_chat_template": True, "fewshot_as_multiturn": False, "system_instruction": "be brief."},
    ),
    "one example": ("plain", {"num_fewshot": 1, "limit": 6}),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_item_is_that_of_transformers_and_peft(place: Path, case: str, tmp_path: Path) -> None:
    base, settings = CASES[case]
    run, output = place / f"{base}-run", tmp_path / "eval.json"
    words = ["--tasks", ",".join(TASKS), "--include_path", str(place / "tasks"), "--output", str(output)]
    for name, value in settings.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    done = command(run, "eval", str(run), *words, "--device", "cpu")
    assert done.status == 0, done.err
    report = json.loads(output.read_text("utf-8"))
    for model, adapter in zip(MODELS, (None, run), strict=True):
        results = by_transformers(place / base, adapter, TASKS, place / "tasks", **settings)
        check_equal(report, results, model, TASKS)
    answers = {
        item["responses"][model][0][0] for item in report["tasks"]["own_answers"]["items"] for model in MODELS
    }
    assert len(answers) > 2  # the tasks tell models and questions apart
    notes = " ".join(report["notes"])
    assert "own_long: " in notes and "own_long_answers: " in notes and "own_bare" not in notes


@pytest.mark.parametrize("page", ["evaluate.md", "evaluate.ko.md"])
def test_the_task_of_the_page_runs(
    place: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text("utf-8")
    part = text[text.index("`capitals.yaml`:") :]
    blocks = re.findall(r"^```\w*\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    Path("capitals.yaml").write_text(blocks[0], encoding="utf-8")
    Path("capitals.jsonl").write_text(blocks[1], encoding="utf-8")
    _, verb, _, *words = blocks[2].split()
    run = place / "plain-run"
    done = command(run, verb, str(run), *words)
    assert done.status == 0, done.err
    report = json.loads((run / "eval.json").read_text("utf-8"))
    assert [entry["name"] for entry in report["scores"]] == ["capitals"]
    assert len(report["tasks"]["capitals"]["items"]) == 2


def test_a_name_that_no_task_has_is_refused_with_the_nearest_one(place: Path, tmp_path: Path) -> None:
    """Among the harness's own thousands, which are read only for a name that the folder does not have."""
    run = place / "plain-run"
    words = ["--include_path", str(place / "tasks"), "--output", str(tmp_path / "eval.json")]
    done = command(run, "eval", str(run), "--tasks", "own_optoins,kmmlu_biologi", *words)
    assert done.status == 2
    assert 'did you mean "own_options"?' in done.err and 'did you mean "kmmlu_biology"?' in done.err
