"""The output folder: whose run it holds, and whether this one may begin, continue or stop.

OUT/run.json says what the mathematics of the run in it depends on, so that the same command continues it and
another is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yeonma.errors import Log, Problem, UserError
from yeonma.files import (
    check_free,
    delete,
    disk_errors_as_user_errors,
    file_hash,
    files_in,
    hashes_of,
    sync,
    sync_and_verify,
    user_path,
)
from yeonma.run_folder.checkpoint import (
    GOES_ON,
    AdapterWriter,
    RunProgress,
    checkpoints,
    newest_whole,
    read_whole,
    remove,
    step_of,
    sweep,
    write_text_atomically,
)

RUN = "run.json"
BEFORE_THE_CHOICE = {"quantization": "none", "optimizer": "adamw"}
"""What runs of earlier versions had, which do not say so."""
SEAL = "manifest.json"
# What a run leaves behind beside run.json and checkpoints, as patterns.
OURS = (
    "settings.yaml",
    "metrics.jsonl",
    "trained_rows.jsonl",
    "loss.png",
    "README.md",
    "yeonma.json",
    "template.txt",
    "samples.json",
    "manifest.json",
    "adapter_*",
)
TOKENIZERS = (
    "tokenizer*",
    "chat_template.jinja",
    "base_chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


@dataclass(frozen=True)
class Start:
    """Where to begin: a checkpoint to continue from, or neither; `finished` where nothing is left to do."""

    checkpoint: Path | None = None
    progress: RunProgress | None = None
    finished: bool = False


def find_start(output: Path, identity: Mapping[str, Any], resume: str, overwrite: bool, say: Log) -> Start:
    """What the folder holds for a run of this `identity`. Changes nothing.

    Raises UserError where it holds another run, something that is no run at all, or damaged checkpoints alone.
    """
    explicit = None if resume in ("latest", "none") else user_path(resume, "resume_from_checkpoint")
    if explicit is not None:
        _check_explicit(explicit, output, overwrite)
    if overwrite:
        return Start()
    if not (output / RUN).is_file():
        foreign = [*_left_behind(output), *checkpoints(output), *output.glob("config.json")]
        if foreign:
            names = ", ".join(path.name for path in foreign)
            cure = "give another folder, or --overwrite true"
            what = f"it holds files that no run left there ({names})"
            raise UserError(what, place=f"output_dir {output}", cure=cure)
    else:
        former, finished = _read_run(output / RUN)
        _check_same(identity, former, str(output))
        if finished and resume == "latest":
            return Start(finished=True)
    if explicit is not None:
        state = read_whole(explicit)
        _check_same(identity, state.identity, str(explicit))
        return Start(explicit, state)
    newest = newest_whole(output, say) if resume == "latest" else None
    if newest is None:
        if resume == "latest" and (damaged := checkpoints(output)):
            names = ", ".join(path.name for path in damaged)
            cure = "mend them, or give --resume_from_checkpoint none, which deletes them and begins anew"
            raise UserError(
                f"none of its checkpoints is whole ({names})", place=f"output_dir {output}", cure=cure
            )
        return Start()
    _check_same(identity, newest[1].identity, str(newest[0]))
    return Start(*newest)


def _check_explicit(checkpoint: Path, output: Path, overwrite: bool) -> None:
    place = f"resume_from_checkpoint {checkpoint}"
    if overwrite:
        raise UserError("overwrite would remove it", place=place, cure="give one of the two")
    if not checkpoint.is_dir():
        raise UserError("no such checkpoint", place=place, cure="give its folder, or latest")
    if checkpoint.resolve().parent != output.resolve():  # its metrics and its best checkpoint lie there
        raise UserError(
            "it belongs to another output_dir", place=place, cure=f"give --output_dir {checkpoint.parent}"
        )


def _read_run(path: Path) -> tuple[dict[str, Any], bool]:
    """The identity of the run that the folder holds, and whether it is finished."""
    try:
        run = json.loads(path.read_text("utf-8"))
        return dict(run["identity"]), bool(run["finished"])
    except (ValueError, KeyError, TypeError) as error:
        cure = "give another output_dir, or --overwrite true"
        raise UserError(f"damaged ({error})", place=str(path), cure=cure) from error


def _check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any], place: str) -> None:
    mine = json.loads(json.dumps(mine))
    theirs = {**{name: value for name, value in BEFORE_THE_CHOICE.items() if name in mine}, **theirs}
    differences = [
        Problem(_difference(key, theirs.get(key), mine.get(key)), place)
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]
    if differences:
        cure = "give the former settings to continue it, another output_dir, or --overwrite true"
        raise UserError([*differences, Problem("the folder holds another run", place, cure)])


def _difference(key: str, before: object, now: object) -> str:
    if key.startswith("content of"):  # SHA-256 sums say nothing to a reader
        return f"the {key} has changed"
    return f"{key} was {before!r} and is now {now!r}"


def begin(output: Path, identity: Mapping[str, Any], settings_yaml: str, start: Start) -> None:
    """Make the folder this run's. What a former run of ours left there goes, and nothing else: all of it where the
    run starts anew, else the checkpoints after the one to continue from, whose steps are done again."""
    output.mkdir(parents=True, exist_ok=True)
    mark(output, identity, finished=False)
    (output / SEAL).unlink(missing_ok=True)  # before anything that it speaks of changes
    sync(output)
    files, folders = _going(output, start)
    for path in files:
        path.unlink(missing_ok=True)
    for checkpoint in folders:
        remove(checkpoint)
    sweep(output)
    write_text_atomically(output / "settings.yaml", settings_yaml)


def bytes_going(output: Path, start: Start) -> int:
    """What `begin` will make free."""
    files, folders = _going(output, start)
    return sum(
        path.stat().st_size for path in (*files, *(file for each in folders for file in files_in(each)))
    )


def _going(output: Path, start: Start) -> tuple[list[Path], list[Path]]:
    """The files and checkpoints that the run has no use for."""
    files = _left_behind(output) if start.checkpoint is None else []
    return files, [
        each for each in checkpoints(output) if start.progress is None or step_of(each) > start.progress.step
    ]


def _left_behind(output: Path) -> list[Path]:
    paths = (path for pattern in (*OURS, *TOKENIZERS) for path in output.glob(pattern))
    return sorted(path for path in paths if path.is_file())


def mark(output: Path, identity: Mapping[str, Any], *, finished: bool) -> None:
    text = json.dumps({"identity": identity, "finished": finished}, ensure_ascii=False, indent=2)
    write_text_atomically(output / RUN, text + "\n")


def seal(output: Path) -> None:
    """Write manifest.json: the SHA-256 of every file that the run leaves in the folder itself, all of them flushed to
    the disk. `begin` takes it away: where run.json says that the run is finished, it is true of what the run left."""
    hashes = {}
    for path in _left_behind(output):
        if path.name != SEAL:
            sync(path)
            hashes[path.relative_to(output).as_posix()] = file_hash(path)
    sync(output)
    write_text_atomically(output / SEAL, json.dumps({"sha256": hashes}, indent=2) + "\n")
    sync(output)


def install(output: Path, adapter: AdapterWriter) -> None:
    """Write the final adapter beside, read it back, and move its files into place one by one, yeonma.json last.

    A reader meanwhile may see files of both; those of one run differ in weights alone. Raises UserError where the disk
    is full or fails.
    """
    beside = output / ".final.partial"
    delete(beside)
    cure = f"make room, {GOES_ON}"
    check_free(output, adapter.about_bytes, "the adapter", cure)
    with disk_errors_as_user_errors(output, "the adapter", adapter.about_bytes, cure):
        try:
            beside.mkdir()
            adapter.write(beside)
            sync_and_verify(beside, hashes_of(beside))
            for path in sorted(files_in(beside), key=lambda path: (path.name == "yeonma.json", path)):
                place = output / path.relative_to(beside)
                place.parent.mkdir(exist_ok=True)
                os.replace(path, place)
                if place.parent != output:
                    sync(place.parent)
            sync(output)
        finally:
            delete(beside)
