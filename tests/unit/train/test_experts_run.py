"""Whole runs on a mixture of experts: what has an adapter is said, trained alike in any micro-batch, and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import VOCABULARY
from tests.runs import TEMPLATE, articles, characters, command, read_lines, trained, write_jsonl
from tests.unit.model.test_targets import MIXTURES, SMALL

EVERY = "attention 2/2, dense MLP 1/1, shared experts 1/1, routed experts 1/1, router 0/1"
NONE_ROUTED = "attention 2/2, dense MLP 1/1, shared experts 1/1, routed experts 0/1, router 0/1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek's layers: the first with a dense MLP, the second with shared and routed experts."""
    place = tmp_path_factory.mktemp("experts") / "base"
    torch.manual_seed(0)
    sizes = {**SMALL, **MIXTURES["deepseek_v3"], "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **sizes)).save_pretrained(place)
    characters().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", articles(12))


def test_adapter_on_all_parts_is_trained_alike_in_any_micro_batch_and_merged(
    tmp_path: Path, base: Path, data: Path
) -> None:
    settings = {"max_steps": 3, "learning_rate": 0.05}
    one = trained(tmp_path / "one", base, data, micro_batch_size=1, **settings)
    four = trained(tmp_path / "four", base, data, micro_batch_size=4, card_rows=2, **settings)
    losses = [[line["loss"] for line in read_lines(done.folder)] for done in (one, four)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for done in (one, four):
        assert f"adapter on {EVERY}" in done.out
    assert (
        f"Rank 4, alpha 8, dropout 0. The adapter is on {EVERY}." in (four.folder / "README.md").read_text()
    )
    merged = command(tmp_path, "merge", str(four.folder), "--output_dir", str(tmp_path / "merged"))
    assert merged.status == 0, merged.out + merged.err
    asked = [str(four.folder), "--data_path", str(data), "--limit", "4", "--max_new_tokens", "8"]
    answers = []
    for folder in (four.folder, tmp_path / "merged"):
        file = tmp_path / f"{folder.name}.jsonl"
        done = command(tmp_path, "generate", str(folder), *asked[1:], "--output", str(file))
        assert done.status == 0, done.err
        answers.append([json.loads(line)["answer"] for line in file.read_text().splitlines()])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("experts", "expected"), [("true", EVERY), ("false", NONE_ROUTED)])
def test_inspect_says_what_has_an_adapter(
    tmp_path: Path, base: Path, data: Path, experts: str, expected: str
) -> None:
    words = ["--base_model", str(base), "--data_path", str(data), "--template", TEMPLATE, "--rows", "none"]
    words += ["--lora_experts", experts]
    page = tmp_path / "page.html"
    shown = command(tmp_path, "inspect", *words, "--html", str(page))
    assert shown.status == 0, shown.err
    assert f"adapter on: {expected}" in shown.out
    assert expected in page.read_text()
    told = command(tmp_path, "inspect", *words, "--json")
    parts = json.loads(told.out.splitlines()[-1])["adapter"]["parts"]
    assert ", ".join(f"{one['part']} {one['reached']}/{one['blocks']}" for one in parts) == expected
