"""Whole runs in the process: a tiny model folder, a small table, `yeonma sft`, and what it leaves behind."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY, tiny_model
from yeonma.cli import main

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;!?'\"#-_()[]{}/"
TEMPLATE = "below is an article.\n\n{document}\n\ntitle: {title}"
WORDS = ("storm", "harbour", "boats", "monday", "wind", "council", "library", "year", "model", "afternoon")

SAMPLE_TOKENS = 12
"""The length of the sample answers on the model cards of tests."""

SETTINGS: Mapping[str, object] = {
    "template": TEMPLATE,
    "batch_size": 4,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "learning_rate": 3e-3,
    "lora_r": 4,
    "lora_alpha": 8,
    "card_rows": 0,
}


TWO_EPOCHS: Mapping[str, object] = {
    "num_epochs": 2,
    "save_steps": 2,
    "eval_steps": 3,
    "val_set_size": 5,
    "lora_dropout": 0.1,
    "card_rows": 1,
}
"""More: dropout, evaluations and checkpoints within epochs, for runs that do not come to their end at once."""


def characters() -> PreTrainedTokenizerFast:
    """One token a character, fewer than the tiny models' 97; ids 0, 1 and 2 are theirs: pad, bos and eos."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS]
    assert len(names) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model_folder(place: Path, family: str = "llama", seed: int = 0) -> Path:
    """A model of tests/models.py and its tokenizer, as a folder to give to `--base_model`."""
    model = tiny_model(family, seed)
    if family != "gpt2":  # which learns them; with the others it is a number that nothing depends on
        model.config.max_position_embeddings = 512
    model.save_pretrained(place)
    characters().save_pretrained(place)
    return place


def articles(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of 1 to 12 words with titles of 1 to 4, no two alike."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 12))]
        rows.append(
            {"document": f"{number}. {' '.join(words)}.", "title": " ".join(words[: draw.randint(1, 4)])}
        )
    return rows


def write_jsonl(place: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return place


@dataclass(frozen=True)
class Done:
    """A run that has ended, with what it printed."""

    status: int
    folder: Path
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.folder)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if not line.get("evaluation")]

    @property
    def looks(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("evaluation")]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.steps]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")

    @property
    def weight_bytes(self) -> bytes:
        return (self.folder / "adapter_model.safetensors").read_bytes()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(metrics: bytes) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without how long it took and how much memory."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes")} for line in lines]


def unfinished_copy(run: Path, place: Path) -> Path:
    """A copy of a run's folder as if it had been killed just before its end: all files, not marked as finished."""
    shutil.copytree(run, place)
    record = place / "run.json"
    text = record.read_text("utf-8").replace('"finished": true', '"finished": false')
    record.write_text(text, encoding="utf-8")
    return place


def left_behind(output: Path, parent: Path | None = None) -> dict[str, Any]:
    """Every file of an output folder but log.txt, without where it lies (or lay), how long it took and how much
    memory."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*")):
        if path.is_file() and path != output / "log.txt":
            content = path.read_bytes().replace(str(parent or output.parent).encode(), b"")
            found[str(path.relative_to(output))] = content
    lines = untimed(found.pop("metrics.jsonl"))
    if "manifest.json" in found:  # the sums of files that name the place, or times, are of these
        sums = json.loads(found.pop("manifest.json"))["sha256"]
        found["manifest.json"] = {
            name: each
            for name, each in sums.items()
            if name not in ("README.md", "settings.yaml", "metrics.jsonl")
        }
    return {**found, "metrics.jsonl": lines}


def arguments(settings: Mapping[str, object]) -> list[str]:
    """Settings as they stand on a command line; those that are None are left out."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, list | dict):
            value = json.dumps(value)
        words += [f"--{name}", str(value)]
    return words


def sft(output: Path, base: Path, data: Path, **settings: object) -> Done:
    """`yeonma sft` with small settings, in this process. A mistake of the user's gives status 2."""
    wanted = {"base_model": base, "data_path": data, "output_dir": output, **SETTINGS, **settings}
    if settings.get("max_steps") is not None and "num_epochs" not in settings:
        del wanted["num_epochs"]
    return command(output, "sft", *arguments(wanted))


def trained(output: Path, base: Path, data: Path, **settings: object) -> Done:
    """The same; it must succeed."""
    done = sft(output, base, data, **settings)
    assert done.status == 0, done.err
    return done


def command(output: Path, *words: str) -> Done:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(list(words))
    return Done(status, output, out.getvalue(), err.getvalue())
