"""The environment that a run's bits depend on: processes, threads, processor and library versions.

A run may resume in another environment. Sums are then formed in another order, and the result is equal only to
rounding.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import torch

from yeonma.language import Language, language
from yeonma.messages import later, tr
from yeonma.packages import version_of

WORDS = {
    "processes": later("processes"),
    "threads of a process": later("threads of a process"),
    "device": later("device"),
    "processor": later("processor"),
    "kernels": later("kernels"),
}
"""The entries that are no packages."""
WORDS_OF_KERNELS = {"compiled": later("compiled"), "plain": later("plain"), "none": later("none")}
LANGUAGE = "language"
"""The entry for the language of help, in which the card is written and loss.svg is labelled."""
NAMES_OF_LANGUAGES: dict[Language, str] = {"en": later("English"), "ko": later("Korean")}


def environment(processes: int, device: torch.device) -> dict[str, str | int]:
    """The environment that checkpoints record. Processors are equal if PyTorch picks the same routines."""
    on_gpu = device.type == "cuda"
    return {
        "processes": processes,
        "threads of a process": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        **versions(),
        LANGUAGE: language(),
        **({"triton": version_of("triton") or "none"} if on_gpu else {}),
    }


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers", "peft")}


def environment_change(
    before: Mapping[str, str | int], now: Mapping[str, str | int], dropout: bool
) -> str | None:
    """A line that lists the changes and their effect; None if there are none. Entries that an older checkpoint does not
    record are ignored."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    numbers = [name for name in changed if name != LANGUAGE]
    lines = []
    if numbers:
        changes = ", ".join(
            tr(
                "{name} was {before} and is now {now}",
                name=tr(WORDS[name]) if name in WORDS else name,
                before=_shown(before[name]),
                now=_shown(now[name]),
            )
            for name in numbers
        )
        if dropout and "processes" in numbers:
            line = tr(
                "{changes}: every step has the same rows, but the result equals that of an uninterrupted run only to "
                "rounding; dropout draws other numbers",
                changes=changes,
            )
        else:
            line = tr(
                "{changes}: every step has the same rows, but the result equals that of an uninterrupted run only to "
                "rounding",
                changes=changes,
            )
        lines.append(line)
    if LANGUAGE in changed:
        lines.append(
            tr(
                "the language was {before} and is now {now}: the card is written in the latter",
                before=_name_of_language(before[LANGUAGE]),
                now=_name_of_language(now[LANGUAGE]),
            )
        )
    return "; ".join(lines) or None


def _shown(value: str | int) -> str:
    words = WORDS_OF_KERNELS.get(str(value))
    return str(value) if words is None else tr(words)


def _name_of_language(code: str | int) -> str:
    return next((tr(name) for known, name in NAMES_OF_LANGUAGES.items() if known == code), str(code))
