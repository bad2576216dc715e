"""Yeonma: fine-tunes a language model with LoRA on a table of examples and a text template.

For notebooks: `yeonma.sft(base_model=..., data_path=..., output_dir="OUT")`, then
`yeonma.load("OUT").generate({"document": "..."})`. Importing this imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yeonma.data.template import Template
    from yeonma.errors import UserError
    from yeonma.policy import Policy
    from yeonma.train.interrupt import Stopped


__version__ = "0.1.0"
__all__ = ["Loaded", "Policy", "Stopped", "Template", "UserError", "__version__", "dpo", "load", "sft"]

_HOMES = {
    "Policy": "yeonma.policy",
    "Stopped": "yeonma.train.interrupt",
    "Template": "yeonma.data.template",
    "UserError": "yeonma.errors",
}


def sft(**settings: Any) -> Path:
    """Fine-tune on the answers in a table of examples. Keywords are the settings of `yeonma sft`. Returns the adapter
    folder.

    `data_path` and `val_data_path` may also be the rows themselves: a list of dicts, a pandas or polars DataFrame, or a
    `datasets.Dataset`.

    Raises UserError for every mistake that `yeonma sft` reports, and RuntimeError if one of several processes (`nproc`)
    failed. Ctrl-C and `time_limit` save a checkpoint and raise Stopped, a KeyboardInterrupt; the same call resumes the
    run. A second Ctrl-C ends it at once.
    """
    return _train("sft", settings)


def dpo(**settings: Any) -> Path:
    """Fine-tune on preference pairs or labelled answers. Keywords are the settings of `yeonma dpo`. Returns and raises
    as `sft`."""
    return _train("dpo", settings)


def _train(name: str, keywords: dict[str, Any]) -> Path:
    import warnings
    from importlib import import_module

    from yeonma.cli import VERBS
    from yeonma.config.parse import config_from_keywords
    from yeonma.config.settings import RunConfig
    from yeonma.data.python_rows import given
    from yeonma.platforms import check_platform

    check_platform()
    from yeonma.shown import one_line

    verb = VERBS[name]
    with given(keywords) as settings:
        reading = config_from_keywords(RunConfig, settings, groups=verb.groups, defaults=verb.defaults)
        for warning in reading.warnings:
            warnings.warn(one_line(warning), stacklevel=3)
        module, function = verb.run.split(":")
        status = getattr(import_module(module), function)(reading.config, as_command=False)
    if status:
        raise RuntimeError(f"training ended with status {status}")
    return Path(reading.config.run.output_dir).expanduser()


def load(adapter_dir: str | Path, **options: Any) -> Policy:
    """Load an adapter folder and its base model for generation. Options and errors as `yeonma.policy.load_policy`."""
    from yeonma.platforms import check_platform

    check_platform()
    from yeonma.policy import load_policy

    return load_policy(adapter_dir, **options)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    name = {"Loaded": "Policy"}.get(name, name)  # earlier name
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
