"""Yeonma: fine-tunes a language model with LoRA on a table of examples and a text template.

For notebooks: `run = yeonma.sft(base_model=..., data_path=..., output_dir="OUT")`, then
`yeonma.generate(run, rows)`. Importing this imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yeonma.policy import Policy


__version__ = "0.1.0"

_CALLS = (
    "compare",
    "dpo",
    "evaluate",
    "export",
    "generate",
    "grpo",
    "inspect",
    "merge",
    "push",
    "sft",
    "verify",
)
_HOMES = {
    **dict.fromkeys(_CALLS, "yeonma.python_api.calls"),
    "Policy": "yeonma.policy",
    "Stopped": "yeonma.train.interrupt",
    "Template": "yeonma.data.template",
    "UserError": "yeonma.errors",
}
"""Name -> the module that it is imported from when it is first used."""
__all__ = ["Loaded", "__version__", "load", *_HOMES]


def load(adapter_dir: str | os.PathLike[str], **options: Any) -> Policy:
    """Load an adapter folder and its base model for generation. Options and errors as `yeonma.policy.load_policy`."""
    from yeonma.platforms import check_platform

    check_platform()
    from yeonma.policy import load_policy

    return load_policy(Path(adapter_dir), **options)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    name = {"Loaded": "Policy"}.get(name, name)  # earlier name
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What completion lists: the public names, without modules and what is imported here."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


class _Package(ModuleType):
    """`evaluate`, `export`, `inspect` and `verify` are folders of modules, too. As attributes they are calls: Python
    would set the folder's module in their place as soon as one of its modules is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _CALLS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
