"""A run whose sample rows servers are asked, with a tokenizer that puts a BOS token first, and ways to spoil it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_model
from tests.runs import articles, characters, command, trained, write_jsonl

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BOS, EOS = 1, 2
SETTINGS = {"val_set_size": 4, "card_rows": 4, "num_epochs": 12, "learning_rate": 2e-2, "lora_r": 8}


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = characters()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def base_model(folder: Path, seed: int = 0) -> Path:
    model = tiny_model("llama", seed)
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    with_bos().save_pretrained(folder)
    return folder


def served_run(root: Path) -> Path:
    """The output folder of a run."""
    base, data = base_model(root / "base"), write_jsonl(root / "data.jsonl", articles(24))
    return trained(root / "run", base, data, **SETTINGS).folder


def other_run(root: Path) -> Path:
    """That of another adapter of the same base, which answers differently."""
    rows = [{**row, "title": row["title"][::-1] + "!"} for row in articles(24)]
    data = write_jsonl(root / "other.jsonl", rows)
    return trained(root / "other", root / "base", data, **SETTINGS).folder


def with_weights(run: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a run's folder with other weights."""
    shutil.copytree(run, folder)
    path = folder / "adapter_model.safetensors"
    save_file({key: change(key, tensor).contiguous() for key, tensor in load_file(path).items()}, path)
    return folder


def verify(folder: Path, url: str, *options: str) -> tuple[int, list[str], dict[str, str]]:
    """`yeonma verify --served`: the exit status, the causes, and the outcome of each check."""
    done = command(folder, "verify", str(folder), "--served", url, "--json", "true", *options)
    report = json.loads(done.out)
    return done.status, report["causes"], {one["check"]: one["outcome"] for one in report["findings"]}
