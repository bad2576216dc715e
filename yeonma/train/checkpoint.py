"""Checkpoints: an adapter folder with optimizer, schedule, random state and position, written beside and renamed.

OUT/checkpoint-N/
    adapter_model.safetensors ... yeonma.json     a whole adapter folder, loadable by plain PEFT
    optimizer.safetensors                         AdamW's state by parameter name
    random.safetensors                            torch's random state of every process
    state.json                                    step, schedule, best-so-far, what the run was
    manifest.json                                 SHA-256 of every other file; written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from yeonma.errors import UserError
from yeonma.text.files import file_hash
from yeonma.tokens.store import sync

STATE, OPTIMIZER, RANDOM, MANIFEST = (
    "state.json",
    "optimizer.safetensors",
    "random.safetensors",
    "manifest.json",
)


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` updates."""

    step: int
    schedule: dict[str, Any]
    best_loss: float | None
    best_step: int | None
    evaluations_without_gain: int
    identity: dict[str, Any]  # the settings and data that the mathematics depends on
    surroundings: dict[str, str | int] = field(default_factory=dict)  # what equal bytes depend on besides
    evaluation_due: bool = (
        False  # the run was stopped before it had looked at the validation rows after this step
    )


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints by name, oldest first. What is inside is checked when one is read."""
    found = [
        path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def write_checkpoint(
    output: Path,
    state: RunState,
    write_adapter: Callable[[Path], None],
    optimizer: Mapping[str, torch.Tensor],
    random: Mapping[str, torch.Tensor],
) -> Path:
    """Write beside its place, flush to the disk, rename. A checkpoint of the same step is replaced."""
    place = checkpoint_path(output, state.step)
    beside = output / f".{place.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write_adapter(beside)
    save_file(dict(optimizer), beside / OPTIMIZER)
    save_file(dict(random), beside / RANDOM)
    (beside / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    hashes = {path.name: file_hash(path) for path in sorted(beside.iterdir())}
    (beside / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
    for path in beside.iterdir():
        sync(path)
    sync(beside)
    if place.exists():
        shutil.rmtree(place)
    beside.rename(place)
    sync(output)
    return place


def read_state(checkpoint: Path) -> RunState:
    """Check every file against the manifest, then read the state. Raises UserError naming the first damaged file."""
    name = MANIFEST
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text("utf-8"))["sha256"]
        for name, expected in hashes.items():
            if file_hash(checkpoint / name) != expected:
                raise UserError("its SHA-256 is not the manifest's", place=str(checkpoint / name))
        name = STATE
        return RunState(**json.loads((checkpoint / STATE).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"it cannot be read ({error})", place=str(checkpoint / name)) from error


def newest_whole(output: Path, say: Callable[[str], None]) -> tuple[Path, RunState] | None:
    """The newest checkpoint to continue from; damaged ones are named and passed over."""
    for checkpoint in reversed(checkpoints(output)):
        try:
            return checkpoint, read_whole(checkpoint)
        except UserError as error:
            say(f"passing over {checkpoint.name}, which is damaged: {error}")
    return None


def read_whole(checkpoint: Path) -> RunState:
    """The state of a checkpoint to continue from. The best one so far must be whole too: it may become the result.

    Raises UserError naming the first damaged file.
    """
    state = read_state(checkpoint)
    if state.best_step not in (None, state.step):
        read_state(checkpoint_path(checkpoint.parent, state.best_step))
    return state


def read_tensors(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(optimizer, random) as written."""
    return load_file(checkpoint / OPTIMIZER), load_file(checkpoint / RANDOM)


def rotate(output: Path, limit: int | None, keep: int | None) -> None:
    """Remove the oldest checkpoints over `limit`, never the one of step `keep` (the best) nor the newest."""
    if limit is None:
        return
    for checkpoint in checkpoints(output)[: -max(limit, 1)]:
        if keep is None or checkpoint != checkpoint_path(output, keep):
            shutil.rmtree(checkpoint)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]
) -> dict[str, torch.Tensor]:
    """Optimizer state as flat tensors, `name/exp_avg` and so on."""
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.Tensor, str],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        parameter = by_name[name]
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameter][what] = value if what == "step" else value.to(parameter.device)


def write_text_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
