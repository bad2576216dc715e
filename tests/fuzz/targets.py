"""All targets by name. A target is imported only when it runs: most need no torch."""

from __future__ import annotations

from importlib import import_module

from tests.fuzz.harness import Target

CASES = {
    "rows": 1500,
    "template": 1400,
    "settings": 1500,
    "row": 500,
    "tokens": 1300,
    "sft": 800,
    "inspect": 500,
    "model": 800,
    "adapter": 600,
    "requests": 600,
    "run_folder": 500,
}
"""Target -> its share of 10,000 cases."""

_MODULES = {
    "rows": "texts:ROWS",
    "template": "texts:TEMPLATE",
    "settings": "texts:SETTINGS",
    "row": "texts:ROW",
    "tokens": "end_to_end:TOKENS",
    "sft": "end_to_end:SFT",
    "inspect": "end_to_end:INSPECT",
    "model": "end_to_end:MODEL",
    "adapter": "end_to_end:ADAPTER",
    "requests": "requests:REQUESTS",
    "run_folder": "run_folders:RUN_FOLDER",
}


def target_of(name: str) -> Target:
    module, attribute = _MODULES[name].split(":")
    target: Target = getattr(import_module(f"tests.fuzz.{module}"), attribute)
    return target
