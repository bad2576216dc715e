"""Two recordings side by side: every file of every run must hold the same value, but for what formats.py leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .formats import NEWER_FILES, Field, Tensor, Value, current_name, fields_of, format_of
from .recording import FORMAT

Kind = Literal["differs", "rounding", "words"]
KINDS: tuple[Kind, ...] = ("differs", "rounding", "words")

MATERIAL = ("models", "data")
WITHIN = (
    # The resumed run was given another setting, the checkpoint to go on from, and keeps it in its settings.
    ("sft-dropout", "sft-resumed", ("settings.yaml",)),
    ("sft-dropout", "sft-killed", ()),
)
"""Runs of one recording whose folders must be equal, and files that are not compared."""


@dataclass(frozen=True)
class Difference:
    """`differs` fails the comparison; `rounding` is within the format's tolerance, and `words` are for people."""

    kind: Kind
    file: str
    where: str  # the field in the file
    before: str
    after: str
    size: float = 0.0  # the largest, of rounding


@dataclass
class Compared:
    """What was found in the files that belong together."""

    name: str
    files: int = 0
    differences: list[Difference] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Difference]:
        return [difference for difference in self.differences if difference.kind == kind]

    @property
    def is_same(self) -> bool:
        return not self.of("differs")


@dataclass(frozen=True)
class Recording:
    """What `record` left in a folder."""

    root: Path
    about: Mapping[str, Any]

    @classmethod
    def read(cls, root: Path) -> Recording:
        """Raises SystemExit where there is none that this version of the script can read."""
        try:
            about = json.loads((root / "recording.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"{root} holds no whole recording ({error})") from None
        if about["format"] != FORMAT:
            raise SystemExit(f"{root} was recorded by another version of this script; record it again")
        return cls(root, about)

    def failure(self, run: str) -> str | None:
        """Why the run is not in this recording, or not whole; None where it is."""
        if run not in self.about["runs"]:
            return "was not recorded"
        return self.about["failures"].get(run)

    def files(self, folders: Sequence[str]) -> dict[str, Path]:
        """Path below the recording -> file, of all files in these folders."""
        paths = [path for name in folders for path in (self.root / name).rglob("*") if path.is_file()]
        return {path.relative_to(self.root).as_posix(): path for path in paths}


class _Missing:
    def __str__(self) -> str:
        return "missing"


MISSING = _Missing()


def compare_recordings(
    before: Recording, after: Recording, only: Sequence[str] | None = None
) -> Iterator[Compared]:
    """Models and data, then the runs, then those runs that must be equal within a recording.

    `only`: names of runs; without it, all that either recording has. A run that a recording lacks differs.
    """
    names = {before.about["work"]: "WORK", after.about["work"]: "WORK"}
    folders = [f"work/{name}" for name in MATERIAL]
    yield compare_folders("material", before.files(folders), after.files(folders), names)
    runs = only if only is not None else list(dict.fromkeys([*before.about["runs"], *after.about["runs"]]))
    for run in runs:
        folders = [f"work/{run}", f"console/{run}"]
        compared = compare_folders(run, before.files(folders), after.files(folders), names)
        for which, recording in (("before", before), ("after", after)):
            if (failure := recording.failure(run)) is not None:
                compared.differences.insert(0, Difference("differs", which, "", "", failure))
        yield compared
    for one, other, without in WITHIN:
        for which, recording in (("before", before), ("after", after)):
            failed = recording.failure(one) or recording.failure(other)
            if failed is None and (one in runs or other in runs):
                yield compare_within(f"{other} = {one}, {which}", recording, one, other, without)


def compare_within(
    name: str, recording: Recording, one: str, other: str, without: Sequence[str] = ()
) -> Compared:
    """The output folders of two runs; `without` names files that are not compared."""

    def files(run: str) -> dict[str, Path]:
        recorded = recording.files([f"work/{run}"]).items()
        by_path = {path.replace(f"work/{run}/", f"work/{one}/", 1): file for path, file in recorded}
        return {path: file for path, file in by_path.items() if file.name not in without}

    return compare_folders(name, files(one), files(other), {other: one})


def compare_folders(
    name: str, before: Mapping[str, Path], after: Mapping[str, Path], names: Mapping[str, str]
) -> Compared:
    """Files by their paths in a recording, renamed ones by their new ones; `names` are texts in the files and what is
    compared in their place."""
    before, after = ({current_name(path): file for path, file in files.items()} for files in (before, after))
    compared = Compared(name)
    for path in sorted({*before, *after}):
        compared.files += 1
        if path not in before and after[path].name in NEWER_FILES:
            continue
        if path not in before or path not in after:
            there, missing = "there", str(MISSING)
            texts = (there, missing) if path in before else (missing, there)
            compared.differences.append(Difference("differs", path, "", *texts))
        else:
            compared.differences += compare_files(path, before[path], after[path], names)
    return compared


def compare_files(
    path: str, before: Path, after: Path, names: Mapping[str, str] | None = None
) -> list[Difference]:
    """The differences of two files that are recorded as `path`; of those that are rounding the largest."""
    form = format_of(path)
    try:
        values = [replaced(form.read(file), names or {}) for file in (before, after)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [Difference("differs", path, "", "", f"cannot be read by {form.read.__name__}: {error!r}")]
    differences = list(_compare(values[0], values[1], "", path, fields_of(path), form.tolerance))
    rounding = [difference for difference in differences if difference.kind == "rounding"]
    if rounding:
        largest = max(rounding, key=lambda difference: difference.size)
        differences = [difference for difference in differences if difference.kind != "rounding"] + [largest]
    return differences


def replaced(value: Value, names: Mapping[str, str]) -> Value:
    """The value with other names in all its texts."""
    if isinstance(value, str):
        for name, other in names.items():
            value = value.replace(name, other)
        return value
    if isinstance(value, list):
        return [replaced(item, names) for item in value]
    if isinstance(value, dict):
        return {key: replaced(item, names) for key, item in value.items()}
    return value


def _compare(
    before: Value, after: Value, where: str, path: str, fields: Sequence[Field], tolerance: float
) -> Iterator[Difference]:
    field = _field(where, fields)
    if field is not None and field.kind == "left out":
        return
    if field is not None and isinstance(before, list) and isinstance(after, list):
        gone, new = _changed_lines(before, after)
        if gone or new:
            yield Difference("words", path, where, gone, new)
    elif isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            a, b = before.get(key, MISSING), after.get(key, MISSING)
            yield from _compare(a, b, f"{where}.{key}" if where else key, path, fields, tolerance)
    elif isinstance(before, list) and isinstance(after, list):
        for index in range(max(len(before), len(after))):
            a, b = (value[index] if index < len(value) else MISSING for value in (before, after))
            yield from _compare(a, b, f"{where}[{index}]", path, fields, tolerance)
    elif not _is_equal(before, after):
        distance = _distance(before, after)
        if field is not None and isinstance(before, str) and isinstance(after, str) and before and after:
            yield Difference("words", path, where, before, after)
        elif distance is not None and 0 < distance <= tolerance:
            yield Difference("rounding", path, where, *_shown(before, after), distance)
        else:
            yield Difference("differs", path, where, *_shown(before, after))


INDEX = re.compile(r"\[\d+\]")


def _field(where: str, fields: Sequence[Field]) -> Field | None:
    name = INDEX.sub("", where)
    matching = (row for row in fields if fnmatchcase(name, row.name) or fnmatchcase(name, f"*.{row.name}"))
    return next(matching, None)


NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def _changed_lines(before: Sequence[Value], after: Sequence[Value]) -> tuple[str, str]:
    """The lines that are only before, and those that are only after, with a # for each number: many are measured, and
    those that are results stand in files, too."""
    a, b = ([NUMBER.sub("#", str(line)) for line in lines] for lines in (before, after))
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    changed = [(a[i:j], b[k:m]) for tag, i, j, k, m in blocks if tag != "equal"]
    return "\n".join(chain(*(gone for gone, _ in changed))), "\n".join(chain(*(new for _, new in changed)))


def _is_equal(before: Value, after: Value) -> bool:
    """Types count: 1 and 1.0 are two things in JSON. NaN equals NaN."""
    both_nan = before != before and after != after
    return type(before) is type(after) and (before == after or both_nan)


def _distance(before: Value, after: Value) -> float | None:
    """The largest |b - a| / (1 + |a|) of two numbers or tensors of one shape, all finite; None for anything else."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        formats = {"F32": np.float32, "F64": np.float64}
        if (before.dtype, before.shape) != (after.dtype, after.shape) or before.dtype not in formats:
            return None
        a, b = (np.frombuffer(tensor.data, formats[before.dtype]).astype(float) for tensor in (before, after))
    elif isinstance(before, float) and isinstance(after, float):
        a, b = np.array([before]), np.array([after])
    else:
        return None
    distance = float(np.max(np.abs(b - a) / (1 + np.abs(a)), initial=0.0))
    return distance if np.isfinite(distance) else None


SHOWN_CHARACTERS = 60


def _shown(before: Value, after: Value) -> tuple[str, str]:
    """Both as text, from shortly before the first character that differs."""
    texts = [json.dumps(v, ensure_ascii=False) if isinstance(v, str) else str(v) for v in (before, after)]
    common = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, common - SHOWN_CHARACTERS // 3) if max(map(len, texts)) > SHOWN_CHARACTERS else 0
    return _cut(texts[0], start), _cut(texts[1], start)


def _cut(text: str, start: int) -> str:
    end = start + SHOWN_CHARACTERS
    return f"{'...' if start else ''}{text[start:end]}{'...' if len(text) > end else ''}"
