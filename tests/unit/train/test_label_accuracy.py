"""Accuracy and macro F1 during training, where answers are labels: which label is the most likely after a prompt."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters import tiny_base
from tests.models import VOCABULARY
from tests.runs import Done, model_folder, trained, untimed, write_jsonl
from tests.tokenizers import CHATML, byte_level
from yeonma.data.classification import accuracy, confusion_matrix, macro_f1
from yeonma.train import label_accuracy, loop, run

LABELS = ("positive", "negative", "it is neither")
TEMPLATE = "a review of a book.\n\n{review}\n\nis it good? {label}"
TURNS = "[user]\na review of a book: {review}\n[assistant]\n{label}\n"
SETTINGS: dict[str, object] = {
    "template": TEMPLATE,
    "num_epochs": 2,
    "val_set_size": 12,
    "eval_steps": 4,
    "learning_rate": 1e-2,
    "save_steps": 4,
}


def reviews(count: int = 48) -> list[dict[str, str]]:
    draw = random.Random(3)
    words = {"positive": "fine", "negative": "dull", "it is neither": "long"}
    rows = []
    for number in range(count):
        label = LABELS[number % 2] if number % 6 else LABELS[2]
        rows.append({"review": f"{number} {words[label]} {'very ' * draw.randint(0, 3)}", "label": label})
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    model_folder(root / "llama")
    tiny_base(root / "chatml", byte_level(CHATML))
    write_jsonl(root / "rows.jsonl", reviews())
    return root


@pytest.fixture(scope="module")
def done(place: Path) -> Done:
    return trained(place / "out", place / "llama", place / "rows.jsonl", **SETTINGS, card_rows=1)


def scores(looks: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(look["step"], look["accuracy"], look["macro_f1"], look["confusion"]) for look in looks]


def test_numbers_are_those_of_plain_transformers_label_by_label(done: Done, place: Path) -> None:
    """One sequence for each row and label, through PEFT's own model of the finished adapter."""
    last = max((look for look in done.looks), key=lambda look: -look["loss"])
    base = AutoModelForCausalLM.from_pretrained(place / "llama")
    model = PeftModel.from_pretrained(base, done.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    trained_rows = {
        row
        for line in (done.folder / "trained_rows.jsonl").read_text().splitlines()
        for row in json.loads(line)["rows"]
    }
    rows = [row for number, row in enumerate(reviews(), 1) if number not in trained_rows]
    assert len(rows) == 12
    by_count = sorted(LABELS, key=lambda label: (-sum(row["label"] == label for row in reviews()), label))
    predicted = []
    for row in rows:
        prompt = tokenizer(TEMPLATE.partition("{label}")[0].format(review=row["review"]))["input_ids"]
        logprobs = []
        for label in by_count:
            answer = tokenizer(label, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
            picked = logits[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])
            logprobs.append(float(picked.sum()))
        predicted.append(int(np.argmax(logprobs)))
    matrix = confusion_matrix([by_count.index(row["label"]) for row in rows], predicted, 3)
    assert (last["accuracy"], last["macro_f1"]) == (accuracy(matrix), pytest.approx(macro_f1(matrix)))
    (confusion,) = last["confusion"].values()
    for own, name in enumerate(by_count):
        row = [confusion.get(name, {}).get(label, 0) for label in by_count]
        assert row == matrix[own, :3].tolist()


def test_training_is_shown_with_accuracy_and_so_is_the_card(done: Done) -> None:
    before, after = done.looks[0], min(done.looks[1:], key=lambda look: look["loss"])
    assert after["accuracy"] > before["accuracy"]
    assert f"accuracy {after['accuracy']:.3f}  macro F1 {after['macro_f1']:.3f}" in done.out
    card = (done.folder / "README.md").read_text("utf-8")
    assert "| validation | loss | perplexity | accuracy | macro F1 | step |" in card
    assert f"{after['accuracy']:.4f} | {after['macro_f1']:.4f} | {after['step']} |" in card
    assert "Scored validation rows: 12 of 12." in card
    table = card.partition("Predicted labels after training.")[2]
    (confusion,) = after["confusion"].values()
    for own, row in confusion.items():
        counts = [line for line in table.splitlines() if line.startswith(f"| `{own}` |")]
        assert len(counts) == 1
        numbers = [int(cell) for cell in counts[0].split("|")[2:-2]]
        assert sum(numbers) == sum(row.values())


@pytest.mark.parametrize(
    "more",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 4},
        {"micro_batch_tokens": 300},
        {"share_prefix": False},
    ],
)
def test_numbers_do_not_depend_on_micro_batches(more: dict[str, object], done: Done, place: Path) -> None:
    other = trained(
        place / f"out{sorted(more.items())}", place / "llama", place / "rows.jsonl", **{**SETTINGS, **more}
    )
    assert scores(other.looks) == scores(done.looks)


def evaluated(
    place: Path, family: str, monkeypatch: pytest.MonkeyPatch, **more: object
) -> tuple[list[dict[str, Any]], list[int]]:
    """The evaluations of a run of one step, and the tokens of each forward pass of the last. Units go through the model
    one by one, so that a forest has one row."""
    lengths: list[int] = []
    evaluate = loop.evaluate

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == VOCABULARY:
            lengths.append(inputs[0].numel())

    def counting(*inputs: Any) -> Any:
        lengths.clear()
        handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
        try:
            return evaluate(*inputs)
        finally:
            handle.remove()

    model = place / family
    if not model.exists():
        model_folder(model, family)
    settings = {
        "val_data_path": place / "held_out.jsonl",
        "num_epochs": None,
        "max_steps": 1,
        "val_set_size": None,
    }
    settings |= {"batch_size": 1, "micro_batch_size": 1}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", counting)
        out = place / f"count{len(list(place.iterdir()))}"
        done = trained(out, model, place / "train.jsonl", **{**SETTINGS, **settings, **more})
    return done.looks, lengths


@pytest.mark.parametrize(
    ("family", "most_rows", "more"),
    [
        ("llama", 500, {}),
        ("llama", 3, {"train_on_inputs": True}),
        ("llama", 500, {"train_on_inputs": True, "row_weights": "weight"}),
        ("bloom", 500, {}),
    ],
)
def test_loss_and_labels_come_from_one_pass_that_computes_no_token_twice(
    family: str,
    most_rows: int,
    more: dict[str, object],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss is that of a pass over the rows alone. A row's forest has the distinct beginnings of its prompt with
    each label and with its own answer, which here may be no label of the training rows; a model that takes no forests
    computes each of these sequences once."""
    weights = {"weight": 1} if "row_weights" in more else {}
    rows = [{**row, **weights} for row in reviews(54)]
    held_out = [{**row, "weight": 1 + number % 3} if weights else row for number, row in enumerate(rows[48:])]
    held_out[2]["label"] = "no idea"
    write_jsonl(place / "train.jsonl", rows[:48])
    write_jsonl(place / "held_out.jsonl", held_out)
    monkeypatch.setattr(label_accuracy, "MOST_ROWS", most_rows if family == "llama" else 3 * most_rows)
    looks, lengths = evaluated(place, family, monkeypatch, **more)
    monkeypatch.setattr(run, "label_trials", lambda *_, **__: {})
    alone, lengths_alone = evaluated(place, family, monkeypatch, **more)
    assert [look["loss"] for look in looks] == pytest.approx([look["loss"] for look in alone], rel=1e-6)
    assert "accuracy" in looks[-1] and "accuracy" not in alone[-1]
    scored = min(most_rows, len(held_out))
    (confusion,) = looks[-1]["confusion"].values()
    assert sum(sum(row.values()) for row in confusion.values()) == scored
    assert len(lengths_alone) == len(held_out)
    tokenizer = AutoTokenizer.from_pretrained(place / family)

    def with_answer(row: dict[str, object], label: object) -> tuple[int, ...]:
        prompt = tokenizer(TEMPLATE.partition("{label}")[0].format(review=row["review"]))["input_ids"]
        return (*prompt, *tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)

    spread = [number * len(held_out) // scored for number in range(scored)]
    expected = []
    for number, row in enumerate(held_out):
        answers = {row["label"], *LABELS} if number in spread else {row["label"]}
        answered = {with_answer(row, answer) for answer in answers}
        prefixes = {ids[:end] for ids in answered for end in range(1, len(ids) + 1)}
        expected += [len(prefixes)] if family == "llama" else [len(ids) for ids in answered]
    assert sorted(lengths) == sorted(expected)


def test_resumed_run_has_the_same_bytes(done: Done, place: Path) -> None:
    copy = place / "resumed"
    shutil.copytree(done.folder, copy)
    shutil.rmtree(max(copy.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])))
    record = copy / "run.json"
    text = record.read_text("utf-8").replace('"finished": true', '"finished": false')
    record.write_text(text, encoding="utf-8")
    again = trained(copy, place / "llama", place / "rows.jsonl", **SETTINGS, card_rows=1)
    assert "continuing after step" in again.out
    assert untimed((copy / "metrics.jsonl").read_bytes()) == untimed(
        (done.folder / "metrics.jsonl").read_bytes()
    )
    cards = [(folder / "README.md").read_text("utf-8") for folder in (copy, done.folder)]
    assert cards[0].replace("resumed", "out") == cards[1]


def test_turns_have_labels_too_and_sets_without_labels_have_none(place: Path) -> None:
    settings = {**SETTINGS, "num_epochs": None, "max_steps": 2}
    turns = trained(
        place / "turns", place / "chatml", place / "rows.jsonl", **{**settings, "template": TURNS}
    )
    assert {*turns.looks[-1]} >= {"accuracy", "macro_f1", "confusion"}
    rows = [{**row, "label": f"{row['label']} {number}"} for number, row in enumerate(reviews())]
    free = write_jsonl(place / "free.jsonl", rows)
    assert "accuracy" not in trained(place / "free", place / "llama", free, **settings).looks[-1]
    talk = [
        {
            "messages": [
                {"role": "user", "content": row["review"]},
                {"role": "assistant", "content": row["label"]},
                {"role": "user", "content": "sure?"},
                {"role": "assistant", "content": "yes" if number % 2 else "no"},
            ]
        }
        for number, row in enumerate(reviews())
    ]
    several = write_jsonl(place / "talk.jsonl", talk)
    chat = trained(place / "talk", place / "chatml", several, **{**settings, "template": "chat"})
    assert "accuracy" not in chat.looks[-1]
