"""`yeonma dpo`: pairs of a chosen and a rejected answer in, an adapter folder out."""

from __future__ import annotations

from yeonma.commands.sft import train
from yeonma.config.settings import RunConfig


def run(config: RunConfig, *, as_command: bool = True) -> int:
    """Train in this process, or in the processes that `nproc` asks for. Under torchrun, torchrun's count holds."""
    return train("dpo", config, as_command=as_command)
