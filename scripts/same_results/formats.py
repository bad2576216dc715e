"""How the files of a recording are read, and which of their fields are not compared: three tables.

A file is read as a value: what JSON can hold, and tensors. One of no known format is read as its SHA-256.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import yaml

Value = Any
"""None, bool, number, text, list, dict with text keys, or `Tensor`."""


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}, SHA-256 {sha256(self.data).hexdigest()[:8]}"


@dataclass(frozen=True)
class Format:
    """How files are read. Floating-point numbers may differ by `tolerance`, absolute and relative."""

    pattern: str  # of the path in a recording; `*` matches `/` as well
    read: Callable[[Path], Value]
    why: str
    tolerance: float = 0.0


@dataclass(frozen=True)
class Field:
    """A field that is left out of the comparison, or whose words may change. A text must not become empty by that."""

    files: str
    name: str  # dotted, without the indices of lists; its last parts are enough
    kind: Literal["left out", "words"]
    why: str


@dataclass(frozen=True)
class Renamed:
    """A file that versions from before a change wrote under another name."""

    before: str
    after: str
    why: str


def current_name(path: str) -> str:
    """The path that this version would have recorded."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + next((row.after for row in RENAMED if row.before == name), name)


def format_of(path: str) -> Format:
    return next(form for form in FORMATS if fnmatchcase(path, form.pattern))


def fields_of(path: str) -> tuple[Field, ...]:
    return tuple(field for field in FIELDS if fnmatchcase(path, field.files))


def read_bytes(path: Path) -> Value:
    return f"{path.stat().st_size} bytes, SHA-256 {sha256(path.read_bytes()).hexdigest()[:16]}"


def read_presence(path: Path) -> Value:
    return "something" if path.stat().st_size else "nothing"


def read_text(path: Path) -> Value:
    return path.read_bytes().decode()  # to the byte: read_text() would translate line ends


def read_lines(path: Path) -> Value:
    return path.read_text(encoding="utf-8").splitlines()


def read_message(path: Path) -> Value:
    """What a refused command says: that it says something, and the words."""
    lines = read_lines(path)
    return {"is there": any(lines), "words": lines}


def read_json(path: Path) -> Value:
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> Value:
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would part a text at U+2028, too
    return [json.loads(line) for line in lines if line]


def read_answers(path: Path) -> Value:
    """answers.jsonl of `compare`, by model and row."""

    def name(line: dict[str, Any]) -> str:
        return f"{line['model']}, row {line['row']}, {'loss' if 'nll' in line else 'answer'}"

    return {name(line): line for line in read_json_lines(path)}


def read_yaml(path: Path) -> Value:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_tensors(path: Path) -> Value:
    from safetensors import deserialize

    return {
        name: Tensor(tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in deserialize(path.read_bytes())
    }


def read_manifest(path: Path) -> Value:
    """File name -> whether the sum is that of the file."""

    def sum_of(file: Path) -> str | None:
        return sha256(file.read_bytes()).hexdigest() if file.is_file() else None

    sums = read_json(path)["sha256"]
    return {current_name(name): sum_of(path.parent / name) == expected for name, expected in sums.items()}


FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
FENCED = re.compile(r"^(`{3,})\w*\n(.*?)\n?\1$", re.DOTALL | re.MULTILINE)
ANSWER = re.compile(
    r"^(reference|base model|with the adapter|fine-tuned):\n\n(`{3,})text\n(.*?)\n?\2$",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
NEWER_METADATA = ("base_model", "datasets", "language")
"""Keys of a card's front matter that earlier versions wrote otherwise, or not at all."""


def read_card(path: Path) -> Value:
    """The results in a model card: its metadata, the numbers of its tables, and the answers. Prompts and settings stand
    in samples.json and settings.yaml; commands are words."""
    text = path.read_text(encoding="utf-8")
    front_matter = FRONT_MATTER.match(text)
    metadata = (yaml.safe_load(front_matter[1]) if front_matter else None) or {}
    tables = [line for line in FENCED.sub("", text).splitlines() if line.startswith("|")]
    return {
        "metadata": {key: value for key, value in metadata.items() if key not in NEWER_METADATA},
        "tables": [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in tables],
        "answers": [[match[1], match[3]] for match in ANSWER.finditer(text)],
    }


EMBEDDED = re.compile(r'<script type="application/json"[^>]*>(.*?)</script>', re.DOTALL)


def read_page(path: Path) -> Value:
    """The data that the script of a page shows. Its numbers and plots are those of report.json."""
    return [json.loads(data) for data in EMBEDDED.findall(path.read_text(encoding="utf-8"))]


TIED = 1e-3
"""Rewards nearer to each other than this are equal to rounding, and which of them is higher is chance."""


def read_preference_metrics(path: Path) -> Value:
    """metrics.jsonl, without the accuracy where policy and reference are still the same model."""
    lines = read_json_lines(path)
    for line in lines:
        if abs(line["reward_margin"]) < TIED:
            line["reward_accuracy"] = "tied"
    return lines


FIRST_REFERENCE = (
    "the first step's own forward pass used to be its reference; a separate pass differs by rounding"
)
CHANGED_ON_PURPOSE = (
    Format("work/dpo/*metrics.jsonl", read_preference_metrics, FIRST_REFERENCE, 1e-5),
    Format("work/dpo/*.safetensors", read_tensors, FIRST_REFERENCE, 1e-5),
    Format("work/dpo/*state.json", read_json, FIRST_REFERENCE, 1e-5),
    Format("work/dpo/README.md", read_card, f"{FIRST_REFERENCE}; a card has four digits", 1e-4),
    Format("work/dpo-continued/*metrics.jsonl", read_preference_metrics, FIRST_REFERENCE, 1e-5),
    Format("work/dpo-continued/*state.json", read_json, FIRST_REFERENCE, 1e-5),
)
"""Formats and results that a change of the code changes on purpose; they win over FORMATS. Remove a row when no version
from before that change is compared any more."""

RENAMED = (Renamed("loss.png", "loss.svg", "the loss was drawn by matplotlib, and is now an SVG of our own"),)
"""Files that are compared under their new name, on both sides. Remove a row like one of CHANGED_ON_PURPOSE."""

NEWER_FILES = ("log.txt", "sample_answers.json")
"""Files without results that only the newer side has. Remove a name like one of CHANGED_ON_PURPOSE."""

FORMATS = (
    *CHANGED_ON_PURPOSE,
    Format("work/models/*", read_bytes, "what both recordings start from"),
    Format("work/data/*", read_bytes, "likewise"),
    Format("console/mistakes/*.err.words", read_message, "a refusal must come with a message"),
    Format("*.words", read_lines, "what a command prints for people"),
    Format("*.status", read_text, "exit statuses"),
    Format("*/log.txt", read_presence, "what was printed, with times"),
    Format("*.txt", read_text, "answers, and templates"),
    Format(
        "*.safetensors", read_tensors, "names, types, shapes and bytes; their order in the file may change"
    ),
    Format("*/manifest.json", read_manifest, "it lists files that hold times and paths"),
    Format("work/compare/answers.jsonl", read_answers, "the order in which answers come is no result"),
    Format("*.jsonl", read_json_lines, "by fields"),
    Format("*/tokenizer*.json", read_bytes, "written by transformers, read by other tools"),
    Format("*.json", read_json, "by fields"),
    Format("*.yaml", read_yaml, "by fields"),
    Format("*/README.md", read_card, "its words may change"),
    Format("*.html", read_page, "its words and looks may change"),
    Format("*/loss.svg", read_presence, "its looks may change; metrics.jsonl has its numbers"),
    Format("*", read_bytes, "everything else"),
)
"""The first pattern that matches decides."""

FIELDS = (
    Field("*metrics.jsonl", "seconds", "left out", "measured"),
    Field("*metrics.jsonl", "peak_memory_bytes", "left out", "measured"),
    *(
        Field("*metrics.jsonl", name, "left out", "earlier versions did not look for labels")
        for name in ("accuracy", "macro_f1", "confusion")
    ),
    Field("*settings.yaml", "logging_steps", "left out", "its default changed, which is no result"),
    Field("*state.json", "surroundings.language", "left out", "earlier versions had cards in English alone"),
    Field("*.html", "words", "left out", "what the script of a page says"),
    Field("*yeonma.json", "versions.yeonma", "left out", "it is not what the results depend on"),
    Field("*yeonma.json", "base_content", "left out", "earlier versions did not record it"),
    Field("*run.json", "identity.content of the base model", "left out", "likewise"),
    Field("*state.json", "identity.content of the base model", "left out", "likewise"),
    Field("*run.json", "identity.train", "left out", "earlier versions trained adapters alone"),
    Field("*state.json", "identity.train", "left out", "likewise"),
    Field("*settings.yaml", "train", "left out", "likewise"),
    Field("console/inspect/*", "forecast.memory.copies", "left out", "likewise"),
    *(
        Field(pattern, f"{prefix}{name}", "left out", "a setting that earlier versions did not have")
        for pattern, prefix in (
            ("*run.json", "identity."),
            ("*state.json", "identity."),
            ("*settings.yaml", ""),
        )
        for name in ("lora_layers", "exclude_modules", "new_tokens", "modules_to_save", "loraplus_ratio")
    ),
    *(
        Field("*yeonma.json", f"lora.{name}", "left out", "likewise")
        for name in ("layers", "exclude", "new_tokens", "modules_to_save")
    ),
    Field("console/inspect/*", "forecast.adapter.tokens", "left out", "likewise"),
    Field("console/inspect/*", "adapter.tokens", "left out", "likewise"),
    *(
        Field(
            "console/inspect/*",
            f"audit.{part}.answer_labels",
            "left out",
            "earlier versions did not look for labels",
        )
        for part in ("train", "validation", "sets.train", "sets.validation")
    ),
    Field("*report.json", "verdict", "left out", "earlier versions gave none"),
    Field("*report.json", "labels", "left out", "earlier versions did not look for labels"),
    Field("*report.json", "yeonma", "left out", "it is not what the results depend on"),
    Field("*report.json", "made", "left out", "a date"),
    Field(
        "*report.json", "models.identity", "left out", "a hash of adapter_config.json, too, which has a path"
    ),
    Field(
        "work/compare/answers.jsonl", "sft*.key", "left out", "likewise; the keys of the base are compared"
    ),
    Field("*report.*", "judge", "left out", "earlier versions had no judge"),
    Field("*report.*", "rows.columns", "left out", "earlier versions had no votes"),
    Field("*report.html", "id", "left out", "likewise"),
    Field("*report.*", "notes", "words", "remarks on the numbers"),
    Field("*report.*", "metrics.name", "words", "`key` says which it is"),
    Field("*report.*", "metrics.about", "words", "an explanation"),
    Field("*report.*", "models.template_of", "words", "where its template comes from"),
    Field("console/inspect/*", "forecast.time.*", "left out", "measured"),
    Field("console/inspect/*", "forecast.memory.process", "left out", "measured"),
    Field("console/inspect/*", "forecast.memory.loading", "left out", "`process` is in it"),
    Field("console/inspect/*", "forecast.memory.training", "left out", "likewise"),
    Field("console/inspect/*", "forecast.memory.peak", "left out", "likewise"),
    Field("console/inspect/*", "forecast.alternatives.peak_bytes", "left out", "likewise"),
    Field("console/inspect/*", "forecast.alternatives.note", "words", "advice"),
    Field("console/inspect/*", "forecast.alternatives.available", "left out", "it was always true"),
    Field("console/inspect/*", "forecast.alternatives.same_result", "left out", "earlier versions lack it"),
    Field("console/inspect/*", "forecast.combinations", "left out", "likewise"),
    Field("console/inspect/*", "forecast.operator_calls", "left out", "likewise"),
    Field("console/inspect/*", "forecast.weight_bytes_read", "left out", "likewise"),
    Field("console/inspect/*", "verdict", "left out", "free memory is measured"),
    Field("console/inspect/*", "what", "words", "`kind` says which remark it is"),
    Field("console/inspect/*", "audit.warnings", "words", "sentences about the run as a whole"),
    Field("console/inspect/*", "left_out", "words", "why a row has no tokens"),
    Field("console/inspect/*", "reason", "words", "likewise"),
    Field("console/verify/*", "what", "words", "what the folder is"),
    Field("console/verify/*", "remark", "words", "what else lies there"),
    Field("console/verify/*", "findings.check", "words", "the name of a check"),
    Field("console/verify/*", "findings.about", "words", "what it looked at; `outcome` is what it found"),
    Field("console/verify/*", "findings.problems.*", "words", "the problems; their number must be equal"),
    Field("work/serve/*", "id", "left out", "new for each answer"),
    Field("work/serve/*", "created", "left out", "a time"),
    Field("work/serve/*", "error.message", "words", "`code` and `param` say which error it is"),
    Field("console/mistakes/*.err.words", "words", "words", "for people"),
    Field("*.words", "", "words", "for people"),
)
"""The first that matches decides. Every other field must be equal."""
