"""`yeonma dpo`: pairs of a chosen and a rejected answer in, an adapter folder out."""

from __future__ import annotations

from collections.abc import Mapping

from yeonma.commands.sft import train


def run(settings: Mapping[type, object], *, as_command: bool = True) -> int:
    """Train in this process, or in the processes that `nproc` asks for. Under torchrun, torchrun's count holds."""
    return train("dpo", settings, as_command=as_command)
