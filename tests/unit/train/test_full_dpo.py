"""Full fine-tuning on preferences: the reference is the base, computed before its weights are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pairs import dpo, labelled, pairs, tuned
from tests.runs import left_behind, model_folder, trained, write_jsonl
from tests.unit.train.test_full import FULL, stops
from yeonma.batch.plan import epoch_order
from yeonma.train import loop, reference

ROWS = pairs(21)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def answer_logprob(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """Computed with transformers alone."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer_ids)[:, None]).sum()


def test_steps_equal_the_dpo_formula(tmp_path: Path, base: Path, data: Path) -> None:
    done = tuned(tmp_path / "out", base, data, **FULL, batch_size=5, max_steps=3, save_steps=1, beta=0.3)
    assert done.steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert done.steps[0]["reward_margin"] == done.steps[0]["reward_chosen"] == 0
    before, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    order = epoch_order(21, 42, 0, 5)
    for step in (2, 3):
        policy = AutoModelForCausalLM.from_pretrained(done.folder / f"checkpoint-{step - 1}")
        losses, margins = [], []
        with torch.no_grad():
            for unit in order[5 * (step - 1) : 5 * step]:
                row = ROWS[unit]
                chosen, rejected = (
                    0.3
                    * (
                        answer_logprob(policy, tokenizer, row["prompt"], row[name])
                        - answer_logprob(before, tokenizer, row["prompt"], row[name])
                    )
                    for name in ("chosen", "rejected")
                )
                margins.append(float(chosen - rejected))
                losses.append(-float(torch.nn.functional.logsigmoid(chosen - rejected)))
        assert done.steps[step - 1]["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert done.steps[step - 1]["reward_margin"] == pytest.approx(np.mean(margins), abs=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_an_interrupted_run_keeps_its_reference(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Also where there is no cache of it, and where the loss measures it anew in every step."""
    rows = data if loss == "sigmoid" else write_jsonl(tmp_path / "labelled.jsonl", labelled(21))
    settings = {**FULL, "loss": loss, "save_steps": 2, "val_set_size": 4, "dtype": "bfloat16"}
    whole = tuned(tmp_path / "whole/out", base, rows, **settings, cache_dir=tmp_path / "cache")
    assert whole.looks[0]["reward_margin"] == 0 if loss == "sigmoid" else whole.steps
    output = tmp_path / "again/out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stops(loop.train_step, 4))
        assert dpo(output, base, rows, **settings, cache_dir=tmp_path / "cache").status == 130
    for path in (tmp_path / "cache").glob("*.reference"):
        path.unlink()
    resumed = tuned(output, base, rows, **settings, cache_dir=tmp_path / "cache")
    assert left_behind(resumed.folder) == left_behind(whole.folder)


def test_without_a_reference_none_is_computed(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "reference_logprobs", None)
    assert len(tuned(tmp_path / "out", base, data, **FULL, loss="simpo", max_steps=2).steps) == 2


def test_whole_texts(tmp_path: Path, base: Path) -> None:
    rows = [{"text": f"{row['prompt']}{row['chosen']}"} for row in ROWS]
    data = write_jsonl(tmp_path / "texts.jsonl", rows)
    done = trained(tmp_path / "out", base, data, **FULL, template="text", num_epochs=3, card_rows=2)
    assert done.losses[-1] < done.losses[0]
