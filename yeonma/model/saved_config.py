"""The files beside the weights of a model that is written anew: config.json, generation_config.json, Python code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from yeonma.model.config_keys import CONFIG, add_older_keys
from yeonma.model.load import load_config
from yeonma.model.source import BaseSource
from yeonma.model.weight_files import file_of

GENERATION = "generation_config.json"


def keep_config_keys(source: BaseSource, folder: Path) -> None:
    """Adds to the config.json written what the base's file had and readers of the older form need."""
    own = file_of(source, CONFIG)
    add_older_keys(folder, load_config(source), {} if own is None else json.loads(own.read_text("utf-8")))


def write_generation_config(source: BaseSource, folder: Path, stop_ids: Sequence[int]) -> None:
    """Writes the base's generation config, if it has one, with the stop tokens of training added to its EOS tokens."""
    path, own = folder / GENERATION, file_of(source, GENERATION)
    content = {} if own is None else json.loads(own.read_text("utf-8"))
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [number for number in stop_ids if number not in ends]
    content["eos_token_id"] = ends if len(ends) != 1 else ends[0]
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def copy_code(source: BaseSource, folder: Path) -> None:
    """Copies the Python code of a local base, which its config refers to."""
    for path in sorted(Path(source.name).glob("*.py")) if Path(source.name).is_dir() else ():
        shutil.copyfile(path, folder / path.name)
