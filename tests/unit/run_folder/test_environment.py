"""A run that resumes in a changed environment reports the change and its effect on the result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.runs import articles, model_folder, sft, trained, write_jsonl
from yeonma.run_folder.environment import environment, environment_change
from yeonma.train import run


def test_unchanged_environment_is_not_reported() -> None:
    current = environment(1, torch.device("cpu"))
    assert environment_change(current, current, dropout=True) is None
    assert environment_change({}, current, dropout=True) is None  # a checkpoint that records none
    assert current["processes"] == 1
    assert current["torch"] == version("torch")


def test_a_changed_language_is_a_remark_about_the_card() -> None:
    now = environment(1, torch.device("cpu"))
    assert now["language"] == "en"
    before = {**now, "language": "ko"}
    remark = "the language was Korean and is now English: the card is written in the latter"
    assert environment_change(before, now, dropout=True) == remark
    change = environment_change({**before, "processes": 2}, now, dropout=False) or ""
    assert change.startswith("processes was 2 and is now 1: ") and change.endswith(f"; {remark}")
    without = {name: value for name, value in now.items() if name != "language"}
    assert environment_change(without, now, dropout=True) is None  # of an earlier version


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_changed_number_of_processes_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    settings: dict[str, object] = {"save_steps": 1, "lora_dropout": dropout}
    with monkeypatch.context() as patch:
        patch.setattr(
            run, "environment", lambda count, device: {**environment(count, device), "processes": 4}
        )
        patch.setattr(run.folder, "install", _interrupt)
        assert sft(tmp_path / "out", base, data, **settings).status == 130
    done = trained(tmp_path / "out", base, data, **settings)
    message = (
        "every step has the same rows, but the result equals that of an uninterrupted run only to rounding"
    )
    noise = "; dropout draws other numbers" if dropout else ""
    assert f"processes was 4 and is now 1: {message}{noise}\n" in done.out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("compiled_again", [True, False])
def test_compiled_run_resumes_exactly_and_reports_a_change_to_plain_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled_again: bool
) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    settings: dict[str, object] = {"save_steps": 1, "batch_size": 4, "torch_compile": True}
    uninterrupted = trained(tmp_path / "whole", base, data, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(run.folder, "install", _interrupt)
        assert sft(tmp_path / "out", base, data, **settings, max_steps=3).status == 130
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")  # as if it had been killed a step earlier
    done = trained(tmp_path / "out", base, data, **{**settings, "torch_compile": compiled_again}, max_steps=3)
    assert "continuing after step 2" in done.out
    assert ("kernels was compiled and is now plain" in done.out) is not compiled_again
    for name, weight in uninterrupted.weights.items():
        actual = done.weights[name]
        assert torch.equal(actual, weight) if compiled_again else torch.allclose(actual, weight, atol=1e-5)


@pytest.mark.slow
def test_missing_compiler_is_reported_before_weights_are_loaded(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    command = ["sft", f"--base_model={base}", f"--data_path={data}", f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "yeonma", *command, "--device=cpu", "--torch_compile=true"],
        env={
            **os.environ,
            "CXX": str(tmp_path / "none"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "PyTorch's compiler fails here" in done.stderr
    assert "--torch_compile false" in done.stderr
    assert "parameters trained" not in done.stdout + done.stderr


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
