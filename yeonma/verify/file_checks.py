"""The files of an output folder against what the run wrote down of them: SHA-256 sums, settings, metrics.

The sums lie beside the files: they show what an accident has done, not what somebody has done who can count sums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

from yeonma.config.parse import read_config, settings_dict
from yeonma.config.settings import TRAINING, RunConfig
from yeonma.errors import Problem, UserError
from yeonma.files import file_hash
from yeonma.run_folder.checkpoint import MANIFEST, STATE, step_of
from yeonma.run_folder.output_folder import OURS, RUN, SEAL, TOKENIZERS
from yeonma.run_folder.trackers import read_metrics
from yeonma.verify.finding import Finding, found, not_checked

OF_THE_RUN = ("settings.yaml", "metrics.jsonl", "trained_rows.jsonl", "loss.png", "README.md")
"""What a copy of the adapter alone may lack."""
_SUM = re.compile("[0-9a-f]{64}")
SETTLED_OTHERWISE = ("base_model", "model_revision", "columns")
"""Settings whose place in a run's identity holds what was found by them, not what was written."""
PARTS = ("base", "tokenizer", "template", "columns", "rules", "trained_on")
"""Of yeonma.json, what is the same in the folder and in every checkpoint of a run."""
ANEW = "put a copy of the file back, or run the same command with --overwrite true"
GOES_ON = "delete the checkpoint; a run goes on from the one before"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where it cannot be read or is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError("it is missing", place=str(path), cure=ANEW) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"it cannot be read ({error})", place=str(path), cure=ANEW) from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", place=str(path), cure=ANEW)
    return value


def check_files(folder: Path, *, whole: bool) -> Finding:
    """The folder's own files against its manifest.json. A copy, not `whole`, may lack the run's own records."""
    check = "files"
    if not (folder / SEAL).is_file():
        if whole:
            return not_checked(
                check, f"there is no {SEAL}: a run of an earlier version, or the file was lost"
            )
        return not_checked(check, f"there is no {SEAL} beside this copy")
    try:
        sums = _sums(folder / SEAL)
    except UserError as error:
        return found(check, error.problems, "")
    lacking = {name for name in sums if not whole and name in OF_THE_RUN and not (folder / name).is_file()}
    problems = [
        problem
        for name, expected in sums.items()
        if name not in lacking and (problem := _changed(folder / name, expected, ANEW)) is not None
    ]
    size = sum((folder / name).stat().st_size for name in sums if (folder / name).is_file())
    about = f"{len(sums) - len(lacking)} files as the run left them, {size / 1e6:,.1f} MB"
    if lacking:
        about += f"; not in this copy: {', '.join(sorted(lacking))}"
    return found(check, problems, about)


def strangers(folder: Path, manifest: Mapping[str, Any] | None) -> list[str]:
    """Names in an output folder that the run did not leave there. Folders are not looked into; hidden names, among
    them what a killed run leaves, are not told."""
    known = {RUN, SEAL, *(manifest or {})}
    patterns = () if manifest is not None else (*OURS, *TOKENIZERS)
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in known
        and not any(path.match(pattern) for pattern in patterns)
    )


def sums_of(folder: Path) -> dict[str, str] | None:
    """The sums of the folder's manifest.json; None where there are none that can be read."""
    try:
        return _sums(folder / SEAL)
    except UserError:
        return None


def check_checkpoint(
    checkpoint: Path, identity: Mapping[str, Any] | None, details: Mapping[str, Any] | None
) -> Finding:
    """A checkpoint's files against its manifest, and whether it is one of the run with this `identity` whose adapter
    has these `details` (where they are known)."""
    name = checkpoint.name
    try:
        sums = _sums(checkpoint / MANIFEST)
        problems = [
            problem
            for file, expected in sums.items()
            if (problem := _changed(checkpoint / file, expected, GOES_ON)) is not None
        ]
        present = {
            path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()
        }
        for file in sorted(present - {MANIFEST, *sums}):
            what = "no part of the checkpoint: its manifest does not name it"
            problems.append(Problem(what, str(checkpoint / file), "move it elsewhere"))
        if not problems:
            problems = _of_run(checkpoint, identity, details)
    except UserError as error:
        problems = list(error.problems)
    if problems and not checkpoint.exists():  # a run that goes on has removed it meanwhile
        return not_checked(name, "it was removed while it was looked at")
    return found(name, problems, f"{len(sums) if not problems else 0} files as the run left them")


def _of_run(
    checkpoint: Path, identity: Mapping[str, Any] | None, details: Mapping[str, Any] | None
) -> list[Problem]:
    state = read_object(checkpoint / STATE)
    problems = []
    if checkpoint.name == f"checkpoint-{state.get('step')}":
        pass
    elif re.fullmatch(r"checkpoint-\d+", checkpoint.name):
        what = f"it is the checkpoint of step {state.get('step')}, not of step {step_of(checkpoint)}"
        problems.append(Problem(what, str(checkpoint), "give it its own name back"))
    if identity is not None and (names := _differing(state.get("identity"), identity)):
        what = f"it is of another run: they differ in {', '.join(names)}"
        problems.append(Problem(what, str(checkpoint / STATE), GOES_ON))
    elif details is not None:
        own = read_object(checkpoint / "yeonma.json")
        if names := [name for name in PARTS if own.get(name) != details.get(name)]:
            what = f"it is not of the folder's adapter: they differ in {', '.join(names)}"
            problems.append(Problem(what, str(checkpoint / "yeonma.json"), GOES_ON))
    return problems


def _differing(mine: object, other: Mapping[str, Any]) -> list[str]:
    if not isinstance(mine, Mapping):
        return ["all"]
    return [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]


def _sums(path: Path) -> dict[str, str]:
    sums = read_object(path).get("sha256")
    well = isinstance(sums, dict) and all(
        isinstance(value, str)
        and _SUM.fullmatch(value)
        and not PurePath(name).is_absolute()
        and ".." not in PurePath(name).parts
        for name, value in sums.items()
    )
    if not well or not sums:
        raise UserError("damaged: it holds no SHA-256 sums", place=str(path), cure=ANEW)
    assert isinstance(sums, dict)
    return sums


def _changed(path: Path, expected: str, cure: str) -> Problem | None:
    try:
        if not path.is_file():
            return Problem("it is missing", str(path), cure)
        if file_hash(path) != expected:
            return Problem("it has changed: its SHA-256 is not the manifest's", str(path), cure)
    except OSError as error:
        return Problem(f"it cannot be read ({error.strerror})", str(path), cure)
    return None


def check_run(
    folder: Path, run: Mapping[str, Any], details: Mapping[str, Any] | None, adapter_config: Mapping[str, Any] | None
) -> Finding:  # fmt: skip
    """Whether run.json, settings.yaml, metrics.jsonl and the adapter's own files tell of one run."""
    identity, finished = run["identity"], run["finished"]
    problems = _of_settings(folder / "settings.yaml", identity)
    if details is not None:
        problems += _of_details(folder, identity, details, adapter_config)
    steps, wrong = _of_metrics(folder / "metrics.jsonl", identity, finished=finished)
    return found(
        "run", [*problems, *wrong], f"settings, metrics of {steps:,} steps and adapter tell of one run"
    )


def _of_settings(path: Path, identity: Mapping[str, Any]) -> list[Problem]:
    """settings.yaml must give what run.json says the result depends on."""
    if not path.is_file():
        return [Problem("it is missing", str(path), ANEW)]
    groups = TRAINING if identity.get("objective") == "sft" else None
    try:
        reading = read_config(RunConfig, ["--config", str(path)], verb="sft", groups=groups)
    except UserError as error:
        return [Problem(each.what, each.place or str(path), ANEW) for each in error.problems]
    values = json.loads(json.dumps(settings_dict(reading.config), default=str))
    return [
        Problem(f"{name} is {value!r}, and was {identity[name]!r} in the run ({RUN})", str(path), ANEW)
        for name, value in values.items()
        if name in identity and name not in SETTLED_OTHERWISE and value != identity[name]
    ]


def _of_details(
    folder: Path,
    identity: Mapping[str, Any],
    details: Mapping[str, Any],
    adapter_config: Mapping[str, Any] | None,
) -> list[Problem]:
    """yeonma.json, and adapter_config.json of a fresh adapter, must be what run.json says."""
    tokenizer = details.get("tokenizer") or {}
    said: dict[str, tuple[Any, Any]] = {
        "content of the template": (details["template"]["sha256"], identity.get("content of the template")),
        "content of data_path": (
            details["trained_on"].get("data_sha256"),
            identity.get("content of data_path"),
        ),
        "columns": (details["columns"], identity.get("columns")),
        **{name: (value, identity.get(name)) for name, value in details["rules"].items()},
    }
    if tokenizer:
        said["content of the tokenizer"] = (
            tokenizer.get("with_chat_template_sha256"),
            identity.get("content of the tokenizer"),
        )
    place = folder / "yeonma.json"
    problems = [
        Problem(f"the {name} is not the run's ({RUN})", str(place), ANEW)
        for name, (own, theirs) in said.items()
        if own != theirs
    ]
    name, base = str(identity.get("base_model")), str(details["base"]["name"])
    if PurePath(name).name != PurePath(base).name:
        what = f"the base is {base}, and was {name} in the run ({RUN})"
        problems.append(Problem(what, str(place), ANEW))
    if adapter_config is not None and identity.get("content of the adapter continued") is None:
        for own_name, name in (
            ("r", "lora_r"),
            ("lora_alpha", "lora_alpha"),
            ("use_rslora", "use_rslora"),
            ("use_dora", "use_dora"),
        ):
            if adapter_config.get(own_name) != identity.get(name):
                what = f"{own_name} is {adapter_config.get(own_name)}, and {name} was {identity.get(name)} in the run"
                problems.append(Problem(what, str(folder / "adapter_config.json"), ANEW))
    return problems


def _of_metrics(path: Path, identity: Mapping[str, Any], *, finished: bool) -> tuple[int, list[Problem]]:
    """The steps that are there, and what is wrong with them. They run from 1 to the end, without a gap."""
    if not path.is_file():
        return 0, [Problem("it is missing", str(path), ANEW)] if finished else []
    try:
        lines = read_metrics(path)
    except UserError as error:
        return 0, list(error.problems)
    steps = [line["step"] for line in lines if not line.get("evaluation")]
    for number, step in enumerate(steps, start=1):
        if step != number:
            what = f"after step {number - 1} comes step {step}"
            return len(steps), [Problem(what, str(path), ANEW)]
    problems = []
    if finished:
        if not path.read_bytes().endswith(b"\n"):
            problems.append(Problem("its last line is cut short", str(path), ANEW))
        total, early = identity.get("steps"), identity.get("early_stopping_patience") is not None
        if isinstance(total, int) and (len(steps) > total or (len(steps) < total and not early)):
            what = f"it has {len(steps):,} steps, and the run had {total:,}"
            problems.append(Problem(what, str(path), ANEW))
    return len(steps), problems


def unknown_names(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
