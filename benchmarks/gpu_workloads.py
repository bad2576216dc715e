"""Rows of random words with the lengths of real work, tokenised once by Yeonma's own rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from dpo_workloads import pair_ids
from gpu_shapes import LORA_R, SEED, word
from workloads import labelled, tokenised

TEMPLATE = "{prompt} {completion}"
CUTOFF_LEN = 16384
TINY = 32  # a tiny workload's lengths are so many times shorter
TINY_PACKED = 64


@dataclass(frozen=True)
class Workload:
    """`prompt` and `answer` are tokens, the end token among the answer's; a pair has two answers of that length."""

    about: str
    batch: int  # rows, or pairs, a step
    prompt: int
    answer: int
    spread: float = 0.0  # standard deviation of the lengths' logarithm
    pairs: bool = False
    packed: int | None = None  # tokens at once, the same for all who can pack
    steps: int | None = None  # where a step takes long; else as many as are asked for
    lora_alpha: int = LORA_R
    lora_dropout: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping

    @property
    def start(self) -> str:
        """The folder of the LoRA start: all have the same weights, and the config says the rest."""
        plain = (self.lora_alpha, self.lora_dropout) == (LORA_R, 0.0)
        return "start" if plain else f"start-{self.lora_alpha}-{self.lora_dropout:g}"


WORKLOADS = {
    "long": Workload("long prompts and short answers, 2048/32 tokens", 16, 2048, 32),
    "alpaca": Workload(
        "lengths as alpaca's: about 60 and 120 tokens, of wide spread", 128, 45, 80, spread=0.9
    ),
    "packed": Workload("the same kind of rows, 8192 tokens at once", 256, 45, 80, spread=0.9, packed=8192),
    "dpo": Workload("pairs of 1024/256/256 tokens", 16, 1024, 256, pairs=True),
    "nemo": Workload(
        "rows of 4096 tokens in NeMo AutoModel's published setting: LoRA alpha 32 and dropout 0.1, no clipping",
        *(32, 8, 4088),
        steps=5,
        lora_alpha=32,
        lora_dropout=0.1,
        max_grad_norm=0.0,
    ),
    "nemo-plain": Workload(
        "the same without dropout", 32, 8, 4088, steps=5, lora_alpha=32, max_grad_norm=0.0
    ),
}
USUAL = ("long", "alpaca", "packed", "dpo")


def of_size(work: Workload, tiny: bool) -> Workload:
    if not tiny:
        return work
    packed = work.packed and TINY_PACKED
    prompt, answer = max(6, work.prompt // TINY), max(3, work.answer // TINY)
    return replace(
        work,
        batch=16 if packed else 8,
        prompt=prompt,
        answer=answer,
        spread=work.spread / 2,
        packed=packed,
        steps=None,
    )


def prepare_workloads(
    folder: Path, tokenizer: Any, names: Sequence[str], steps: int, *, tiny: bool
) -> dict[str, Any]:
    return {name: _prepare(folder, tokenizer, name, of_size(WORKLOADS[name], tiny), steps) for name in names}


def rows_of(work: Workload, count: int, words: int) -> list[dict[str, str]]:
    draw = np.random.default_rng(SEED)

    def text(mean: int, fewer: int = 0) -> str:
        length = round(mean * float(np.exp(work.spread * draw.standard_normal()))) if work.spread else mean
        length = min(max(length, 3), 4096)
        return " ".join(word(int(number)) for number in draw.integers(1, words, length - fewer))

    rows = []
    for _ in range(count):
        prompt, answers = text(work.prompt), [text(work.answer, fewer=1) for _ in range(1 + work.pairs)]
        names = ("chosen", "rejected") if work.pairs else ("completion",)
        rows.append({"prompt": f"{prompt} ", **dict(zip(names, answers, strict=True))})
    return rows


def _prepare(folder: Path, tokenizer: Any, name: str, work: Workload, steps: int) -> dict[str, Any]:
    """Write a workload's rows (`NAME.jsonl`), and their token ids in the order of training (`NAME.json`)."""
    from yeonma.batch.plan import make_plan

    steps = work.steps or steps
    rows = rows_of(work, work.batch * steps, tokenizer.vocab_size - 1)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    part = tokenised(path, folder, tokenizer, CUTOFF_LEN, pairs=work.pairs)
    store, units = part.store, part.units
    plan = make_plan(
        units, store.unit_lengths[units], batch_size=work.batch, seed=SEED, num_epochs=1, max_steps=None
    )
    order = [int(unit) for step in plan.steps() for unit in step]
    examples = [pair_ids(store, unit) if work.pairs else labelled(store.example(unit)) for unit in order]
    (folder / f"{name}.json").write_text(json.dumps(examples), "utf-8")
    described = []
    for step in plan.steps():
        examples = store.examples_of(step)
        lengths = store.lengths[examples].astype(int)
        described.append(
            {
                "tokens": int(lengths.sum()),
                "trained_tokens": int(store.trained_counts[examples].sum()),
                "squares": int((lengths**2).sum()),
            }
        )
    return {
        "about": work.about,
        "batch": work.batch,
        "packed": work.packed,
        "pairs": work.pairs,
        "start": work.start,
        "lora_alpha": work.lora_alpha,
        "lora_dropout": work.lora_dropout,
        "max_grad_norm": work.max_grad_norm,
        "steps": described,
    }
