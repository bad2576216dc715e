"""Checkpoints: the folder of an adapter or a model with the state of optimizer, schedule and random numbers, written
under a hidden name and then renamed.

OUT/checkpoint-N/
    adapter_model.safetensors ... yeonma.json     a whole adapter folder, loadable by plain PEFT; of a fully fine-tuned
                                                  model, a whole model folder, loadable by transformers
    optimizer.safetensors                         the optimizer's state by parameter name
    random.safetensors                            torch's random state of every process
    state.json                                    step, schedule, best step, identity of the run
    manifest.json                                 SHA-256 of every other file; written last

An incomplete checkpoint has a hidden name: `.checkpoint-N.partial` is being written, `.checkpoint-N.removed` is being
deleted, and `.checkpoint-N.former` is about to be replaced by a new one of the same step. A killed run leaves such
folders behind. The next run gives a former one its name back, unless it was replaced (`recover`), and deletes the rest
(`sweep`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import save_file

from yeonma.errors import Log, UserError, brief, system_reason
from yeonma.files import (
    check_free,
    delete,
    disk_errors_as_user_errors,
    file_hash,
    give_usual_permissions,
    hashes_of,
    hidden_path,
    kind_of,
    read_regular,
    replace_file,
    sync,
    sync_and_verify,
)
from yeonma.messages import later, tr
from yeonma.run_folder.entries import (
    PARTIAL_FILES,
    PARTIAL_FINAL,
    is_checkpoint,
    is_unfinished,
    passed_over,
)
from yeonma.run_folder.run_log import THEN_CONTINUE, LogSums
from yeonma.run_folder.state_checks import check_state

STATE, OPTIMIZER, RANDOM, MANIFEST = (
    "state.json",
    "optimizer.safetensors",
    "random.safetensors",
    "manifest.json",
)

NEEDED = (STATE, OPTIMIZER, RANDOM)
"""Files without which a run cannot resume. A manifest that does not list them all is damaged."""
NEEDED_WEIGHTS = {
    "adapter_config.json": ("adapter_model.safetensors",),
    "config.json": ("model.safetensors", "model.safetensors.index.json"),
}
"""The config of an adapter or a model, and the files of which one must be there as well."""
ALLOWANCE_BYTES = 1 << 20
"""For small files and the file system's overhead."""
JSON_KEYS = {"environment": "surroundings"}
"""Keys of state.json that differ from the attribute of RunProgress."""


@dataclass(frozen=True)
class AdapterWriter:
    """Writes the files of an adapter or a model into an existing folder. `about_bytes`: their size, without small
    files."""

    write: Callable[[Path], None]
    about_bytes: int
    noun: str = later("adapter")
    gather: Callable[[], None] = lambda: None
    """Called by all processes before the first one writes: brings what they share out to it."""


@dataclass(frozen=True)
class RunProgress:
    """The state of a run after `step` updates, as state.json records it."""

    step: int
    schedule: dict[str, Any]
    best_loss: float | None
    best_step: int | None
    evaluations_without_gain: int
    identity: dict[str, Any]
    """What the result of the run depends on, as in run.json."""
    environment: dict[str, str | int] = field(default_factory=dict)
    """What equal bits depend on besides; `surroundings` in state.json."""
    micro_batches: list[int] = field(default_factory=list)
    """The `micro_batch_size` of the settings, then what fits into each process's memory."""
    micro_batch_tokens: list[int] = field(default_factory=list)
    """The token budget of each process; empty unless `micro_batch_tokens` is auto."""
    evaluation_due: bool = False
    """Whether the run stopped before the evaluation that follows this step."""
    carried: dict[str, float] = field(default_factory=dict)
    """The numbers that the objective carries from step to step."""
    logs: LogSums = field(default_factory=dict)
    """Of the lines in the run's logs up to this step. Empty in checkpoints of earlier versions."""
    best_score: float | None = None
    """The metric of `best_step`, if `keep_best` names one; not written if it is None."""

    def to_json(self) -> str:
        values = asdict(self)
        if self.best_score is None:
            del values["best_score"]
        return json.dumps({JSON_KEYS.get(key, key): value for key, value in values.items()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> RunProgress:
        """Raises ValueError, TypeError or AttributeError for anything but the state of a run."""
        names = {key: name for name, key in JSON_KEYS.items()}
        state = cls(**{names.get(key, key): value for key, value in json.loads(text).items()})
        check_state({entry.name: getattr(state, entry.name) for entry in fields(cls)})
        return state


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def checkpoints(output: Path) -> list[Path]:
    """The folder's checkpoints by name, oldest first. Their files are checked when one is read."""
    paths = [
        path for path in output.glob("checkpoint-*") if is_checkpoint(path.name) and kind_of(path) == "folder"
    ]
    return sorted(paths, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def write_checkpoint(
    output: Path,
    state: RunProgress,
    adapter: AdapterWriter,
    optimizer: Mapping[str, torch.Tensor],
    random: Mapping[str, torch.Tensor],
) -> Path:
    """Writes a checkpoint under a hidden name, syncs it to disk, reads it back and renames it. Replaces a checkpoint of
    the same step.

    Raises UserError if the disk is full or fails. No other checkpoint is touched then, and nothing of this one stays.
    """
    checkpoint = checkpoint_path(output, state.step)
    partial = hidden_path(checkpoint, "partial")
    tensors = sum(tensor.nbytes for tensor in (*optimizer.values(), *random.values()))
    needed, what = (
        adapter.about_bytes + tensors + ALLOWANCE_BYTES,
        tr("the checkpoint of step {step}", step=state.step),
    )
    cure = tr("make room or lower --save_total_limit")
    delete(partial)
    whole_cure = tr(
        "make room or lower --save_total_limit, then run the same command to continue from the last checkpoint"
    )
    check_free(output, needed, what, whole_cure)
    with disk_errors_as_user_errors(output, what, needed, cure, THEN_CONTINUE):
        try:
            partial.mkdir(parents=True)
            adapter.write(partial)
            save_file(dict(optimizer), partial / OPTIMIZER)
            save_file(dict(random), partial / RANDOM)
            (partial / STATE).write_text(state.to_json() + "\n", encoding="utf-8")
            hashes = hashes_of(partial)
            (partial / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
            give_usual_permissions(partial)
            sync_and_verify(partial, {**hashes, MANIFEST: file_hash(partial / MANIFEST)})
            _rename(partial, checkpoint)
        except Exception:
            delete(partial)
            raise
    return checkpoint


def _rename(partial: Path, checkpoint: Path) -> None:
    """Gives a complete checkpoint its name. Until then `recover` can restore an old one of the same step."""
    former = hidden_path(checkpoint, "former")
    if checkpoint.exists():
        delete(former)
        checkpoint.rename(former)
        sync(checkpoint.parent)
    try:
        partial.rename(checkpoint)
    finally:
        recover(checkpoint.parent)
    sync(checkpoint.parent)
    delete(former)


def recover(output: Path) -> None:
    """Gives checkpoints their names back that an interrupted save was about to replace."""
    for former in output.glob(".checkpoint-*.former"):
        place = output / former.name[1 : -len(".former")]
        if is_checkpoint(place.name) and not kind_of(place):
            former.rename(place)
            sync(output)


def sweep(output: Path) -> None:
    """Deletes what interrupted saves and removals left behind."""
    for path in output.iterdir():
        if is_unfinished(path.name) or path.name in (PARTIAL_FINAL, *PARTIAL_FILES):
            delete(path)


def read_state(checkpoint: Path) -> RunProgress:
    """Verifies every file of the manifest and reads the state. Raises UserError that names the first damaged file, or
    the state if it is of another step than the folder's name says.

    Files that the manifest does not list are ignored. They may be the user's.
    """
    name = MANIFEST
    try:
        hashes = json.loads(read_regular(checkpoint / MANIFEST))["sha256"]
        if missing := _missing(hashes):
            raise UserError(
                tr("it has no SHA-256 of {missing}", missing=", ".join(missing)),
                place=str(checkpoint / MANIFEST),
            )
        for name, expected in hashes.items():
            path = checkpoint / name
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise UserError(tr("it lists {name}", name=brief(name)), place=str(checkpoint / MANIFEST))
            if (kind := kind_of(path)) != "file":
                what = (
                    tr("it is a {kind}, not a file", kind=tr(kind))
                    if kind
                    else tr("it is missing, but the manifest lists it")
                )
                raise UserError(what, place=str(path))
            if file_hash(path) != expected:
                raise UserError(tr("its SHA-256 differs from the manifest's"), place=str(path))
        name = STATE
        state = RunProgress.from_json(read_regular(checkpoint / STATE).decode())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            tr("it cannot be read ({error})", error=system_reason(error)), place=str(checkpoint / name)
        ) from error
    if is_checkpoint(checkpoint.name) and state.step != step_of(checkpoint):
        raise UserError(
            tr("it is the state of step {step}: the folder has another checkpoint's name", step=state.step),
            place=str(checkpoint / STATE),
        )
    return state


def _missing(names: Collection[str]) -> list[str]:
    """The files without which a run cannot resume, and that are not among the names."""
    missing = sorted({*NEEDED} - {*names})
    kinds = {config: files for config, files in NEEDED_WEIGHTS.items() if config in names}
    if not kinds:
        return [*missing, min(NEEDED_WEIGHTS)]
    return missing + [files[0] for files in kinds.values() if not {*files} & {*names}]


def newest_whole(output: Path, log: Log) -> tuple[Path, RunProgress] | None:
    """The newest undamaged checkpoint and its state. Logs and skips damaged ones, and names that no run gives."""
    for name in passed_over(output) if output.is_dir() else ():
        log(
            tr(
                "passing over {name}: a run names its checkpoints checkpoint-1, checkpoint-2 and so on",
                name=name,
            )
        )
    for checkpoint in reversed(checkpoints(output)):
        try:
            return checkpoint, read_whole(checkpoint)
        except UserError as error:
            log(
                tr(
                    "skipping {checkpoint}, which is damaged: {error}",
                    checkpoint=checkpoint.name,
                    error=error,
                )
            )
    return None


def read_whole(checkpoint: Path) -> RunProgress:
    """The state of a checkpoint to resume from. The best checkpoint so far must be undamaged too, because it may become
    the result. Raises UserError that names the first damaged file.
    """
    state = read_state(checkpoint)
    if state.best_step not in (None, state.step):
        read_state(checkpoint_path(checkpoint.parent, state.best_step))
    return state


def rotate(output: Path, limit: int | None, keep: int | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`, but never the newest, nor that of step `keep` (the best).

    Part of a save, and of a start: a run that was killed between the two has rotated when it continues. The newest must
    have been verified, by `write_checkpoint` or by reading it, so that the run can resume without the deleted ones.
    """
    if limit is None:
        return
    for checkpoint in checkpoints(output)[: -max(limit, 1)]:
        if keep is None or checkpoint != checkpoint_path(output, keep):
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Hides a checkpoint, then deletes it, so that no incomplete one is ever visible. `sweep` retries what is left."""
    removed = hidden_path(checkpoint, "removed")
    delete(removed)
    checkpoint.rename(removed)
    sync(checkpoint.parent)
    delete(removed)


def write_text_atomically(path: Path, text: str) -> None:
    """Raises OSError if the file cannot be written; it then keeps its old text."""
    replace_file(path, text.encode())
