"""Yeonma: from a table of examples and a text template to a LoRA adapter, with proof of what it was trained on.

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
    """Fine-tune, with the settings of `yeonma sft` as keywords. Returns the adapter folder.

    Raises UserError for every mistake that `yeonma sft` reports, and RuntimeError where one of several processes
    failed (`nproc`). Ctrl-C and `time_limit` end it with a checkpoint and Stopped, which is a KeyboardInterrupt; the
    same call goes on. A second Ctrl-C ends it at once.
    """
    return _train("sft", settings)


def dpo(**settings: Any) -> Path:
    """Learn from pairs, with the settings of `yeonma dpo` as keywords. Returns and raises as `sft`."""
    return _train("dpo", settings)


def _train(name: str, keywords: dict[str, Any]) -> Path:
    import warnings
    from importlib import import_module

    from yeonma.cli import VERBS
    from yeonma.config.parse import config_from_keywords
    from yeonma.config.settings import RunConfig

    verb = VERBS[name]
    reading = config_from_keywords(RunConfig, keywords, groups=verb.groups, defaults=verb.defaults)
    for warning in reading.warnings:
        warnings.warn(warning, stacklevel=3)
    module, function = verb.run.split(":")
    status = getattr(import_module(module), function)(reading.config, as_command=False)
    if status:
        raise RuntimeError(f"training ended with status {status}")
    return Path(reading.config.run.output_dir).expanduser()


def load(adapter_dir: str | Path, **options: Any) -> Policy:
    """An adapter folder on its base model, ready to be asked; options and errors as `yeonma.policy.load_policy`."""
    from yeonma.policy import load_policy

    return load_policy(adapter_dir, **options)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    name = {"Loaded": "Policy"}.get(name, name)  # the name that a policy had before
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
