"""The samples that come with Yeonma: `sample:news_en` in the place of a path. They were written for this project."""

from __future__ import annotations

from pathlib import Path

from yeonma.errors import UserError
from yeonma.messages import tr

PREFIX = "sample:"
FOLDER = Path(__file__).parents[1] / "samples"
_DATA, _TEMPLATE = ".jsonl", ".txt"


def sample_data(data_path: str) -> Path | None:
    """The file of a data path that begins with `sample:`; None for any other path. Raises UserError if there is no such
    sample."""
    return _file(data_path, _DATA, tr("no sample with rows has this name"))


def sample_template(setting: str) -> Path | None:
    """The file of a template that is named `sample:...`; None for any other. Raises UserError if there is no such
    sample."""
    return _file(setting, _TEMPLATE, tr("no sample with a template has this name"))


def _file(written: str, ending: str, problem: str) -> Path | None:
    if not written.startswith(PREFIX) or any(character in written for character in "\n{"):
        return None
    names = _names(ending)
    if written in names:
        return FOLDER / f"{written.removeprefix(PREFIX)}{ending}"
    cure = tr(
        "the samples are {names}; a path of your own with this name is ./{written}",
        names=", ".join(names),
        written=written,
    )
    raise UserError(problem, place=written, cure=cure)


def _names(ending: str) -> list[str]:
    return sorted(f"{PREFIX}{path.stem}" for path in FOLDER.glob(f"*{ending}"))
