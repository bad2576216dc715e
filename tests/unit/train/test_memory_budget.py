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
from yeonma.model import load
from yeonma.model.memory_trace import trace
from yeonma.policy import blueprint
from yeonma.train import memory_budget as budget
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
from yeonma.train.prepare import Prepared, lora_shape, prepare

AUTO: dict[str, object] = {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto", "batch_size": 8}
PLENTY = 10**12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(24))


class Case:
    """Prepared settings, the memory that they need, and what is chosen for some amount of free memory."""

    def __init__(self, base: Path, data: Path, **changed: object) -> None:
        settings = {"base_model": base, "data_path": data, "output_dir": "nowhere", **SETTINGS, **changed}
        self.config = config_from_keywords(RunConfig, settings, groups=TRAINING).config
        self.source = load.find_base(str(base))
        self.prepared: Prepared = prepare(self.config, self.source, None, lambda _: None)
        self.said: list[str] = []

    def chosen(self, free: float, **more: Any) -> tuple[Any, Any]:
        group = Processes(0, 1)
        resolved = resolve_auto(
            self.config, self.source, self.prepared, group, self.said.append, free=round(free), **more
        )
        return resolved.model.gradient_checkpointing, resolved.step

    def free_for(self, way: Any, micro: MicroBatchBounds) -> float:
        """The free memory in bytes that these micro-batches need."""
        lora = lora_shape(self.config.lora)
        drawn = blueprint(self.prepared.config, torch.float32, lora, gradient_checkpointing=way)
        batches = survey_micro_batches(self.prepared.plan, self.prepared.dataset.train.store, micro, 1)
        peak = trace(drawn, batches.heaviest, has_gradients=batches.several).peak
        return (peak + drawn.weight_bytes + 3 * drawn.trained_bytes) / MEMORY_SHARE["cpu"]


def test_budgets_go_down_by_about_a_quarter_to_the_longest_row() -> None:
    assert list(token_budgets(1000, 300)) == [1000, 750, 500, 375, 300]
    assert list(token_budgets(200, 300)) == [300]
    assert list(token_budgets(300, 300)) == [300]


def test_tokens_are_what_free_memory_holds(base: Path, data: Path) -> None:
    case = Case(base, data, micro_batch_tokens="auto", batch_size=8)
    plan = case.prepared.plan
    whole, longest = sum(sorted(plan.lengths.tolist())[-8:]), int(plan.lengths.max())
    way, step = case.chosen(PLENTY)
    assert way is False and micro_batching(step) == MicroBatchBounds(8, whole, True)
    assert f"at most {whole:,} tokens at once; activations are kept" in case.said[-1]
    needs = {n: case.free_for(False, MicroBatchBounds(8, n, True)) for n in token_budgets(whole, longest)}
    budgets_found = [case.chosen(free + 2)[1].micro_batch_tokens for free in needs.values()]
    # a long row alone may take more than several short ones of more tokens
    assert budgets_found == [max(n for n, need in needs.items() if need <= free) for free in needs.values()]
    assert len(set(budgets_found)) > 3
    assert case.chosen(1)[1].micro_batch_tokens == longest  # the trial will tell


def test_more_tokens_than_bring_speed_are_not_taken(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(base, data, micro_batch_tokens="auto", batch_size=8)
    longest = int(case.prepared.plan.lengths.max())
    monkeypatch.setitem(budget.MAX_TOKENS, "cpu", longest + 40)
    assert case.chosen(PLENTY)[1].micro_batch_tokens == longest + 40
    monkeypatch.setitem(budget.MAX_TOKENS, "cpu", 10)
    assert case.chosen(PLENTY)[1].micro_batch_tokens == longest


@pytest.mark.parametrize("tokens", [None, "auto"])
def test_activations_are_kept_where_there_is_room(
    tmp_path: Path, base: Path, data: Path, tokens: object
) -> None:
    deeper = shutil.copytree(base, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text("utf-8"))
    config |= {"num_hidden_layers": 4}  # of two layers, the last is as large computed again as kept
    config.pop("layer_types", None)
    (deeper / "config.json").write_text(json.dumps(config), "utf-8")
    case = Case(deeper, data, micro_batch_size=4, **{**AUTO, "micro_batch_tokens": tokens})
    micro = MicroBatchBounds(4, None, True) if tokens is None else micro_batching(case.chosen(PLENTY)[1])
    needs = [case.free_for(way, micro) for way in CHECKPOINTING_LEVELS]
    assert needs[0] > needs[1] > needs[2]
    assert [case.chosen(need + 2)[0] for need in needs] == list(CHECKPOINTING_LEVELS)
    assert case.chosen(1)[0] is True
    assert [("kept" in said, "every other" in said) for said in case.said[-4:]] == [
        (True, False), (False, True), (False, False), (False, False),
    ]  # fmt: skip


def test_a_quantised_base_leaves_more_room(base: Path, data: Path) -> None:
    free = Case(base, data).free_for(False, MicroBatchBounds(4, None, True))
    whole, packed = (
        Case(base, data, gradient_checkpointing="auto", micro_batch_size=4, quantization=quantization).chosen(
            free - 1000
        )
        for quantization in ("none", "fp8")
    )
    assert (whole[0], packed[0]) == ("selective", False)


def test_what_is_not_auto_stays_and_what_a_checkpoint_had_is_kept(base: Path, data: Path) -> None:
    plain = Case(base, data)
    assert resolve_auto(plain.config, plain.source, plain.prepared, Processes(0, 1), print) is plain.config
    case = Case(base, data, gradient_checkpointing="selective", micro_batch_tokens="auto")
    assert case.chosen(PLENTY)[0] == "selective"
    assert case.chosen(PLENTY, earlier_tokens=77)[1].micro_batch_tokens == 77
    assert case.chosen(1, earlier_tokens=77)[1].micro_batch_tokens == 77


def test_where_free_memory_is_not_known_it_is_an_error(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: None)
    case = Case(base, data, micro_batch_tokens="auto")
    with pytest.raises(UserError, match="how much memory is free is not known on this system"):
        resolve_auto(case.config, case.source, case.prepared, Processes(0, 1), print)


def test_free_memory_is_the_systems_and_a_containers_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None and free > 1e6
    assert budget._cgroup_free_bytes(tmp_path) == []
    for name, text in (("memory.max", "max\n"), ("memory.current", "5000\n")):
        (tmp_path / name).write_text(text)
    assert budget._cgroup_free_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("9000\n")
    assert budget._cgroup_free_bytes(tmp_path) == [4000]


# Runs


def state(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return dict(json.loads((newest / "state.json").read_text()))


def same(one: Done, other: Done) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-4, atol=1e-5)


def test_a_run_chooses_for_itself_and_its_result_is_the_same(tmp_path: Path, base: Path, data: Path) -> None:
    plain = trained(tmp_path / "plain", base, data, batch_size=8, micro_batch_size=1)
    auto = trained(tmp_path / "auto", base, data, micro_batch_size=1, **AUTO)
    same(auto, plain)
    assert "GB free: at most" in auto.out and "activations are kept" in auto.out
    (tokens,) = state(tmp_path / "auto")["micro_batch_tokens"]
    assert f"at most {tokens:,} tokens at once" in auto.out
    assert state(tmp_path / "plain")["micro_batch_tokens"] == []
    assert "micro_batch_tokens: auto" in (tmp_path / "auto" / "settings.yaml").read_text()
    assert "gradient_checkpointing: auto" in (tmp_path / "auto" / "settings.yaml").read_text()


def test_a_run_that_goes_on_keeps_what_it_had_though_other_memory_is_free(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Case(base, data, **AUTO)
    few = micro_batching(small.chosen(1)[1])
    settings = {**AUTO, "save_steps": 1, "lora_dropout": 0.1}

    def run(place: Path, free: float, **more: object) -> Done:
        monkeypatch.setattr(budget, "free_memory", lambda device: round(free))
        return trained(place, base, data, **settings, **more)

    little = small.free_for(True, few) + 2
    whole = run(tmp_path / "whole", little)
    assert state(tmp_path / "whole")["micro_batch_tokens"] == [few.most_tokens]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "again" / name)
    run_json = json.loads((tmp_path / "again" / "run.json").read_text())
    (tmp_path / "again" / "run.json").write_text(json.dumps({**run_json, "finished": False}))
    again = run(tmp_path / "again", PLENTY)
    assert "continuing after step 1" in again.out
    assert again.weight_bytes == whole.weight_bytes
    assert state(tmp_path / "again")["micro_batch_tokens"] == [few.most_tokens]


def limited(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, tokens: int) -> list[int]:
    """Makes passes with more than `tokens` tokens run out of memory. Returns the list of all passes' tokens."""
    compute, seen = getattr(module, name), []

    def passing(*given: Any, **more: Any) -> Any:
        if name == "trained_logprobs":
            seen.append(len(given[1].token_ids_T))
        else:
            seen.append(int(given[2].batch.lengths_E.sum()))
        if seen[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(*given, **more)

    monkeypatch.setattr(module, name, passing)
    return seen


def test_what_the_trial_has_no_room_for_is_halved_before_the_first_step(
    tmp_path: Path,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = trained(tmp_path / "plain", base, data, batch_size=8, share_prefix=False)
    longest = int(Case(base, data).prepared.plan.lengths.max())
    seen = limited(monkeypatch, budget, "trained_logprobs", 2 * longest)
    done = trained(tmp_path / "auto", base, data, share_prefix=False, **AUTO)
    same(done, plain)
    assert seen[0] > 2 * longest >= seen[-1]
    (tokens,) = state(tmp_path / "auto")["micro_batch_tokens"]
    assert longest <= tokens < seen[0]
    assert "tokens at once; continuing with" in done.err


def test_a_step_without_room_halves_the_tokens(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(tmp_path / "plain", base, data, batch_size=8, share_prefix=False)
    longest = int(Case(base, data).prepared.plan.lengths.max())
    seen = limited(monkeypatch, step_module, "pass_logprobs", 2 * longest)
    done = trained(tmp_path / "auto", base, data, share_prefix=False, **AUTO)
    same(done, plain)
    assert max(seen) > 2 * longest and "out of memory with" in done.err
    (tokens,) = state(tmp_path / "auto")["micro_batch_tokens"]
    assert longest // 2 < tokens <= 2 * longest


def test_where_the_longest_row_has_no_room_nothing_is_written(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = int(Case(base, data).prepared.plan.lengths.max())
    limited(monkeypatch, budget, "trained_logprobs", longest - 1)
    done = sft(tmp_path / "out", base, data, **AUTO)
    assert done.status == 2
    assert f"({longest} tokens)" in done.err and "out of memory on cpu with one row at a time" in done.err
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_model_without_forests_takes_one_sequence_at_a_time(tmp_path: Path, data: Path) -> None:
    base = model_folder(tmp_path / "bloom", "bloom")
    done = trained(tmp_path / "auto", base, data, **{**AUTO, "max_steps": 2})
    plain = trained(tmp_path / "plain", base, data, batch_size=8, max_steps=2)
    same(done, plain)
    assert state(tmp_path / "auto")["micro_batch_tokens"] == []


def test_inspect_shows_what_the_run_would_choose(base: Path, data: Path) -> None:
    case = Case(base, data, **AUTO)
    _, step = case.chosen(PLENTY)
    words = {"base_model": base, "data_path": data, "rows": "none", **SETTINGS, **AUTO}
    done = command(
        base, "inspect", *[part for name, value in words.items() for part in (f"--{name}", str(value))]
    )
    assert done.status == 0, done.err
    assert f"at most {step.micro_batch_tokens:,} tokens at once; activations are kept" in done.err
    heaviest = survey_micro_batches(
        case.prepared.plan, case.prepared.dataset.train.store, micro_batching(step), 1
    )
    assert f"{len(heaviest.heaviest.token_ids_T):,} tokens" in done.out


def test_the_choice_of_the_process_with_least_room_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(group: Processes, mine: torch.Tensor) -> list[torch.Tensor]:
        others = [torch.tensor([2, 900]).view(torch.uint8), torch.tensor([0, 300]).view(torch.uint8)]
        return [mine, *others]

    monkeypatch.setattr(budget, "gather_bytes", gathered)
    assert budget._agree(replace(Processes(0, 3)), False, 500) == (True, 300)
