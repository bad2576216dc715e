"""Complete runs of `yeonma dpo`: same results for any micro-batch size and after interruptions, every data format."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import yeonma
from tests.losses import FEATURES, LOSS_SETTINGS, compares, rows_for
from tests.pairs import PLAIN, chat_folder, dpo, labelled, pairs, tuned
from tests.runs import Done, command, left_behind, model_folder, trained, write_jsonl
from yeonma.batch.plan import epoch_order
from yeonma.data.task import PAIRS
from yeonma.train import build as setup
from yeonma.train import loop, reference
from yeonma.train import step as step_module
from yeonma.train.preference_losses import LOSSES

ROWS = pairs(21)
SLOW = pytest.mark.slow
PAIR_LOSSES = [name for name, loss in LOSSES.items() if loss.task is PAIRS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def assert_same(one: Done, other: Done) -> None:
    for name in one.steps[0].keys() - {"seconds", "peak_memory_bytes", "reward_accuracy"}:
        for mine, theirs in zip(one.lines, other.lines, strict=True):
            values = [math.nan if line.get(name) is None else line[name] for line in (mine, theirs)]
            assert values[0] == pytest.approx(values[1], abs=1e-4, rel=1e-4, nan_ok=True), name
    for name, weight in one.weights.items():
        assert float((weight - other.weights[name]).abs().max()) < 1e-3, name


def answer_logprob(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[torch.Tensor, int]:
    """Computed with transformers alone."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer_ids)[:, None]).sum(), len(answer_ids)


# The formula


def test_first_steps_equal_the_dpo_formula(tmp_path: Path, base: Path, data: Path) -> None:
    done = tuned(tmp_path / "out", base, data, batch_size=5, max_steps=3, save_steps=1, beta=0.3)
    frozen, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    order = epoch_order(21, 42, 0, 5)
    for step in (2, 3):  # step 1 starts from an untrained adapter
        folder = done.folder / f"checkpoint-{step - 1}"
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        sums = dict.fromkeys(("loss", "reward_chosen", "reward_rejected", "reward_accuracy"), 0.0)
        counts = dict.fromkeys(
            ("logprob_chosen", "logprob_rejected", "tokens_chosen", "tokens_rejected"), 0.0
        )
        with torch.no_grad():
            for i in order[5 * (step - 1) : 5 * step]:
                rewards = {}
                for side in ("chosen", "rejected"):
                    text = ROWS[i][side]
                    ours, tokens = answer_logprob(policy, tokenizer, ROWS[i]["prompt"], text)
                    theirs, _ = answer_logprob(frozen, tokenizer, ROWS[i]["prompt"], text)
                    rewards[side] = 0.3 * float(ours - theirs)
                    counts[f"logprob_{side}"] += float(ours)
                    counts[f"tokens_{side}"] += tokens
                    sums[f"reward_{side}"] += rewards[side]
                margin = rewards["chosen"] - rewards["rejected"]
                sums["loss"] += math.log1p(math.exp(-margin))
                sums["reward_accuracy"] += margin > 0
        for name, value in {**sums, **counts}.items():
            assert done.steps[step - 1][name] == pytest.approx(value / 5, abs=2e-4), (step, name)
        margin = done.steps[step - 1]["reward_chosen"] - done.steps[step - 1]["reward_rejected"]
        assert done.steps[step - 1]["reward_margin"] == pytest.approx(margin, abs=1e-5)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """21 pairs in steps of 8, two epochs; the last step of each epoch has 5."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return tuned(folder, base, data, **STEPS, micro_batch_size=1, share_prefix=False)


STEPS: dict[str, object] = {"batch_size": 8, "num_epochs": 2, "val_data_path": None}


@pytest.mark.parametrize(
    "speed",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 8},
        {"micro_batch_size": 8, "micro_batch_tokens": 150},
        {"micro_batch_size": 3, "micro_batch_tokens": 1},
        {"micro_batch_size": 8, "share_prefix": False},
        {"micro_batch_size": 8, "gradient_checkpointing": True},
        {"micro_batch_size": 8, "gradient_checkpointing": "selective"},
        {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"},
    ],
)
def test_micro_batching_and_prefix_sharing_do_not_change_results(
    tmp_path: Path, base: Path, data: Path, one_by_one: Done, speed: dict[str, object]
) -> None:
    done = tuned(tmp_path / "out", base, data, **STEPS, **speed)
    assert [line["examples"] for line in done.steps] == [8, 8, 5] * 2
    assert_same(done, one_by_one)
    assert done.losses[-1] < done.losses[0] - 0.05  # it learns


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_results_without_forest_support_do_not_depend_on_micro_batch_size(
    tmp_path: Path, data: Path, family: str
) -> None:
    base = model_folder(tmp_path / "base", family)
    one, other = (
        tuned(tmp_path / str(size), base, data, max_steps=3, micro_batch_size=size) for size in (1, 4)
    )
    assert "one sequence at a time" in one.out
    assert_same(one, other)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_loss_learns_the_same_for_any_micro_batch_size_and_packing(
    tmp_path: Path, base: Path, feature: str
) -> None:
    settings: dict[str, object] = {
        "batch_size": 8,
        "max_steps": 4,
        "val_set_size": 5,
        "cache_dir": tmp_path / "cache",
        **FEATURES[feature],
    }
    data = rows_for(tmp_path, settings)
    alone = tuned(tmp_path / "one", base, data, **settings, micro_batch_size=1, share_prefix=False)
    packed = tuned(tmp_path / "packed", base, data, **settings, micro_batch_size=5, micro_batch_tokens=150)
    assert_same(alone, packed)
    assert alone.losses[-1] != alone.losses[0]
    first, before, after = alone.steps[0], alone.looks[0], alone.looks[-1]
    if "reward_margin" in before:
        assert after["reward_margin"] > before["reward_margin"]
    assert ("reference: " in alone.out) == compares(settings)
    assert ("every comparison a tie" in (alone.folder / "README.md").read_text("utf-8")) == compares(settings)
    if compares(settings):
        for line in (first, before, packed.steps[0], packed.looks[0]):
            rewards = [line[name] for name in line if name.startswith("reward_")]
            assert all(reward == 0 for reward in rewards), line
            assert line.get("reference_point", 0) == 0


WITH_STATE = ("kto", "bco", "aot_unpaired", "wpo", "sum of labels")
"""What a step reads besides its own pairs, first; the others are slow by their number."""


@pytest.mark.parametrize(
    "feature", [*WITH_STATE, *(pytest.param(name, marks=SLOW) for name in FEATURES if name not in WITH_STATE)]
)
def test_every_loss_resumes_to_identical_files(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    settings: dict[str, object] = {
        "batch_size": 5,
        "max_steps": 4,
        "save_steps": 2,
        "val_set_size": 5,
        "lora_dropout": 0.1,
        "cache_dir": tmp_path / "cache",
        **FEATURES[feature],
    }
    data = rows_for(tmp_path, settings)
    whole = tuned(tmp_path / "whole" / "out", base, data, **settings)
    train_step, calls = loop.train_step, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        assert dpo(tmp_path / "out", base, data, **settings).status == 130
    done = tuned(tmp_path / "out", base, data, **settings)
    assert "continuing after step 2 of 4" in done.out
    assert done.losses == whole.losses
    assert done.weight_bytes == whole.weight_bytes


def test_a_continued_adapter_with_dropout_differs_from_its_reference_in_the_first_step(
    tmp_path: Path, base: Path, data: Path
) -> None:
    first = tuned(tmp_path / "first", base, data, max_steps=2).folder
    plain, dropped = (
        tuned(tmp_path / name, base, data, adapter=first, max_steps=1, val_set_size=5, lora_dropout=dropout)
        for name, dropout in (("plain", 0.0), ("dropped", 0.5))
    )
    assert (plain.steps[0]["reward_margin"], plain.steps[0]["reward_accuracy"]) == (0, 0)
    assert "margin 0.00  accuracy 0.00" in plain.out
    assert dropped.steps[0]["reward_margin"] != 0
    assert (dropped.looks[0]["reward_margin"], dropped.looks[0]["loss"]) == (0, pytest.approx(math.log(2)))


def test_kto_measures_a_continued_adapter_against_its_start(tmp_path: Path, base: Path) -> None:
    """The reference point is that of the adapter given, before and after a resumed run has read its checkpoint."""
    data = write_jsonl(tmp_path / "rows.jsonl", labelled(21))
    first = tuned(tmp_path / "first", base, data, loss="kto", max_steps=3).folder
    settings: dict[str, object] = {"loss": "kto", "adapter": first, "batch_size": 21, "max_steps": 3}
    done = tuned(tmp_path / "out", base, data, **settings, save_steps=1)
    frozen, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    start = PeftModel.from_pretrained(frozen, first)
    rows = [labelled(21)[i] for i in epoch_order(21, 42, 1, 21)]

    def logprobs(model: Any) -> torch.Tensor:
        """Each prompt with the answer of the row before."""
        mixed = zip(rows, [rows[-1], *rows[:-1]], strict=True)
        return torch.stack(
            [answer_logprob(model, tokenizer, row["prompt"], other["completion"])[0] for row, other in mixed]
        )

    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), done.folder / "checkpoint-1"
    )
    assert done.steps[0]["reference_point"] == 0
    with torch.no_grad():
        ratio = (logprobs(policy) - logprobs(start)).mean().item()
    assert done.steps[1]["reference_point"] == pytest.approx(max(0.0, ratio), abs=1e-4)
    assert ratio != pytest.approx(0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_every_pair_loss_increases_the_reward_margin(
    tmp_path: Path, base: Path, data: Path, loss: str
) -> None:
    settings: dict[str, object] = {
        "cache_dir": tmp_path,
        "val_set_size": 6,
        "num_epochs": 3,
        **LOSS_SETTINGS.get(loss, {}),
    }
    done = tuned(tmp_path / "out", base, data, loss=loss, keep_best=False, **settings)
    margins = [evaluation["reward_margin"] for evaluation in done.looks]
    assert margins[-1] > margins[0], margins
    assert done.looks[-1]["loss"] < done.looks[0]["loss"]
    assert ("reference: " in done.out) == LOSSES[loss].needs_reference
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert ("every comparison a tie" in card) == LOSSES[loss].needs_reference


def test_kto_learns_the_same_for_any_micro_batch_size(tmp_path: Path, base: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", labelled(21))
    kto: dict[str, object] = {"loss": "kto", "batch_size": 5, "num_epochs": 3, "val_set_size": 0, "beta": 0.5}
    one, four, unshared = (
        tuned(tmp_path / name, base, data, **kto, **speed)
        for name, speed in (
            ("one", {"micro_batch_size": 1}),
            ("four", {"micro_batch_size": 4}),
            ("alone", {"micro_batch_size": 5, "share_prefix": False}),
        )
    )
    assert_same(four, one)
    assert_same(unshared, one)
    assert any(step["reference_point"] > 0 for step in one.steps)
    assert one.losses[-1] < one.losses[0] - 0.05
    (last,) = (step for step in one.steps[:5] if step["examples"] == 1)  # a step with a single row
    assert {last["desirable"], last["undesirable"]} == {0.0, 1.0}
    assert None in (last["reward_desirable"], last["reward_undesirable"])


@pytest.mark.parametrize(("loss", "said"), [("kto", True), ("aot", True), ("sigmoid", False)])
def test_a_step_of_one_row_is_said_if_the_loss_compares_rows(
    tmp_path: Path, base: Path, loss: str, said: bool
) -> None:
    data = rows_for(tmp_path, {"loss": loss})
    done = tuned(tmp_path / "out", base, data, loss=loss, batch_size=1, max_steps=2, val_set_size=0)
    assert ("compares the rows of a step; with --batch_size 1" in done.out) == said
    assert done.steps[1].get("reference_point", 0) == 0


def test_kto_card_shows_a_reference_answer_only_for_desirable_rows(tmp_path: Path, base: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", labelled(12))
    done = tuned(tmp_path / "out", base, data, loss="kto", val_set_size=6, card_rows=6, max_steps=2)
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    sections = card.partition("## Before and after")[2].partition("## Use")[0].split("### Row ")[1:]
    rows = {int(section.partition("\n")[0]): section for section in sections}
    assert len(rows) == 6
    assert {labelled(12)[number - 1]["label"] for number in rows} == {True, False}
    for number, section in rows.items():
        assert ("\nreference:\n" in section) == labelled(12)[number - 1]["label"]
    assert "on 6 labelled answers (" in card
    assert (
        "| validation | loss | reward accuracy | reward of desirable | reward of undesirable | step |" in card
    )


def test_saved_adapter_is_the_checkpoint_with_the_lowest_validation_loss(
    tmp_path: Path, base: Path, data: Path
) -> None:
    done = tuned(tmp_path / "out", base, data, val_set_size=8, max_steps=6, eval_steps=1, learning_rate=3e-2)
    best = min(done.looks[1:], key=lambda evaluation: evaluation["loss"])["step"]
    assert (
        done.weight_bytes == (done.folder / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    )
    assert "perplexity" not in done.looks[0]
    assert done.looks[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(
        f"reward_{what}" in evaluation
        for evaluation in done.looks
        for what in ("chosen", "rejected", "margin")
    )


# Resuming

RESUME_SETTINGS: dict[str, object] = {
    "num_epochs": 2,
    "save_steps": 2,
    "val_set_size": 5,
    "lora_dropout": 0.1,
    "card_rows": 1,
}


@pytest.mark.parametrize("keep_cache", [True, False])
def test_interrupted_run_resumes_to_identical_files(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, keep_cache: bool
) -> None:
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "cache"))
    uninterrupted = tuned(tmp_path / "whole" / "out", base, data, **RESUME_SETTINGS)
    train_step, calls = loop.train_step, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        assert dpo(tmp_path / "out", base, data, **RESUME_SETTINGS).status == 130
    if not keep_cache:  # the reference is the model at the start, not the checkpoint
        shutil.rmtree(tmp_path / "cache")
    pass_sizes = forward_passes(monkeypatch)
    done = tuned(tmp_path / "out", base, data, **RESUME_SETTINGS)
    assert "continuing after step 4 of 8" in done.out
    assert sum(pass_sizes) == (0 if keep_cache else 2 * 21)
    assert left_behind(done.folder) == left_behind(uninterrupted.folder)


def test_changed_beta_is_refused_and_changed_micro_batch_size_is_accepted(
    tmp_path: Path, base: Path, data: Path
) -> None:
    tuned(tmp_path / "out", base, data, max_steps=2)
    again = dpo(tmp_path / "out", base, data, max_steps=2, beta=0.2)
    assert again.status == 2
    assert "beta was 0.1 and is now 0.2" in again.err
    same = tuned(tmp_path / "out", base, data, max_steps=2, micro_batch_size=4)
    assert "holds this run, which is finished" in same.out


# The reference


def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of examples in each forward pass of the reference."""
    pass_sizes: list[int] = []
    compute = reference.pass_logprobs

    def counted(model: Any, support: Any, micro_pass: Any, *others: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        pass_sizes.append(len(micro_pass.batch))
        return compute(model, support, micro_pass, *others)

    monkeypatch.setattr(reference, "pass_logprobs", counted)
    return pass_sizes


def test_reference_logprobs_are_computed_once_for_all_runs(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    pass_sizes = forward_passes(monkeypatch)
    first = tuned(tmp_path / "first", base, data, cache_dir=cache, lora_dropout=0.2)
    assert sum(pass_sizes) == 2 * 21
    # fewer passes than training has micro-batches
    assert len(pass_sizes) == math.ceil(21 / (2 * setup.REFERENCE_UNITS_FACTOR))
    pass_sizes.clear()
    second = tuned(tmp_path / "second", base, data, cache_dir=cache, beta=0.2, val_set_size=3, lora_r=8)
    assert pass_sizes == []
    assert "reference: " in first.out
    assert "reference: " not in second.out


def test_reference_computes_only_needed_rows_and_later_the_missing_ones(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    pass_sizes = forward_passes(monkeypatch)
    tuned(tmp_path / "short", base, data, cache_dir=cache, max_steps=2, val_set_size=3)
    assert sum(pass_sizes) == 2 * (4 + 4 + 3)  # two steps and the validation rows
    pass_sizes.clear()
    (file,) = cache.glob("*.reference")
    missing = set(np.flatnonzero(np.isnan(load_file(file)["logprobs"])) // 2)
    assert len(missing) == 21 - 11
    completed = tuned(tmp_path / "whole", base, data, cache_dir=cache)
    assert sum(pass_sizes) == 2 * len(missing)
    fresh = tuned(tmp_path / "fresh", base, data, cache_dir=tmp_path / "other")
    assert_same(completed, fresh)


def test_interrupted_reference_pass_continues_where_it_stopped(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROUND_TOKENS", 300)
    pass_sizes = forward_passes(monkeypatch)
    compute, calls = reference.pass_logprobs, 0

    def interrupted(*arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return compute(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "pass_logprobs", interrupted)
        assert dpo(tmp_path / "out", base, data, cache_dir=tmp_path / "cache").status == 130
    examples_before = sum(pass_sizes)
    assert 0 < examples_before < 42
    tuned(tmp_path / "out", base, data, cache_dir=tmp_path / "cache")
    assert sum(pass_sizes) == 42


ROUND_SETTINGS: dict[str, object] = {"num_epochs": 2, "save_steps": 1, "val_set_size": 5, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def in_rounds(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> tuple[Done, bytes]:
    """A run whose reference is written in several rounds, and the cache file."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ROUND_TOKENS", 500)
        done = tuned(folder / "out", base, data, cache_dir=folder / "cache", **ROUND_SETTINGS)
    (file,) = (folder / "cache").glob("*.reference")
    return done, file.read_bytes()


@pytest.mark.parametrize("remove_cache", [True, False])
@pytest.mark.parametrize("point", ["first round", "second round", "update", "step 1", "step 2", "step 6"])
def test_run_interrupted_at_any_point_ends_with_the_same_bytes(
    tmp_path: Path,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_rounds: tuple[Done, bytes],
    point: str,
    remove_cache: bool,
) -> None:
    monkeypatch.setattr(reference, "ROUND_TOKENS", 500)
    module, name, failing_call = {
        "first round": (reference, "write_reference", 1),
        "second round": (reference, "write_reference", 2),
        "update": (torch.optim.AdamW, "step", 2),  # the first one is the forecast's
        "step 1": (loop, "write_checkpoint", 1),
        "step 2": (loop, "write_checkpoint", 2),
        "step 6": (loop, "write_checkpoint", 6),
    }[point]
    original, calls = getattr(module, name), 0

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert dpo(tmp_path / "out", base, data, cache_dir=cache, **ROUND_SETTINGS).status == 130
    if module is not reference:  # the whole reference is on disk before the first update
        (file,) = cache.glob("*.reference")
        assert file.read_bytes() == in_rounds[1]
    if remove_cache:
        shutil.rmtree(cache)
    done = tuned(tmp_path / "out", base, data, cache_dir=cache, **ROUND_SETTINGS)
    assert ("continuing after step" in done.out) == (point in ("step 2", "step 6"))
    (file,) = cache.glob("*.reference")
    assert file.read_bytes() == in_rounds[1]
    ours, theirs = left_behind(done.folder), left_behind(in_rounds[0].folder)
    assert {k: v for k, v in ours.items() if "settings" not in k and k != "README.md"} == {
        k: v for k, v in theirs.items() if "settings" not in k and k != "README.md"
    }


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_reference_file_is_recomputed(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    cache = tmp_path / "cache"
    first = tuned(tmp_path / "first", base, data, cache_dir=cache, max_steps=2)
    (file,) = cache.glob("*.reference")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes({"flip": bytes(content), "truncate": bytes(content[:-8]), "empty": b""}[damage])
    pass_sizes = forward_passes(monkeypatch)
    second = tuned(tmp_path / "second", base, data, cache_dir=cache, max_steps=2)
    assert sum(pass_sizes) == 2 * 8  # the pairs of both steps
    assert second.weight_bytes == first.weight_bytes


def test_changed_weights_adapter_rows_cutoff_or_dtype_get_their_own_reference(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {"cache_dir": tmp_path / "cache", "max_steps": 2}
    tuned(tmp_path / "out", base, data, **settings)
    other = model_folder(tmp_path / "other", seed=1)
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs(5, seed=1))
    adapter = tmp_path / "out"
    pass_sizes = forward_passes(monkeypatch)
    tuned(tmp_path / "a", other, data, **settings)
    tuned(tmp_path / "b", base, rows, **settings)
    tuned(tmp_path / "c", base, data, **settings, cutoff_len=60)
    tuned(tmp_path / "d", base, data, **settings, adapter=adapter)
    tuned(tmp_path / "e", base, data, **settings, dtype="bfloat16")
    assert sum(pass_sizes) == 2 * (4 * 8 + 5)  # two steps each; b has five pairs


def test_unwritable_reference_cache_is_reported(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "save_file", full)
    done = dpo(tmp_path / "out", base, data, cache_dir=tmp_path / "cache")
    assert done.status == 2
    assert done.err.startswith(
        f"yeonma: {tmp_path / 'cache'}: the reference's log-probabilities cannot be written"
    )
    assert list((tmp_path / "cache").glob("*reference*")) == []


# Continuing an adapter


def test_continued_sft_adapter_is_the_reference(tmp_path: Path, base: Path, data: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    answers = write_jsonl(tmp_path / "answers.jsonl", rows)
    first = trained(tmp_path / "sft", base, answers, template="prompt-completion", num_epochs=2)
    frozen_bytes = first.weight_bytes
    done = tuned(tmp_path / "out", base, data, adapter=first.folder, max_steps=4, batch_size=21)
    assert done.losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the policy starts as its reference
    assert done.losses[-1] < done.losses[0] - 0.01
    assert first.weight_bytes == frozen_bytes
    tokenizer = AutoTokenizer.from_pretrained(base)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first.folder)
    with torch.no_grad():
        logprobs = [float(answer_logprob(policy, tokenizer, r["prompt"], r["chosen"])[0]) for r in ROWS]
    assert done.steps[0]["logprob_chosen"] == pytest.approx(sum(logprobs) / 21, abs=1e-3)


# Forms of data, from the command line to the answers

DIALOGUES = [
    {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": f"number {i}?"},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "are you sure?"},
        ],
        "chosen": {"from": "gpt", "value": "quite sure"},
        "rejected": {"from": "gpt", "value": f"no, not at all {i}"},
    }
    for i in range(6)
]
FORMS: dict[str, list[dict[str, Any]]] = {
    "prompt": pairs(6),
    "question": [
        {"system": "", "question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in pairs(6)
    ],
    "instruction": [
        {"instruction": row["prompt"], "input": "", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in pairs(6)
    ],
    "conversations": DIALOGUES,
    "dialogues": [
        {side: [*row["conversations"], row[side]] for side in ("chosen", "rejected")} for row in DIALOGUES
    ],
    "OpenAI's": [
        {
            "input": {"messages": row["conversations"], "tools": []},
            "preferred_output": [row["chosen"]],
            "non_preferred_output": [row["rejected"]],
        }
        for row in DIALOGUES
    ],
    "ms-swift's": [
        {"messages": [*row["conversations"], row["chosen"]], "rejected_response": [row["rejected"]]}
        for row in DIALOGUES
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_pair_format_trains_and_generates_from_the_training_prompt(
    tmp_path: Path, chat_base: Path, form: str
) -> None:
    rows = FORMS[form]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = tuned(tmp_path / "out", chat_base, data, val_set_size=2, card_rows=2)
    assert done.looks[-1]["examples"] == 2
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert "| validation | loss | reward accuracy | margin |" in card
    assert "| before | 0.6931 | 0.0000 | 0.0000 | 0.0000 | 0.0000 | 0 |" in card
    assert f"| {done.looks[-1]['loss']:.4f} | {done.looks[-1]['reward_accuracy']:.4f} | " in card
    assert f"on 4 pairs ({sum(line['trained_tokens'] for line in done.steps):,} trained tokens" in card
    assert "yeonma dpo --config settings.yaml" in card
    loaded = yeonma.load(done.folder)
    card_row = rows[int(card.partition("### Row ")[2].partition("\n")[0]) - 1]
    row = {name: value for name, value in card_row.items() if name not in ("chosen", "rejected")}
    if form == "dialogues":
        row = {"messages": card_row["chosen"]}
    prompt = loaded.prompt_builder.tokenizer.decode(loaded.prompt_ids(row, max_new_tokens=8))
    answers = loaded.generate([row], max_new_tokens=4)
    assert len(answers) == 1
    field = row.get(form)
    assert (field if isinstance(field, str) else prompt.rstrip("\n")) in card
    answers = tmp_path / "answers.jsonl"
    settings = ["--data_path", str(write_jsonl(tmp_path / "asked.jsonl", [row]))]
    generated = command(
        tmp_path, "generate", str(done.folder), *settings, "--max_new_tokens", "4", "--output", str(answers)
    )
    assert generated.status == 0, generated.err
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 1


def test_python_function_trains_an_adapter(tmp_path: Path, base: Path, data: Path) -> None:
    settings = {**PLAIN, "max_steps": 1}
    del settings["num_epochs"]
    folder = yeonma.dpo(base_model=base, data_path=data, output_dir=tmp_path / "out", **settings)
    assert folder.folder == tmp_path / "out"
    assert (folder / "adapter_model.safetensors").is_file()


def test_default_learning_rate_is_1e_05(tmp_path: Path, base: Path, data: Path) -> None:
    done = tuned(tmp_path / "out", base, data, max_steps=1, learning_rate=None)
    assert done.steps[0]["learning_rate"] == 1e-5
    assert "learning_rate: 1.0e-05" in (done.folder / "settings.yaml").read_text()
    page = command(tmp_path, "dpo", "--help", "learning_rate").out
    assert "default 1e-05" in " ".join(page.split())


# Refusals before any costly work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_on_inputs": True}, "train_on_inputs: a prompt is the same for both answers"),
        ({"label_smoothing": 0.5}, "label_smoothing: 0.5 is out of range"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing: hinge does not read it"),
        ({"simpo_gamma": 1}, "simpo_gamma: sigmoid does not read it"),
        ({"kto_desirable_weight": 2}, "kto_desirable_weight: sigmoid does not read it"),
        ({"beta": 0}, "beta: 0 is out of range"),
        ({"loss": "sigmoid_nrm"}, "loss: sigmoid_nrm is not valid"),
        (
            {"loss": "exo_pair"},
            "label_smoothing: exo_pair needs a value above 0; give --label_smoothing 0.001",
        ),
        ({"loss": "nca_pair", "f_divergence": "js"}, "f_divergence: nca_pair does not read it"),
        ({"loss": "aot", "wpo_weights": True}, "wpo_weights: aot does not read it"),
        ({"f_alpha": 0.3}, "f_alpha: only the divergence alpha reads it"),
        ({"token_loss": "dft"}, "token_loss: preference losses do not read it"),
    ],
)
def test_invalid_settings_are_refused(
    tmp_path: Path, base: Path, data: Path, settings: dict[str, object], message: str
) -> None:
    done = dpo(tmp_path / "out", base, data, **settings)
    assert (done.status, done.err.startswith(f"yeonma: {message}")) == (2, True), done.err
    assert not done.folder.exists()


def test_nan_loss_is_reported_with_the_rows_of_its_pairs(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = step_module.pass_logprobs
    monkeypatch.setattr(step_module, "pass_logprobs", lambda *a, **k: compute(*a, **k) * math.nan)
    done = dpo(tmp_path / "out", base, data, batch_size=3)
    rows = ", ".join(str(row) for row in sorted(int(i) + 1 for i in epoch_order(21, 42, 0, 3)[:3]))
    assert done.status == 2
    assert done.err.startswith(f"yeonma: rows {rows}: the loss is nan")


def test_template_defaults_to_that_of_the_continued_adapter(tmp_path: Path, base: Path) -> None:
    template = "say it: {prompt}\nwell: {completion}"
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS[:4]]
    first = trained(
        tmp_path / "sft", base, write_jsonl(tmp_path / "a.jsonl", rows), template=template, max_steps=1
    )
    data = write_jsonl(tmp_path / "b.jsonl", ROWS[:4])
    done = tuned(tmp_path / "out", base, data, adapter=first.folder, max_steps=1)
    assert (done.folder / "template.txt").read_text() == template + "\n"
    assert f"template {first.folder}/template.txt, from the adapter to continue" in done.out
    other = [
        {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS[:4]
    ]
    other_data = write_jsonl(tmp_path / "c.jsonl", other)
    done = tuned(tmp_path / "other", base, other_data, adapter=first.folder, max_steps=1)
    assert "template orca, because the columns are question, chosen, rejected" in done.out
