"""All targets by name, each imported only where it runs: most need no torch."""

from __future__ import annotations

from importlib import import_module

from tests.fuzz.harness import Target

CASES = {
    "rows": 2500,
    "template": 1500,
    "settings": 1500,
    "row": 500,
    "tokens": 1300,
    "sft": 800,
    "inspect": 500,
    "model": 800,
    "adapter": 600,
}
"""Target -> its cases of 10,000; another number is shared out alike."""

_MODULES = {
    "rows": "texts:ROWS",
    "template": "texts:TEMPLATE",
    "settings": "texts:SETTINGS",
    "row": "texts:ROW",
    "tokens": "whole:TOKENS",
    "sft": "whole:SFT",
    "inspect": "whole:INSPECT",
    "model": "whole:MODEL",
    "adapter": "whole:ADAPTER",
}


def target_of(name: str) -> Target:
    module, found = _MODULES[name].split(":")
    target: Target = getattr(import_module(f"tests.fuzz.{module}"), found)
    return target
