"""A run that resumes in another environment reports it, and what that means for the result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import articles, model_folder, sft, trained, write_jsonl
from yeonma.run_folder.environment import environment, environment_change
from yeonma.train import run


def test_what_is_as_it_was_is_not_told() -> None:
    here = environment(1, torch.device("cpu"))
    assert environment_change(here, here, dropout=True) is None
    assert environment_change({}, here, dropout=True) is None  # a checkpoint without a record of it
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
            run, "environment", lambda count, device: {**environment(count, device), "processes": 4}
        )
        patch.setattr(run.folder, "install", _killed)
        assert sft(tmp_path / "out", base, data, **settings).status == 130
    done = trained(tmp_path / "out", base, data, **settings)
    equal = (
        "every step has the same rows, but the result equals that of an uninterrupted run only to rounding"
    )
    noise = "; dropout draws other numbers" if dropout else ""
    assert f"processes was 4 and is now 1: {equal}{noise}\n" in done.out


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("then", [True, False])
def test_a_run_with_compiled_kernels_goes_on_to_the_same_bytes_and_without_them_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: bool
) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    settings: dict[str, object] = {"save_steps": 1, "batch_size": 4, "torch_compile": True}
    whole = trained(tmp_path / "whole", base, data, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(run.folder, "install", _killed)
        assert sft(tmp_path / "out", base, data, **settings, max_steps=3).status == 130
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")  # as if killed a step before
    done = trained(tmp_path / "out", base, data, **{**settings, "torch_compile": then}, max_steps=3)
    assert "continuing after step 2" in done.out
    assert ("kernels was compiled and is now plain" in done.out) is not then
    for name, weight in whole.weights.items():
        actual = done.weights[name]
        assert torch.equal(actual, weight) if then else torch.allclose(actual, weight, atol=1e-5)


def test_a_compiler_that_is_not_there_is_told_before_weights_are_loaded(tmp_path: Path) -> None:
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


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
