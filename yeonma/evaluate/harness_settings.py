"""The settings of `yeonma eval`, as far as they can be checked before lm-evaluation-harness is imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from yeonma.config.settings import EvalSettings
from yeonma.errors import UserError
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.packages import install


def check_harness() -> None:
    """Raises UserError if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(tr("benchmarks need lm-evaluation-harness"), cure=install("lm_eval"))


def task_names(settings: EvalSettings) -> list[str]:
    """The names in `tasks`, also those within one word as `a,b`, each once. Raises UserError if there are none."""
    names = [name.strip() for word in settings.tasks for name in word.split(",")]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise UserError(tr("no tasks given"), place="--tasks", cure=tr("name one or more tasks"))
    return names


def include_folder(settings: EvalSettings) -> Path | None:
    """The folder of `include_path`. Raises UserError if there is no such folder."""
    if settings.include_path is None:
        return None
    folder = user_path(settings.include_path, "--include_path")
    if not folder.is_dir():
        raise UserError(
            tr("no such folder"),
            place=f"--include_path {settings.include_path}",
            cure=tr("name the folder of your task files (.yaml)"),
        )
    return folder
