"""The preference benchmark's pairs, tokenised once by Yeonma's own rules: every contender trains on these ids.

Run as a script with a job file, this makes a folder that all contenders start from: `NAME.jsonl` (pairs), `NAME.json`
(their token ids, and the order of each epoch), `start/` (one LoRA start), `prepared.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from harness import answer_job
from workloads import loaded, tokenised

BATCH_SIZE = 4
SEED = 42
LEARNING_RATE = 1e-5
BETA = 0.1
CUTOFF_LEN = 4096
LORA_R = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MOST_ANSWER = 250
SHORT_PROMPT = (60, 400)
LONG_PROMPT = 700
TIMES = 4  # a long prompt is to be so many times as long as an answer

Row = dict[str, Any]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def answer(self) -> float:
        return (self.chosen + self.rejected) / 2


@dataclass(frozen=True)
class Workload:
    about: str
    pairs: str  # which pairs: two workloads may have the same
    epochs: int


WORKLOADS = {
    "short": Workload(
        f"prompts of {SHORT_PROMPT[0]} to {SHORT_PROMPT[1]} tokens, answers of less than {MOST_ANSWER}",
        "short",
        1,
    ),
    "long": Workload(
        f"prompts about {TIMES} times as long as an answer, of at most {LONG_PROMPT} tokens", "long", 1
    ),
    "epochs": Workload("the pairs of `short`, three epochs", "short", 3),
}


def select(pairs: str, lengths: Sequence[Lengths], count: int) -> list[int]:
    """The pairs of the data that suit, in its order. Raises ValueError where there are too few."""
    fitting = [i for i, pair in enumerate(lengths) if max(pair.chosen, pair.rejected) < MOST_ANSWER]
    if pairs == "short":
        low, high = SHORT_PROMPT
        fitting = [i for i in fitting if low <= lengths[i].prompt <= high]
    else:
        fitting = [i for i in fitting if lengths[i].prompt <= LONG_PROMPT]
        fitting.sort(key=lambda i: abs(math.log(lengths[i].prompt / lengths[i].answer / TIMES)))
    if len(fitting) < count:
        raise ValueError(f"{pairs} needs {count} pairs; the data has {len(fitting)} that suit it")
    return sorted(fitting[:count])


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make the folder of the module's docstring; returns what prepared.json holds."""
    from yeonma.model.load import LoraShape, add_lora

    folder = Path(job["folder"])
    model, tokenizer, about_model = loaded(job["model"])
    rows = read_pairs(Path(job["data"]))
    whole = tokenised(write_rows(folder / "all.jsonl", rows), folder, tokenizer, CUTOFF_LEN, pairs=True)
    numbers = sorted({int(number) - 1 for number in whole.store.row_numbers})
    lengths = [lengths_of(whole.store, unit) for unit in whole.units]
    written: dict[str, dict[str, Any]] = {}
    workloads = {}
    for name in job["workloads"]:
        workload = WORKLOADS[name]
        if workload.pairs not in written:
            chosen = [rows[numbers[i]] for i in select(workload.pairs, lengths, job["pairs"])]
            written[workload.pairs] = write_pairs(workload.pairs, chosen, folder, tokenizer)
        workloads[name] = {"about": workload.about, "epochs": workload.epochs, **written[workload.pairs]}
    # `yeonma dpo` draws the same numbers from the same seed.
    add_lora(model, LoraShape(LORA_R, LORA_R, 0.0, list(TARGETS)), SEED).save_pretrained(folder / "start")
    return {"model": about_model, "workloads": workloads}


def read_pairs(path: Path) -> list[Row]:
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """In ASCII: a byte order mark within a text, which the demo data has, is refused in a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def lengths_of(store: Any, unit: int) -> Lengths:
    start, stop = store.unit_starts[unit : unit + 2]
    prompt = int(store.prompt_lengths[start])
    chosen, rejected = (int(length) - prompt for length in store.lengths[start:stop])
    return Lengths(prompt, chosen, rejected)


def pair_ids(store: Any, unit: int) -> dict[str, list[int]]:
    """A pair as TRL's DPOTrainer holds it."""
    start = int(store.unit_starts[unit])
    prompt = int(store.prompt_lengths[start])
    chosen, rejected = (store.example(start + side).token_ids.tolist() for side in (0, 1))
    return {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}


def write_pairs(name: str, rows: Sequence[Row], folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write some pairs and their token ids; returns what describes them."""
    from yeonma.batch.plan import make_plan

    part = tokenised(write_rows(folder / f"{name}.jsonl", rows), folder, tokenizer, CUTOFF_LEN, pairs=True)
    store, units = part.store, part.units
    pairs = [pair_ids(store, unit) for unit in units]
    most = max(workload.epochs for workload in WORKLOADS.values())
    plan = make_plan(
        units,
        store.unit_lengths[units],
        batch_size=BATCH_SIZE,
        seed=SEED,
        num_epochs=most,
        max_steps=None,
    )
    place = {int(unit): number for number, unit in enumerate(units)}
    steps = [[place[int(unit)] for unit in step] for step in plan.steps()]
    per_epoch = plan.steps_per_epoch
    orders = [
        list(chain.from_iterable(steps[epoch * per_epoch : (epoch + 1) * per_epoch])) for epoch in range(most)
    ]
    (folder / f"{name}.json").write_text(json.dumps({"pairs": pairs, "orders": orders}), "utf-8")
    lengths = [lengths_of(store, unit) for unit in units]
    return {
        "pairs": len(pairs),
        "longest": max(pair.prompt + max(pair.chosen, pair.rejected) for pair in lengths),
        "prompt_tokens": mean(pair.prompt for pair in lengths),
        "answer_tokens": mean(pair.answer for pair in lengths),
    }


if __name__ == "__main__":
    answer_job(prepare, output="prepared.json")
