"""Full fine-tuning: the steps of transformers' Trainer, gradients, micro-batches, and resumed runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers import trainer as trainer_module

from tests.models import VOCABULARY, tiny_model
from tests.quantised import needs_bitsandbytes
from tests.runs import (
    SETTINGS,
    Done,
    arguments,
    articles,
    command,
    left_behind,
    model_folder,
    sft,
    trained,
    write_jsonl,
)
from yeonma.batch.batch import Batch
from yeonma.commands import sft as sft_command
from yeonma.model.forest_support import check_forest_support
from yeonma.model.logprobs import batch_logprobs
from yeonma.run_folder import output_folder as folder
from yeonma.tokenization.example import Example
from yeonma.train import loop, prepare, run
from yeonma.train.full_weights import round_weights, trained_weights

FULL: dict[str, object] = {"train": "full", "learning_rate": 1e-3, "lora_r": None, "lora_alpha": None}
TWO_EPOCHS = {**FULL, "num_epochs": 2, "save_steps": 2, "eval_steps": 3, "val_set_size": 5, "card_rows": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(24))


def weights_of(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


# ------------------------------------------------------------------------------------------ transformers' Trainer


class InOrder(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def test_twenty_steps_are_those_of_the_trainer(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FULL, "max_steps": 20, "warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.5}
    done = trained(tmp_path / "out", base, data, **settings)
    words = ["--rows", "all", "--json", "--base_model", base, "--data_path", data]
    shown = command(tmp_path, "inspect", *map(str, words), "--template", str(tmp_path / "out/template.txt"))
    examples = {
        line["row"]: {
            "input_ids": line["token_ids"],
            "attention_mask": [1] * len(line["token_ids"]),
            "labels": [
                id_ if is_trained else -100
                for id_, is_trained in zip(line["token_ids"], line["trained"], strict=True)
            ],
        }
        for line in map(json.loads, shown.out.splitlines())
        if "token_ids" in line
    }
    lines = (tmp_path / "out/trained_rows.jsonl").read_text("utf-8").splitlines()
    rows = [examples[row] for line in lines for row in json.loads(line)["rows"]]
    monkeypatch.setattr(trainer_module, "is_torch_xla_available", lambda: False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = InOrder(
        model,
        TrainingArguments(
            str(tmp_path / "trainer"),
            per_device_train_batch_size=4,
            max_steps=20,
            learning_rate=1e-3,
            warmup_steps=3,
            weight_decay=0.1,
            max_grad_norm=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=padded,
        train_dataset=rows,
    )
    theirs.train()
    losses = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
    assert np.allclose(done.losses, losses, rtol=0, atol=1e-4)
    ours, start = weights_of(tmp_path / "out"), weights_of(base)
    for name, weight in model.named_parameters():
        assert torch.allclose(ours[name], weight.detach(), rtol=0, atol=1e-4), name
        assert not torch.allclose(ours[name], start[name], rtol=0, atol=1e-3), name


# ------------------------------------------------------------------------------------------ gradients


FAMILIES = [
    "gemma2",
    "gpt2",
    "gpt_oss",
    "granitemoehybrid",
    "lfm2",
    "llama",
    "olmo_hybrid",
    "qwen3_moe",
    "qwen3_next",
]


def examples(vocabulary: int) -> list[Example]:
    """Three sequences, of which two share a beginning."""
    draw = np.random.default_rng(0)
    shared = draw.integers(3, vocabulary, 20)
    ids = [np.concatenate([shared, draw.integers(3, vocabulary, size)]) for size in (7, 11)]
    ids.append(draw.integers(3, vocabulary, 15))
    return [
        Example(one.astype(np.int32), np.arange(len(one)) >= len(one) - 6, len(one) - 6, row, 0, 0, False, 0)
        for row, one in enumerate(ids, 1)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_have_the_gradient_of_the_plain_model(family: str) -> None:
    """Embeddings, norms, routers, sinks and recurrent layers included, and a head that is tied to the embedding."""
    models = [tiny_model(family), tiny_model(family)]
    if family == "gemma2":
        for model in models:
            model.config.tie_word_embeddings = True
            model.tie_weights()
    own, plain = (model.requires_grad_(True) for model in models)
    batch = Batch.of(examples(VOCABULARY))
    batch_logprobs(own, check_forest_support(own), batch).sum().backward()
    for ids, mask in zip(batch.token_ids, batch.trained, strict=True):
        ids_T = torch.from_numpy(ids.astype(np.int64))
        logprobs = torch.log_softmax(plain(ids_T[None], use_cache=False).logits[0, :-1].float(), -1)
        logprobs.gather(1, ids_T[1:, None])[torch.from_numpy(mask[1:].copy()), 0].sum().backward()
    expected = dict(plain.named_parameters())
    for name, weight in own.named_parameters():
        if expected[name].grad is None:
            assert weight.grad is None or not weight.grad.any(), name
            continue
        assert weight.grad is not None, name
        tolerance = 1e-5 * max(1.0, float(expected[name].grad.abs().max()))
        if family == "qwen3_next":  # the plain model's rounding; ours is nearer to its gradient in float64
            tolerance *= 10
        assert torch.allclose(weight.grad, expected[name].grad, rtol=0, atol=tolerance), name


MICRO_BATCHES: list[dict[str, object]] = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 4, "gradient_checkpointing": True},
    {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"},
]


def test_micro_batches_do_not_change_the_step(tmp_path: Path, base: Path, data: Path) -> None:
    runs = [
        trained(tmp_path / str(number), base, data, **FULL, **settings)
        for number, settings in enumerate(MICRO_BATCHES)
    ]
    first = weights_of(runs[0].folder)
    for other in runs[1:]:
        assert np.allclose(other.losses, runs[0].losses, rtol=0, atol=1e-5)
        for name, weight in weights_of(other.folder).items():
            assert torch.allclose(weight, first[name], rtol=0, atol=1e-5), name


def test_bfloat16_weights_are_rounded_from_what_the_optimizer_updates() -> None:
    """Updates and gradients that bfloat16 would lose are not lost."""
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    copies, weights = trained_weights(model)
    optimizer = torch.optim.SGD(copies.values(), lr=1.0)
    for _ in range(300):  # of which each alone is below the rounding of 1
        for factor in (1.0, 2**-10):
            (model(torch.tensor([[factor * 2**-9, 0.0]], dtype=torch.bfloat16)).sum()).backward()
            assert weights["weight"].grad is None
        assert copies["weight"].grad is not None
        assert torch.equal(copies["weight"].grad, torch.tensor([[2**-9 + 2**-19, 0.0]]))
        optimizer.step()
        optimizer.zero_grad()
        round_weights(copies, weights)
    expected = 1 - 300 * (2**-9 + 2**-19)
    assert abs(float(copies["weight"][0, 0].detach()) - expected) < 1e-4
    assert torch.equal(weights["weight"], copies["weight"].bfloat16())


# ------------------------------------------------------------------------------------------ resuming


INTERRUPTIONS: dict[str, tuple[Any, str, int]] = {
    "in the fourth step": (loop, "train_step", 4),
    "before the third checkpoint": (loop, "write_checkpoint", 3),
    "before the model is put into place": (folder, "install", 1),
    "before the plot": (run, "plot_loss", 1),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path
) -> Done:
    """An uninterrupted run."""
    settings = {**TWO_EPOCHS, "dtype": request.param}
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **settings)


@pytest.mark.parametrize(
    "where",
    [
        name if number == 0 else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate(INTERRUPTIONS)
    ],
)
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, base: Path, data: Path, whole: Done, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    dtype = json.loads((whole.folder / "run.json").read_text("utf-8"))["identity"]["dtype"]
    settings, output = {**TWO_EPOCHS, "dtype": dtype}, tmp_path / "out"
    owner, name, call = INTERRUPTIONS[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stops(getattr(owner, name), call))
        assert sft(output, base, data, **settings).status == 130
    resumed = trained(output, base, data, **settings)
    assert left_behind(resumed.folder) == left_behind(whole.folder)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bytes_of_another(
    tmp_path: Path, base: Path, data: Path, whole: Done
) -> None:
    """By SIGKILL, wherever it is when its second checkpoint is there; several times."""
    dtype = json.loads((whole.folder / "run.json").read_text("utf-8"))["identity"]["dtype"]
    output = tmp_path / "out"
    settings = {**SETTINGS, **TWO_EPOCHS, "dtype": dtype, "base_model": base, "data_path": data}
    words = arguments({**settings, "output_dir": output})
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        with subprocess.Popen(
            [sys.executable, "-m", "yeonma", "sft", *words], stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and not (output / checkpoint).exists():
                time.sleep(0.01)
            process.kill()
    resumed = trained(output, base, data, **TWO_EPOCHS, dtype=dtype)
    assert "continuing after step" in resumed.out or "finished" in resumed.out
    assert left_behind(resumed.folder) == left_behind(whole.folder)


def stops(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, of which a call is a Ctrl-C instead."""
    calls: list[int] = []

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    return stopping


def test_the_best_checkpoint_becomes_the_model(tmp_path: Path, base: Path, data: Path) -> None:
    settings = {**TWO_EPOCHS, "eval_steps": 2, "learning_rate": 0.3, "lr_scheduler": "constant"}
    done = trained(tmp_path / "out", base, data, **settings)
    losses = {look["step"]: look["loss"] for look in done.looks if look["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best != max(losses) and f"using the model of step {best}" in done.out
    of_best, ours = weights_of(done.folder / f"checkpoint-{best}"), weights_of(done.folder)
    assert all(torch.equal(weight, of_best[name]) for name, weight in ours.items())


@needs_bitsandbytes
def test_averages_in_8_bits(tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run asks for a GPU, which these optimizers do not need to be right."""
    for module in (prepare, sft_command):
        monkeypatch.setattr(module, "check_optimizer_device", lambda *_: None)
    settings = {**FULL, "optimizer": "adamw_8bit", "dtype": "bfloat16", "save_steps": 2}
    whole = trained(tmp_path / "whole/out", base, data, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stops(loop.train_step, 4))
        assert sft(tmp_path / "part/out", base, data, **settings).status == 130
    resumed = trained(tmp_path / "part/out", base, data, **settings)
    assert left_behind(resumed.folder) == left_behind(whole.folder)
    exact = trained(tmp_path / "exact", base, data, **FULL, dtype="bfloat16")
    assert np.allclose(whole.losses, exact.losses, rtol=0, atol=0.05)
