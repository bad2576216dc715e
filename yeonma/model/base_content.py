"""The content of a base model: SHA-256 of its weights, config, code, and the end tokens of its generation config.

A model that was moved, or shared out to other files, has the same content. Sums of weight files are kept on disk, so
that a large base is read once on a machine.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from yeonma.errors import Log, UserError, brief
from yeonma.files import default_cache_dir, file_hash
from yeonma.messages import tr
from yeonma.model.source import BaseSource
from yeonma.model.weight_files import file_of, weight_files
from yeonma.model.weight_sums import MODULO, SHA256, WeightSums

SLOW_SECONDS = 3.0
"""After which a line says what takes so long."""
MOST_THREADS = 8
MOST_SHOWN = 5
"""Differences that a message names."""
SHOWN_CHARACTERS = 100
"""Values of a config up to this length are recorded as they are, longer ones as their SHA-256."""
MODEL_TYPE = "model_type"
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash", "use_cache")
"""Keys of a config that change no result: where it lies and what wrote it. The weights have their own number format."""


@dataclass(frozen=True)
class BaseContent:
    """What a base is, wherever it lies. `changes` compares two."""

    weights: dict[str, str]
    """Weight file -> SHA-256."""
    tensors: str
    """Of all tensors by name, number format, shape and bytes, in whatever files they lie; empty if unknown."""
    config: str
    """SHA-256 of config.json."""
    config_values: dict[str, Any]
    """The config as transformers reads it, without VOLATILE keys: values, or `SHA-256 ...` of long ones."""
    eos_token_id: list[int]
    """The tokens that end an answer by generation_config.json; nothing else of that file is used."""
    code: dict[str, str] = field(default_factory=dict)
    """Python file that comes with the model -> SHA-256."""

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def content_of(record: Any) -> BaseContent:
    """The content in a record. Raises ValueError for anything that `BaseContent.record` would not give."""
    try:
        content = BaseContent(**record)
        sums = [*content.weights.values(), *content.code.values(), content.config]
        names = [*content.weights, *content.code, *content.config_values]
        is_valid = (
            all(isinstance(text, str) and SHA256.fullmatch(text) for text in sums)
            and all(isinstance(name, str) for name in names)
            and isinstance(content.tensors, str)
            and all(type(token) is int for token in content.eos_token_id)
            and bool(content.weights)
        )
    except (TypeError, AttributeError) as error:
        raise ValueError(f"no content of a base model ({error})") from error
    if not is_valid:
        raise ValueError("no content of a base model")
    return content


def changes(then: BaseContent, now: BaseContent) -> list[str]:
    """What differs, in words that name the files; nothing for equal contents."""
    found = []
    if then.weights != now.weights and not (then.tensors and then.tensors == now.tensors):
        found += _changed_files(then.weights, now.weights)
    found += config_changes(then, now.config_values, now.config)
    if sorted(then.eos_token_id) != sorted(now.eos_token_id):
        before, after = (_end_tokens(content) for content in (then, now))
        found.append(
            tr(
                "generation_config.json: eos_token_id was {before} and is now {after}",
                before=before,
                after=after,
            )
        )
    return found + _changed_files(then.code, now.code)


def config_changes(then: BaseContent, values: Mapping[str, Any], file_sha256: str = "") -> list[str]:
    """What differs in a config with these values. A file with the recorded SHA-256 has no differences, although another
    version of transformers may read other values from it."""
    if file_sha256 == then.config:
        return []
    keys = sorted({*then.config_values, *values})
    if then.config_values.get(MODEL_TYPE) != values.get(MODEL_TYPE):
        keys = [MODEL_TYPE]  # which explains all others
    return [
        tr(
            "config.json: {key} was {config_values} and is now {values}",
            key=key,
            config_values=_shown(then.config_values, key),
            values=_shown(values, key),
        )
        for key in keys
        if then.config_values.get(key) != values.get(key)
    ]


def listed(found: list[str]) -> str:
    """Differences as part of a sentence."""
    shown = "; ".join(found[:MOST_SHOWN])
    if len(found) <= MOST_SHOWN:
        return shown
    return tr("{names} and {more} more", names=shown, more=len(found) - MOST_SHOWN)


def _changed_files(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    found = []
    for name in sorted({*then, *now}):
        before, after = then.get(name), now.get(name)
        if before is None:
            found.append(tr("{name} is new", name=name))
        elif after is None:
            found.append(tr("{name} is missing", name=name))
        elif before != after:
            found.append(
                tr(
                    "{name} had SHA-256 {before}... and has {after}... now",
                    name=name,
                    before=before[:12],
                    after=after[:12],
                )
            )
    return found


def _end_tokens(content: BaseContent) -> str:
    return ", ".join(map(str, sorted(content.eos_token_id))) or tr("not set")


def _shown(values: Mapping[str, Any], key: str) -> str:
    return (
        brief(json.dumps(values[key], ensure_ascii=False), SHOWN_CHARACTERS)
        if key in values
        else tr("not set")
    )


# Reading


def read_content(
    source: BaseSource,
    config: Any = None,
    *,
    log: Log = lambda _: None,
    cache_dir: Path | None = None,
    trust_cache: bool = True,
) -> BaseContent:
    """The content of a base in a folder or on the hub, from where it is downloaded if it is not here.

    `config`: the base's config, if it has been loaded. `log` gets a line if reading takes long. Sums of files are kept
    in `cache_dir`, by default the user's cache. `trust_cache` False reads every file again, and corrects what is kept.
    Raises UserError if a file is missing, cannot be read or changes meanwhile.
    """
    with reading_content(source, config, cache_dir=cache_dir, trust_cache=trust_cache) as wait:
        return wait(log)


@contextmanager
def reading_content(
    source: BaseSource, config: Any = None, *, cache_dir: Path | None = None, trust_cache: bool = True
) -> Iterator[Callable[[Log], BaseContent]]:
    """Reads a folder's content in other threads, while the block does something else. Yields the function that waits
    for it. A base on the hub is read only then. At the end of the block reading stops."""
    import yeonma.model.load  # noqa: F401 (here, because two threads must not import it at once)

    files = WeightSums(cache_dir or default_cache_dir(), trust_cache)
    results: list[BaseContent | BaseException] = []

    def work() -> None:
        try:
            results.append(_content(source, config, files))
        except BaseException as error:  # raised again by `wait`
            results.append(error)

    thread = threading.Thread(target=work, name="base content", daemon=True)
    if Path(source.name).is_dir():
        thread.start()

    def wait(log: Log) -> BaseContent:
        if not thread.ident:
            weight_files(source)  # downloads them
            thread.start()
        is_slow = False
        while thread.is_alive():
            thread.join(SLOW_SECONDS)  # wakes up for signals
            if thread.is_alive() and files.reading and not is_slow:
                is_slow = True
                log(tr("reading the weights of {source} for their SHA-256", source=source.name))
        if is_slow and files.not_kept:
            log(
                tr(
                    "it cannot be kept in {folder} ({not_kept}): the next command reads them again",
                    folder=files.folder,
                    not_kept=files.not_kept,
                )
            )
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        return result

    try:
        yield wait
    finally:
        files.stopped.set()


def is_here(source: BaseSource) -> bool:
    """Whether the weights need no download."""
    try:
        return bool(weight_files(source, download=False))
    except (UserError, OSError):
        return False


def known_hash(path: Path, cache_dir: Path | None = None) -> str:
    """SHA-256 of a weight file, from `cache_dir`, by default the user's cache, if it is kept there."""
    return WeightSums(cache_dir or default_cache_dir(), trust_cache=True).sums(path).sha256


def config_hash_in(source: BaseSource) -> str:
    """SHA-256 of config.json; empty if there is none."""
    file = file_of(source, "config.json")
    return "" if file is None else file_hash(file)


def config_values(config: Any) -> dict[str, Any]:
    """A config as BaseContent has it."""
    return {key: _short(value) for key, value in sorted(config.to_diff_dict().items()) if key not in VOLATILE}


def _short(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True, default=str)
    short: Any = (
        json.loads(text) if len(text) <= SHOWN_CHARACTERS else f"SHA-256 {sha256(text.encode()).hexdigest()}"
    )
    return short


def _content(source: BaseSource, config: Any, files: WeightSums) -> BaseContent:
    from yeonma.model.load import generation_eos, load_config

    config = load_config(source) if config is None else config
    commit = getattr(config, "_commit_hash", None)
    if commit and not Path(source.name).is_dir():
        source = replace(source, revision=commit)  # what is here is then found without asking the hub
    paths = weight_files(source)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1, len(paths))) as threads:
        sums = list(threads.map(files.sums, paths))
    known = [one.tensors for one in sums if one.tensors is not None]
    tensors = f"{sum(known) % MODULO:064x}" if len(known) == len(sums) else ""
    return BaseContent(
        weights={path.name: one.sha256 for path, one in zip(paths, sums, strict=True)},
        tensors=tensors,
        config=config_hash_in(source),
        config_values=config_values(config),
        eos_token_id=sorted({*generation_eos(source)}),
        code=_code(source, config),
    )


def _code(source: BaseSource, config: Any) -> dict[str, str]:
    """The Python files that a config names and those that they import, of a base whose code may run."""
    from transformers.dynamic_module_utils import get_relative_imports

    classes = getattr(config, "auto_map", None)
    if not source.trust_remote_code or not isinstance(classes, dict):
        return {}
    named = [
        name for value in classes.values() for name in (value if isinstance(value, list | tuple) else [value])
    ]
    own = [str(name).removeprefix(f"{source.name}--") for name in named if name]
    waiting = [name.partition(".")[0] for name in own if "--" not in name]
    found: dict[str, str] = {}
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found and (path := file_of(source, name)) is not None:
            found[name] = file_hash(path)
            waiting += [module.replace(".", "/") for module in get_relative_imports(path)]
    return dict(sorted(found.items()))
