"""The training loop: equal to transformers' Trainer for any micro-batches; schedules, evaluation, NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, get_scheduler

from tests.models import OTHER_FAMILIES
from tests.runs import TEMPLATE, Done, articles, model_folder, sft, trained, write_jsonl
from yeonma.batch.plan import epoch_order
from yeonma.config.settings import LrScheduler

ROWS = articles(29)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


# Comparison with transformers' Trainer


class Reference(Trainer):
    """transformers' Trainer with rows in order, recording each step's unrounded loss."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **keywords)
        self.losses = getattr(self, "losses", {})
        self.losses[self.state.global_step] = self.losses.get(self.state.global_step, 0.0) + float(loss)
        return loss


def tokens_of(row: Mapping[str, str], tokenizer: Any, train_on_inputs: bool = False) -> dict[str, list[int]]:
    before, _, _ = TEMPLATE.partition("{title}")
    prompt = tokenizer(before.replace("{document}", row["document"]))["input_ids"]
    answer = [*tokenizer(row["title"])["input_ids"], tokenizer.eos_token_id]
    untrained = prompt if train_on_inputs else [-100] * len(prompt)
    return {"input_ids": prompt + answer, "labels": untrained + answer}


def padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)

    def pad_field(name: str, value: int) -> torch.Tensor:
        return torch.tensor(
            [example[name] + [value] * (longest - len(example[name])) for example in examples]
        )

    mask = torch.tensor(
        [[1] * len(example["labels"]) + [0] * (longest - len(example["labels"])) for example in examples]
    )
    return {
        "input_ids": pad_field("input_ids", 0),
        "labels": pad_field("labels", -100),
        "attention_mask": mask,
    }


def reference(folder: Path, base: Path, rows: list[dict[str, str]], **settings: Any) -> Reference:
    """The run of the test below (20 steps of 8 rows) with transformers and PEFT only."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(42)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    order = epoch_order(len(rows), 42, 0, 8)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        warmup_steps=3,
        weight_decay=0.01,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    dataset = [tokens_of(rows[i], tokenizer, **settings) for i in order]
    trainer = Reference(model, arguments, data_collator=padded, train_dataset=dataset)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("family", "train_on_inputs"), [("llama", False), ("llama", True), ("bloom", False), ("lfm2", False)]
)
def test_20_steps_give_the_losses_and_weights_of_transformers_trainer(
    tmp_path: Path, family: str, train_on_inputs: bool
) -> None:
    rows = articles(157, seed=1)  # the last step has 5 rows
    base, data = model_folder(tmp_path / "base", family), write_jsonl(tmp_path / "rows.jsonl", rows)
    ours = trained(
        tmp_path / "out",
        base,
        data,
        batch_size=8,
        warmup_steps=3,
        weight_decay=0.01,
        adam_beta2=0.99,
        train_on_inputs=train_on_inputs,
    )
    theirs = reference(tmp_path / "theirs", base, rows, train_on_inputs=train_on_inputs)
    assert ("one sequence at a time" in ours.out) == (family in OTHER_FAMILIES)
    assert len(ours.losses) == 20
    assert ours.losses == pytest.approx(list(theirs.losses.values()), abs=1e-4)
    assert ours.losses[0] > ours.losses[-1] + 0.1  # the model has learned
    weights = {name: weight for name, weight in theirs.model.state_dict().items() if "lora_" in name}
    assert len(ours.weights) == len(weights)
    for name, weight in ours.weights.items():
        theirs_weight = weights[name.replace(".weight", ".default.weight")]
        assert float((weight - theirs_weight).abs().max()) < 1e-3, name


# Micro-batches, steps and kinds of LoRA


@pytest.fixture(scope="module")
def micro_batch_1_run(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """A run with micro-batches of one row: 29 rows, steps of 8, two epochs; the last step of each epoch has 5 rows."""
    return trained(tmp_path_factory.mktemp("run") / "out", base, data, **STEPS, micro_batch_size=1)


STEPS: dict[str, object] = {"batch_size": 8, "num_epochs": 2}


@pytest.mark.parametrize(
    "speed",
    [
        {"micro_batch_size": 4},
        {"micro_batch_size": 8},
        {"micro_batch_size": 8, "micro_batch_tokens": 150},
        {"micro_batch_size": 3, "micro_batch_tokens": 1},
        {"micro_batch_size": 8, "share_prefix": False},
        {"micro_batch_size": 8, "gradient_checkpointing": True},
        {"micro_batch_size": 8, "gradient_checkpointing": "selective"},
        {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"},
    ],
)
def test_micro_batches_and_prefix_sharing_do_not_change_results(
    tmp_path: Path, base: Path, data: Path, micro_batch_1_run: Done, speed: dict[str, object]
) -> None:
    done = trained(tmp_path / "out", base, data, **STEPS, **speed)
    assert [line["examples"] for line in done.steps] == [8, 8, 8, 5] * 2
    assert done.losses == pytest.approx(micro_batch_1_run.losses, abs=1e-5)
    for name, weight in done.weights.items():
        assert float((weight - micro_batch_1_run.weights[name]).abs().max()) < 1e-3, name


def test_shared_trained_prompt_counts_once_per_row(tmp_path: Path, base: Path, data: Path) -> None:
    alone, shared = (
        trained(tmp_path / name, base, data, batch_size=8, micro_batch_size=size, train_on_inputs=True)
        for name, size in (("alone", 1), ("shared", 8))
    )
    assert alone.losses == pytest.approx(shared.losses, abs=1e-5)
    lengths = [len(TEMPLATE.format(**row)) for row in ROWS]
    # every token and the end token, except the first token, which is not predicted
    assert sum(line["trained_tokens"] for line in alone.steps) == sum(lengths)


def test_batch_size_may_exceed_the_number_of_rows(tmp_path: Path, base: Path, data: Path) -> None:
    done = trained(tmp_path / "out", base, data, batch_size=1000, num_epochs=2)
    assert [line["examples"] for line in done.steps] == [29, 29]


def test_step_metrics_have_token_counts_and_epochs(micro_batch_1_run: Done) -> None:
    first = micro_batch_1_run.steps[0]
    rows = [ROWS[i] for i in epoch_order(29, 42, 0, 8)[:8]]
    assert first["trained_tokens"] == sum(len(row["title"]) + 1 for row in rows)
    assert first["tokens"] == sum(len(TEMPLATE.format(**row)) + 1 for row in rows)
    assert [line["step"] for line in micro_batch_1_run.steps] == list(range(1, 9))
    assert [line["epoch"] for line in micro_batch_1_run.steps] == [step / 4 for step in range(1, 9)]


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}])
def test_rslora_and_dora_train(
    tmp_path: Path, base: Path, data: Path, micro_batch_1_run: Done, kind: dict[str, object]
) -> None:
    done, plain = trained(tmp_path / "out", base, data, **STEPS, **kind), micro_batch_1_run
    assert done.losses[0] == pytest.approx(plain.losses[0], abs=1e-5)  # a new adapter has no effect
    assert done.losses[-1] < done.losses[0]
    assert done.losses[1:] != pytest.approx(plain.losses[1:], abs=1e-5)
    magnitudes = [name for name in done.weights if "magnitude" in name]
    assert bool(magnitudes) == ("use_dora" in kind)


def test_only_the_named_layers_get_an_adapter(tmp_path: Path, base: Path, data: Path) -> None:
    done = trained(tmp_path / "out", base, data, lora_target_modules=["gate_proj", "up_proj"], max_steps=1)
    assert {name.split(".")[-3] for name in done.weights} == {"gate_proj", "up_proj"}
    assert len(done.weights) == 2 * 2 * 2  # layers, names, A and B


# Schedules

ARGUMENTS: dict[str, dict[str, object]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 10.0, "factor": 0.5},
    "greedy": {"patience": 0, "factor": 0.5, "threshold": 10.0, "min_lr": 1e-6},
}


@pytest.mark.parametrize("name", get_args(LrScheduler))
def test_every_schedule_runs_as_in_transformers(tmp_path: Path, base: Path, data: Path, name: str) -> None:
    by_metric = name in ("reduce_lr_on_plateau", "greedy")
    more_settings = {"val_set_size": 9, "eval_steps": 2} if by_metric else {"warmup_steps": 2}
    arguments = ARGUMENTS.get(name)
    done = trained(
        tmp_path / "out",
        base,
        data,
        lr_scheduler=name,
        lr_scheduler_kwargs=arguments,
        max_steps=6,
        **more_settings,
    )
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-3)
    schedule = get_scheduler(name, optimizer, 2, 6, arguments)
    validation_losses = {line["step"]: line["loss"] for line in done.looks}
    expected = []
    for step in range(1, 7):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not by_metric:
            schedule.step()
        elif step in validation_losses:
            schedule.step(validation_losses[step])
    assert [line["learning_rate"] for line in done.steps] == pytest.approx(expected, rel=1e-9)
    if name != "constant":
        assert len(set(expected)) > 1


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_validation_loss_schedule_without_validation_rows_is_refused(
    tmp_path: Path, base: Path, data: Path, name: str
) -> None:
    done = sft(tmp_path / "out", base, data, lr_scheduler=name)
    assert (done.status, done.err) == (
        2,
        "yeonma: lr_scheduler: it follows the validation loss; give val_set_size, val_split or val_data_path\n",
    )
    assert not done.folder.exists()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear", {"num_cycles": 2}),
        ("constant", {"num_cycles": 2}),
        ("warmup_stable_decay", {}),
        ("linear", {"last_epoch": 5}),
        ("inverse_sqrt", {"timescale": 0}),
        ("polynomial", {"power": "x"}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": "x"}),
        ("reduce_lr_on_plateau", {"min_lr": "x"}),
        ("reduce_lr_on_plateau", {"patience": "x"}),
        ("greedy", {"patience": "x"}),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_invalid_schedule_arguments_are_refused(
    tmp_path: Path, base: Path, data: Path, name: str, arguments: dict[str, object], warmup_steps: int
) -> None:
    done = sft(
        tmp_path / "out",
        base,
        data,
        lr_scheduler=name,
        lr_scheduler_kwargs=arguments,
        warmup_steps=warmup_steps,
        val_set_size=1,
    )
    assert done.status == 2
    assert done.err.startswith("yeonma: lr_scheduler_kwargs: ")
    assert name in done.err
    assert not done.folder.exists()


def test_warmup_settings_without_effect_are_reported(tmp_path: Path, base: Path, data: Path) -> None:
    done = trained(tmp_path / "out", base, data, lr_scheduler="constant", warmup_steps=2, max_steps=2)
    assert "constant has no warm-up: warmup_steps and warmup_ratio have no effect\n" in done.out


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [({"warmup_steps": 3}, 3), ({"warmup_ratio": 0.3}, 3), ({"warmup_ratio": 0.31}, 4), ({}, 0)],
)
def test_warmup_is_given_in_steps_or_as_a_ratio(
    tmp_path: Path, base: Path, data: Path, warmup: dict[str, object], steps: int
) -> None:
    done = trained(tmp_path / "out", base, data, lr_scheduler="constant_with_warmup", max_steps=10, **warmup)
    rates = [line["learning_rate"] for line in done.steps]
    assert rates[:steps] == pytest.approx([3e-3 * step / steps for step in range(steps)])
    assert rates[steps:] == pytest.approx([3e-3] * (10 - steps))


def test_max_grad_norm_zero_turns_clipping_off(tmp_path: Path, base: Path, data: Path) -> None:
    # one step: AdamW's own division hides the scale of the gradient, so a large epsilon stands in for plain descent
    wide, narrow, off = (
        trained(tmp_path / str(norm), base, data, max_steps=1, max_grad_norm=norm, adam_epsilon=1000)
        for norm in (1e9, 1e-3, 0)
    )
    assert wide.steps[0]["grad_norm"] == off.steps[0]["grad_norm"] > 1e-3
    assert wide.weight_bytes == off.weight_bytes != narrow.weight_bytes


# Evaluation


def test_the_validation_loss_is_that_of_a_plain_forward(tmp_path: Path, base: Path) -> None:
    rows, held_out = articles(8), articles(7, seed=5)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    validation_data = write_jsonl(tmp_path / "more.jsonl", held_out)
    done = trained(tmp_path / "out", base, data, val_data_path=validation_data, micro_batch_size=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for row in held_out:
        batch = padded([tokens_of(row, tokenizer)])
        tokens = int((batch["labels"] != -100).sum())
        total += model(**batch).loss.item() * tokens
        count += tokens
    first = done.looks[0]
    assert (first["step"], first["examples"], first["trained_tokens"]) == (0, 7, count)
    assert first["loss"] == pytest.approx(total / count, abs=1e-5)
    assert first["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_without_eval_steps_every_epoch_ends_with_an_evaluation_and_a_checkpoint(
    tmp_path: Path, base: Path, data: Path
) -> None:
    done = trained(
        tmp_path / "out", base, data, val_set_size=9, batch_size=8, num_epochs=2.5, keep_best=False
    )
    assert [line["step"] for line in done.looks] == [0, 3, 6, 8]
    assert {path.name for path in done.folder.glob("checkpoint-*")} >= {
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-8",
    }


def test_evaluations_run_every_eval_steps_and_at_start_and_end(
    tmp_path: Path, base: Path, data: Path
) -> None:
    done = trained(tmp_path / "out", base, data, val_set_size=9, max_steps=7, eval_steps=3, card_rows=2)
    assert [line["step"] for line in done.looks] == [0, 3, 6, 7]


def test_evaluation_frequency_does_not_change_training(tmp_path: Path, base: Path, data: Path) -> None:
    validation_data = write_jsonl(tmp_path / "more.jsonl", articles(5, seed=5))
    settings: dict[str, object] = {
        "val_data_path": validation_data,
        "lora_dropout": 0.1,
        "keep_best": False,
        "max_steps": 6,
    }
    often, seldom = (
        trained(tmp_path / str(steps), base, data, eval_steps=steps, **settings) for steps in (1, 100)
    )
    assert often.losses == seldom.losses
    assert often.weight_bytes == seldom.weight_bytes


# Kept adapters and checkpoints, early stopping


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Done]:
    """A learning rate so high that the validation loss falls first and then rises."""
    folder = tmp_path_factory.mktemp("overfitted")
    data = write_jsonl(folder / "rows.jsonl", articles(16))
    yield trained(folder / "out", base, data, **OVERFITTING)


OVERFITTING: dict[str, object] = {
    "learning_rate": 2e-2,
    "lr_scheduler": "constant",
    "batch_size": 8,
    "max_steps": 24,
    "eval_steps": 2,
    "save_steps": 4,
    "val_set_size": 8,
    "save_total_limit": 2,
}


def best_of(done: Done) -> int:
    return int(min(done.looks[1:], key=lambda line: line["loss"])["step"])


def test_the_adapter_with_the_lowest_validation_loss_is_kept(overfitted: Done) -> None:
    best = best_of(overfitted)
    assert 2 <= best < 20  # otherwise the test proves nothing
    best_weights = overfitted.folder / f"checkpoint-{best}" / "adapter_model.safetensors"
    assert overfitted.weight_bytes == best_weights.read_bytes()
    assert f"using the adapter of step {best}, which had the lowest validation loss" in overfitted.out


def test_newest_and_best_checkpoints_are_kept(overfitted: Done) -> None:
    steps = {int(path.name.removeprefix("checkpoint-")) for path in overfitted.folder.glob("checkpoint-*")}
    assert steps == {best_of(overfitted), 20, 24}


def test_last_adapter_is_kept_without_keep_best(tmp_path: Path, base: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(16))
    done = trained(tmp_path / "out", base, data, **{**OVERFITTING, "keep_best": False})
    assert done.weight_bytes == (done.folder / "checkpoint-24" / "adapter_model.safetensors").read_bytes()


def test_evaluations_without_improvement_stop_the_run_early(
    tmp_path: Path, base: Path, overfitted: Done
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(16))
    done = trained(tmp_path / "out", base, data, **OVERFITTING, early_stopping_patience=2)
    losses = {line["step"]: line["loss"] for line in overfitted.looks[1:]}
    stop = next(
        step for step in losses if step > 4 and min(losses[step], losses[step - 2]) > min(
            loss for earlier, loss in losses.items() if earlier < step - 2
        )
    )  # fmt: skip
    assert done.steps[-1]["step"] == stop < 24
    assert "stopping early: no lower loss in 2 evaluations" in done.out
    assert done.losses == overfitted.losses[:stop]


def test_improvement_below_the_threshold_does_not_delay_early_stopping(
    tmp_path: Path, base: Path, data: Path
) -> None:
    done = trained(
        tmp_path / "out", base, data, val_set_size=9, max_steps=6, eval_steps=1,
        early_stopping_patience=2, early_stopping_threshold=100,
    )  # fmt: skip
    assert done.steps[-1]["step"] == 3
    losses = [line["loss"] for line in done.looks[1:]]
    assert losses[0] > losses[1] > losses[2]  # lower, but not by 100; the best is still kept
    assert done.weight_bytes == (done.folder / "checkpoint-3" / "adapter_model.safetensors").read_bytes()


def test_early_stopping_without_validation_rows_is_refused(tmp_path: Path, base: Path, data: Path) -> None:
    done = sft(tmp_path / "out", base, data, early_stopping_patience=2)
    assert (done.status, done.err.partition(":")[2].strip().partition(":")[0]) == (
        2,
        "early_stopping_patience",
    )


def test_trained_adapter_is_kept_even_if_the_validation_loss_rose(
    tmp_path: Path, base: Path, data: Path
) -> None:
    done = trained(tmp_path / "out", base, data, val_set_size=9, max_steps=1, learning_rate=30)
    before, after = done.looks
    assert before["loss"] < after["loss"]
    best_weights = done.folder / "checkpoint-1" / "adapter_model.safetensors"
    assert done.weight_bytes == best_weights.read_bytes()


# NaN


def test_nan_loss_stops_the_run_before_the_update(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yeonma.train import run

    states: list[Any] = []
    build = run.build_train_state

    def build_with_nan(*arguments: Any, **keywords: Any) -> Any:
        state = build(*arguments, **keywords)
        states.append(state)
        next(iter(state.parameters.values())).data[0, 0] = math.nan
        return state

    monkeypatch.setattr(run, "build_train_state", build_with_nan)
    done = sft(tmp_path / "out", base, data, batch_size=3)
    rows = sorted(int(i) + 1 for i in epoch_order(29, 42, 0, 3)[:3])
    assert done.status == 2
    assert done.err.startswith(
        f"yeonma: rows {rows[0]}, {rows[1]}, {rows[2]}: the loss is nan and the gradient norm nan"
    )
    assert done.lines == []
    assert not states[0].optimizer.state  # no update
    assert list(done.folder.glob("checkpoint-*")) == []


def test_nan_loss_names_its_rows_and_keeps_earlier_checkpoints(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yeonma.train import step as step_module

    order, compute = epoch_order(29, 42, 0, 4), step_module.pass_logprobs
    calls = 0

    def logprobs_with_nan(*arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return compute(*arguments, **keywords) * (math.nan if calls == 6 else 1)  # two micro-batches a step

    monkeypatch.setattr(step_module, "pass_logprobs", logprobs_with_nan)
    done = sft(tmp_path / "out", base, data, save_steps=1)
    rows = ", ".join(str(row) for row in sorted(int(i) + 1 for i in order[8:12]))
    assert done.status == 2
    assert f"rows {rows}: the loss is nan" in done.err
    assert [line["step"] for line in done.steps] == [1, 2]
    assert {path.name for path in done.folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    monkeypatch.undo()
    uninterrupted = trained(tmp_path / "whole", base, data, save_steps=1)
    resumed = trained(tmp_path / "out", base, data, save_steps=1)
    assert resumed.weight_bytes == uninterrupted.weight_bytes
