"""What a run will write into its output folder, in bytes, known before weights are loaded."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yeonma.errors import UserError
from yeonma.files import free_bytes
from yeonma.run_folder.checkpoint import ALLOWANCE_BYTES, checkpoints, step_of
from yeonma.run_folder.output_folder import Start, bytes_going

FLOAT32_BYTES = 4
OPTIMIZER_PARTS = 2
"""AdamW keeps two numbers for each that is trained."""


@dataclass(frozen=True)
class Saves:
    """When a run saves, in steps, and how many checkpoints it keeps; `best`: one more, that of the lowest loss."""

    total_steps: int
    save_steps: int
    limit: int | None
    best: bool


def adapter_bytes(parameters: int, tokenizer: Any) -> int:
    """An adapter's weights, and the tokenizer's files beside them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        written = len(backend.to_str(pretty=True).encode())
    else:
        path = getattr(tokenizer, "vocab_file", None)
        written = os.path.getsize(path) if path and os.path.isfile(path) else 0
    return parameters * FLOAT32_BYTES + written


def stored_parameters(weights: Path) -> int:
    """The numbers in a safetensors file, by its header."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(each["shape"]) for name, each in header.items() if name != "__metadata__")


def most_at_once(saves: Saves, done: int, there: int) -> int:
    """The checkpoints that will be on the disk beyond the `there` of now, at most: rotation removes an old one only
    when the new one is whole. `done` steps are behind. Better losses in between, saved without a limit, are not known.
    """
    to_come = len({*range(saves.save_steps, saves.total_steps + 1, saves.save_steps), saves.total_steps})
    to_come -= done // saves.save_steps + (done == saves.total_steps and done % saves.save_steps > 0)
    if saves.limit is None:
        return to_come
    return min(to_come, max(1, saves.limit + saves.best + 1 - there))


def check_room(output: Path, start: Start, saves: Saves, parameters: int, tokenizer: Any) -> None:
    """Raises UserError where the run's checkpoints and its adapter will not fit into what is free."""
    adapter = adapter_bytes(parameters, tokenizer)
    checkpoint = adapter + OPTIMIZER_PARTS * parameters * FLOAT32_BYTES + ALLOWANCE_BYTES
    done = 0 if start.progress is None else start.progress.step
    there = sum(1 for each in checkpoints(output) if step_of(each) <= done)
    most = most_at_once(saves, done, there)
    needed, free = most * checkpoint + adapter, free_bytes(output) + bytes_going(output, start)
    if needed > free:
        what = (
            f"the run needs {needed:,} bytes here ({most:,} checkpoints of {checkpoint:,} at once, and the adapter), "
            f"and {free:,} are free"
        )
        cure = "make room, give another output_dir, or keep fewer checkpoints with --save_total_limit"
        raise UserError(what, place=f"output_dir {output}", cure=cure)
