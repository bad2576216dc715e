"""A run that goes on elsewhere says so, and what that means for its result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import articles, model_folder, sft, trained, write_jsonl
from yeonma.train import run
from yeonma.train.surroundings import moved, surroundings


def test_what_is_as_it_was_is_not_told() -> None:
    here = surroundings(1, torch.device("cpu"))
    assert moved(here, here, dropout=True) is None
    assert moved({}, here, dropout=True) is None  # a checkpoint that kept nothing of it
    assert here["processes"] == 1
    assert here["torch"] == torch.__version__


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_another_number_of_processes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    settings: dict[str, object] = {"save_steps": 1, "lora_dropout": dropout}
    with monkeypatch.context() as patch:
        patch.setattr(
            run, "surroundings", lambda count, device: {**surroundings(count, device), "processes": 4}
        )
        patch.setattr(run.folder, "install", _killed)
        assert sft(tmp_path / "out", base, data, **settings).status == 130
    done = trained(tmp_path / "out", base, data, **settings)
    equal = "the rows of the steps are the same, the result equals the uninterrupted run's only to rounding"
    noise = "; dropout draws other numbers" if dropout else ""
    assert f"processes was 4 and is now 1: {equal}{noise}\n" in done.out


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
