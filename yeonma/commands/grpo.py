"""`yeonma grpo`: learning from rewards of answers that the model draws."""

from __future__ import annotations

from yeonma.commands.sft import train
from yeonma.config.settings import RunConfig


def run(config: RunConfig, *, as_command: bool = True) -> int:
    """Parameters, return value and errors as `yeonma.commands.sft.run`."""
    return train("grpo", config, as_command=as_command)
