"""Accuracy and macro F1 during training, where answers are labels: which label is the most likely after a prompt."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters import tiny_base
from tests.runs import Done, model_folder, trained, untimed, write_jsonl
from tests.tokenizers import CHATML, byte_level
from yeonma.data.classification import accuracy, confusion_matrix, macro_f1

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
