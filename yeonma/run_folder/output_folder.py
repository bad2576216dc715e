"""The output folder: whether a run may begin there, continue or is finished, and whether the disk has room for it.

OUT/run.json records what the result of the run depends on. The same command continues the run; a command with a
different result is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yeonma.config.metric_names import is_built_in
from yeonma.errors import Log, Problem, UserError, brief
from yeonma.files import (
    check_free,
    delete,
    disk_errors_as_user_errors,
    file_hash,
    files_in,
    free_bytes,
    give_usual_permissions,
    hashes_of,
    kind_of,
    read_regular,
    sync,
    sync_and_verify,
    user_path,
)
from yeonma.messages import counted, later, tr
from yeonma.model.base_content import changes, content_of, listed
from yeonma.run_folder.checkpoint import (
    ALLOWANCE_BYTES,
    STATE,
    AdapterWriter,
    RunProgress,
    checkpoints,
    newest_whole,
    read_whole,
    remove,
    rotate,
    step_of,
    sweep,
    write_text_atomically,
)
from yeonma.run_folder.entries import (
    OURS,
    PARTIAL_FINAL,
    RUN,
    SEAL,
    TOKENIZERS,
    is_model_file,
    passed_over,
)
from yeonma.run_folder.run_log import THEN_CONTINUE, check_logs
from yeonma.shown import json_text

EARLIER_DEFAULTS = {
    "quantization": "none",
    "train": "lora",
    "optimizer": "adamw",
    "lora_experts": True,
    "lora_layers": None,
    "exclude_modules": None,
    "new_tokens": None,
    "modules_to_save": None,
    "loraplus_ratio": None,
    "token_loss": "nll",
    "discopop_tau": 0.05,
    "f_divergence": "reverse_kl",
    "f_alpha": 0.5,
    "wpo_weights": False,
}
"""Settings that runs of earlier versions had, but did not record."""
CONTENT_OF_BASE = "content of the base model"
"""Key of a run's identity. Runs of earlier versions lack it; they know their base by its name."""
CONTENT_OF_METRICS = "content of the functions in answer_metrics"
"""Key of a run's identity: a user's function -> the SHA-256 of its file. A mended function may go on with a run whose
best step it does not choose."""
CONTENT_OF_REWARDS = "content of the functions in reward"
"""Key of a run's identity: the same of the functions that it learns from."""
CONTENTS = {
    "content of data_path": later("content of data_path"),
    "content of the validation rows": later("content of the validation rows"),
    "content of the template": later("content of the template"),
    "content of the tokenizer": later("content of the tokenizer"),
    "content of the adapter continued": later("content of the adapter continued"),
    CONTENT_OF_METRICS: later("content of the functions in answer_metrics"),
    CONTENT_OF_REWARDS: later("content of the functions in reward"),
}
"""Other keys of a run's identity whose values are SHA-256 sums."""
NAMES_OF_BASE = ("base_model", "model_revision")
"""Keys for where the base is, which may change if its content does not."""
FLOAT32_BYTES = 4
OPTIMIZER_STATES = 2
"""Numbers that AdamW keeps for each trained parameter."""


@dataclass(frozen=True)
class Start:
    """Where a run starts: from a checkpoint and its progress, or from the beginning if both are None. `finished`: the
    folder holds this run and nothing is left to do."""

    checkpoint: Path | None = None
    progress: RunProgress | None = None
    finished: bool = False


def find_start(output: Path, identity: Mapping[str, Any], resume: str, overwrite: bool, log: Log) -> Start:
    """Where a run with this `identity` starts. Changes nothing. `resume` and `overwrite` are the settings of the run.

    Raises UserError if the folder holds another run or files that are not from a run, or if all checkpoints are
    damaged.
    """
    explicit = None if resume in ("latest", "none") else user_path(resume, "resume_from_checkpoint")
    if explicit is not None:
        _check_explicit(explicit, output, overwrite)
    if overwrite:
        _check_no_other_model(output, identity)
        return Start()
    remarks: list[str] = []
    if kind_of(output / RUN) != "file":
        foreign = [*_run_files(output), *checkpoints(output), *output.glob("config.json")]
        if foreign:
            names = ", ".join(path.name for path in foreign)
            cure = tr("give another folder, or --overwrite true")
            what = tr("it holds files that are not from a run ({names})", names=names)
            raise UserError(what, place=f"output_dir {output}", cure=cure)
    else:
        recorded, finished = _read_run(output / RUN)
        remarks.append(_check_same(identity, recorded, str(output)))
        if finished and resume == "latest":
            _log_first(remarks, log)
            return Start(finished=True)
    if explicit is not None:
        state = read_whole(explicit)
        remarks.append(_check_same(identity, state.identity, str(explicit)))
        _log_first(remarks, log)
        check_logs(output, state.logs, state.step, log)
        return Start(explicit, state)
    newest = newest_whole(output, log) if resume == "latest" else None
    if newest is None:
        if resume == "latest" and (damaged := checkpoints(output)):
            names = ", ".join(path.name for path in damaged)
            cure = tr(
                "restore them, or give --resume_from_checkpoint none, which deletes them and starts over"
            )
            raise UserError(
                tr("all of its checkpoints are damaged ({names})", names=names),
                place=f"output_dir {output}",
                cure=cure,
            )
        if resume == "latest" and (other := _other_checkpoints(output)):
            what = tr("none of its checkpoints has a name that a run gives ({other})", other=", ".join(other))
            cure = tr(
                "give each its name back, or --resume_from_checkpoint none, which starts over beside them"
            )
            raise UserError(what, place=f"output_dir {output}", cure=cure)
        return Start()
    remarks.append(_check_same(identity, newest[1].identity, str(newest[0])))
    _log_first(remarks, log)
    check_logs(output, newest[1].logs, newest[1].step, log)
    return Start(*newest)


def is_full(identity: Mapping[str, Any]) -> bool:
    """Whether the run with this identity trains all weights, and so writes a whole model."""
    return identity.get("train") == "full"


def _wrote_model(output: Path) -> bool:
    """Whether the run that the folder holds, if any, writes a whole model."""
    try:
        return is_full(_read_run(output / RUN)[0])
    except UserError:
        return False


def _check_no_other_model(output: Path, identity: Mapping[str, Any]) -> None:
    """Raises UserError if full fine-tuning would replace a model that no run has written, whatever `overwrite` says."""
    if not is_full(identity) or _wrote_model(output) or not output.is_dir():
        return
    if found := sorted(path.name for path in output.iterdir() if is_model_file(path.name)):
        what = tr(
            "it holds a model that is not from a run ({found}), which overwrite does not replace",
            found=brief(", ".join(found)),
        )
        raise UserError(
            what,
            place=f"output_dir {output}",
            cure=tr("give another folder, or remove these files"),
        )


def _log_first(remarks: list[str], log: Log) -> None:
    """What run.json and the checkpoint would both say is said once."""
    for remark in [one for one in remarks if one][:1]:
        log(remark)


def _other_checkpoints(output: Path) -> list[str]:
    """Names of folders that hold a checkpoint and have a name that no run gives."""
    names = passed_over(output) if output.is_dir() else []
    return [name for name in names if (output / name / STATE).is_file()]


def _check_explicit(checkpoint: Path, output: Path, overwrite: bool) -> None:
    place = f"resume_from_checkpoint {checkpoint}"
    if overwrite:
        raise UserError(tr("overwrite would delete it"), place=place, cure=tr("give only one of the two"))
    if not checkpoint.is_dir():
        raise UserError(tr("no such checkpoint"), place=place, cure=tr("give its folder, or latest"))
    if checkpoint.resolve().parent != output.resolve():  # its metrics and best checkpoint are there
        raise UserError(
            tr("it belongs to another output_dir"),
            place=place,
            cure=tr("give --output_dir {parent}", parent=checkpoint.parent),
        )


def _read_run(path: Path) -> tuple[dict[str, Any], bool]:
    """The identity in run.json, and whether that run is finished."""
    try:
        run = json.loads(read_regular(path))
        identity, finished = run["identity"], run["finished"]
        if not isinstance(identity, dict) or not isinstance(finished, bool):
            raise TypeError(tr("it does not say what the run depends on, and whether it is finished"))
        return identity, finished
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        cure = tr("give another output_dir, or --overwrite true")
        raise UserError(tr("damaged ({error})", error=error), place=str(path), cure=cure) from error


def _check_same(identity: Mapping[str, Any], recorded: Mapping[str, Any], place: str) -> str:
    """Raises UserError that lists all differences between this run's identity and the recorded one. Returns a remark
    about a base that was moved, or an empty text."""
    found = differences(identity, recorded)
    if CONTENT_OF_METRICS in found and is_built_in(identity.get("keep_best")):
        del found[CONTENT_OF_METRICS]
        if not found:
            return tr(
                "warning: the functions in answer_metrics have changed since the run began; what they gave before "
                "stays in metrics.jsonl as it is"
            )
    if [*found] == [CONTENT_OF_BASE]:
        is_folder = Path(str(identity.get("base_model"))).is_dir()
        cure = (
            tr(
                "restore its files, or give a folder that has them with --base_model; else give another output_dir, "
                "or --overwrite true"
            )
            if is_folder
            else tr(
                "give the commit that the run began with as --model_revision; else give another output_dir, or "
                "--overwrite true"
            )
        )
        raise UserError(found[CONTENT_OF_BASE], place=place, cure=cure)
    if found:
        cure = tr("give the earlier settings to continue it, another output_dir, or --overwrite true")
        problems = [Problem(what, place) for what in found.values()]
        raise UserError([*problems, Problem(tr("the folder holds another run"), place, cure)])
    then, now = (
        ", ".join(str(one[name]) for name in NAMES_OF_BASE if one.get(name)) for one in (recorded, identity)
    )
    return (
        ""
        if then == now
        else tr(
            "the base model is {now} now; it has the content of {then}, with which the run began",
            now=now,
            then=then,
        )
    )


def differences(identity: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, str]:
    """What differs between a run's identity and a recorded one: key -> what, in words. A base of the same content in
    another place is no difference."""
    now: dict[str, Any] = json.loads(json.dumps(identity))
    then = {**{name: value for name, value in EARLIER_DEFAULTS.items() if name in now}, **recorded}
    base_now, base_then = now.pop(CONTENT_OF_BASE, None), then.pop(CONTENT_OF_BASE, None)
    found = {}
    if base_now is not None and base_then is not None:
        try:
            changed = changes(content_of(base_then), content_of(base_now))
        except ValueError:
            changed = [tr("its record is damaged")]
        if changed:
            found[CONTENT_OF_BASE] = tr(
                "the content of the base model has changed: {changed}", changed=listed(changed)
            )
        else:
            for name in NAMES_OF_BASE:
                then[name] = now.get(name)
    for key in sorted({*now, *then}):
        if now.get(key) != then.get(key):
            found[key] = _difference(key, then.get(key), now.get(key))
    return found


def _difference(key: str, before: object, now: object) -> str:
    if key.startswith("content of"):  # the values are SHA-256 sums
        return tr("the {key} has changed", key=tr(CONTENTS[key]) if key in CONTENTS else key)
    return tr("{key} was {before!r} and is now {now!r}", key=key, before=before, now=now)


def begin(
    output: Path, identity: Mapping[str, Any], settings_yaml: str, start: Start, limit: int | None = None
) -> None:
    """Prepares the folder for this run. Deletes an earlier run's files, or, if the run continues from a checkpoint,
    only later checkpoints and those beyond `limit`, as if it had come here without a stop. Other files stay.

    Call it when all that the run continues from is loaded.
    """
    output.mkdir(parents=True, exist_ok=True)
    if start.checkpoint is None and _wrote_model(output):  # while run.json still says whose these files are
        write_run_json(output, _read_run(output / RUN)[0], finished=False)
        for path in _model_files(output):
            path.unlink(missing_ok=True)
    write_run_json(output, identity, finished=False)
    (output / SEAL).unlink(missing_ok=True)  # before any file that it lists changes
    sync(output)
    files, folders = _obsolete(output, start)
    for path in files:
        path.unlink(missing_ok=True)
    for checkpoint in folders:
        remove(checkpoint)
    sweep(output)
    if start.progress is not None:
        rotate(output, limit, start.progress.best_step)
    write_text_atomically(output / "settings.yaml", settings_yaml)


def obsolete_bytes(output: Path, start: Start) -> int:
    """The disk space that `begin` will free."""
    files, folders = _obsolete(output, start)
    in_folders = (file for folder in folders for file in files_in(folder))
    return sum(path.stat().st_size for path in (*files, *in_folders))


def _obsolete(output: Path, start: Start) -> tuple[list[Path], list[Path]]:
    """The files and checkpoints of an earlier run that this run does not need."""
    files = _run_files(output) if start.checkpoint is None else []
    if files and _wrote_model(output):
        files = sorted([*files, *_model_files(output)])
    return files, [
        path for path in checkpoints(output) if start.progress is None or step_of(path) > start.progress.step
    ]


def _run_files(output: Path) -> list[Path]:
    """The files that a run has written, without run.json and checkpoints."""
    paths = (path for pattern in (*OURS, *TOKENIZERS) for path in output.glob(pattern))
    return sorted(path for path in paths if kind_of(path) == "file")


def _model_files(output: Path) -> list[Path]:
    """The files that full fine-tuning has written, beside those of any run."""
    return sorted(path for path in output.iterdir() if is_model_file(path.name) and kind_of(path) == "file")


def write_run_json(output: Path, identity: Mapping[str, Any], *, finished: bool) -> None:
    text = json_text({"identity": identity, "finished": finished}, indent=2)
    write_text_atomically(output / RUN, text + "\n")


def seal(output: Path) -> None:
    """Syncs the run's files to disk and writes their SHA-256 sums to manifest.json. `begin` deletes manifest.json, so a
    finished run.json always comes with a valid one."""
    hashes = {}
    model_files = _model_files(output) if _wrote_model(output) else []
    for path in sorted([*_run_files(output), *model_files]):
        if path.name != SEAL:
            sync(path)
            hashes[path.relative_to(output).as_posix()] = file_hash(path)
    sync(output)
    write_text_atomically(output / SEAL, json.dumps({"sha256": hashes}, indent=2) + "\n")
    sync(output)


def install(output: Path, adapter: AdapterWriter) -> None:
    """Writes the final adapter, or model, into a hidden folder, verifies it, and moves its files into place one by one,
    yeonma.json last.

    A concurrent reader may see a mix with files of an earlier adapter; within one run these differ only in weights.
    Raises UserError if the disk is full or fails.
    """
    staging, what = output / PARTIAL_FINAL, tr("the {noun}", noun=tr(adapter.noun))
    delete(staging)
    cure = tr("make room, then run the same command to continue from the last checkpoint")
    check_free(output, adapter.about_bytes, what, cure)
    with disk_errors_as_user_errors(output, what, adapter.about_bytes, then=THEN_CONTINUE):
        try:
            staging.mkdir()
            adapter.write(staging)
            give_usual_permissions(staging)
            sync_and_verify(staging, hashes_of(staging))
            for path in sorted(files_in(staging), key=lambda path: (path.name == "yeonma.json", path)):
                place = output / path.relative_to(staging)
                place.parent.mkdir(exist_ok=True)
                os.replace(path, place)
                if place.parent != output:
                    sync(place.parent)
            sync(output)
        finally:
            delete(staging)


@dataclass(frozen=True)
class CheckpointSchedule:
    """When a run saves checkpoints, and how many it keeps."""

    total_steps: int
    save_steps: int
    limit: int | None
    """None keeps all."""
    keeps_best: bool
    """Whether the checkpoint with the lowest validation loss is kept beside the `limit` newest ones."""


def adapter_bytes(parameters: int, tokenizer: Any) -> int:
    """The size of an adapter's weights and tokenizer files."""
    return parameters * FLOAT32_BYTES + _tokenizer_bytes(tokenizer)


def state_bytes(optimizer: str) -> int:
    """Bytes of an optimizer's state for each trained parameter: two numbers, in float32 or in 8 bits with scales."""
    return OPTIMIZER_STATES * FLOAT32_BYTES if optimizer == "adamw" else 3


def model_bytes(weights: Iterable[torch.Tensor], tokenizer: Any) -> int:
    """The size of a model's weights and tokenizer files."""
    return sum(weight.nbytes for weight in weights) + _tokenizer_bytes(tokenizer)


def _tokenizer_bytes(tokenizer: Any) -> int:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        tokenizer_bytes = len(backend.to_str(pretty=True).encode())
    else:
        path = getattr(tokenizer, "vocab_file", None)
        tokenizer_bytes = os.path.getsize(path) if path and os.path.isfile(path) else 0
    return tokenizer_bytes


def max_new_checkpoints(schedule: CheckpointSchedule, steps_done: int, existing: int) -> int:
    """The largest number of checkpoints that the disk must hold beside the `existing` ones.

    The run deletes an old checkpoint only after the new one is complete. Without a limit, extra checkpoints for a
    lower validation loss are not counted, because nobody knows them in advance.
    """
    total, every = schedule.total_steps, schedule.save_steps
    remaining = total // every + (total % every > 0)
    remaining -= steps_done // every + (steps_done == total and steps_done % every > 0)
    if schedule.limit is None:
        return remaining
    return min(remaining, max(1, schedule.limit + schedule.keeps_best + 1 - existing))


def check_disk_space(
    output: Path,
    start: Start,
    schedule: CheckpointSchedule,
    parameters: int,
    tokenizer: Any,
    *,
    state_bytes: int = OPTIMIZER_STATES * FLOAT32_BYTES,
    noun: str = "adapter",
) -> None:
    """Raises UserError if the disk has no room for the run's checkpoints and its adapter, or what `noun` says.
    `state_bytes`: of the optimizer's state, per parameter."""
    adapter = adapter_bytes(parameters, tokenizer)
    checkpoint = adapter + state_bytes * parameters + ALLOWANCE_BYTES
    steps_done = 0 if start.progress is None else start.progress.step
    existing = sum(1 for path in checkpoints(output) if step_of(path) <= steps_done)
    count = max_new_checkpoints(schedule, steps_done, existing)
    needed, free = count * checkpoint + adapter, free_bytes(output) + obsolete_bytes(output, start)
    if needed > free:
        what = tr(
            "the run needs {needed:,} bytes here ({checkpoints} of {bytes:,} at once, and the {noun}), and {free:,} "
            "are free",
            needed=needed,
            checkpoints=counted(count, "checkpoint"),
            bytes=checkpoint,
            noun=tr(noun),
            free=free,
        )
        cure = tr("make room, give another output_dir, or keep fewer checkpoints with --save_total_limit")
        raise UserError(what, place=f"output_dir {output}", cure=cure)
