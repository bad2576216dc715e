"""Checkpoints: an adapter folder with optimizer, schedule, random state and position, written beside and renamed.

OUT/checkpoint-N/
    adapter_model.safetensors ... yeonma.json     a whole adapter folder, loadable by plain PEFT
    optimizer.safetensors                         the optimizer's state by parameter name
    random.safetensors                            torch's random state of every process
    state.json                                    step, schedule, best-so-far, what the run was
    manifest.json                                 SHA-256 of every other file; written last

What is not whole has a hidden name: `.checkpoint-N.partial` is being written, `.checkpoint-N.removed` being deleted,
and `.checkpoint-N.former` is the old one while another of the same step takes its place. A kill leaves such names; the
next run of the folder puts a former one back where nothing has taken its place (`recover`), and deletes the rest
(`sweep`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from yeonma.errors import Log, UserError
from yeonma.files import (
    check_free,
    delete,
    disk_errors_as_user_errors,
    file_hash,
    hashes_of,
    hidden_path,
    replace_file,
    sync,
    sync_and_verify,
)

STATE, OPTIMIZER, RANDOM, MANIFEST = (
    "state.json",
    "optimizer.safetensors",
    "random.safetensors",
    "manifest.json",
)


NEEDED = (STATE, OPTIMIZER, RANDOM, "adapter_model.safetensors", "adapter_config.json")
"""What a run cannot go on without: a manifest that lacks one of them is damaged."""
LEFTOVERS = (
    *(f".checkpoint-*.{state}" for state in ("partial", "removed", "former")),
    ".final.partial",
    *(f".{name}.partial" for name in ("run.json", "settings.yaml", "README.md", "loss.svg", "loss.png")),
)
ALLOWANCE_BYTES = 1 << 20
"""For the small files and the file system's own blocks."""
GOES_ON = "then run the same command to continue from the last checkpoint"


@dataclass(frozen=True)
class AdapterWriter:
    """Writes an adapter's files into an existing folder; `about_bytes` is what they take, small ones left out."""

    write: Callable[[Path], None]
    about_bytes: int


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: after `step` updates."""

    step: int
    schedule: dict[str, Any]
    best_loss: float | None
    best_step: int | None
    evaluations_without_gain: int
    identity: dict[str, Any]  # the settings and data that the mathematics depends on
    surroundings: dict[str, str | int] = field(default_factory=dict)  # what equal bytes depend on besides
    micro_batches: list[int] = field(
        default_factory=list
    )  # what was asked for, then what each process had room for
    micro_batch_tokens: list[int] = field(
        default_factory=list
    )  # the tokens that each process had room for, where they were its own choice
    evaluation_due: bool = (
        False  # the run was stopped before it had looked at the validation rows after this step
    )


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints by name, oldest first. What is inside is checked when one is read."""
    whole = [
        path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def write_checkpoint(
    output: Path,
    state: RunProgress,
    adapter: AdapterWriter,
    optimizer: Mapping[str, torch.Tensor],
    random: Mapping[str, torch.Tensor],
) -> Path:
    """Write beside its place, flush to the disk, read back, rename. A checkpoint of the same step is replaced.

    Raises UserError where the disk is full or fails: no other checkpoint has then been touched, and nothing is left of
    this one.
    """
    place = checkpoint_path(output, state.step)
    beside = hidden_path(place, "partial")
    tensors = sum(tensor.nbytes for tensor in (*optimizer.values(), *random.values()))
    needed, what = adapter.about_bytes + tensors + ALLOWANCE_BYTES, f"the checkpoint of step {state.step}"
    cure = f"make room or lower --save_total_limit, {GOES_ON}"
    delete(beside)
    check_free(output, needed, what, cure)
    with disk_errors_as_user_errors(output, what, needed, cure):
        try:
            beside.mkdir(parents=True)
            adapter.write(beside)
            save_file(dict(optimizer), beside / OPTIMIZER)
            save_file(dict(random), beside / RANDOM)
            (beside / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
            hashes = hashes_of(beside)
            (beside / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
            sync_and_verify(beside, {**hashes, MANIFEST: file_hash(beside / MANIFEST)})
            _put(beside, place)
        except Exception:
            delete(beside)
            raise
    return place


def _put(beside: Path, place: Path) -> None:
    """Give a whole checkpoint its name. No moment is without one: an old one stays findable until then (`recover`)."""
    former = hidden_path(place, "former")
    if place.exists():
        delete(former)
        place.rename(former)
        sync(place.parent)
    try:
        beside.rename(place)
    finally:
        recover(place.parent)
    sync(place.parent)
    delete(former)


def recover(output: Path) -> None:
    """Give checkpoints their names back that a save was about to replace when it ended."""
    for former in output.glob(".checkpoint-*.former"):
        place = output / former.name[1 : -len(".former")]
        if not place.exists():
            former.rename(place)
            sync(output)


def sweep(output: Path) -> None:
    """Delete what saves and removals left that did not come to their end."""
    for pattern in LEFTOVERS:
        for path in output.glob(pattern):
            delete(path)


def read_state(checkpoint: Path) -> RunProgress:
    """Check every file against the manifest, then read the state. Raises UserError naming the first damaged file.

    A file that the manifest does not name is not looked at, here nor by what continues a run: it may be the user's.
    """
    name = MANIFEST
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text("utf-8"))["sha256"]
        if lacking := sorted({*NEEDED} - hashes.keys()):
            raise UserError(f"it has no SHA-256 of {', '.join(lacking)}", place=str(checkpoint / MANIFEST))
        for name, expected in hashes.items():
            if not (checkpoint / name).is_file():
                raise UserError("it is missing, and the manifest names it", place=str(checkpoint / name))
            if file_hash(checkpoint / name) != expected:
                raise UserError("its SHA-256 is not the manifest's", place=str(checkpoint / name))
        name = STATE
        return RunProgress(**json.loads((checkpoint / STATE).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"it cannot be read ({error})", place=str(checkpoint / name)) from error


def newest_whole(output: Path, say: Log) -> tuple[Path, RunProgress] | None:
    """The newest checkpoint to continue from; damaged ones are named and passed over."""
    for checkpoint in reversed(checkpoints(output)):
        try:
            return checkpoint, read_whole(checkpoint)
        except UserError as error:
            say(f"passing over {checkpoint.name}, which is damaged: {error}")
    return None


def read_whole(checkpoint: Path) -> RunProgress:
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
    """Remove the oldest checkpoints over `limit`, never the one of step `keep` (the best) nor the newest.

    The newest is one that `write_checkpoint` has just read back: what is removed here is not needed to go on.
    """
    if limit is None:
        return
    for checkpoint in checkpoints(output)[: -max(limit, 1)]:
        if keep is None or checkpoint != checkpoint_path(output, keep):
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Out of sight first, then deleted, so that half of one is never found. `sweep` tries again what stays."""
    removed = hidden_path(checkpoint, "removed")
    delete(removed)
    checkpoint.rename(removed)
    sync(checkpoint.parent)
    delete(removed)


def write_text_atomically(path: Path, text: str) -> None:
    """Raises OSError where it cannot be written; the old text stays then."""
    replace_file(path, text.encode())
