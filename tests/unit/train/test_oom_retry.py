"""A step that runs out of memory is repeated in smaller parts, with the same result. The tests inject the errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pairs import chat_folder, labelled, pairs, tuned
from tests.runs import Done, articles, model_folder, sft, trained, write_jsonl
from yeonma.train import loop, reference
from yeonma.train import step as step_module
from yeonma.train.oom_retry import MicroBatchLimit, _is_out_of_memory

Fails = Callable[[int, int], bool]
DROPOUT: dict[str, object] = {"lora_dropout": 0.1, "save_steps": 1, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(24))


def out_of_memory(text: str = "CUDA out of memory. Tried to allocate 2.00 GiB.") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(text)


def fail_passes(
    monkeypatch: pytest.MonkeyPatch, module: Any, fails: Fails, error: Callable[[], Exception]
) -> list[int]:
    """Makes forward passes fail if `fails(number of the pass, examples)`. Returns the list of failed ones."""
    compute, passes, failed = module.pass_logprobs, [0], []

    def limited(model: Any, support: Any, micro_pass: Any, *others: Any) -> torch.Tensor:
        passes[0] += 1
        if fails(passes[0], len(micro_pass.batch)):
            failed.append(passes[0])
            raise error()
        return compute(model, support, micro_pass, *others)

    monkeypatch.setattr(module, "pass_logprobs", limited)
    return failed


def assert_same_result(one: Done, other: Done) -> None:
    """Asserts that losses and weights are equal up to rounding."""
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory,
        MemoryError,
        lambda: RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
    ids=["device", "python", "cpu"],
)
def test_step_out_of_memory_is_repeated_in_halves(
    tmp_path: Path,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Callable[[], Exception],
) -> None:
    undisturbed = trained(tmp_path / "whole", base, data, batch_size=8, micro_batch_size=4)
    # Fails from pass 4 on, the second of step 2: the gradients of its first pass must be discarded.
    failed = fail_passes(
        monkeypatch, step_module, lambda number, examples: number >= 4 and examples > 1, error
    )
    done = trained(tmp_path / "out", base, data, batch_size=8, micro_batch_size=4)
    assert failed == [4, 5]  # pass 4 with 4 examples, then pass 5 with 2, the first of the repeated step
    assert_same_result(done, undisturbed)
    lines = [line for line in done.err.splitlines() if "out of memory" in line]
    assert lines == [
        "yeonma: out of memory with 4 at once; continuing with 2, the same result to rounding",
        "yeonma: out of memory with 2 at once; continuing with 1, the same result to rounding",
    ]


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "simpo"])
def test_preference_training_and_reference_retry_out_of_memory_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    base = chat_folder(tmp_path / "base")
    rows = labelled(16) if loss == "kto" else pairs(16)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    settings: dict[str, object] = {"loss": loss, "val_set_size": 4, "batch_size": 6, "micro_batch_size": 3}
    undisturbed = tuned(tmp_path / "whole", base, data, cache_dir=tmp_path / "cache", **settings)
    failed = [
        fail_passes(monkeypatch, module, lambda number, examples: examples > 2, out_of_memory)
        for module in (step_module, reference)
    ]
    done = tuned(tmp_path / "out", base, data, cache_dir=tmp_path / "other", **settings)
    assert failed[0]
    assert bool(failed[1]) == (loss != "simpo")
    assert_same_result(done, undisturbed)
    assert [line["loss"] for line in done.looks] == pytest.approx(
        [line["loss"] for line in undisturbed.looks], rel=1e-5
    )


def test_resume_restores_the_reduced_micro_batch_size(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after step 3. The dropout masks depend on the micro-batches."""

    def run(output: Path, interrupted_at: int | None) -> Done:
        with monkeypatch.context() as patch:
            failed = fail_passes(
                patch, step_module, lambda number, examples: number >= 2 and examples > 2, out_of_memory
            )
            if interrupted_at is not None:
                step = loop.train_step

                def interrupted_step(state: Any, *others: Any) -> Any:
                    if state.scheduler.last_epoch == interrupted_at:
                        raise KeyboardInterrupt
                    return step(state, *others)

                patch.setattr(loop, "train_step", interrupted_step)
            done = sft(output, base, data, **DROPOUT)
            assert failed == [2]
        return done

    uninterrupted = run(tmp_path / "whole", None)
    assert uninterrupted.status == 0
    assert run(tmp_path / "out", 3).status == 130
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "state.json").read_text())
    assert state["micro_batches"] == [4, 2]
    shutil.copytree(tmp_path / "out", tmp_path / "asked")
    with monkeypatch.context() as patch:
        restored: list[int] = []
        patch.setattr(MicroBatchLimit, "restore", lambda limit, most: restored.append(most))
        trained(tmp_path / "asked", base, data, **{**DROPOUT, "micro_batch_size": 3})
        assert restored == []  # a newly given micro_batch_size takes precedence
    resumed = trained(tmp_path / "out", base, data, **DROPOUT)  # nothing fails here
    assert resumed.losses == uninterrupted.losses
    assert resumed.weight_bytes == uninterrupted.weight_bytes
    without_errors = trained(tmp_path / "plain", base, data, **DROPOUT)
    assert without_errors.losses != uninterrupted.losses


def test_out_of_memory_with_one_row_names_the_longest_rows(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_passes(monkeypatch, step_module, lambda number, examples: number >= 3, out_of_memory)
    done = sft(tmp_path / "out", base, data, save_steps=1)
    assert done.status == 2
    line = done.err.splitlines()[-1]
    assert "out of memory on cpu with one row at a time; the longest of the step" in line
    assert "tokens)" in line
    assert "--gradient_checkpointing true, a smaller --cutoff_len or --dtype bfloat16" in line
    rows = json.loads((tmp_path / "out" / "trained_rows.jsonl").read_text().splitlines()[0])
    assert rows["step"] == 1
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_other_errors_do_not_count_as_out_of_memory() -> None:
    assert not _is_out_of_memory(RuntimeError("shape mismatch"))
    assert not _is_out_of_memory(ValueError("out of memory"))
