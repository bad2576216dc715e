"""The output folder: whose run it holds, and whether this one may begin, continue or stop.

OUT/run.json says what the mathematics of the run in it depends on, so that the same command continues it and
another is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yeonma.errors import Problem, UserError
from yeonma.train.checkpoint import RunState, checkpoints, newest_whole, read_state, write_text_atomically

RUN = "run.json"
OURS = (RUN, "settings.yaml", "metrics.jsonl", "loss.png", "README.md", "yeonma.json", "template.txt")
PEFTS = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Start:
    """Where to begin: a checkpoint to continue from, or neither; `finished` where nothing is left to do."""

    checkpoint: Path | None = None
    state: RunState | None = None
    finished: bool = False


def check_writable(output: Path, base: str) -> None:
    """Raises UserError, having left nothing behind, where the folder is the base's own or cannot be written."""
    if output.exists() and Path(base).is_dir() and output.resolve() == Path(base).resolve():
        raise UserError("it is the base model's own folder", place="output_dir", cure="give another folder")
    if output.exists() and not output.is_dir():
        raise UserError("it is a file", place=f"output_dir {output}", cure="give a folder")
    existing = output if output.exists() else next(parent for parent in output.absolute().parents if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError("cannot be written", place=str(existing), cure="give an output_dir that you may write to")


def find_start(
    output: Path, identity: Mapping[str, Any], resume: str, overwrite: bool, say: Callable[[str], None]
) -> Start:
    """What the folder holds for a run of this `identity`. Changes nothing.

    Raises UserError where it holds another run, or something that is no run at all.
    """
    if overwrite:
        return Start()
    explicit = None if resume in ("latest", "none") else Path(resume)
    if explicit is not None and not explicit.is_dir():
        raise UserError("no such checkpoint", place=f"resume_from_checkpoint {resume}", cure="give its folder, or latest")
    if not (output / RUN).is_file():
        foreign = [name for name in (*PEFTS, "config.json", "yeonma.json") if (output / name).exists()]
        if foreign or checkpoints(output):
            what = f"it already holds something else ({', '.join(foreign) or 'checkpoints'})"
            raise UserError(what, place=f"output_dir {output}", cure="give another folder, or --overwrite true")
    else:
        run = json.loads((output / RUN).read_text("utf-8"))
        _check_same(identity, run["identity"], str(output))
        if run["finished"] and explicit is None and resume == "latest":
            return Start(finished=True)
    if explicit is not None:
        state = read_state(explicit)
        _check_same(identity, state.identity, str(explicit))
        return Start(explicit, state)
    found = newest_whole(output, say) if resume == "latest" else None
    if found is None:
        return Start()
    _check_same(identity, found[1].identity, str(found[0]))
    return Start(*found)


def _check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any], place: str) -> None:
    mine = json.loads(json.dumps(mine))
    differences = [
        Problem(f"{key} was {theirs.get(key)!r} and is now {mine.get(key)!r}", place)
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]
    if differences:
        cure = "give the former settings to continue it, another output_dir, or --overwrite true"
        raise UserError([*differences, Problem("the folder holds another run", place, cure)])


def begin(output: Path, identity: Mapping[str, Any], settings_yaml: str, *, fresh: bool) -> None:
    """Make the folder this run's. `fresh` removes what a former run of ours left there, and nothing else."""
    output.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in (*OURS, *PEFTS):
            (output / name).unlink(missing_ok=True)
        for checkpoint in checkpoints(output):
            shutil.rmtree(checkpoint)
    for partial in output.glob(".*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    write_text_atomically(output / "settings.yaml", settings_yaml)
    mark(output, identity, finished=False)


def mark(output: Path, identity: Mapping[str, Any], *, finished: bool) -> None:
    text = json.dumps({"identity": identity, "finished": finished}, ensure_ascii=False, indent=2)
    write_text_atomically(output / RUN, text + "\n")


def install(output: Path, write: Callable[[Path], None]) -> None:
    """Write the final adapter beside and move its files into place one by one, yeonma.json last."""
    beside = output / ".final.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write(beside)
    for path in sorted(beside.iterdir(), key=lambda path: (path.name == "yeonma.json", path.name)):
        os.replace(path, output / path.name)
    beside.rmdir()
