"""Checks the files of an output folder against the run's own records: SHA-256 checksums, settings, metrics.

The checksums lie beside the files, so they reveal accidents, not deliberate changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, Literal

from yeonma.adapter.adapter_folder import BASE_CONTENT, TRAINED, is_full
from yeonma.config.data_sets import of_data_set
from yeonma.config.parse import read_config, settings_dict
from yeonma.config.settings import GROUPS, RunConfig
from yeonma.errors import Problem, UserError, system_reason
from yeonma.files import file_hash, read_file
from yeonma.messages import counted, later, tr
from yeonma.model.base_content import changes, content_of
from yeonma.run_folder.checkpoint import MANIFEST, STATE, step_of
from yeonma.run_folder.entries import FORMER_PLOT, MODEL_FILES, OURS, PRINTED, RUN, SEAL, TOKENIZERS
from yeonma.run_folder.output_folder import CONTENT_OF_BASE, differences
from yeonma.run_folder.run_log import read_metrics

RUN_RECORDS = (
    *("settings.yaml", "metrics.jsonl", "trained_rows.jsonl", "answers.jsonl"),
    *("loss.svg", FORMER_PLOT, "README.md"),
)
"""Files that a copy of the adapter alone may lack."""
_SHA256 = re.compile("[0-9a-f]{64}")
RESOLVED_SETTINGS = ("base_model", "model_revision", "columns", "keep_best", "answer_metrics")
"""Settings of which a run's identity records the resolved value, not the written one."""
PARTS = ("base", "tokenizer", "template", "columns", "rules", "trained_on")
"""Keys of yeonma.json that are the same in the folder and in every checkpoint of a run."""
RESTORE = tr("restore a copy of the file, or run the same command with --overwrite true")
DELETE = tr("delete the checkpoint; the run then resumes from the one before")


Outcome = Literal["well", "differs", "not checked"]
"""These words are part of the JSON that `yeonma verify --json` prints."""


@dataclass(frozen=True)
class Finding:
    """One check. `about` says what was checked, or why nothing was."""

    check: str
    outcome: Outcome
    about: str
    problems: tuple[Problem, ...] = ()


def checked(check: str, problems: Iterable[Problem], about: str) -> Finding:
    """A check that ran. It passed if there are no problems."""
    problems = tuple(problems)
    if not problems:
        return Finding(check, "well", about)
    return Finding(check, "differs", counted(len(problems), "difference"), problems)


def not_checked(check: str, reason: str) -> Finding:
    return Finding(check, "not checked", reason)


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if the file cannot be read or is not one."""
    try:
        value = json.loads(read_file(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise UserError(tr("the file is missing"), place=str(path), cure=RESTORE) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            tr("cannot be read ({error})", error=system_reason(error)), place=str(path), cure=RESTORE
        ) from error
    if not isinstance(value, dict):
        raise UserError(tr("not a JSON object"), place=str(path), cure=RESTORE)
    return value


def check_files(folder: Path, *, is_run: bool) -> Finding:
    """Checks the folder's own files against manifest.json. A mere copy of the adapter may lack RUN_RECORDS."""
    check = later("files")
    if not (folder / SEAL).is_file():
        if is_run:
            return not_checked(
                check, tr("no {seal}: the run is of an earlier version, or the file was lost", seal=SEAL)
            )
        return not_checked(check, tr("no {seal} beside this copy", seal=SEAL))
    try:
        hashes = _manifest_hashes(folder / SEAL)
    except UserError as error:
        return checked(check, error.problems, "")
    absent = {name for name in RUN_RECORDS if not is_run and name in hashes and not (folder / name).is_file()}
    problems = [
        problem
        for name, expected in hashes.items()
        if name not in absent and (problem := _changed(folder / name, expected, RESTORE)) is not None
    ]
    if problems:
        return checked(check, problems, "")
    size = sum((folder / name).stat().st_size for name in hashes if name not in absent)
    files = counted(len(hashes) - len(absent), "file")
    about = tr("{files} unchanged since the run, {size:,.1f} MB", files=files, size=size / 1e6)
    if absent:
        names = ", ".join(sorted(absent))
        about = tr("{about}; not in this copy: {names}", about=about, names=names)
    return checked(check, problems, about)


def unknown_files(folder: Path, manifest: Mapping[str, Any] | None) -> list[str]:
    """Names of files in an output folder that are not the run's. Subfolders and hidden names, among them leftovers of a
    killed run, are ignored."""
    known = {RUN, SEAL, PRINTED, *(manifest or {})}
    patterns = () if manifest is not None else (*OURS, *MODEL_FILES, *TOKENIZERS)
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in known
        and not any(path.match(pattern) for pattern in patterns)
    )


def manifest_hashes(folder: Path) -> dict[str, str] | None:
    """The checksums in the folder's manifest.json, or None if they cannot be read."""
    try:
        return _manifest_hashes(folder / SEAL)
    except UserError:
        return None


def check_checkpoint(
    checkpoint: Path, identity: Mapping[str, Any] | None, details: Mapping[str, Any] | None
) -> Finding:
    """Checks a checkpoint's files against its manifest, and that it belongs to the run with this `identity` and to the
    adapter with these `details`, if known."""
    name = checkpoint.name
    try:
        hashes = _manifest_hashes(checkpoint / MANIFEST)
        problems = [
            problem
            for file, expected in hashes.items()
            if (problem := _changed(checkpoint / file, expected, DELETE)) is not None
        ]
        present = {
            path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()
        }
        for file in sorted(present - {MANIFEST, *hashes}):
            what = tr("not part of the checkpoint: its manifest does not list it")
            problems.append(Problem(what, str(checkpoint / file), tr("move it elsewhere")))
        if not problems:
            problems = _run_problems(checkpoint, identity, details)
    except UserError as error:
        problems = list(error.problems)
    if problems and not checkpoint.exists():  # the run that is under way has removed it meanwhile
        return not_checked(name, tr("removed during the check"))
    return checked(
        name,
        problems,
        tr("{files} unchanged since the run", files=counted(len(hashes) if not problems else 0, "file")),
    )


def _run_problems(
    checkpoint: Path, identity: Mapping[str, Any] | None, details: Mapping[str, Any] | None
) -> list[Problem]:
    state = read_object(checkpoint / STATE)
    problems = []
    if checkpoint.name == f"checkpoint-{state.get('step')}":
        pass
    elif re.fullmatch(r"checkpoint-\d+", checkpoint.name):
        what = tr(
            "it is the checkpoint of step {step}, not of step {checkpoint}",
            step=state.get("step"),
            checkpoint=step_of(checkpoint),
        )
        problems.append(Problem(what, str(checkpoint), tr("rename it to its own step")))
    if identity is not None and (names := _differing_keys(state.get("identity"), identity)):
        what = tr("it belongs to another run, which differs in {names}", names=", ".join(names))
        problems.append(Problem(what, str(checkpoint / STATE), DELETE))
    elif details is not None:
        own = read_object(checkpoint / "yeonma.json")
        if names := _differing_parts(own, details):
            what = tr(
                "it does not belong to the folder's adapter: they differ in {names}", names=", ".join(names)
            )
            problems.append(Problem(what, str(checkpoint / "yeonma.json"), DELETE))
    return problems


def _differing_keys(one: object, other: Mapping[str, Any]) -> list[str]:
    if not isinstance(one, Mapping):
        return ["everything"]
    return sorted(differences(other, one))


def _differing_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts of two yeonma.json that differ. Equal bases in two places do not."""
    contents = one.get(BASE_CONTENT), other.get(BASE_CONTENT)
    names = [name for name in PARTS if one.get(name) != other.get(name)]
    if None in contents:  # from before the content was recorded
        return names
    same = _same_content(*contents)
    return [name for name in names if name != "base" or not same] + ([] if same else [BASE_CONTENT])


def _same_content(one: object, other: object) -> bool:
    try:
        return not changes(content_of(one), content_of(other))
    except ValueError:
        return False


def _manifest_hashes(path: Path) -> dict[str, str]:
    hashes = read_object(path).get("sha256")
    is_valid = isinstance(hashes, dict) and all(
        isinstance(value, str)
        and _SHA256.fullmatch(value)
        and not PurePath(name).is_absolute()
        and ".." not in PurePath(name).parts
        for name, value in hashes.items()
    )
    if not is_valid or not hashes:
        raise UserError(tr("damaged: no SHA-256 checksums in it"), place=str(path), cure=RESTORE)
    assert isinstance(hashes, dict)
    return hashes


def _changed(path: Path, expected: str, cure: str) -> Problem | None:
    try:
        if not path.is_file():
            return Problem(tr("the file is missing"), str(path), cure)
        if file_hash(path) != expected:
            return Problem(
                tr("the file has changed: its SHA-256 is not that of the manifest"), str(path), cure
            )
    except OSError as error:
        return Problem(tr("cannot be read ({strerror})", strerror=system_reason(error)), str(path), cure)
    return None


def check_run(
    folder: Path, run: Mapping[str, Any], details: Mapping[str, Any] | None, adapter_config: Mapping[str, Any] | None
) -> Finding:  # fmt: skip
    """Checks that run.json, settings.yaml, metrics.jsonl and the adapter's own files are of one run."""
    identity, finished = run["identity"], run["finished"]
    problems = _settings_problems(folder / "settings.yaml", identity)
    if details is not None:
        problems += _details_problems(folder, identity, details, adapter_config)
    steps, metrics_problems = _metrics_problems(folder / "metrics.jsonl", identity, finished=finished)
    noun = tr("model") if is_full(details or {}) else tr("adapter")
    about = tr(
        "settings, metrics of {steps} and {noun} are of one run", steps=counted(steps, "step"), noun=noun
    )
    return checked(later("run"), [*problems, *metrics_problems], about)


def _settings_problems(path: Path, identity: Mapping[str, Any]) -> list[Problem]:
    """settings.yaml must have the values that run.json records of the settings that the result depends on."""
    if not path.is_file():
        return [Problem(tr("the file is missing"), str(path), RESTORE)]
    groups = GROUPS.get(str(identity.get("objective")), GROUPS["dpo"])
    try:
        reading = read_config(RunConfig, ["--config", str(path)], verb="sft", groups=groups)
    except UserError as error:
        return [Problem(problem.what, problem.place or str(path), RESTORE) for problem in error.problems]
    values = json.loads(json.dumps(settings_dict(reading.config), default=str))
    return [
        Problem(
            tr(
                "{name} is {value!r}, but was {identity!r} in the run ({run})",
                name=name,
                value=value,
                identity=identity[name],
                run=RUN,
            ),
            str(path),
            RESTORE,
        )
        for name, value in values.items()
        if name in identity and name not in RESOLVED_SETTINGS and value != identity[name]
    ]


def _details_problems(
    folder: Path,
    identity: Mapping[str, Any],
    details: Mapping[str, Any],
    adapter_config: Mapping[str, Any] | None,
) -> list[Problem]:
    """yeonma.json, and adapter_config.json unless an adapter was continued, must agree with run.json."""
    tokenizer, trained_on = details.get("tokenizer") or {}, details.get("trained_on", {})
    values: dict[str, tuple[Any, Any]] = {
        "content of the template": (details["template"]["sha256"], identity.get("content of the template")),
        "content of data_path": (
            trained_on.get("data_sha256"),
            identity.get("content of data_path"),
        ),
        "columns": (details["columns"], identity.get("columns")),
        TRAINED: (details.get(TRAINED, "lora"), identity.get("train", "lora")),
        **{name: (value, identity.get(name)) for name, value in details["rules"].items()},
    }
    for number, one in enumerate(trained_on.get("data_sets", ()), 1):
        own = {
            "content of the template": sha256(one["template"]["text"].encode()).hexdigest(),
            "content of data_path": one.get("data_sha256"),
            "columns": one["columns"],
        }
        named = {of_data_set(name, number): value for name, value in own.items()}
        values |= {name: (value, identity.get(name)) for name, value in named.items()}
    if tokenizer:
        values["content of the tokenizer"] = (
            tokenizer.get("with_chat_template_sha256"),
            identity.get("content of the tokenizer"),
        )
    place = folder / "yeonma.json"
    problems = [
        Problem(tr("{name} is not that of the run ({run})", name=tr(name), run=RUN), str(place), RESTORE)
        for name, (own, recorded) in values.items()
        if own != recorded
    ]
    name, base = str(identity.get("base_model")), str(details["base"]["name"])
    contents = details.get(BASE_CONTENT), identity.get(CONTENT_OF_BASE)
    if None not in contents:
        if not _same_content(*contents):
            what = tr("the base has other content than in the run ({run})", run=RUN)
            problems.append(Problem(what, str(place), RESTORE))
    elif PurePath(name).name != PurePath(base).name:
        what = tr("the base is {base}, but was {name} in the run ({run})", base=base, name=name, run=RUN)
        problems.append(Problem(what, str(place), RESTORE))
    if adapter_config is not None and identity.get("content of the adapter continued") is None:
        for own_name, name in (
            ("r", "lora_r"),
            ("lora_alpha", "lora_alpha"),
            ("use_rslora", "use_rslora"),
            ("use_dora", "use_dora"),
        ):
            if adapter_config.get(own_name) != identity.get(name):
                what = tr(
                    "{own_name} is {own_name2}, but {name} was {name2} in the run",
                    own_name=own_name,
                    own_name2=adapter_config.get(own_name),
                    name=name,
                    name2=identity.get(name),
                )
                problems.append(Problem(what, str(folder / "adapter_config.json"), RESTORE))
    return problems


def _metrics_problems(
    path: Path, identity: Mapping[str, Any], *, finished: bool
) -> tuple[int, list[Problem]]:
    """The number of steps in metrics.jsonl, and its problems: steps count from 1 to the last without a gap."""
    if not path.is_file():
        return 0, [Problem(tr("the file is missing"), str(path), RESTORE)] if finished else []
    try:
        lines = read_metrics(path)
    except UserError as error:
        return 0, list(error.problems)
    steps = [line["step"] for line in lines if not line.get("evaluation")]
    for number, step in enumerate(steps, start=1):
        if step != number:
            what = tr("step {number} is followed by step {step}", number=number - 1, step=step)
            return len(steps), [Problem(what, str(path), RESTORE)]
    problems = []
    if finished:
        if not path.read_bytes().endswith(b"\n"):
            problems.append(Problem(tr("the last line is incomplete"), str(path), RESTORE))
        total, early = identity.get("steps"), identity.get("early_stopping_patience") is not None
        if isinstance(total, int) and (len(steps) > total or (len(steps) < total and not early)):
            what = tr(
                "it has {steps}, but the run had {total:,}", steps=counted(len(steps), "step"), total=total
            )
            problems.append(Problem(what, str(path), RESTORE))
    return len(steps), problems
