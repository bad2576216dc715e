"""Names of layers in the settings, checked against the names in the base's weight files before torch is imported.

For most architectures the files name every layer as the model does, but for the head where it is tied. Where they do
not (fused experts, towers), the model without its weights is asked later, by `yeonma.model.targets`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from yeonma.config.layer_ranges import as_ranges, layer_ranges, layers_lacking
from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.messages import tr

TARGETS, EXCLUDED, LAYERS = "lora_target_modules", "exclude_modules", "lora_layers"
ALL_LINEAR = "all-linear"
MODEL_TYPES = frozenset(
    {
        *("cohere", "gemma", "gemma2", "gpt2", "granite", "llama", "mistral", "olmo2"),
        *("phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
    }
)
"""Model types whose files have the model's own names."""
HEAD_NAME = "lm_head"
"""What these models call their head."""
EMBEDDINGS = ("embed_tokens", "wte", "wpe")
NOT_IN_FILES = frozenset({"model", "transformer", "act_fn", "act", "rotary_emb", "dropout"})
"""Modules that the files of such a model may not name: what contains all others, and what has no weights."""


@dataclass(frozen=True)
class LayerNames:
    """What the files of a base name."""

    modules: frozenset[str]
    """The paths of modules with weights, and the head's."""
    leaves: tuple[str, ...]
    """The names of linear layers, in alphabetical order."""
    numbers: tuple[int, ...]
    """Of the layers."""


def names_in_files(folder: Path) -> LayerNames | None:
    """None if the names in the files may not be those of the model, or if the files cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if config["model_type"] not in MODEL_TYPES:
            return None
        shapes = _shapes(folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    linear = {
        path
        for path, kind, dimensions in (
            (*name.rpartition(".")[::2], dimensions) for name, dimensions in shapes.items()
        )
        if kind == "weight" and dimensions == 2 and path.rpartition(".")[2] not in EMBEDDINGS
    }
    modules = {name.rpartition(".")[0] for name in shapes} | {HEAD_NAME}
    parts = (path.split(".") for path in modules)
    numbers = {int(part) for path in parts for part in path if part.isascii() and part.isdigit()}
    leaves = {path.rpartition(".")[2] for path in linear} | {HEAD_NAME}
    return LayerNames(frozenset(modules), tuple(sorted(leaves)), tuple(sorted(numbers)))


def check_layer_names(
    folder: Path,
    targets: Sequence[str] | str,
    excluded: Sequence[str] | str | None,
    layers: Sequence[int] | int | str | None,
) -> None:
    """Raises UserError for names and numbers of layers that a local base certainly does not have. `targets` and the
    others: the settings `lora_target_modules`, `exclude_modules` and `lora_layers`."""
    names = names_in_files(folder)
    if names is None:
        return
    problems = [
        unknown_layer(name, names.leaves, place)
        for place, setting in ((TARGETS, targets), (EXCLUDED, excluded))
        for name in listed(setting)
        if _is_missing(name, names)
    ]
    if layers is not None and (lacking := layers_lacking(layer_ranges(str(layers)), names.numbers)):
        problems.append(missing_layers(lacking, names.numbers))
    if problems:
        raise UserError(problems)


def unknown_layer(name: str, leaves: Sequence[str], place: str) -> Problem:
    """The problem of a name that no layer has."""
    what = tr(
        'no layer of the model is called "{name}"; it has {leaves}', name=name, leaves=", ".join(leaves)
    )
    return Problem(what, place, did_you_mean(name, leaves) or tr("or use all-linear"))


def missing_layers(lacking: Sequence[str], there: Sequence[int]) -> Problem:
    """The problem of numbers that no layer has. `there`: those of the layers."""
    cure = (
        tr("it has the layers {there}", there=as_ranges(there)) if there else tr("it has no numbered layers")
    )
    return Problem(tr("the model has no layers {lacking}", lacking=", ".join(lacking)), LAYERS, cure)


def _is_missing(name: str, names: LayerNames) -> bool:
    """False for what is no plain name: patterns, and paths from the model's beginning, which files may leave out."""
    name = name.strip()
    if not name or name.lower() == ALL_LINEAR or any(char in name for char in "*?["):
        return False
    if NOT_IN_FILES & set(name.split(".")):
        return False
    return not any(f".{name}." in f".{path}." for path in names.modules)


def listed(names: Sequence[str] | str | None) -> list[str]:
    """The names of a setting that takes one or several."""
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _shapes(folder: Path) -> Mapping[str, int]:
    """Every tensor of the files by its name, with the number of its dimensions. Reads headers alone."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole]
    if not whole.is_file():
        files = [
            folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        ]
    shapes: dict[str, int] = {}
    for path in files:
        with safe_open(path, "np") as file:
            shapes |= {name: len(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
