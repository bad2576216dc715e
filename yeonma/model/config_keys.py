"""A model's config.json for readers of either form.

Transformers 5 writes `rope_parameters` and `dtype`. Readers of the older form want `rope_theta`, `rope_scaling` and
`torch_dtype`, and where these are missing they take defaults without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

CONFIG = "config.json"
NOT_KEPT = frozenset({"_name_or_path", "quantization_config", "compression_config", "transformers_version"})
"""Keys of a published config.json that are not true of weights written anew."""
_INSIDE_ROPE = ("rope_theta", "partial_rotary_factor")
"""Keys that the older form has beside `rope_scaling`, the newer one inside `rope_parameters`."""

KeyPath = tuple[str, ...]
"""Where a value stands in nested objects."""


def add_older_keys(folder: Path, config: Any, published: Mapping[str, Any]) -> None:
    """Adds to the folder's config.json the keys that the `published` one had, and the older form of those that it has.

    `config`: a config of the model's class. A key is left out if transformers would then read another config.
    """
    path = folder / CONFIG
    written = json.loads(path.read_text("utf-8"))
    completed = with_older_keys(written, published, type(config))
    if completed != written:
        path.write_text(json.dumps(completed, ensure_ascii=False, indent=2, sort_keys=True) + "\n", "utf-8")


def with_older_keys(
    written: Mapping[str, Any], published: Mapping[str, Any], config_class: Any
) -> dict[str, Any]:
    """`written` with more keys, which `config_class` reads as the same config."""
    additions = dict(_missing(_older_form(written), written)) | dict(_missing(published, written))
    before = _read(config_class, written)
    completed = _with(written, additions)
    if _read(config_class, completed) == before:
        return completed
    completed = deepcopy(dict(written))
    for key, value in additions.items():
        more = _with(completed, {key: value})
        if _read(config_class, more) == before:
            completed = more
    return completed


def _older_form(written: Mapping[str, Any]) -> dict[str, Any]:
    """What readers of the older form need, also of the configs inside."""
    older: dict[str, Any] = {
        name: _older_form(inner)
        for name, inner in written.items()
        if isinstance(inner, dict) and name.endswith("_config")
    }
    if isinstance(dtype := written.get("dtype"), str):
        older["torch_dtype"] = dtype
    rope = written.get("rope_parameters")
    if not isinstance(rope, dict):
        return older
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        older["rope_local_base_freq"] = local["rope_theta"]
    rope = rope.get("full_attention", rope)
    if not isinstance(rope, dict):  # such layers have no positions
        return older
    older |= {name: rope[name] for name in _INSIDE_ROPE if isinstance(rope.get(name), int | float)}
    return older | _older_scaling(rope)


def _older_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type")
    if kind == "default":
        return {"rope_scaling": None}
    scaling = {name: value for name, value in rope.items() if name not in _INSIDE_ROPE}
    if kind == "longrope":  # Phi-3 refuses any other fields
        del scaling["rope_type"]
        beside = {
            name: scaling.pop(name) for name in ("original_max_position_embeddings",) if name in scaling
        }
        return {**beside, "rope_scaling": {"type": kind, **scaling}}
    return {"rope_scaling": scaling} if isinstance(kind, str) else {}


def _missing(
    wanted: Mapping[str, Any], written: Mapping[str, Any], at: KeyPath = ()
) -> Iterator[tuple[KeyPath, Any]]:
    """The values of `wanted` that are not in `written`."""
    for name, value in wanted.items():
        if name in NOT_KEPT or (name == "torch_dtype" and value != written.get("dtype", value)):
            continue
        if name not in written:
            yield (*at, name), value
        elif isinstance(value, dict) and isinstance(written[name], dict):
            yield from _missing(value, written[name], (*at, name))


def _with(config: Mapping[str, Any], additions: Mapping[KeyPath, Any]) -> dict[str, Any]:
    completed = deepcopy(dict(config))
    for key, value in additions.items():
        inner = completed
        for name in key[:-1]:
            inner = inner[name]
        inner[key[-1]] = deepcopy(value)
    return completed


def _read(config_class: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config that transformers makes of it, without the keys that it does not know; None if it refuses."""
    try:
        read = config_class.from_dict(deepcopy(dict(config)))
        known = config_class().to_dict()
    except Exception:  # a config's code may raise anything
        return None
    return _known(read.to_dict(), known)


def _known(read: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in read.items():
        if name not in known:
            continue
        if isinstance(value, dict) and isinstance(known[name], dict) and name.endswith("_config"):
            value = _known(value, known[name])
        if name == "rope_parameters" and isinstance(
            value, dict
        ):  # its older name for the kind is kept beside
            value = {field: inner for field, inner in value.items() if field != "type"}
        result[name] = value
    return result
