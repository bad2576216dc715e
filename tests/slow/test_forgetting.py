"""Runs on SmolLM2-135M-Instruct that forget, and do not: a card warns of the first alone, and replayed rows keep more.

The model comes from the hub or from PyPI; docs/evaluate.md has the numbers of longer runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Done, command, write_jsonl
from yeonma.errors import UserError
from yeonma.model.smollm2 import fetch

ASK = "[user]\n{prompt}\n[assistant]\n{completion}"
PROMPTS = (
    "Why do leaves turn red in autumn?",
    "How do I boil an egg?",
    "What is the difference between weather and climate?",
    "Write a short thank-you note to a teacher.",
    "Explain how rain forms.",
    "Give me five ideas for a birthday present.",
    "Describe spring in three sentences.",
    "How many continents are there?",
)
TITLES = ["--data_path", "sample:news_en", "--max_rows", "48", "--template", "sample:title_en"]


@pytest.fixture(scope="module")
def smollm2() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE", raising=False)  # the default cache may hold the model
        try:
            return fetch(print)
        except UserError as error:
            pytest.skip(f"SmolLM2 is not here, and cannot be fetched: {error}")


def sft(base: str, output: Path, *words: str) -> Done:
    short = ["--num_epochs", "2", "--card_rows", "1", "--output_dir", str(output)]
    done = command(output, "sft", "--base_model", base, *TITLES, *short, *words)
    assert done.status == 0, done.err
    return done


def share_of(done: Done) -> float:
    return float(done.out.partition("the trained model keeps ")[2].partition("%")[0])


@pytest.mark.slow
def test_a_run_that_forgets_is_named_and_replayed_rows_keep_more(smollm2: str, tmp_path: Path) -> None:
    forgetful = sft(smollm2, tmp_path / "forgetful", "--learning_rate", "5e-3")
    mild = sft(smollm2, tmp_path / "mild", "--learning_rate", "1e-4")
    for done, is_lost in ((forgetful, True), (mild, False)):
        assert ("This is a loss of general abilities." in done.out) is is_lost
        assert (
            "--replay" in (done.folder / "README.md").read_text("utf-8").partition("## Template")[0]
        ) is is_lost
        assert "General questions (Korean): the base answers them by chance" in done.out
    assert share_of(forgetful) < 90 < share_of(mild)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (tmp_path / "ask.txt").write_text(ASK, encoding="utf-8")
    replay = _answered_by(smollm2, prompts, tmp_path)
    entry = json.dumps({"path": str(replay), "template": str(tmp_path / "ask.txt")})
    words = ["--learning_rate", "5e-3", "--replay", entry, "--replay_share", "0.25"]
    replayed = sft(smollm2, tmp_path / "replayed", *words)
    assert share_of(replayed) > share_of(forgetful)


def _answered_by(base: str, prompts: Path, folder: Path) -> Path:
    """The base's own answers as rows, by the recipe of docs/evaluate.md."""
    report = folder / "base_answers"
    words = ["--models", base, "--data_path", str(prompts), "--template", str(folder / "ask.txt")]
    done = command(report, "compare", *words, "--max_new_tokens", "48", "--output_dir", str(report))
    assert done.status == 0, done.err
    rows: list[dict[str, Any]] = json.loads((report / "report.json").read_text("utf-8"))["rows"]
    pairs = zip(PROMPTS, rows, strict=True)
    texts = [{"prompt": prompt, "completion": row["answers"][0]["text"]} for prompt, row in pairs]
    return write_jsonl(folder / "replay.jsonl", texts)
