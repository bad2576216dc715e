"""`micro_batch_tokens auto` and `gradient_checkpointing auto`: chosen from free memory, tried, saved in checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import SETTINGS, Done, articles, command, model_folder, sft, trained, write_jsonl
from yeonma.batch.micro_batches import survey_micro_batches
from yeonma.batch.plan import MicroBatchBounds
from yeonma.config.parse import config_from_keywords
from yeonma.config.settings import TRAINING, RunConfig
from yeonma.errors import UserError
from yeonma.inspect.estimate import estimate
from yeonma.model import load, logprobs
from yeonma.platforms import cgroup_free_bytes
from yeonma.train import memory_budget as budget
from yeonma.train import memory_parts
from yeonma.train import step as step_module
from yeonma.train.distributed import Processes
from yeonma.train.memory_budget import (
    CHECKPOINTING_LEVELS,
    MEMORY_SHARE,
    free_memory,
    micro_batching,
    resolve_auto,
    token_budgets,
)
from yeonma.train.prepare import Prepared, prepare

AUTO: dict[str, object] = {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto", "batch_size": 8}
PLENTY = 10**12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(24))


class Case:
    """Prepared settings, the memory that they need, and the choices for an amount of free memory."""

    def __init__(self, base: Path, data: Path, **changed: object) -> None:
        settings = {"base_model": base, "data_path": data, "output_dir": "nowhere", **SETTINGS, **changed}
        self.config = config_from_keywords(RunConfig, settings, groups=TRAINING).config
        self.source = load.find_base(str(base))
        self.prepared: Prepared = prepare(self.config, self.source, None, lambda _: None)
        self.messages: list[str] = []

    def choose(self, free: float, **more: Any) -> tuple[Any, Any]:
        group = Processes(0, 1)
        resolved = resolve_auto(
            self.config, self.source, self.prepared, group, self.messages.append, free=round(free), **more
        )
        return resolved.model.gradient_checkpointing, resolved.step

    def required_bytes(self, level: Any, bounds: MicroBatchBounds) -> float:
        """The free memory in bytes that these micro-batches need, by the forecast of `inspect`."""
        model = replace(self.config.model, gradient_checkpointing=level)
        micro = {"micro_batch_size": bounds.most_examples, "micro_batch_tokens": bounds.most_tokens}
        config = replace(self.config, model=model, step=replace(self.config.step, **micro))
        memory = estimate(config, self.source, self.prepared, with_alternatives=False).memory
        return (memory.training - memory.process) / MEMORY_SHARE["cpu"]


def test_token_budgets_shrink_by_a_quarter_down_to_the_longest_row() -> None:
    assert list(token_budgets(1000, 300)) == [1000, 750, 500, 375, 300]
    assert list(token_budgets(200, 300)) == [300]
    assert list(token_budgets(300, 300)) == [300]


def test_token_budget_is_the_largest_that_fits_free_memory(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_parts, "has_onednn", lambda: False)  # its routines outweigh a tiny model
    case = Case(base, data, micro_batch_tokens="auto", batch_size=8)
    plan = case.prepared.plan
    step_tokens, longest = sum(sorted(plan.lengths.tolist())[-8:]), int(plan.lengths.max())
    level, step = case.choose(PLENTY)
    assert level is False and micro_batching(step) == MicroBatchBounds(8, step_tokens, True)
    assert f"at most {step_tokens:,} tokens at once; activations are kept" in case.messages[-1]
    required = {
        tokens: case.required_bytes(False, MicroBatchBounds(8, tokens, True))
        for tokens in token_budgets(step_tokens, longest)
    }
    chosen_budgets = [case.choose(free + 2)[1].micro_batch_tokens for free in required.values()]
    # a long row alone may take more than several short ones of more tokens
    assert chosen_budgets == [
        max(tokens for tokens, required_free in required.items() if required_free <= free)
        for free in required.values()
    ]
    assert len(set(chosen_budgets)) > 3
    assert case.choose(1)[1].micro_batch_tokens == longest  # the trial decides


def test_token_budget_is_capped_at_max_tokens(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(base, data, micro_batch_tokens="auto", batch_size=8)
    longest = int(case.prepared.plan.lengths.max())
    monkeypatch.setitem(budget.MAX_TOKENS, "cpu", longest + 40)
    assert case.choose(PLENTY)[1].micro_batch_tokens == longest + 40
    monkeypatch.setitem(budget.MAX_TOKENS, "cpu", 10)
    assert case.choose(PLENTY)[1].micro_batch_tokens == longest


@pytest.mark.parametrize("tokens", [None, pytest.param("auto", marks=pytest.mark.slow)])
def test_checkpointing_level_depends_on_free_memory(
    tmp_path: Path, base: Path, data: Path, tokens: object
) -> None:
    deeper = shutil.copytree(base, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text("utf-8"))
    # With two layers, recomputing the last one takes as much memory as keeping it.
    config |= {"num_hidden_layers": 4}
    config.pop("layer_types", None)
    (deeper / "config.json").write_text(json.dumps(config), "utf-8")
    case = Case(deeper, data, micro_batch_size=4, **{**AUTO, "micro_batch_tokens": tokens})
    bounds = MicroBatchBounds(4, None, True) if tokens is None else micro_batching(case.choose(PLENTY)[1])
    required = [case.required_bytes(level, bounds) for level in CHECKPOINTING_LEVELS]
    assert required[0] > required[1] > required[2]
    assert [case.choose(free + 2)[0] for free in required] == list(CHECKPOINTING_LEVELS)
    assert case.choose(1)[0] is True
    assert [("kept" in message, "every other" in message) for message in case.messages[-4:]] == [
        (True, False), (False, True), (False, False), (False, False),
    ]  # fmt: skip


def test_quantised_base_leaves_memory_to_keep_activations(base: Path, data: Path) -> None:
    free = Case(base, data).required_bytes(False, MicroBatchBounds(4, None, True))
    unquantised, quantised = (
        Case(base, data, gradient_checkpointing="auto", micro_batch_size=4, quantization=quantization).choose(
            free - 1000
        )
        for quantization in ("none", "fp8")
    )
    assert (unquantised[0], quantised[0]) == ("selective", False)


def test_explicit_settings_and_the_budget_of_a_checkpoint_are_kept(base: Path, data: Path) -> None:
    plain = Case(base, data)
    assert resolve_auto(plain.config, plain.source, plain.prepared, Processes(0, 1), print) is plain.config
    case = Case(base, data, gradient_checkpointing="selective", micro_batch_tokens="auto")
    assert case.choose(PLENTY)[0] == "selective"
    assert case.choose(PLENTY, earlier_tokens=77)[1].micro_batch_tokens == 77
    assert case.choose(1, earlier_tokens=77)[1].micro_batch_tokens == 77


def test_unknown_free_memory_is_an_error(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: None)
    case = Case(base, data, micro_batch_tokens="auto")
    with pytest.raises(UserError, match="how much memory is free is not known on this system"):
        resolve_auto(case.config, case.source, case.prepared, Processes(0, 1), print)


def test_free_memory_is_read_from_the_system_and_the_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None and free > 1e6
    assert cgroup_free_bytes(tmp_path) == []
    for name, text in (("memory.max", "max\n"), ("memory.current", "5000\n")):
        (tmp_path / name).write_text(text)
    assert cgroup_free_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("9000\n")
    assert cgroup_free_bytes(tmp_path) == [4000]


# Runs


def newest_state(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return dict(json.loads((newest / "state.json").read_text()))


def assert_same_run(one: Done, other: Done) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-4, atol=1e-5)


def test_run_with_auto_equals_the_run_with_explicit_settings(tmp_path: Path, base: Path, data: Path) -> None:
    plain = trained(tmp_path / "plain", base, data, batch_size=8, micro_batch_size=1)
    auto = trained(tmp_path / "auto", base, data, micro_batch_size=1, **AUTO)
    assert_same_run(auto, plain)
    assert "GB free: at most" in auto.out and "activations are kept" in auto.out
    (tokens,) = newest_state(tmp_path / "auto")["micro_batch_tokens"]
    assert f"at most {tokens:,} tokens at once" in auto.out
    assert newest_state(tmp_path / "plain")["micro_batch_tokens"] == []
    assert "micro_batch_tokens: auto" in (tmp_path / "auto" / "settings.yaml").read_text()
    assert "gradient_checkpointing: auto" in (tmp_path / "auto" / "settings.yaml").read_text()


@pytest.mark.slow
def test_resumed_run_keeps_its_token_budget_although_more_memory_is_free(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_parts, "has_onednn", lambda: False)  # its routines outweigh a tiny model
    case = Case(base, data, **AUTO)
    smallest_bounds = micro_batching(case.choose(1)[1])
    settings = {**AUTO, "save_steps": 1, "lora_dropout": 0.1}

    def run(output: Path, free: float, **more: object) -> Done:
        monkeypatch.setattr(budget, "free_memory", lambda device: round(free))
        return trained(output, base, data, **settings, **more)

    little_memory = case.required_bytes(True, smallest_bounds) + 2
    whole = run(tmp_path / "whole", little_memory)
    assert newest_state(tmp_path / "whole")["micro_batch_tokens"] == [smallest_bounds.most_tokens]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "again" / name)
    run_json = json.loads((tmp_path / "again" / "run.json").read_text())
    (tmp_path / "again" / "run.json").write_text(json.dumps({**run_json, "finished": False}))
    resumed = run(tmp_path / "again", PLENTY)
    assert "continuing after step 1" in resumed.out
    assert resumed.weight_bytes == whole.weight_bytes
    assert newest_state(tmp_path / "again")["micro_batch_tokens"] == [smallest_bounds.most_tokens]


def limit_tokens_per_pass(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, tokens: int) -> list[int]:
    """Makes passes with more than `tokens` tokens run out of memory. Returns the list of all passes' tokens."""
    compute, pass_tokens = getattr(module, name), []

    def limited_pass(*args: Any, **options: Any) -> Any:
        if name == "trained_logprobs":
            pass_tokens.append(len(args[1].token_ids_T))
        else:
            pass_tokens.append(int(args[2].batch.lengths_E.sum()))
        if pass_tokens[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(*args, **options)

    monkeypatch.setattr(module, name, limited_pass)
    return pass_tokens


def test_budget_that_fails_the_trial_is_reduced_before_the_first_step(
    tmp_path: Path,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = trained(tmp_path / "plain", base, data, batch_size=8, share_prefix=False)
    longest = int(Case(base, data).prepared.plan.lengths.max())
    pass_tokens = limit_tokens_per_pass(monkeypatch, logprobs, "trained_logprobs", 2 * longest)
    done = trained(tmp_path / "auto", base, data, share_prefix=False, **AUTO)
    assert_same_run(done, plain)
    assert pass_tokens[0] > 2 * longest >= pass_tokens[-1]
    (tokens,) = newest_state(tmp_path / "auto")["micro_batch_tokens"]
    assert longest <= tokens < pass_tokens[0]
    assert "tokens at once; continuing with" in done.err


def test_out_of_memory_in_a_step_reduces_the_token_budget(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(tmp_path / "plain", base, data, batch_size=8, share_prefix=False)
    longest = int(Case(base, data).prepared.plan.lengths.max())
    pass_tokens = limit_tokens_per_pass(monkeypatch, step_module, "pass_logprobs", 2 * longest)
    done = trained(tmp_path / "auto", base, data, share_prefix=False, **AUTO)
    assert_same_run(done, plain)
    assert max(pass_tokens) > 2 * longest and "out of memory with" in done.err
    (tokens,) = newest_state(tmp_path / "auto")["micro_batch_tokens"]
    assert longest // 2 < tokens <= 2 * longest


def test_run_fails_before_writing_if_the_longest_row_does_not_fit(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = int(Case(base, data).prepared.plan.lengths.max())
    limit_tokens_per_pass(monkeypatch, logprobs, "trained_logprobs", longest - 1)
    done = sft(tmp_path / "out", base, data, **AUTO)
    assert done.status == 2
    assert f"({longest} tokens)" in done.err and "out of memory on cpu with one row at a time" in done.err
    assert not (tmp_path / "out" / "run.json").exists()


def test_model_without_forest_support_trains_without_a_token_budget(tmp_path: Path, data: Path) -> None:
    base = model_folder(tmp_path / "bloom", "bloom")
    done = trained(tmp_path / "auto", base, data, **{**AUTO, "max_steps": 2})
    plain = trained(tmp_path / "plain", base, data, batch_size=8, max_steps=2)
    assert_same_run(done, plain)
    assert newest_state(tmp_path / "auto")["micro_batch_tokens"] == []


def test_inspect_prints_the_budget_that_a_run_would_choose(base: Path, data: Path) -> None:
    case = Case(base, data, **AUTO)
    _, step = case.choose(PLENTY)
    words = {"base_model": base, "data_path": data, "rows": "none", **SETTINGS, **AUTO}
    done = command(
        base, "inspect", *[word for name, value in words.items() for word in (f"--{name}", str(value))]
    )
    assert done.status == 0, done.err
    assert f"at most {step.micro_batch_tokens:,} tokens at once; activations are kept" in done.err
    micro_batches = survey_micro_batches(
        case.prepared.plan, case.prepared.dataset.train.store, micro_batching(step), 1
    )
    assert f"{len(micro_batches.heaviest.token_ids_T):,} tokens" in done.out


def test_processes_agree_on_the_slowest_level_and_smallest_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_gather(group: Processes, own: torch.Tensor) -> list[torch.Tensor]:
        others = [torch.tensor([2, 900]).view(torch.uint8), torch.tensor([0, 300]).view(torch.uint8)]
        return [own, *others]

    monkeypatch.setattr(budget, "gather_bytes", fake_gather)
    assert budget._agree(replace(Processes(0, 3)), False, 500) == (True, 300)
